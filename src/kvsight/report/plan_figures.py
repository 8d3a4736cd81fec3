"""Where a plan's bits go: maps, damage and spectra."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from kvsight.records import Row
from kvsight.report.drawing import NARROW, canvas, plain
from kvsight.report.theme import LIGHT

_SIDES = (("k", "keys"), ("v", "values"))


def bits_figure(row: Row, width: float) -> Figure:
    layers = sorted({r["layer"] for r in row["rows"]})
    heads = sorted({r["head"] for r in row["rows"]})
    values = {(r["side"], r["layer"], r["head"]): r["true_bits"] for r in row["rows"]}
    limits = min(values.values()), max(values.values())
    cell = width / (len(layers) + 2)
    figure = canvas(width, 0.9 + 2 * len(heads) * min(0.34, max(0.14, cell)))
    for axes, (side, name) in zip(figure.subplots(2, 1, sharex=True), _SIDES, strict=True):
        grid = [[values.get((side, layer, head), math.nan) for layer in layers] for head in heads]
        mesh = axes.pcolormesh(grid, cmap="viridis", vmin=limits[0], vmax=limits[1], rasterized=False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        axes.set_title(f"bits of {name}")
        axes.set_ylabel("head")
        _cell_ticks(axes, len(layers), len(heads), layers, heads, cell)
        if cell > 0.24:
            _write_cells(axes, grid, limits)
    axes.set_xlabel("layer")
    if cell <= 0.24:
        bar = figure.colorbar(mesh, ax=figure.axes, aspect=30, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def _cell_ticks(
    axes: Axes, width: int, height: int, layers: Sequence[int], heads: Sequence[int], cell: float
) -> None:
    every = max(1, math.ceil(0.16 / cell))
    axes.set_xticks([i + 0.5 for i in range(0, width, every)], [str(i) for i in layers[::every]])
    axes.set_yticks([i + 0.5 for i in range(0, height, every)], [str(i) for i in heads[::every]])
    axes.tick_params(length=0)


def _write_cells(axes: Axes, grid: Sequence[Sequence[float]], limits: tuple[float, float]) -> None:
    middle = sum(limits) / 2
    for y, line in enumerate(grid):
        for x, bits in enumerate(line):
            if not math.isnan(bits):
                colour = "white" if bits < middle else "black"
                axes.text(
                    x + 0.5, y + 0.5, f"{bits:.1f}", ha="center", va="center", color=colour, fontsize=7
                )


def damage_figure(row: Row, width: float) -> Figure:
    figure = canvas(width, 2.4)
    axes = figure.subplots()
    for offset, (side, name) in zip((-0.2, 0.2), _SIDES, strict=True):
        rows = [r for r in row["rows"] if r["side"] == side]
        colour = LIGHT["key"] if side == "k" else LIGHT["value"]
        axes.bar(
            [r["layer"] + offset for r in rows], [r["kl"] for r in rows], 0.38, color=colour, label=name
        )
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16 if width > NARROW else 8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("layer")
    axes.set_title("share of the final KL, nats per token", color=LIGHT["muted"])
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def chosen_heads(rows: Sequence[Row]) -> list[Row]:
    """The heads with the most and the fewest bits, of keys and of values."""
    coded = [row for row in rows if row["widths"]]
    out: list[Row] = []
    for side, _ in _SIDES:
        ordered = sorted((row for row in coded if row["side"] == side), key=lambda row: sum(row["widths"]))
        out += [ordered[-1], ordered[0]] if len(ordered) > 1 else ordered
    return out


def spectra_figure(row: Row, width: float) -> Figure:
    heads = chosen_heads(row["rows"])
    columns = 4 if width > NARROW else 2
    lines = math.ceil(len(heads) / columns)
    figure = canvas(width, 3.1 * lines + 0.3)
    parts = figure.subfigures(lines, columns, squeeze=False).flatten()
    for i, (part, head) in enumerate(zip(parts, heads, strict=False)):
        _head(part, head, first=i % columns == 0)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3 if width > NARROW else 2)
    return figure


def _head(part: Any, head: Row, *, first: bool) -> None:
    above, below = part.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    order = sorted(range(len(head["lambda"])), key=lambda i: -head["lambda"][i])
    curves = (
        ("cost of an error", head["metric"], LIGHT["other3"], 1.1),
        ("variance", head["covariance"], LIGHT["other2"], 1.1),
        ("λ: both together", [head["lambda"][i] for i in order], LIGHT["ink"], 1.8),
    )
    for name, values, colour, thick in curves:
        top = max(values, default=0) or 1
        shares = [max(value, 0) / top or math.nan for value in values]
        above.plot(shares, color=colour, linewidth=thick, label=name)
    above.set_yscale("log")
    above.set_ylim(1e-6, 2)
    above.set_yticks([1, 1e-2, 1e-4, 1e-6], ["1", "10⁻²", "10⁻⁴", "10⁻⁶"])
    above.yaxis.set_minor_locator(NullLocator())
    side = "K" if head["side"] == "k" else "V"
    bits = sum(head["widths"]) / len(head["widths"])
    above.set_title(f"{side}, layer {head['layer']}, head {head['head']}\n{bits:.1f} bits", fontsize=8)
    widths = [head["widths"][i] for i in order]
    colour = LIGHT["key"] if head["side"] == "k" else LIGHT["value"]
    below.stairs(widths, fill=True, color=colour)
    below.set_ylim(0, 8.4)
    below.set_yticks([0, 4, 8])
    below.set_xlabel("coordinate")
    if first:
        above.set_ylabel("share of the largest")
        below.set_ylabel("bits")

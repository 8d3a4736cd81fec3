"""KL against stored bits."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvsight.records import Row
from kvsight.report.contents import Contents, frontier, series
from kvsight.report.drawing import NARROW, canvas, plain
from kvsight.report.theme import LIGHT, colours


def frontier_figure(found: Contents, width: float) -> Figure:
    figure = canvas(width, 4.2 if width > NARROW else 4.0)
    axes = figure.subplots()
    # an exact arm has no place on a log scale
    arms = [row for row in found.arms if row["kl"]["mean"] > 0]
    names = list(dict.fromkeys(series(row) for row in arms))
    ours = [name for name in names if any(row["ours"] for row in arms if series(row) == name)]
    palette = colours(names, ours)
    labels = []
    for name in names:
        rows = sorted((row for row in arms if series(row) == name), key=lambda row: row["true_bits"])
        strong = name in ours
        _curve(axes, rows, palette[name], strong)
        labels.append((rows[-1]["true_bits"], rows[-1]["kl"]["mean"], name, palette[name], strong))
    best = frontier(arms)
    axes.plot(
        [row["true_bits"] for row in best],
        [row["kl"]["mean"] for row in best],
        linestyle="none",
        marker="D",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=LIGHT["ink"],
        markeredgewidth=0.9,
        zorder=5,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("stored bits per number")
    axes.set_title("KL against the uncompressed model, nats per token", color=LIGHT["muted"])
    _label_ends(axes, labels, figure.get_figheight())
    return figure


def _curve(axes: Axes, rows: Sequence[Row], colour: str, strong: bool) -> None:
    mean = [row["kl"]["mean"] for row in rows]
    low = [m if row["kl"]["low"] is None else row["kl"]["low"] for m, row in zip(mean, rows, strict=True)]
    high = [
        m if row["kl"]["high"] is None else row["kl"]["high"] for m, row in zip(mean, rows, strict=True)
    ]
    # the interval of a KL may end at 0, which a log scale does not have
    below = [m - max(at, m / 30) for m, at in zip(mean, low, strict=True)]
    above = [at - m for m, at in zip(mean, high, strict=True)]
    axes.errorbar(
        [row["true_bits"] for row in rows],
        mean,
        yerr=(below, above),
        color=colour,
        linestyle="--" if rows[0]["external"] else "-",
        linewidth=2.6 if strong else 1.1,
        marker="o",
        markersize=5 if strong else 3.2,
        elinewidth=1.0,
        capsize=2,
        zorder=4 if strong else 3,
    )


def _label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str, bool]], height: float) -> None:
    """Names at the right ends of curves, pushed apart where they would overlap."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    step = 0.155 / (height - 0.9) * (high - low)
    right = axes.get_xlim()[1]
    ordered = sorted(labels, key=lambda label: -label[1])
    heights: list[float] = []
    for _, y, *_ in ordered:
        heights.append(min(math.log10(y), heights[-1] - step if heights else high))
    lift = max(0.0, low - min(heights, default=low))
    for (x, y, name, colour, strong), at in zip(ordered, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(right, 10 ** (at + lift)),
            color=colour,
            fontsize=9 if strong else 8,
            fontweight="bold" if strong else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "linestyle": ":",
                "shrinkA": 1,
            },
        )
    axes.set_xlim(right=right)

"""What was measured at run time: tasks by place, decoding by context."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from kvsight.records import Row
from kvsight.report.contents import UNCOMPRESSED, Contents
from kvsight.report.drawing import NARROW, canvas
from kvsight.report.theme import LIGHT, colours
from kvsight.report.words import number

_PLACES: Mapping[str, tuple[str, str]] = {
    "positions": ("to", "position in the context"),
    "distances": ("distance", "distance, tokens"),
    "lengths": ("tokens", "tokens generated"),
}


def places(row: Row) -> list[Row]:
    """A task's figures by position, distance or length; empty where it has none."""
    return next((row["detail"][name] for name in _PLACES if row["detail"].get(name)), [])


def _palette(found: Contents) -> dict[str, str]:
    """One colour for an arm in all figures."""
    arms = found.run_arms
    return {**colours(arms, arms[:1]), UNCOMPRESSED: LIGHT["muted"]}


def tasks_figure(found: Contents, width: float) -> Figure:
    rows = [row for row in found.tasks if places(row)]
    names = list(dict.fromkeys(row["task"] for row in rows))
    palette = _palette(found)
    columns = min(len(names), 3 if width > NARROW else 1)
    lines = math.ceil(len(names) / columns)
    figure = canvas(width, 2.2 * lines + 0.3)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, task in zip(panels, names, strict=False):
        for row in (row for row in rows if row["task"] == task):
            _by_place(axes, row, palette[row["arm"]])
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles = {label: h for ax in panels for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=6 if width > NARROW else 2
    )
    return figure


def _by_place(axes: Axes, row: Row, colour: str) -> None:
    kind = next(name for name in _PLACES if row["detail"].get(name))
    at, label = _PLACES[kind]
    parts = row["detail"][kind]
    plain = row["arm"] == UNCOMPRESSED
    axes.plot(
        [part[at] for part in parts],
        [part[row["metric"]] for part in parts],
        color=colour,
        linestyle="--" if plain else "-",
        linewidth=1.3,
        marker="o",
        markersize=3,
        label=row["arm"],
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"{row['task']}: {row['metric']}", color=LIGHT["muted"])
    axes.set_xlabel(label)


def speed_figure(found: Contents, width: float) -> Figure:
    figure = canvas(width, 2.8)
    axes = figure.subplots()
    arms = list(dict.fromkeys(row["arm"] for row in found.speed))
    palette = _palette(found)
    for arm in arms:
        rows = sorted((row for row in found.speed if row["arm"] == arm), key=lambda row: row["tokens"])
        figures = [row["decode_ms_per_token"] for row in rows]
        axes.errorbar(
            [row["tokens"] for row in rows],
            [f["median"] for f in figures],
            yerr=([f["median"] - f["low"] for f in figures], [f["high"] - f["median"] for f in figures]),
            color=palette[arm],
            linestyle="--" if arm == UNCOMPRESSED else "-",
            marker="o",
            markersize=4,
            capsize=2,
            label=arm,
        )
    lengths = sorted({row["tokens"] for row in found.speed})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y, 2) if y else "0"))
    axes.set_xlabel("context, tokens")
    axes.set_title("one decoding step, ms", color=LIGHT["muted"])
    figure.legend(loc="outside upper left", ncols=6 if width > NARROW else 2)
    return figure

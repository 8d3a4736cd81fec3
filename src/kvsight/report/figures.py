"""The page's figures: each a function of records and a width, drawn once wide and once narrow."""

from functools import partial

from kvsight.report.contents import Contents
from kvsight.report.drawing import Drawing
from kvsight.report.plan_figures import bits_figure, damage_figure, spectra_figure
from kvsight.report.quality_figure import frontier_figure
from kvsight.report.run_figures import places, speed_figure, tasks_figure


def drawings(found: Contents) -> list[Drawing]:
    """Every figure that the records allow."""
    bits, damage, spectra = (found.of_shown(rows) for rows in (found.bits, found.damage, found.spectra))
    out: list[Drawing] = []
    if found.arms:
        out.append(Drawing("frontier", "KL against stored bits", partial(frontier_figure, found)))
    if bits is not None:
        out.append(Drawing("bits", "stored bits by layer, head and side", partial(bits_figure, bits)))
    if damage is not None:
        out.append(Drawing("damage", "damage by layer and side", partial(damage_figure, damage)))
    if spectra is not None:
        out.append(Drawing("spectra", "spectra and widths by head", partial(spectra_figure, spectra)))
    if any(places(row) for row in found.tasks):
        out.append(Drawing("tasks", "task metrics by position or distance", partial(tasks_figure, found)))
    if found.speed:
        out.append(Drawing("speed", "decode time by context", partial(speed_figure, found)))
    return out

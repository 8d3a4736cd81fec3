"""Long-context perplexity: windows as long as the model reads, sliding by half over whole texts."""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, arange, cat, int64, tensor

from kvsight.eval.tasks.arms import Arm, Scores, score
from kvsight.eval.tasks.base import Part, Sample, Setting, Task
from kvsight.eval.tasks.tokens import lead, source_ids, spread

# the first range of positions ends here, every other one is as long as all before it
_FIRST_RANGE = 64


@dataclass(frozen=True, eq=False)
class Window:
    """Ids [T]; tokens from ``scored`` on count for the metric."""

    id: str
    ids: Tensor
    scored: int


def _prepare(setting: Setting, count: int) -> tuple[Window, ...]:
    """Windows spread evenly over all windows of all texts; no window crosses from text to text.

    Each counts only its second half, so that every token counts once and has half a window before it.
    """
    first = tensor(lead(setting.tokenizer), dtype=int64)
    length = setting.length - len(first)
    stride = max(1, length // 2)
    found = []
    for source in setting.texts:
        ids = source_ids(setting.tokenizer, source, length)
        found += [(source.name, ids, start) for start in range(0, len(ids) - length + 1, stride)]
    chosen = [found[i] for i in spread(count, len(found))]
    return tuple(
        Window(f"{name}:{start}", cat([first, ids[start : start + length]]), setting.length - stride)
        for name, ids, start in chosen
    )


def _measure(arm: Arm, window: Window) -> tuple[Sample, ...]:
    scores = score(arm, window.ids)
    value = scores.mean_loss(arange(window.scored, len(window.ids)))
    ranges = pairwise(edges(len(window.ids)))
    return (Sample(window.id, value, parts=tuple(_part(scores, *ends) for ends in ranges)),)


def _part(scores: Scores, start: int, stop: int) -> Part:
    return Part({"from": start, "to": stop}, stop - start, {"loss": scores.mean_loss(arange(start, stop))})


def edges(length: int) -> list[int]:
    """Where ranges of positions begin and end: 1, 64, 128, 256, ... up to the length."""
    out = [1]
    edge = _FIRST_RANGE
    while edge < length:
        out.append(edge)
        edge *= 2
    return [*out, length]


TASK = Task(
    name="books",
    metric="loss",
    higher_is_better=False,
    least=0.0,
    most=math.inf,
    samples=6,
    uses=("texts", "length"),
    prepare=_prepare,
    measure=_measure,
    places="positions",
)

"""Probes of what a model finds again in its context: something shown, other text, then asked for.

One sequence asks at all distances, nested like brackets: what is shown first is asked for last, so that
one pass over the longest distance measures every shorter one on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from torch import Tensor, tensor

from kvsight.errors import KVSightError
from kvsight.eval.tasks.arms import Arm, score
from kvsight.eval.tasks.base import Part, Sample, Setting, Task
from kvsight.eval.tasks.tokens import lead, source_ids

# tokens between what is shown and its question; each holds the shorter ones with their questions
_DISTANCES = (64, 384, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Block:
    """What is shown, what is asked later, and which tokens of the question are scored."""

    shown: list[int]
    asked: list[int]
    scored: list[int]


@dataclass(frozen=True, eq=False)
class Probe:
    """Ids [T], and per distance the positions that are scored."""

    id: str
    ids: Tensor
    scored: tuple[tuple[int, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Material:
    """The running text [n] that fills a probe, and the random numbers of one sample."""

    tokenizer: Any
    text: str
    ids: list[int]
    random: Random


def probe_task(name: str, make: Callable[[Material], Block]) -> Task:
    """The task of asking for blocks that ``make`` draws."""
    return Task(
        name=name,
        metric="accuracy",
        higher_is_better=True,
        least=0.0,
        most=1.0,
        samples=8,
        uses=("texts", "length"),
        prepare=partial(_prepare, name, make),
        measure=_measure,
        places="distances",
    )


def _prepare(
    name: str, make: Callable[[Material], Block], setting: Setting, count: int
) -> tuple[Probe, ...]:
    """``count`` probes; each sample's random numbers are drawn from its own fixed seed."""
    source = setting.texts[0]
    ids = source_ids(setting.tokenizer, source, 512).tolist()
    probes = []
    for i in range(count):
        material = Material(setting.tokenizer, source.text, ids, Random(f"{name} {i}"))
        probes.append(_nested(str(i), material, make, lead(setting.tokenizer), setting.length))
    return tuple(probes)


def _measure(arm: Arm, probe: Probe) -> tuple[Sample, ...]:
    """Accuracy over all scored tokens, teacher-forced; by distance in the parts."""
    scores = score(arm, probe.ids)
    parts = tuple(
        Part(
            {"distance": distance},
            len(positions),
            {"accuracy": scores.accuracy(positions), "loss": scores.mean_loss(positions)},
        )
        for distance, positions in probe.scored
    )
    total = sum(part.count for part in parts)
    accuracy, loss = (
        sum(part.count * part.means[name] for part in parts) / total for name in ("accuracy", "loss")
    )
    return (Sample(probe.id, accuracy, {"loss": loss}, parts),)


def filler(material: Material, count: int) -> list[int]:
    """Consecutive tokens from a random place of the text, from its start again where it ends."""
    start = material.random.randrange(len(material.ids))
    out: list[int] = []
    while len(out) < count:
        out += material.ids[start : start + count - len(out)]
        start = 0
    return out


def _nested(
    name: str, material: Material, make: Callable[[Material], Block], first: list[int], length: int
) -> Probe:
    inner: list[int] = []
    scored: list[tuple[int, list[int]]] = []
    for distance in _DISTANCES:
        block = make(material)
        slack = distance - len(inner)
        if len(first) + len(block.shown) + distance + len(block.asked) > length:
            break
        if slack < 0:
            raise KVSightError(
                f"what a probe shows and asks takes {len(inner)} of this tokenizer's tokens, more than the "
                f"distance of {distance}; leave out the task."
            )
        before = filler(material, slack // 2)
        after = filler(material, slack - slack // 2)
        shift = len(block.shown) + len(before)
        scored = [(d, [p + shift for p in at]) for d, at in scored]
        asked = len(block.shown) + distance
        scored.append((distance, [asked + p for p in block.scored]))
        inner = [*block.shown, *before, *inner, *after, *block.asked]
    if not scored:
        raise KVSightError(
            f"probes need contexts of about {_DISTANCES[0] + 160} tokens; this run has {length}. "
            "Raise --length, or leave out the tasks induction, copy and recall."
        )
    shift = len(first)
    return Probe(
        name,
        tensor([*first, *inner]),
        tuple((distance, tensor([p + shift for p in at])) for distance, at in scored),
    )

"""Continuation: would the packed cache have said the same, token by token, as its errors pile up?

The uncompressed model continues a prompt greedily. An arm then reads the same continuation one token at
a time through its own cache, so that every token is appended and read as in generation, and its top token
is compared with the next one. Up to the first difference that is exactly what greedy generation with the
arm does: the tokens until then are the length of the common trajectory.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, stack, tensor

from kvsight.errors import KVSightError
from kvsight.eval.arms import UNCOMPRESSED
from kvsight.eval.tasks.arms import Arm, check_read
from kvsight.eval.tasks.base import Part, Sample, Setting, Task
from kvsight.eval.tasks.tokens import lead, source_ids, spread

_PROMPT = 64
_LENGTHS = (128, 256, 512, 1024)


@dataclass(frozen=True, eq=False)
class Continued:
    """Prompts [B, P] and what the uncompressed model says next, greedily [B, N]."""

    prompts: Tensor
    tokens: Tensor


def _prepare(setting: Setting, count: int) -> tuple[Continued, ...]:
    """Prompts spread evenly over the texts, all continued in one batch; an end token is a token."""
    generated = min(setting.generated, setting.length - _PROMPT)
    if generated < 1:
        raise KVSightError(
            f"continuation takes prompts of {_PROMPT} tokens; contexts have {setting.length}. "
            "Raise --length, or leave out the task."
        )
    first = lead(setting.tokenizer)
    room = _PROMPT - len(first)
    found = []
    for source in setting.texts:
        ids = source_ids(setting.tokenizer, source, room)
        found += [tensor([*first, *ids[at : at + room]]) for at in range(0, len(ids) - room + 1, room)]
    prompts = stack([found[i] for i in spread(count, len(found))]).to(setting.model.device)
    return (Continued(prompts, _greedy(Arm(UNCOMPRESSED, setting.model), prompts, generated)),)


def _greedy(arm: Arm, prompts: Tensor, count: int) -> Tensor:
    """Top tokens [B, count], each read before the next is chosen."""
    cache, out = arm.cache(), []
    with arm.reading():
        read = prompts
        for _ in range(count):
            read = arm.step(read, cache)[:, -1].argmax(-1, keepdim=True)
            out.append(read)
    return torch.cat(out, 1)


def _measure(arm: Arm, item: Continued) -> tuple[Sample, ...]:
    cache, same = arm.cache(), []
    read = item.prompts
    for i in range(item.tokens.shape[1]):
        top = arm.step(read, cache)[:, -1].argmax(-1)
        same.append(top == item.tokens[:, i])
        read = item.tokens[:, i : i + 1]
    check_read(cache)
    return tuple(_sample(str(i), row) for i, row in enumerate(stack(same, 1).cpu()))


def _sample(name: str, same: Tensor) -> Sample:
    """Agreement over a whole continuation [N], and by how far it has gone."""
    count = len(same)
    ends = [0, *(length for length in _LENGTHS if length < count), count]
    parts = tuple(
        Part({"tokens": stop}, stop - start, {"agreement": float(same[start:stop].double().mean())})
        for start, stop in pairwise(ends)
    )
    until = count if bool(same.all()) else int(same.int().argmin())
    return Sample(name, float(same.double().mean()), {"divergence": float(until)}, parts)


TASK = Task(
    name="continuation",
    metric="agreement",
    higher_is_better=True,
    least=0.0,
    most=1.0,
    samples=8,
    uses=("texts", "length", "generated"),
    prepare=_prepare,
    measure=_measure,
    places="lengths",
)

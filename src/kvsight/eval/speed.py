"""Time of prefill, of coding, and of decoding one token, packed against uncompressed, in alternation."""

import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvsight.eval.caches import Arm, LayerShape, draw


@dataclass(frozen=True)
class Spread:
    """Median of ``n`` runs, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one arm at one context: reading the prompt, the cache's share in that (``encode``),
    and one decoding step behind it."""

    prefill: Spread
    encode: Spread
    decode: Spread


@dataclass(frozen=True)
class Runs:
    """How often: whole prompts, and decoding steps."""

    prompts: int = 3
    steps: int = 32


def spread(seconds: Sequence[float]) -> Spread:
    """In milliseconds."""
    ordered = sorted(1e3 * s for s in seconds)
    tenth = len(ordered) // 10
    return Spread(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def timings(
    model: PreTrainedModel,
    arms: Sequence[Arm],
    shapes: Sequence[LayerShape],
    ids: Tensor,
    runs: Runs,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Each arm's times by name, arms taking turns so that a drift of the machine hits all of them.

    Args:
        ids: LongTensor [B, T + runs.steps]: a prompt of T tokens and the tokens of the decoding steps.
    """
    prompt, rest = ids[:, : -runs.steps], ids[:, -runs.steps :]
    numbers = draw(shapes, prompt.shape[1], len(ids), model.dtype, model.device)
    prefill: dict[str, list[float]] = {arm.name: [] for arm in arms}
    encode: dict[str, list[float]] = {arm.name: [] for arm in arms}
    decode: dict[str, list[float]] = {arm.name: [] for arm in arms}
    caches: dict[str, Cache] = {}
    total, done = runs.prompts * len(arms) + runs.steps, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with torch.inference_mode():
        for arm in arms:
            # the first call of a model pays for what later ones find ready
            _read(model, arm, arm.cache(model.config), prompt[:, :16])
        for _ in range(runs.prompts):
            for arm in arms:
                coding = partial(_update, arm.cache(model.config), shapes, numbers)
                encode[arm.name].append(_seconds(coding, model.device))
                caches[arm.name] = arm.cache(model.config)
                prefill[arm.name].append(_read(model, arm, caches[arm.name], prompt))
                step()
        for column in rest.split(1, dim=1):
            for arm in arms:
                decode[arm.name].append(_read(model, arm, caches[arm.name], column))
            step()
    return {
        arm.name: Timing(spread(prefill[arm.name]), spread(encode[arm.name]), spread(decode[arm.name]))
        for arm in arms
    }


def break_even(stock: Mapping[int, float], packed: Mapping[int, float]) -> int | None:
    """The shortest measured context from which on packed decoding is no slower; None if there is none."""
    found = None
    for tokens in sorted(stock.keys() & packed.keys(), reverse=True):
        if packed[tokens] > stock[tokens]:
            break
        found = tokens
    return found


def _read(model: PreTrainedModel, arm: Arm, cache: Cache, ids: Tensor) -> float:
    # logits of a whole prompt would outweigh what is measured; not every model can leave them out
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if last_only else {}
    with arm.attention(model):
        return _seconds(partial(model, ids, past_key_values=cache, use_cache=True, **options), model.device)


def _update(cache: Cache, shapes: Sequence[LayerShape], numbers: Iterable[tuple[Tensor, Tensor]]) -> None:
    for shape, (key, value) in zip(shapes, numbers, strict=True):
        cache.update(key, value, shape.index)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    # CUDA returns before the work is done
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What encoding and decoding cost, apart from the model."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvsight.plan import SIDES, Plan, side_block

_REPEATS = 3
KeysValues = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Job:
    """Something to encode, x [B, H, T, d], and by what."""

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Any]
    x: Tensor


def keys_values(model: PreTrainedModel, ids: Tensor) -> KeysValues:
    """What every layer caches of ids [B, T]: keys and values [B, H, T, d] by index of the layer."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids.to(model.device), past_key_values=cache, use_cache=True)
    # layers of another kind keep no keys and values
    found = ((i, getattr(x, "keys", None), getattr(x, "values", None)) for i, x in enumerate(cache.layers))
    return {i: (k, v) for i, k, v in found if k is not None and v is not None}


def plan_jobs(plan: Plan, seen: KeysValues) -> Iterator[Job]:
    """Every placement's share of ``seen``, cut to whole blocks."""
    for layer in plan.layers:
        for side, x in zip(SIDES, seen[layer.index], strict=True):
            block = side_block(layer.side(side))
            whole = x.shape[2] // block * block
            for placement in layer.side(side):
                codec = placement.codec.to(x.device)
                mine = x[:, list(placement.heads), :whole].contiguous()
                yield Job(codec.encode, codec.decode, mine)


def times(jobs: Sequence[Job]) -> tuple[float | None, float | None]:
    """Microseconds per token for encoding and for decoding all jobs, medians of a few repeats.

    None where there is not one whole block to time.
    """
    if not jobs or any(job.x.shape[2] == 0 for job in jobs):
        return None, None
    encode: list[float] = []
    decode: list[float] = []
    for _ in range(_REPEATS):
        encode.append(0.0)
        decode.append(0.0)
        for job in jobs:
            share = 1e6 / (job.x.shape[0] * job.x.shape[2])
            coded, seconds = _timed(job.encode, job.x)
            encode[-1] += share * seconds
            decode[-1] += share * _timed(job.decode, coded, job.x.device)[1]
    return statistics.median(encode), statistics.median(decode)


def _timed(act: Callable[[Any], Any], x: Any, device: torch.device | None = None) -> tuple[Any, float]:
    device = x.device if device is None else device
    _wait(device)
    start = time.perf_counter()
    with torch.inference_mode():
        out = act(x)
    _wait(device)
    return out, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

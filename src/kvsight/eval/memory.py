"""What caches take in memory, and how much fits into a budget: all of it really allocated.

Caches are filled with random keys and values, without the model: bytes do not depend on the numbers.
"""

import copy
import ctypes
import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Cache, PreTrainedConfig

from kvsight.eval.caches import Arm, LayerShape, fill, held_bytes

_STATM = Path("/proc/self/statm")
# contexts are searched in these steps, so that no format's block is cut
CONTEXT_GRAIN = 64
_LEAP = 7


@dataclass(frozen=True)
class Place:
    """Where caches are measured: the model's config and cached layers, and the device."""

    config: PreTrainedConfig
    shapes: tuple[LayerShape, ...]
    device: torch.device


@dataclass(frozen=True)
class Footprint:
    """Bytes: of the cache's tensors, of the allocator's peak while it filled (CUDA only, else None), and
    by which the process grew (Linux only, else None; on CUDA host memory, so nearly nothing)."""

    cache_bytes: int
    allocator_peak: int | None
    resident_bytes: int | None


def footprint(arm: Arm, place: Place, tokens: int, batch: int) -> Footprint:
    """Fill a fresh cache with BF16 numbers and see what it took."""
    # what the first use of a codec leaves behind is not the cache's
    fill(arm.cache(place.config), place.shapes, CONTEXT_GRAIN, 1, place.device)
    cache = arm.cache(place.config)
    resident_before = resident_bytes()
    allocated_before = _restart_peak(place.device)
    fill(cache, place.shapes, tokens, batch, place.device)
    peak = None if allocated_before is None else torch.cuda.max_memory_allocated(place.device)
    resident = resident_bytes()
    return Footprint(
        held_bytes(cache),
        None if peak is None or allocated_before is None else peak - allocated_before,
        None if resident is None or resident_before is None else resident - resident_before,
    )


def resident_bytes() -> int | None:
    """Bytes of this process in memory, once the heap's free pages went back to the system (Linux)."""
    if not _STATM.is_file():
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def _restart_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def longest_context(
    arm: Arm, place: Place, budget: int, progress: Callable[[int], None] | None = None
) -> int | None:
    """Tokens of one sequence within ``budget`` bytes, in steps of 64; 64 more are over it.

    None where the bytes stop growing: a model of sliding windows alone holds any length. Takes up to
    three times the budget in memory, and the time of coding that many tokens once.
    """
    held, length = arm.cache(place.config), 0

    def measure(tokens: int) -> int:
        nonlocal held, length
        trial = copy.deepcopy(held)
        fill(trial, place.shapes, tokens - length, 1, place.device)
        size = held_bytes(trial)
        if size <= budget:
            held, length = trial, tokens
        if progress is not None:
            progress(min(size, budget))
        return size

    return largest(measure, budget, CONTEXT_GRAIN)


def largest_batch(arm: Arm, place: Place, tokens: int, budget: int) -> int:
    """Sequences of ``tokens`` tokens within ``budget`` bytes; one more is over it."""
    one = arm.cache(place.config)
    fill(one, place.shapes, tokens, 1, place.device)

    def measure(batch: int) -> int:
        trial: Cache = copy.deepcopy(one)
        trial.batch_repeat_interleave(batch)
        return held_bytes(trial)

    found = largest(measure, budget, 1)
    assert found is not None, "a batch always takes more bytes than a smaller one"
    return found


def largest(measure: Callable[[int], int], budget: int, grain: int) -> int | None:
    """The largest multiple of ``grain`` whose measured size is within ``budget``, one grain more over it.

    The slope of what was measured says what to try next; only a measurement decides. None where the
    size stops growing.
    """
    low = low_size = 0
    high: int | None = None
    guess = grain
    while high is None or high - low > grain:
        size = measure(guess)
        if size > budget:
            high = guess
        elif size == low_size:
            return None
        else:
            low, low_size = guess, size
        # a slope from small sizes may be far off, and a size may stop growing: no step is a leap
        room = min((budget - low_size) * low // low_size, _LEAP * low) if low else 0
        guess = low + max(1, room // grain) * grain
        if high is not None and guess >= high:
            guess = low + max(1, (high - low) // grain // 2) * grain
    return low

"""A finding, and the words that findings share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One property of a model: is it there, what was measured, what it means for a plan, what to do.

    ``status``: "found", "clear" (looked for and not there) or "unknown" (``summary`` says why).
    """

    name: str
    status: Literal["found", "clear", "unknown"]
    summary: str
    evidence: str = ""
    meaning: str = ""
    advice: str = ""


def unheard(name: str) -> Finding:
    """What only attention shows, of a model whose attention is hidden."""
    return Finding(name, "unknown", "the model has no attention interface")


def mean(values: Iterable[float]) -> float:
    """0 of nothing."""
    every = list(values)
    return sum(every) / len(every) if every else 0.0


def percent(share: float) -> str:
    """0.0041 as "0.4 %", 0.61 as "61 %"."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def either(values: Sequence[int]) -> str:
    """[1, 2048] as "1 or 2,048"."""
    return " or ".join(f"{value:,}" for value in values)


def first_tokens(count: int) -> str:
    """The first ``count`` tokens in words."""
    return "the first token" if count == 1 else f"the first {count} tokens"


def layers(indices: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "layers 0-2, 5"."""
    every = sorted(indices)
    return f"layer{'s' if len(every) > 1 else ''} {ranges(every)}"


def ranges(indices: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    every = sorted(indices)
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(every)) if b != a + 1), len(every)]
    runs = [every[a:b] for a, b in pairwise(cuts)]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

"""Who is best at which bits: matched budgets, paired differences, the Pareto frontier. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvsight.eval.intervals import Estimate, mean_interval

Row = Mapping[str, Any]
Point = tuple[float, float]

# more bits than the budget by this share still count as the budget
SLACK = 0.02


def frontier(points: Sequence[Point]) -> list[int]:
    """Which of the (bits, KL) points no other beats in both, by rising bits; of equals the first."""
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if not best or points[i][1] < points[best[-1]][1]:
            best.append(i)
    return best


def at_budget(rows: Sequence[Row], budget: float) -> list[Row]:
    """The rows that were asked for this budget and keep to it, within ``SLACK``."""
    return [r for r in rows if r["budget"] == budget and r["true_bits"] <= budget * (1 + SLACK)]


def paired(ours: Row, peer: Row) -> Estimate:
    """KL of the peer less ours, window by window, in nats per token."""
    windows = zip(ours["windows"], peer["windows"], strict=True)
    return mean_interval([theirs["kl"] - mine["kl"] for mine, theirs in windows])


def bits_at(points: Sequence[Point], kl: float) -> float | None:
    """Bits where the frontier of the points crosses a KL, log-linear between them; None outside."""
    known = [p for p in points if p[1] > 0]
    chosen = [known[i] for i in frontier(known)]
    if not chosen or kl <= 0:
        return None
    bits, logs = (np.array(column) for column in zip(*((b, -math.log(k)) for b, k in chosen), strict=True))
    found = float(np.interp(-math.log(kl), logs, bits, left=math.nan, right=math.nan))
    return None if math.isnan(found) else found


def pair(rows: Sequence[Row], budget: float) -> dict[str, Any] | None:
    """Our best row at a budget against the best of all others there; None where either is missing.

    ``bits_saved`` is how many more bits the others need for our KL, along the frontier of all their rows.
    """
    here = at_budget(rows, budget)
    mine = [r for r in here if r["ours"]]
    theirs = [r for r in here if not r["ours"]]
    if not mine or not theirs:
        return None
    ours, peer = (min(some, key=lambda r: r["kl"]["mean"]) for some in (mine, theirs))
    others = [(r["true_bits"], r["kl"]["mean"]) for r in rows if not r["ours"]]
    needed = bits_at(others, ours["kl"]["mean"])
    return {
        "ours": ours["arm"],
        "peer": peer["arm"],
        "ours_bits": ours["true_bits"],
        "peer_bits": peer["true_bits"],
        "difference": paired(ours, peer).to_json(),
        "bits_saved": None if needed is None else needed - ours["true_bits"],
    }

"""A mean with its interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kvsight.errors import KVSightError


@dataclass(frozen=True)
class Estimate:
    """Mean over ``n`` independent windows with a 95 % interval; one window has none (low = high = nan)."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "mean": self.mean,
            "low": None if math.isnan(self.low) else self.low,
            "high": None if math.isnan(self.high) else self.high,
            "n": self.n,
        }


def mean_interval(
    values: Sequence[float], level: float = 0.95, *, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    """Student's t interval over windows: few windows, each already a mean over many tokens.

    ``least`` and ``most`` are what the quantity can be at all; the interval ends there.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.nan, math.nan, len(x))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    mean = float(x.mean())
    return Estimate(mean, max(least, mean - half), min(most, mean + half), len(x))


def perplexity_interval(losses: Sequence[float], level: float = 0.95) -> Estimate:
    """exp of the mean loss [nats per token], its interval taken before the exponential."""
    loss = mean_interval(losses, level)
    return Estimate(math.exp(loss.mean), _exp(loss.low), _exp(loss.high), loss.n)


def _exp(x: float) -> float:
    return math.nan if math.isnan(x) else math.exp(x)


def paired_interval(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate:
    """Interval of the mean of ``values − baseline`` over samples, paired by their names.

    Raises ``KVSightError`` where the two are not the same samples.
    """
    if values.keys() != baseline.keys():
        alone = sorted(values.keys() ^ baseline.keys())
        raise KVSightError(
            f"samples do not pair: {len(alone)} of them, such as {alone[0]!r}, are on one side only. "
            "Compare runs over the same samples."
        )
    return mean_interval([value - baseline[name] for name, value in values.items()])

"""How far keys and values have moved from what a plan was calibrated on.

In the coordinates that a codec quantises, every coordinate has a mean and a variance that its scales
were made for. Drift is the Kullback-Leibler divergence of what is seen from that, as if both were
Gaussian and coordinates independent: ½ (v/v₀ + (m − m₀)²/v₀ − 1 − ln v/v₀) nats, averaged over
coordinates.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvsight.transforms import Transform

# Mean drift beyond which a plan serves text that it was not made for, and how many tokens it takes to
# tell (docs/drift.md has the figures behind both).
LIMIT = 0.025
ENOUGH_TOKENS = 512


@dataclass(frozen=True, eq=False)
class Assumed:
    """Mean and variance of each coordinate on the calibration text, [H, d] each, fp32."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, transform: Transform, mean: Tensor, covariance: Tensor) -> Self:
        """In transform coordinates, from the mean [H, d] and covariance [H, d, d] of the vectors."""
        centre = transform.forward(mean.double().unsqueeze(-2)).squeeze(-2)
        matrix = transform.matrix
        if matrix is not None:
            covariance = matrix.mT.to(covariance) @ covariance @ matrix.to(covariance)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        return cls(centre.float().contiguous(), variance.clamp_min(0).float().contiguous())

    def to(self, device: torch.device | str) -> Self:
        return replace(self, mean=self.mean.to(device), variance=self.variance.to(device))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.mean, self.variance))


@dataclass(frozen=True, eq=False)
class Seen:
    """Sums over ``count`` vectors per head in a codec's coordinates: first and second powers, [H, d]."""

    count: int
    total: Tensor
    square: Tensor

    @classmethod
    def of(cls, y: Tensor) -> Self:
        """Of coordinates [B, H, n, d]."""
        y = y.float()
        return cls(y.shape[0] * y.shape[2], y.sum((0, 2)), y.square().sum((0, 2)))

    def add(self, other: "Seen") -> Self:
        return replace(
            self,
            count=self.count + other.count,
            total=self.total + other.total.to(self.total),
            square=self.square + other.square.to(self.square),
        )

    def drift(self, assumed: Assumed) -> Tensor:
        """Nats per coordinate and head, [H] fp64; 0 for a head that has not moved."""
        mean = self.total.double() / self.count
        variance = (self.square.double() / self.count - mean.square()).clamp_min(0)
        expected = assumed.variance.to(mean)
        # a coordinate that never moved in calibration has no scale to compare with
        floor = 1e-6 * expected.amax(-1, keepdim=True) + torch.finfo(torch.float32).tiny
        expected, variance = expected + floor, variance + floor
        ratio = variance / expected
        shift = (mean - assumed.mean.to(mean)).square() / expected
        return ((ratio + shift - 1 - ratio.log()) / 2).mean(-1).cpu()


@dataclass(frozen=True)
class Drift:
    """Drift of a cache, or of all caches of an evaluation.

    Args:
        tokens: how many were looked at, per layer.
        mean: nats per coordinate, over all layers, sides and heads.
        worst: the largest of a single head, and ``where`` it is.
    """

    tokens: int
    mean: float
    worst: float
    where: str

    @property
    def clear(self) -> bool:
        """Whether there were enough tokens to tell."""
        return self.tokens >= ENOUGH_TOKENS

    @property
    def beyond(self) -> bool:
        """Whether the text is unlike the calibration."""
        return self.clear and self.mean > LIMIT

    def __str__(self) -> str:
        figures = f"{self.mean:.3g} nats per coordinate, most in {self.where} ({self.worst:.3g})"
        if not self.clear:
            return f"{figures}; {self.tokens} tokens are too few to tell"
        return f"{figures}; {'beyond' if self.beyond else 'within'} the limit of {LIMIT:g}"

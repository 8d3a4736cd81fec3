"""Non-uniform codes of one codebook: fitted by weighted k-means, scaled by each token (KVQuant).

Source: KVQuant, arXiv 2401.18079, §3.3: signposts in [-1, 1] that least squares places, each number
weighted by how much the loss depends on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Packed, Scaled
from kvsight.packing import half, pack_row
from kvsight.quantizers.base import Unguided

_SWEEPS = 100


def signposts(x: Tensor, weights: Tensor, bits: int) -> Tensor:
    """2^bits ascending levels [2^bits] fp64 of least weighted squared error for numbers x [n].

    Lloyd's iteration from weighted quantiles of the density to the power 1/3 (Panter and Dite), so that
    two fits give one codebook. Fewer different numbers than levels leave some unused.
    """
    count = 2**bits
    x, order = x.double().flatten().sort()
    weights = weights.double().flatten()[order]
    sums = [torch.nn.functional.pad((weights * x**k).cumsum(0), (1, 0)) for k in (0, 1)]
    levels = _start(x, weights, count)
    for _ in range(_SWEEPS):
        edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        bounds = torch.nn.functional.pad(edges, (1, 0))
        bounds = torch.nn.functional.pad(bounds, (0, 1), value=len(x))
        mass, first = (s[bounds].diff() for s in sums)
        moved = torch.where(mass > 0, first / mass, levels).cummax(0).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _start(x: Tensor, weights: Tensor, count: int) -> Tensor:
    """Levels as dense as the cube root of a histogram's density."""
    low, high = float(x[0]), float(x[-1])
    bins = 16 * count
    width = (high - low) / bins
    if width <= 0:
        return x[:1].expand(count).clone()
    at = ((x - low) / width).long().clamp(0, bins - 1)
    density = torch.zeros(bins, dtype=x.dtype).index_add_(0, at, weights)
    mass = (density ** (1 / 3)).cumsum(0)
    wanted = (torch.arange(count, dtype=x.dtype) + 0.5) / count * mass[-1]
    return low + width * (torch.searchsorted(mass, wanted).double() + 0.5)


def matched(levels: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Q-Norm (KVQuant, §3.6): levels moved and stretched so that codes keep the mean and variance of x."""
    x, weights = x.double().flatten(), weights.double().flatten()
    coded = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    total = weights.sum()

    def moments(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = (weights * values).sum() / total
        return mean, ((weights * (values - mean).square()).sum() / total).sqrt()

    (wanted, spread), (mean, own) = moments(x), moments(coded)
    return wanted if bool(own == 0) else wanted + (levels - mean) * (spread / own)


def normalise(y: Tensor, trimmed: int) -> tuple[Tensor, Tensor]:
    """fp16 scale and zero point [..., 1] that take a token's numbers [..., d] to [-1, 1].

    The ``trimmed`` numbers furthest from the median take no part, and may land outside.
    """
    if trimmed:
        away = (y - y.median(dim=-1, keepdim=True).values).abs()
        inner = away.sort(dim=-1, stable=True).indices[..., : y.shape[-1] - trimmed]
        y = y.gather(-1, inner)
    low, high = y.amin(dim=-1, keepdim=True), y.amax(dim=-1, keepdim=True)
    zero = half((low + high) / 2)
    reach = torch.maximum(high - zero.to(y), zero.to(y) - low)
    return half(reach), zero


@dataclass(frozen=True, eq=False)
class ScaledQuantizer(Unguided):
    """One codebook ``levels`` [2^bits] fp32 for numbers that each token's own range scales."""

    format: Scaled
    levels: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return (self.levels,)

    @cached_property
    def _edges(self) -> Tensor:
        return (self.levels[1:] + self.levels[:-1]) / 2

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to codes, scales and zero points."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        scale, zero = normalise(y, self.format.trimmed)
        step = scale.to(y)
        unit = torch.where(step > 0, (y - zero.to(y)) / step, torch.zeros_like(y))
        codes = torch.bucketize(unit.contiguous(), self._edges.to(y)).to(torch.uint8)
        rows = pack_row(codes, (self.format.bits,) * self.format.dim)
        return Packed(self.format, (rows, scale, zero))

    def decode(self, packed: Packed) -> Tensor:
        return packed.read(self.tables)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, levels=self.levels.to(device))

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share the codebook."""
        return self

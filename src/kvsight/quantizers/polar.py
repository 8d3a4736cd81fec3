"""Recursive polar coordinates of blocks (PolarQuant, arXiv 2502.02617)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Packed, Polar
from kvsight.packing import half, pack_row
from kvsight.quantizers.base import Unguided
from kvsight.quantizers.lloyd_max import angle


@dataclass(frozen=True, eq=False)
class PolarQuantizer(Unguided):
    """Every angle at the nearest of its level's, and the exact radius of each block in fp16.

    ``angles`` [Σ 2^width] holds the angles of level 1 in [0, 2π), then those of the levels above in
    [0, π/2], each ascending.
    """

    format: Polar
    angles: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return (self.angles,)

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to codes and radii."""
        found, radius = polar_angles(y.double(), len(self.format.widths))
        tables = self.angles.double().split([1 << width for width in self.format.widths])
        # no neighbours across 0: level 1's angles begin half a step behind it and end half a step before
        codes = [_nearest(a, t) for a, t in zip(found, tables, strict=True)]
        rows = pack_row(torch.cat(codes, dim=-1).to(torch.uint8), self.format.columns)
        return Packed(self.format, (rows, half(radius)))

    def decode(self, packed: Packed) -> Tensor:
        """Codes and radii to [..., H, n, d] in fp32."""
        return packed.read(self.tables)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, angles=self.angles.to(device))

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share the angles."""
        return self


def polar_angles(y: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
    """Angles of each level [..., d / 2^level] and radii [..., d / 2^levels] of y [..., d].

    Level 1 is in [0, 2π), the others, whose pairs are radii, in [0, π/2].
    """
    found: list[Tensor] = []
    for _ in range(levels):
        first, second = y[..., ::2], y[..., 1::2]
        found.append(torch.atan2(second, first))
        y = torch.hypot(first, second)
    # atan2 is in (-π, π]
    found[0] = found[0].remainder(2 * math.pi)
    return found, y


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest of ascending angles."""
    return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)


def polar_quantizer(format: Polar) -> PolarQuantizer:
    """The paper's angles: evenly spaced on level 1, where a rotated pair has any angle; then Lloyd-Max."""
    count = 1 << format.widths[0]
    angles = [(i + 0.5) * 2 * math.pi / count for i in range(count)]
    for level, bits in enumerate(format.widths[1:], start=2):
        angles += angle(bits, level)
    return PolarQuantizer(format, torch.tensor(angles, dtype=torch.float32))

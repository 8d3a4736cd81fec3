"""Sums of codes: every part codes what the parts before it left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Joined, Packed
from kvsight.quantizers.base import Quantizer


@dataclass(frozen=True, eq=False)
class JoinedQuantizer:
    """Codes y = [y_1 | y_2 | ...], coordinates of one vector under several maps.

    Part i gets y_i - [ŷ_1 | ... | ŷ_i-1] @ crosses[i]: its own coordinates of what the others left.
    ``crosses[i]`` [H or 1, stored coordinates before, m_i] fp64 is their inverses times the map of part i.
    """

    parts: tuple[Quantizer, ...]
    crosses: tuple[Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Quantizer], matrix: Tensor, inverse: Tensor) -> Self:
        """From the parts' maps side by side: ``matrix`` [H or 1, d, M], ``inverse`` [H or 1, M, d]."""
        sizes = [part.format.dim for part in parts]
        forward, back = matrix.double().split(sizes, -1), inverse.double().split(sizes, -2)
        stored = [part.format.of_stored(rows) for part, rows in zip(parts, back, strict=True)]
        crosses = [torch.cat([back[0][:, :0], *stored[:i]], -2) @ own for i, own in enumerate(forward)]
        return cls(tuple(parts), tuple(crosses))

    @cached_property
    def format(self) -> Joined:
        return Joined(tuple(part.format for part in self.parts))

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return tuple(table for part in self.parts for table in part.tables)

    @property
    def guides(self) -> Mapping[str, Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.guides.items()}

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, M] to the codes of every part, one after the other."""
        known = y[..., :0]
        tensors: list[Tensor] = []
        own = y.split([part.format.dim for part in self.parts], -1)
        for part, cross, wanted in zip(self.parts, self.crosses, own, strict=True):
            packed = part.encode(wanted - known @ cross.to(y))
            known = torch.cat([known, part.decode(packed).to(y)], -1)
            tensors += packed.tensors
        return Packed(self.format, tuple(tensors))

    def decode(self, packed: Packed) -> Tensor:
        """[..., H, n, stored], part by part."""
        return packed.read(self.tables)

    def to(self, device: torch.device | str) -> Self:
        parts = tuple(part.to(device) for part in self.parts)
        return replace(self, parts=parts, crosses=tuple(cross.to(device) for cross in self.crosses))

    def heads(self, index: Sequence[int]) -> Self:
        """The quantizer of a subset of heads; shared tensors stay shared."""
        parts = tuple(part.heads(index) for part in self.parts)
        crosses = tuple(cross if cross.shape[0] == 1 else cross[list(index)] for cross in self.crosses)
        return replace(self, parts=parts, crosses=crosses)

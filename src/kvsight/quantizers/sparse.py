"""The few largest coordinates of a token, exact to fp16, and where they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Packed, Sparse
from kvsight.packing import half


@dataclass(frozen=True)
class SparseQuantizer:
    """Keeps ``format.count`` coordinates; of equal ones the first."""

    format: Sparse

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def guides(self) -> Mapping[str, Tensor]:
        """None: encoding reads nothing but ``tables``."""
        return {}

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to ascending indices and their values."""
        order = y.abs().sort(dim=-1, descending=True, stable=True).indices
        index = order[..., : self.format.count].sort(dim=-1).values
        values = half(y.gather(-1, index))
        return Packed(self.format, (index.to(self.format.fields[0].dtype), values))

    def decode(self, packed: Packed) -> Tensor:
        return packed.read()

    def to(self, device: torch.device | str) -> Self:
        """Itself: there are no static tensors to move."""
        return self

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share it."""
        return self

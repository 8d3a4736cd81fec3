"""Plain numbers: the identity quantizer, and the exact tokens of windows and sinks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Dense, Packed


@dataclass(frozen=True)
class DenseQuantizer:
    """Round to the dense number type and nothing else."""

    format: Dense

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
        """[..., H, n, d] in ``format.dtype``."""
        return Packed(self.format, (y.to(self.format.dtype),))

    def decode(self, packed: Packed) -> Tensor:
        return packed.read()

    def to(self, device: torch.device | str) -> Self:
        """Itself: there are no static tensors to move."""
        return self

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share it."""
        return self

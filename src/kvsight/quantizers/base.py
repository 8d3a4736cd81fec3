"""What a quantizer is: reals in transform coordinates to codes in one format, and back."""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from kvsight.formats import Format, Packed
from kvsight.ops.encode.ref import Rounding


class Quantizer(Protocol):
    """Reals in transform coordinates to codes in one format, and back."""

    @property
    def format(self) -> Format: ...

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Static tensors that reading needs, in the order of ``format.table_names``."""

    @property
    def guides(self) -> Mapping[str, Tensor]:
        """Static tensors that only encoding needs, as a plan file calls them."""

    @property
    def rounding(self) -> Rounding | None:
        """Boundaries of a row, which is encoded in one pass; None where ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed: ...

    def decode(self, packed: Packed) -> Tensor: ...

    def to(self, device: torch.device | str) -> Self: ...

    def heads(self, index: Sequence[int]) -> Self: ...


class Unguided:
    """What most quantizers share: encoding takes coordinates and reads nothing but ``tables``."""

    @property
    def guides(self) -> Mapping[str, Tensor]:
        """None: encoding reads nothing but ``tables``."""
        return {}

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""


class Tableless(Unguided):
    """A quantizer without static tensors: the same for all heads and devices."""

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return ()

    def to(self, device: torch.device | str) -> Self:
        """Itself: there are no static tensors to move."""
        return self

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share it."""
        return self

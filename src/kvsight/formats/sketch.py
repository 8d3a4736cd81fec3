"""Signs of a sketch, and a norm."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.formats.base import Field, Format
from kvsight.packing import packed_width, unpack_row


@dataclass(frozen=True)
class Sketch(Format):
    """One sign for each coordinate, and the token's Euclidean norm in fp16.

    The norm is that of the vector before it was sketched (``quantizers.sketch``).
    """

    dim: int

    @property
    def name(self) -> str:
        return f"sketch-{self.dim}"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        codes = Field("signs", torch.uint8, packed_width((1,) * self.dim))
        return codes, Field("norm", torch.float16, 1, meta=True)

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """norm · (±1)."""
        signs = unpack_row(tensors[0], (1,) * self.dim).float().mul_(2).sub_(1)
        return signs * tensors[1].to(signs)

    def spec(self) -> dict[str, object]:
        return {"kind": "sketch", "dim": self.dim}

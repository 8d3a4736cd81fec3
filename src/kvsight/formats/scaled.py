"""Codes into one codebook, scaled by each token."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.base import Field, Format
from kvsight.packing import MAX_WIDTH, packed_width, unpack_row


@dataclass(frozen=True)
class Scaled(Format):
    """Codes into one codebook, with a scale and a zero point of the token's own in fp16.

    ``trimmed`` extremes of a token take no part in its scale: a rule for encoding, which nobody who reads
    needs.
    """

    dim: int
    bits: int
    trimmed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_WIDTH:
            raise KVSightError(f"scaled codes have 1 to {MAX_WIDTH} bits; got {self.bits}.")
        if not 0 <= self.trimmed < self.dim:
            raise KVSightError(f"{self.trimmed} of {self.dim} numbers cannot be trimmed; leave one.")

    @property
    def name(self) -> str:
        return f"scaled-{self.bits}b"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return (
            Field("codes", torch.uint8, packed_width((self.bits,) * self.dim)),
            Field("scale", torch.float16, 1, meta=True),
            Field("zero", torch.float16, 1, meta=True),
        )

    @property
    def table_names(self) -> tuple[str, ...]:
        return ("levels",)

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """levels[code] · scale + zero; ``levels`` [2^bits]."""
        rows, scale, zero = tensors
        levels = tables[0][unpack_row(rows, (self.bits,) * self.dim).int()]
        return levels * scale.to(levels) + zero.to(levels)

    def spec(self) -> dict[str, object]:
        return {"kind": "scaled", "dim": self.dim, "bits": self.bits, "trimmed": self.trimmed}

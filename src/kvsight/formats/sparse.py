"""A few coordinates of a token, and where they are."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.base import Field, Format


@dataclass(frozen=True)
class Sparse(Format):
    """``count`` coordinates of a token as index and fp16 value; the others are zero."""

    dim: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.dim:
            raise KVSightError(f"a sparse format keeps 1 to {self.dim} coordinates; got {self.count}.")

    @property
    def name(self) -> str:
        return f"sparse-{self.count}"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        index = torch.uint8 if self.dim <= 256 else torch.int16
        return (
            Field("index", index, self.count, meta=True),
            Field("values", torch.float16, self.count),
        )

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """The values at their places, zeros elsewhere."""
        index, values = tensors
        dense = torch.zeros(*index.shape[:-1], self.dim, device=index.device)
        return dense.scatter_(-1, index.long(), values.float())

    def spec(self) -> dict[str, object]:
        return {"kind": "sparse", "dim": self.dim, "count": self.count}

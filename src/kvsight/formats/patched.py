"""A grouped format with repairs: exact outliers and a low-rank term."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.affine import Grouped
from kvsight.formats.base import Field, Format
from kvsight.packing import MAX_WIDTH, packed_width, unpack_row


@dataclass(frozen=True)
class Patched(Format):
    """x = base + left · right, except for ``outliers`` exact numbers of every line.

    A line is one token (``base.along="channel"``) or one channel over a block of ``span`` tokens
    (``"token"``). ``left`` has ``rank`` numbers for each token, and ``right`` for each channel of a block.
    """

    base: Grouped
    span: int
    outliers: int
    rank: int

    def __post_init__(self) -> None:
        if self.span < 1 or (self.base.along == "token" and self.span % self.base.group):
            raise KVSightError(
                f"blocks of {self.span} tokens do not hold whole groups of {self.base.group}."
            )
        if not 0 <= self.outliers <= self.line:
            raise KVSightError(f"a line of {self.line} numbers cannot have {self.outliers} outliers.")
        if self.outliers and self.index_bits > MAX_WIDTH:
            raise KVSightError(f"outliers are found in lines of up to 256 numbers; got {self.line}.")
        if self.rank < 0:
            raise KVSightError(f"a rank is not negative; got {self.rank}.")

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.base.dim

    @property
    def name(self) -> str:
        return f"{self.base.name}-out{self.outliers}-rank{self.rank}x{self.span}"

    @property
    def line(self) -> int:
        """Numbers of a line."""
        return self.span if self.base.along == "token" else self.dim

    @property
    def lines(self) -> int:
        """Lines per stored row of outliers: one of a token, or all channels of a block."""
        return self.dim if self.base.along == "token" else 1

    @property
    def index_bits(self) -> int:
        return max(1, (self.line - 1).bit_length())

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        every = self.span if self.base.along == "token" else 1
        count = self.lines * self.outliers
        fields = self.base.fields
        if self.outliers:
            width = packed_width((self.index_bits,) * count)
            fields += (
                Field("index", torch.uint8, width, every, meta=True),
                Field("outlier", torch.float16, count, every, meta=True),
            )
        if self.rank:
            fields += (
                Field("left", torch.float16, self.rank, meta=True),
                Field("right", torch.float16, self.rank * self.dim, self.span, meta=True),
            )
        return fields

    def low_rank(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """left · right, [..., n, d] in fp32; zero where the format has none."""
        if not self.rank:
            return torch.zeros((), device=tensors[0].device)
        # products of other strides may round differently
        left = tensors[-2].float().contiguous().unflatten(-2, (-1, self.span))
        right = tensors[-1].float().contiguous().unflatten(-1, (self.rank, self.dim))
        product: Tensor = (left @ right).flatten(-3, -2)
        return product

    def restore(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """x [..., n, d] with the outliers put in their places."""
        if not self.outliers:
            return x
        index = unpack_row(tensors[3], (self.index_bits,) * (self.lines * self.outliers)).long()
        exact = tensors[4].to(x)
        if self.base.along == "channel":
            return x.scatter(-1, index, exact)
        lines: Tensor = x.unflatten(-2, (-1, self.span)).mT
        index, exact = (t.unflatten(-1, (self.dim, self.outliers)) for t in (index, exact))
        restored: Tensor = lines.scatter(-1, index, exact).mT.flatten(-3, -2)
        return restored

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        return self.restore(self.base.read(tensors[:3], ()) + self.low_rank(tensors), tensors)

    def spec(self) -> dict[str, object]:
        return {
            "kind": "patched",
            "base": self.base.spec(),
            "span": self.span,
            "outliers": self.outliers,
            "rank": self.rank,
        }

"""Indices into codebooks."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.base import Field, Format
from kvsight.packing import MAX_WIDTH, pack_row, packed_width, unpack_row


@dataclass(frozen=True)
class Indexed(Format):
    """Indices into codebooks: vector quantisation, residual where there are several stages.

    A token's coordinates are cut into cells of ``span``; each cell has one index of ``bits`` bits for
    every stage, and is the sum of the centroids that they point to. Cell c holds neighbouring
    coordinates, from c·span on; ``strided`` cells hold c, c + cells, c + 2·cells, ..., so that
    coordinates half a head apart, which RoPE turns together, share a cell when ``span`` is even.
    ``norm`` adds the token's root mean square in fp16.
    """

    dim: int
    span: int
    bits: int
    stages: int = 1
    strided: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 2 * MAX_WIDTH:
            raise KVSightError(f"an index has 1 to {2 * MAX_WIDTH} bits; got {self.bits}.")
        if self.span < 1 or self.dim % self.span:
            raise KVSightError(
                f"cells of {self.span} coordinates do not tile {self.dim}. Choose a divisor of head_dim."
            )
        if self.stages < 1:
            raise KVSightError(f"an index format has at least one stage; got {self.stages}.")

    @property
    def name(self) -> str:
        stages = f"x{self.stages}" if self.stages > 1 else ""
        return f"indexed-{self.bits}b{stages}-span{self.span}"

    @property
    def cells(self) -> int:
        """Groups of coordinates that share an index."""
        return self.dim // self.span

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Widths of the packed columns: low bytes of all indices, then what is above."""
        count = self.stages * self.cells
        if self.bits <= MAX_WIDTH:
            return (self.bits,) * count
        return (MAX_WIDTH,) * count + (self.bits - MAX_WIDTH,) * count

    @property
    def table_names(self) -> tuple[str, ...]:
        return ("centroids",)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        codes = Field("codes", torch.uint8, packed_width(self.widths))
        return (codes, Field("norm", torch.float16, 1, meta=True)) if self.norm else (codes,)

    def cut(self, y: Tensor) -> Tensor:
        """[..., dim] to cells [..., cells, span]."""
        if self.strided:
            columns: Tensor = y.unflatten(-1, (self.span, self.cells))
            return columns.mT
        cells: Tensor = y.unflatten(-1, (self.cells, self.span))
        return cells

    def join(self, cells: Tensor) -> Tensor:
        """Inverse of ``cut``."""
        return (cells.mT if self.strided else cells).flatten(-2)

    def pack(self, index: Tensor) -> Tensor:
        """int64 indices [..., stages, cells] to rows [..., bytes]."""
        flat = index.flatten(-2)
        if self.bits > MAX_WIDTH:
            flat = torch.cat((flat & 0xFF, flat >> MAX_WIDTH), dim=-1)
        return pack_row(flat.to(torch.uint8), self.widths)

    def unpack(self, rows: Tensor) -> Tensor:
        """Inverse of ``pack``."""
        codes = unpack_row(rows, self.widths).long()
        if self.bits > MAX_WIDTH:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << MAX_WIDTH
        index: Tensor = codes.unflatten(-1, (self.stages, self.cells))
        return index

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """The sum over stages of ``centroids[head, cell, stage, index]``, times the norm if stored.

        The first table is ``centroids`` [H or 1, cells or 1, stages, 2^bits, span].
        """
        centroids, index = tables[0], self.unpack(tensors[0])
        heads, cells, _, size, _ = centroids.shape
        lines = centroids.flatten(0, -2)
        first = torch.arange(heads * cells, device=index.device).view(heads, 1, cells) * self.stages
        total: Tensor | None = None
        for stage in range(self.stages):
            at = (first + stage) * size + index[..., stage, :]
            part = lines.index_select(0, at.reshape(-1)).view(*at.shape, self.span)
            total = part if total is None else total + part
        assert total is not None
        y = self.join(total)
        return y * tensors[1].to(y) if self.norm else y

    def spec(self) -> dict[str, object]:
        return {
            "kind": "indexed",
            "dim": self.dim,
            "span": self.span,
            "bits": self.bits,
            "stages": self.stages,
            "strided": self.strided,
            "norm": self.norm,
        }

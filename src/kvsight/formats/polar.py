"""Recursive polar coordinates."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.base import Field, Format
from kvsight.packing import MAX_WIDTH, packed_width, unpack_row


@dataclass(frozen=True)
class Polar(Format):
    """Recursive polar coordinates: angles of L levels and one fp16 radius for each 2^L coordinates.

    Level 1 has an angle for each pair of neighbouring coordinates, level 2 for each pair of the radii that
    level 1 leaves, and so on. ``widths[l]`` is the width of the angles of level l + 1, falling.
    """

    dim: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths or any(not 1 <= w <= MAX_WIDTH for w in self.widths):
            raise KVSightError(
                f"angles have 1 to {MAX_WIDTH} bits on one level or more; got {self.widths}."
            )
        if list(self.widths) != sorted(self.widths, reverse=True):
            raise KVSightError(f"widths of angles must fall from level to level; got {self.widths}.")
        if self.dim % self.span:
            raise KVSightError(f"polar blocks of {self.span} coordinates do not tile {self.dim}.")

    @property
    def name(self) -> str:
        return f"polar-{'.'.join(map(str, self.widths))}"

    @property
    def span(self) -> int:
        """Coordinates that share a radius."""
        return 1 << len(self.widths)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Angles of each level in a token."""
        return tuple(self.dim >> level for level in range(1, len(self.widths) + 1))

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Widths of the packed columns: all angles of level 1, then of level 2, ..."""
        return tuple(w for w, count in zip(self.widths, self.counts, strict=True) for _ in range(count))

    @property
    def table_names(self) -> tuple[str, ...]:
        return ("angles",)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        radii = Field("radius", torch.float16, self.dim // self.span, meta=True)
        return (Field("codes", torch.uint8, packed_width(self.columns)), radii)

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """Radii times products of cosines and sines; the table holds the angles of all levels in turn."""
        codes, r = unpack_row(tensors[0], self.columns).long(), tensors[1].float()
        angles = tables[0].split([1 << width for width in self.widths])
        by_level = codes.split(self.counts, dim=-1)
        for table, code in zip(reversed(angles), reversed(by_level), strict=True):
            # (first, second) = radius · (cos, sin) of every pair, in order
            pair = torch.stack((table.cos(), table.sin()), dim=-1)
            r = (r.unsqueeze(-1) * pair[code]).flatten(-2)
        return r

    def spec(self) -> dict[str, object]:
        return {"kind": "polar", "dim": self.dim, "widths": list(self.widths)}

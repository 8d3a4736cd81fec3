"""Several codes of one token."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.base import Field, Format


@dataclass(frozen=True)
class Joined(Format):
    """Several codes of one token: their coordinates side by side, in the order of ``parts``.

    What a token means is linear in its coordinates, so codes of a vector and of what they left add up.
    """

    parts: tuple[Format, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise KVSightError(f"a joined format has two parts or more; got {len(self.parts)}.")
        if any(self.block % part.block for part in self.parts):
            sizes = ", ".join(str(part.block) for part in self.parts)
            raise KVSightError(f"blocks of joined formats must divide the largest; got {sizes}.")

    @property
    def dim(self) -> int:  # type: ignore[override]
        return sum(part.dim for part in self.parts)

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @cached_property
    def stored(self) -> int:
        return sum(part.stored for part in self.parts)

    def of_stored(self, rows: Tensor) -> Tensor:
        cut = rows.split([part.dim for part in self.parts], dim=-2)
        return torch.cat([p.of_stored(r) for p, r in zip(self.parts, cut, strict=True)], dim=-2)

    @property
    def table_names(self) -> tuple[str, ...]:
        return tuple(f"{i}.{name}" for i, part in enumerate(self.parts) for name in part.table_names)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return tuple(
            replace(field, name=f"{i}.{field.name}")
            for i, part in enumerate(self.parts)
            for field in part.fields
        )

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """What every part reads, side by side."""
        stored, static = iter(tensors), iter(tables)
        return torch.cat(
            [
                part.read(
                    tuple(islice(stored, len(part.fields))), tuple(islice(static, len(part.table_names)))
                )
                for part in self.parts
            ],
            dim=-1,
        )

    def spec(self) -> dict[str, object]:
        return {"kind": "joined", "parts": [part.spec() for part in self.parts]}

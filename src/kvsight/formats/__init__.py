"""What the stored bytes mean. Kernels and caches dispatch on nothing else.

A format lists its *fields*. A field is a tensor ``[..., rows, width]`` that holds one row for every
``every`` tokens, so slicing, joining, saving and counting bytes are the same code for all formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.affine import Affine, Grouped, Symmetric, Ternary
from kvsight.formats.base import Field, Format
from kvsight.formats.indexed import Indexed
from kvsight.formats.joined import Joined
from kvsight.formats.patched import Patched
from kvsight.formats.polar import Polar
from kvsight.formats.scaled import Scaled
from kvsight.formats.sketch import Sketch
from kvsight.formats.sparse import Sparse
from kvsight.formats.tiered import Tiered
from kvsight.packing import MAX_WIDTH, packed_width, unpack_columns

__all__ = [
    "KINDS",
    "Affine",
    "Dense",
    "Field",
    "Format",
    "Grouped",
    "Indexed",
    "Joined",
    "Packed",
    "Patched",
    "Polar",
    "Row",
    "Scaled",
    "Sketch",
    "Sparse",
    "Symmetric",
    "Ternary",
    "Tiered",
    "concat",
    "dtype_from_name",
    "dtype_name",
    "empty",
    "format_from_spec",
    "room",
]

# what plan files call them
KINDS = (
    "row",
    "grouped",
    "symmetric",
    "ternary",
    "tiered",
    "patched",
    "indexed",
    "polar",
    "sketch",
    "scaled",
    "sparse",
    "joined",
    "dense",
)


@dataclass(frozen=True)
class Dense(Format):
    """Plain numbers, ``dim`` per token."""

    dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"dense-{dtype_name(self.dtype)}"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return (Field("values", self.dtype, self.dim),)

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        return tensors[0]

    def spec(self) -> dict[str, object]:
        return {"kind": "dense", "dim": self.dim, "dtype": dtype_name(self.dtype)}


@dataclass(frozen=True)
class Row(Format):
    """One byte row per token: coordinates in bands of falling bit width, no scales, maybe one norm.

    ``widths[i]`` in 0..8 is the width of coordinate i; zeros come last and store nothing.
    ``norm`` adds the token's root mean square in fp16.
    """

    widths: tuple[int, ...]
    norm: bool = False

    def __post_init__(self) -> None:
        if any(not 0 <= w <= MAX_WIDTH for w in self.widths):
            raise KVSightError(f"row widths must be 0 to {MAX_WIDTH}; got {self.widths}.")
        if list(self.widths) != sorted(self.widths, reverse=True):
            raise KVSightError(
                f"row widths must fall from first to last; got {self.widths}. Permute the coordinates."
            )

    @property
    def dim(self) -> int:  # type: ignore[override]
        return len(self.widths)

    @property
    def name(self) -> str:
        low, high = min(self.widths), max(self.widths)
        return f"row-{low}" if low == high else f"row-{low}to{high}"

    @cached_property
    def stored(self) -> int:
        return sum(w > 0 for w in self.widths)

    @property
    def table_names(self) -> tuple[str, ...]:
        return ("levels", "starts")

    @property
    def row_bytes(self) -> int:
        return packed_width(self.widths)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        codes = Field("codes", torch.uint8, self.row_bytes)
        return (codes, Field("norm", torch.float16, 1, meta=True)) if self.norm else (codes,)

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """``levels[start + code]``, times the norm where one is stored."""
        levels, starts = tables
        index = unpack_columns(tensors[0], self.widths).int().add_(starts.unsqueeze(-1))
        y = levels.index_select(0, index.view(-1)).view(index.shape).mT
        return y * tensors[1].to(y) if self.norm else y

    def spec(self) -> dict[str, object]:
        return {"kind": "row", "widths": list(self.widths), "norm": self.norm}


def format_from_spec(spec: Mapping[str, object]) -> Format:
    """Rebuild a format from ``Format.spec()``; an unknown kind raises ``KVSightError``."""
    match spec:
        case {"kind": "dense", "dim": int(dim), "dtype": str(dtype)}:
            return Dense(dim, dtype_from_name(dtype))
        case {"kind": "row", "widths": list(widths), "norm": bool(norm)}:
            return Row(tuple(int(w) for w in widths), norm)
        case {
            "kind": "grouped" | "symmetric" as kind,
            "dim": int(dim),
            "bits": int(bits),
            "group": int(group),
            "along": "channel" | "token" as along,
        }:
            return (Grouped if kind == "grouped" else Symmetric)(dim, bits, group, along)
        case {
            "kind": "ternary",
            "dim": int(dim),
            "group": int(group),
            "along": "channel" | "token" as along,
        }:
            return Ternary(dim, group, along)
        case {
            "kind": "tiered",
            "dim": int(dim),
            "span": int(span),
            "widths": list(widths),
            "total": int(total),
            "along": "channel" | "token" as along,
            "scaled": bool(scaled),
        }:
            return Tiered(dim, span, tuple(int(w) for w in widths), total, along, scaled)
        case {
            "kind": "patched",
            "base": dict(inner),
            "span": int(span),
            "outliers": int(outliers),
            "rank": int(rank),
        }:
            base = format_from_spec(inner)
            if isinstance(base, Grouped):
                return Patched(base, span, outliers, rank)
        case {
            "kind": "indexed",
            "dim": int(dim),
            "span": int(span),
            "bits": int(bits),
            "stages": int(stages),
            "strided": bool(strided),
            "norm": bool(norm),
        }:
            return Indexed(dim, span, bits, stages, strided, norm)
        case {"kind": "polar", "dim": int(dim), "widths": list(widths)}:
            return Polar(dim, tuple(int(w) for w in widths))
        case {"kind": "sketch", "dim": int(dim)}:
            return Sketch(dim)
        case {"kind": "scaled", "dim": int(dim), "bits": int(bits), "trimmed": int(trimmed)}:
            return Scaled(dim, bits, trimmed)
        case {"kind": "sparse", "dim": int(dim), "count": int(count)}:
            return Sparse(dim, count)
        case {"kind": "joined", "parts": list(parts)}:
            return Joined(tuple(format_from_spec(part) for part in parts))
    raise KVSightError(f"unknown format {dict(spec)!r}; this kvsight knows {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Packed:
    """Tensors in a format: each ``[batch..., heads, rows, width]``, in the order of ``format.fields``."""

    format: Format
    tensors: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return self.tensors[0].shape[-2] * self.format.fields[0].every

    def read(self, tables: tuple[Tensor, ...] = ()) -> Tensor:
        """``Format.read`` of these tensors."""
        return self.format.read(self.tensors, tables)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as allocated."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def narrow(self, start: int, stop: int) -> Self:
        """Tokens start..stop as views; both must be multiples of the block."""
        if start % self.format.block or stop % self.format.block:
            raise KVSightError(
                f"{self.format.name} is cut at multiples of {self.format.block} tokens; got {start}:{stop}."
            )
        pairs = zip(self.format.fields, self.tensors, strict=True)
        return type(self)(
            self.format,
            tuple(t[..., start // f.every : stop // f.every, :] for f, t in pairs),
        )

    def select(self, batch: Tensor) -> Self:
        """Rows of the first dimension, in the order of ``batch`` (int64)."""
        return type(self)(self.format, tuple(t.index_select(0, batch.to(t.device)) for t in self.tensors))

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.format, tuple(t.to(device) for t in self.tensors))

    def copy_(self, other: "Packed") -> None:
        """Overwrite these tensors with the bytes of ``other``, which has as many tokens."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)

    def contiguous(self) -> Self:
        """Copies of their own memory, so that what a view was cut from can be freed."""
        return type(self)(
            self.format, tuple(t.clone(memory_format=torch.contiguous_format) for t in self.tensors)
        )


def concat(parts: Sequence[Packed]) -> Packed:
    """Join along tokens; the bytes of each part are copied unchanged."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(p.tensors for p in parts), strict=True)
    return Packed(parts[0].format, tuple(torch.cat(column, dim=-2) for column in columns))


def room(packed: Packed, tokens: int) -> Packed:
    """A copy with unwritten space for ``tokens`` more, a multiple of the block."""
    grown: list[Tensor] = []
    for stored, tensor in zip(packed.format.fields, packed.tensors, strict=True):
        rows = tensor.shape[-2]
        larger = tensor.new_empty(*tensor.shape[:-2], rows + tokens // stored.every, tensor.shape[-1])
        larger[..., :rows, :] = tensor
        grown.append(larger)
    return Packed(packed.format, tuple(grown))


def empty(format: Format, lead: tuple[int, ...], device: torch.device | str) -> Packed:
    """Zero tokens for leading dimensions ``lead`` = (batch..., heads)."""
    return Packed(
        format,
        tuple(torch.empty(*lead, 0, f.width, dtype=f.dtype, device=device) for f in format.fields),
    )


_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The stored name of a dense number type, such as ``"bfloat16"``."""
    for name, known in _DTYPES.items():
        if known == dtype:
            return name
    raise KVSightError(f"dense numbers are stored as {', '.join(_DTYPES)}; got {dtype}.")


def dtype_from_name(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise KVSightError(f"unknown number type {name!r}; known: {', '.join(_DTYPES)}.")
    return _DTYPES[name]

"""What the stored bytes mean: row, grouped affine, dense, sketch, or several of them joined.

Kernels and caches dispatch on nothing else.

A format lists its *fields*. A field is a tensor ``[..., rows, width]`` that holds one row for every
``every`` tokens, so slicing, joining, saving and counting bytes are the same code for all formats.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Literal, Self

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.packing import MAX_WIDTH, packed_width, unpack_columns, unpack_row


@dataclass(frozen=True)
class Field:
    """One stored tensor: ``width`` items of ``dtype`` for every ``every`` tokens of one head."""

    name: str
    dtype: torch.dtype
    width: int
    every: int = 1
    meta: bool = False


class Format(ABC):
    """Byte layout of one head's keys or values. ``block`` tokens are committed together.

    ``dim`` is how many coordinates a token has, those without bits included: head_dim, unless the codec's
    transform gives fewer or more.
    """

    dim: int

    @property
    @abstractmethod
    def fields(self) -> tuple[Field, ...]: ...

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def spec(self) -> dict[str, object]:
        """JSON-ready description; ``format_from_spec`` is its inverse."""

    @abstractmethod
    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """The numbers that the bytes mean: [..., H, n, stored], fp32 unless dense.

        ``tables`` are the static tensors that the format needs (levels and starts for rows).
        """

    @property
    def table_names(self) -> tuple[str, ...]:
        """What ``read`` wants as ``tables``, in order."""
        return ()

    @property
    def stored(self) -> int:
        """Coordinates per token that have any bits."""
        return self.dim

    def of_stored(self, rows: Tensor) -> Tensor:
        """Of rows [..., dim, n], one for each coordinate, those that have any bits [..., stored, n]."""
        return rows[..., : self.stored, :]

    @cached_property
    def block(self) -> int:
        return max(field.every for field in self.fields)

    def nbytes(self, tokens: int) -> int:
        """Stored bytes of one head for ``tokens`` tokens, metadata and padding included."""
        if tokens % self.block:
            raise KVSightError(
                f"{self.name} stores whole blocks of {self.block} tokens; got {tokens}. "
                "Keep the remainder in the dense tail."
            )
        return sum(_field_bytes(field, tokens) for field in self.fields)

    def meta_nbytes(self, tokens: int) -> int:
        """The part of ``nbytes`` that is scales, zero points and norms rather than codes."""
        return sum(_field_bytes(field, tokens) for field in self.fields if field.meta)


def _field_bytes(field: Field, tokens: int) -> int:
    return tokens // field.every * field.width * field.dtype.itemsize


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


@dataclass(frozen=True)
class Grouped(Format):
    """Asymmetric integers with an fp16 scale and zero point for each group.

    ``along="channel"``: a group is ``group`` neighbouring channels of one token.
    ``along="token"``: a group is one channel over a block of ``group`` tokens.
    """

    dim: int
    bits: int
    group: int
    along: Literal["channel", "token"]

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_WIDTH:
            raise KVSightError(f"grouped codes have 1 to {MAX_WIDTH} bits; got {self.bits}.")
        if self.group < 1 or (self.along == "channel" and self.group > self.dim):
            raise KVSightError(f"group {self.group} does not fit {self.dim} channels.")

    @property
    def name(self) -> str:
        return f"grouped-{self.bits}b-{self.along}{self.group}"

    @property
    def groups(self) -> int:
        """Scale and zero-point pairs per stored parameter row."""
        return -(-self.dim // self.group) if self.along == "channel" else self.dim

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        every = 1 if self.along == "channel" else self.group
        return (
            Field("codes", torch.uint8, packed_width((self.bits,) * self.dim)),
            Field("scale", torch.float16, self.groups, every, meta=True),
            Field("zero", torch.float16, self.groups, every, meta=True),
        )

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """code · scale + zero."""
        rows, scale, zero = tensors
        codes = unpack_row(rows, (self.bits,) * self.dim).float()
        if self.along == "token":
            blocks: Tensor = codes.unflatten(-2, (-1, self.group))
            return (blocks * scale.float().unsqueeze(-2) + zero.float().unsqueeze(-2)).flatten(-3, -2)
        if self.dim % self.group == 0:
            cells: Tensor = codes.unflatten(-1, (-1, self.group))
            return (cells * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).flatten(-2)
        per_channel = torch.arange(self.dim, device=rows.device) // self.group
        return codes * scale.float()[..., per_channel] + zero.float()[..., per_channel]

    def spec(self) -> dict[str, object]:
        return {
            "kind": "grouped",
            "dim": self.dim,
            "bits": self.bits,
            "group": self.group,
            "along": self.along,
        }


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


def format_from_spec(spec: Mapping[str, object]) -> Format:
    """Rebuild a format from ``Format.spec()``; an unknown kind raises ``KVSightError``."""
    match spec:
        case {"kind": "dense", "dim": int(dim), "dtype": str(dtype)}:
            return Dense(dim, dtype_from_name(dtype))
        case {"kind": "row", "widths": list(widths), "norm": bool(norm)}:
            return Row(tuple(int(w) for w in widths), norm)
        case {
            "kind": "grouped",
            "dim": int(dim),
            "bits": int(bits),
            "group": int(group),
            "along": "channel" | "token" as along,
        }:
            return Grouped(dim, bits, group, along)
        case {"kind": "sketch", "dim": int(dim)}:
            return Sketch(dim)
        case {"kind": "scaled", "dim": int(dim), "bits": int(bits), "trimmed": int(trimmed)}:
            return Scaled(dim, bits, trimmed)
        case {"kind": "sparse", "dim": int(dim), "count": int(count)}:
            return Sparse(dim, count)
        case {"kind": "joined", "parts": list(parts)}:
            return Joined(tuple(format_from_spec(part) for part in parts))
    raise KVSightError(
        f"unknown format {dict(spec)!r}; this kvsight knows row, grouped, dense, sketch, scaled, "
        "sparse and joined."
    )


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

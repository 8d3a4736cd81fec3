"""What the stored bytes mean. Kernels and caches dispatch on formats and on nothing else.

A format lists its *fields*. A field is a tensor ``[..., rows, width]`` that holds one row for every
``every`` tokens, so slicing, joining, saving and counting bytes are the same code for all formats.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.packing import MAX_WIDTH, pack_row, packed_width, unpack_columns, unpack_row

# what a plan file calls them
KINDS = ("row", "grouped", "indexed", "polar", "dense")


@dataclass(frozen=True)
class Field:
    """One stored tensor: ``width`` items of ``dtype`` for every ``every`` tokens of one head."""

    name: str
    dtype: torch.dtype
    width: int
    every: int = 1
    meta: bool = False


class Format(ABC):
    """Byte layout of one head's keys or values. ``block`` tokens are committed together."""

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
    def stored(self) -> int:
        """Coordinates per token that have any bits."""
        return self.dim

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

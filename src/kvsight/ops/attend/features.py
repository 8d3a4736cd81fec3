"""How kernels read formats: bytes become features of a token, and a static linear map decodes them.

x = φ(bytes) @ matrix + constant. Keys apply the map to the query, values to the weighted sum, so the loop
over tokens sees features only. README.md has the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from kvsight.formats import Dense, Format, Grouped, Row
from kvsight.ops.attend.ref import Coded, Folded
from kvsight.packing import packed_width, piece_table, pieces

_SLOTS = {4: 2, 2: 4, 1: 8}
# levels this close to a line, relative to the largest, are on it: fp32 stores them no better
_STRAIGHT = 2.0**-22


class Kind(IntEnum):
    """What a kernel does with a token's bytes; the numbers are known to kernels.py."""

    DENSE = 0
    PLANES = 1
    LEVELS = 2
    GROUPED = 3
    NORMED = 4


# codes that are put together, or looked up
JOINED = (Kind.LEVELS, Kind.GROUPED, Kind.NORMED)


@dataclass(frozen=True)
class Blocks:
    """Padded bytes of each class (powers of two, or 0), and padded coordinates, of one side."""

    nibbles: int
    crumbs: int
    bits: int
    dim: int

    @property
    def planes(self) -> int:
        return 2 * self.nibbles + 4 * self.crumbs + 8 * self.bits

    @property
    def width(self) -> int:
        return max(self.planes, self.dim)


@lru_cache(maxsize=4096)
def byte_classes(widths: tuple[int, ...]) -> tuple[int, int, int]:
    """Bytes of a row that hold nibbles only, then crumbs at the finest, then single bits."""
    finest = [4] * packed_width(widths)
    for piece in pieces(widths):
        octet = piece.at // 8
        finest[octet] = min(finest[octet], piece.size)
    return finest.count(4), finest.count(2), finest.count(1)


@lru_cache(maxsize=4096)
def _planes(widths: tuple[int, ...], blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """For each masked slot that holds bits: its feature, the coordinate, and what one step of it is worth.

    A byte masked in place is the piece times 2^(its position in the byte), and kernels centre it.
    """
    features: list[int] = []
    owners: list[int] = []
    worth: list[float] = []
    counts = byte_classes(widths)
    of_bit = {piece.at + i: piece for piece in pieces(widths) for i in range(piece.size)}
    octet = start = 0
    for size, count, block in zip(
        _SLOTS, counts, (blocks.nibbles, blocks.crumbs, blocks.bits), strict=True
    ):
        for place in range(count):
            for slot in range(_SLOTS[size]):
                piece = of_bit.get(8 * octet + slot * size)
                if piece is not None:
                    features.append(start + slot * block + place)
                    owners.append(piece.owner)
                    worth.append(2.0 ** (piece.low - piece.at % 8))
            octet += 1
        start += _SLOTS[size] * block
    return (
        torch.tensor(features, dtype=torch.int64),
        torch.tensor(owners, dtype=torch.int64),
        torch.tensor(worth, dtype=torch.float64),
    )


def _widths(form: Format) -> tuple[int, ...]:
    match form:
        case Row():
            return form.widths
        case Grouped():
            return (form.bits,) * form.dim
    return ()


_Entry = tuple[tuple[int, ...], Format, tuple[Tensor, ...], Folded]


class Coding:
    """A segment's coded heads by the identity of their static tensors.

    Those never change, so that what follows from them is worked out once and kept.
    """

    def __init__(self, coded: Sequence[Coded]) -> None:
        self.coded: list[_Entry] = [(c.heads, c.packed.format, c.tables, c.folded) for c in coded]
        self._key: list[object] = []
        for heads, form, tables, folded in self.coded:
            self._key += [heads, form, *map(id, (*tables, folded.inverse, folded.shift))]
        self._hash = hash(tuple(self._key))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        # both hold their tensors, so an id cannot have changed hands
        return isinstance(other, Coding) and self._key == other._key


@lru_cache(maxsize=1024)
def kinds(coding: Coding) -> tuple[Kind, ...]:
    """The kind of each group of heads."""
    return tuple(_kind(form, tables) for _, form, tables, _ in coding.coded)


@lru_cache(maxsize=1024)
def most_pieces(coding: Coding) -> int:
    """Pieces of the longest code that kernels put together; 0 where planes or plain numbers are read."""
    joined = [entry[1] for kind, entry in zip(kinds(coding), coding.coded, strict=True) if kind in JOINED]
    owners = [[piece.owner for piece in pieces(_widths(form))] for form in joined]
    return max((own.count(owner) for own in owners for owner in set(own)), default=0)


@dataclass(frozen=True)
class Uniform:
    """Codes of one width, in groups of ``cell`` coordinates by ``span`` tokens that share parameters.

    ``book``: whether levels are looked up for whole bytes.
    """

    width: int
    cell: int
    span: int
    book: bool = False


def uniform(codings: Sequence[Coding | None], block: int, tokens: int) -> Uniform | None:
    """What all codes that kernels put together have in common; None where they differ.

    Kernels take rows of ``block`` coordinates, ``tokens`` at a time; parameters must follow these blocks.
    """
    joined = [
        (entry[1], book)
        for coding in codings
        if coding is not None
        for kind, entry, book in zip(kinds(coding), coding.coded, books(coding), strict=True)
        if kind in JOINED
    ]
    found = {_uniform(form, block, tokens) for form, _ in joined}
    same = found.pop() if len(found) == 1 else None
    return same and replace(same, book=all(book is not None for _, book in joined))


@lru_cache(maxsize=1024)
def books(coding: Coding) -> tuple[Tensor | None, ...]:
    """Of each group of heads: the fp16 levels [256, 8 / width] of all codes in a byte.

    None where codes are not 2 or 4 bits wide, or coordinates have levels of their own.
    """
    return tuple(_book(form, tables) for _, form, tables, _ in coding.coded)


def _book(form: Format, tables: tuple[Tensor, ...]) -> Tensor | None:
    widths = set(_widths(form))
    if not isinstance(form, Row) or widths not in ({2}, {4}):
        return None
    (width,) = widths
    levels, starts = tables
    first = int(starts.min())
    if first != int(starts.max()):
        return None
    slots = torch.arange(0, 8, width, device=levels.device)
    codes = (torch.arange(256, device=levels.device).unsqueeze(-1) >> slots) & (2**width - 1)
    return levels[first + codes].half()


@lru_cache(maxsize=1024)
def _uniform(form: Format, block: int, tokens: int) -> Uniform | None:
    widths = set(_widths(form))
    if len(widths) != 1 or 0 in widths or form.dim % 16:
        return None
    cell, span = block, 1
    if isinstance(form, Grouped):
        size = form.group
        cell, span = (size, 1) if form.along == "channel" else (1, size)
        cell = block if cell >= form.dim else cell
        if cell & (cell - 1) or (tokens % span and span % tokens):
            return None
    return Uniform(widths.pop(), cell, span)


def _kind(form: Format, tables: tuple[Tensor, ...]) -> Kind:
    match form:
        case Dense():
            return Kind.DENSE
        case Grouped():
            return Kind.GROUPED
        case Row() if form.norm:
            return Kind.NORMED
        case Row():
            return Kind.LEVELS if _lines(form.widths, *tables) is None else Kind.PLANES
    raise AssertionError(form)


def blocks(codings: Sequence[Coding | None], dim: int) -> Blocks:
    """Padding that fits every segment of a side; None stands for a dense one of ``dim``."""
    classes, coordinates = [(0, 0, 0)], [0]
    for coding in codings:
        if coding is None:
            coordinates.append(dim)
            continue
        for kind, (_, form, _, _) in zip(kinds(coding), coding.coded, strict=True):
            if kind == Kind.PLANES:
                classes.append(byte_classes(_widths(form)))
            else:
                coordinates.append(form.stored)
    nibbles, crumbs, bits = (max(column) for column in zip(*classes, strict=True))
    return Blocks(
        _block(nibbles, dim // 2),
        _block(crumbs, dim // 4),
        _block(bits, dim // 8),
        _block(max(coordinates)),
    )


def _block(count: int, usual: int = 0) -> int:
    """The least power of two that holds ``count`` and suits a matrix product; 0 for none.

    Less than ``usual`` is not worth compiling a kernel of its own for.
    """
    return 0 if count == 0 else max(16, 1 << (max(count, usual) - 1).bit_length())


def _lines(widths: tuple[int, ...], levels: Tensor, starts: Tensor) -> tuple[Tensor, Tensor] | None:
    """Middle and step of every coordinate's levels, [H or 1, stored] fp64; None where they are free."""
    stored = [width for width in widths if width]
    if not stored:
        return starts.double().cpu(), starts.double().cpu()
    table, starts = levels.double().cpu(), starts.long().cpu()
    counts = 2 ** torch.tensor(stored)
    # past its last level a coordinate repeats it
    index = torch.arange(int(counts.max())).expand(len(stored), -1).minimum((counts - 1).unsqueeze(-1))
    own = table[starts.unsqueeze(-1) + index]
    first = own[..., 0]
    step = (own[..., -1] - first) / (counts - 1)
    bent = (own - first.unsqueeze(-1) - step.unsqueeze(-1) * index).abs().amax(-1)
    middle = (first + own[..., -1]) / 2
    return (middle, step) if bool((bent <= _STRAIGHT * own.abs().amax(-1)).all()) else None


@dataclass(frozen=True, eq=False)
class Reading:
    """How the heads of a segment are read.

    ``kinds`` and ``sizes`` (bytes of each class, or stored coordinates) by head; ``matrix`` [H, width, d]
    and ``constant`` [H, d] decode features, None for the identity and for zero; ``tables``
    [H, 13, dim] int32 are piece tables, then where a coordinate's levels start or its parameter column.
    """

    kinds: tuple[Kind, ...]
    sizes: tuple[tuple[int, int, int], ...]
    matrix: Tensor | None = None
    constant: Tensor | None = None
    tables: Tensor | None = None


def plain(heads: int, dim: int) -> Reading:
    """Numbers as they are."""
    return Reading((Kind.DENSE,) * heads, ((dim, 0, 0),) * heads)


# two for each layer of the largest models
@lru_cache(maxsize=512)
def reading(coding: Coding, padded: Blocks, dim: int, device: torch.device, dtype: torch.dtype) -> Reading:
    """Of a coded segment, its maps in ``dtype``; features start at 0 of ``padded.width`` columns."""
    of_head: dict[int, tuple[Kind, tuple[int, int, int], Tensor, Tensor, Tensor]] = {}
    for kind, entry in zip(kinds(coding), coding.coded, strict=True):
        heads, form, tables, _ = entry
        sizes = byte_classes(_widths(form)) if kind == Kind.PLANES else (form.stored, 0, 0)
        matrix, constant = _linear(kind, entry, padded, dim)
        table = _head_tables(kind, form, tables, padded.dim)
        own = (t.expand(len(heads), *t.shape[1:]) for t in (matrix, constant, table))
        of_head |= {head: (kind, sizes, *parts) for head, *parts in zip(heads, *own, strict=True)}
    columns = tuple(zip(*(of_head[head] for head in sorted(of_head)), strict=True))
    matrix, constant, table = (torch.stack(column).to(device) for column in columns[2:])
    if all(_is_plain(kind, entry) for kind, entry in zip(kinds(coding), coding.coded, strict=True)):
        return Reading(columns[0], columns[1], tables=table)
    return Reading(columns[0], columns[1], matrix.to(dtype), constant.to(dtype), table)


def _is_plain(kind: Kind, entry: _Entry) -> bool:
    return kind != Kind.PLANES and entry[3].inverse is None and entry[3].shift is None


def _linear(kind: Kind, entry: _Entry, padded: Blocks, dim: int) -> tuple[Tensor, Tensor]:
    """Matrix [H or 1, width, dim] and constant [H or 1, dim] from features to numbers, fp64."""
    _, form, tables, folded = entry
    inverse = torch.eye(dim).unsqueeze(0) if folded.inverse is None else folded.inverse
    inverse = inverse.double().cpu()
    shift = torch.zeros(1, dim) if folded.shift is None else folded.shift
    constant = shift.double().cpu()
    lines = _lines(_widths(form), *tables) if kind == Kind.PLANES else None
    if lines is None:
        return torch.nn.functional.pad(inverse, (0, 0, 0, padded.width - form.stored)), constant
    middle, step = lines
    features, owners, worth = _planes(_widths(form), padded)
    weights = (worth * step[:, owners]).unsqueeze(-1) * inverse[:, owners]
    matrix = weights.new_zeros(weights.shape[0], padded.width, dim).index_copy_(1, features, weights)
    return matrix, constant + (middle.unsqueeze(-2) @ inverse).squeeze(-2)


def _head_tables(kind: Kind, form: Format, tables: tuple[Tensor, ...], block: int) -> Tensor:
    """[H or 1, 13, block] int32, zero for kinds that need none."""
    match form:
        case Row() if kind != Kind.PLANES:
            column = tables[1].int().cpu()
        case Grouped():
            column = torch.arange(form.dim, dtype=torch.int32).unsqueeze(0)
            column = column // form.group if form.along == "channel" else column
        case _:
            return torch.zeros(1, 13, block, dtype=torch.int32)
    column = torch.nn.functional.pad(column, (0, block - form.stored)).unsqueeze(1)
    table = piece_table(_widths(form), block).expand(len(column), -1, -1)
    return torch.cat([table, column], dim=1)

"""Where kernels find the bytes of a side: one row of numbers for each segment and KV head."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from kvsight.formats import Dense, Grouped
from kvsight.ops.attend.features import (
    Blocks,
    Coding,
    Kind,
    Reading,
    Uniform,
    blocks,
    books,
    most_pieces,
    plain,
    reading,
    uniform,
)
from kvsight.ops.attend.ref import Segment, head_dim, kv_heads
from kvsight.packing import cut

# hints that are worth compiling for: the widest load, a word, a byte
_ALIGNED = (16, 4, 1)


@dataclass(frozen=True, eq=False)
class Side:
    """Keys or values as the kernels see them.

    ``ends``: tokens up to the end of each segment. ``readings``: one for each segment; ``groups``: the
    distinct ones. ``sources``: the rows that kernels.py describes, segments first; ``held`` keeps alive
    what they point to. ``stored``: the type of dense numbers. ``plane_align``, ``code_align`` and
    ``dense_align`` divide the addresses of planes, of other codes and of dense numbers, in bytes.
    ``firsts``: the first token of each segment's storage. ``uniform``: how codes are read a row at a time.
    """

    heads: int
    ends: tuple[int, ...]
    readings: tuple[Reading, ...]
    groups: tuple[Reading, ...]
    padded: Blocks
    stored: torch.dtype
    pieces: int
    plane_align: int
    code_align: int
    dense_align: int
    firsts: tuple[int, ...]
    uniform: Uniform | None
    sources: list[list[int]]
    held: list[Tensor]


def read_side(
    segments: Sequence[Segment],
    device: torch.device,
    dtype: torch.dtype,
    tokens: int | None = None,
    exact: bool = True,
) -> Side:
    """Segments of one side, their linear maps in ``dtype``; empty ones are left out.

    Codes of one width are read so where kernels take ``tokens`` at a time; levels are as they are stored
    if ``exact``, else in fp16 where that is faster.
    """
    segments = [segment for segment in segments if segment.tokens]
    heads, dim = kv_heads(segments[0]), head_dim(segments[0])
    codings = [None if segment.dense is not None else Coding(segment.coded) for segment in segments]
    padded = blocks(codings, dim)
    dense = plain(heads, dim)
    found = [dense if coding is None else reading(coding, padded, dim, device, dtype) for coding in codings]
    groups = list(dict.fromkeys(found))
    ends = tuple(accumulate(segment.tokens for segment in segments))
    stored = _dense_type(segments)
    same = None if tokens is None else uniform(codings, padded.dim, tokens)
    same = replace(same, book=False) if same is not None and exact else same
    sources: list[list[int]] = []
    held: list[Tensor] = []
    bytewise = same is not None and same.book
    for segment, own, end in zip(segments, found, ends, strict=True):
        start = [groups.index(own), end - segment.tokens - segment.skip]
        of_head = dict(_places(segment, stored, held, bytewise))
        for head, (kind, sizes) in enumerate(zip(own.kinds, own.sizes, strict=True)):
            table = 0 if own.tables is None else own.tables[head].data_ptr()
            *place, levels = of_head[head]
            sources.append([int(kind), *start, *place, *sizes, table, levels])
    return Side(
        heads,
        ends,
        tuple(found),
        tuple(groups),
        padded,
        stored,
        max((most_pieces(coding) for coding in codings if coding is not None), default=0),
        _aligned(_plane_align(source) for source in sources),
        _aligned(_code_align(source, same) for source in sources),
        _aligned(_dense_align(source, stored.itemsize) for source in sources),
        tuple(end - segment.tokens - segment.skip for segment, end in zip(segments, ends, strict=True)),
        same,
        sources,
        held,
    )


def _places(
    segment: Segment, stored: torch.dtype, held: list[Tensor], bytewise: bool
) -> Iterator[tuple[int, list[int]]]:
    """Fields 3 to 12, and 17, of every head; ``bytewise`` where levels are looked up for whole bytes."""
    if segment.dense is not None:
        dense = _kept(segment.dense.to(stored), held)
        for head in range(dense.shape[1]):
            yield head, [*_place(dense, head), *(0,) * 6, 1, 0]
    found = books(Coding(segment.coded))
    for coded, book in zip(segment.coded, found, strict=True):
        form, tensors = coded.packed.format, coded.packed.tensors
        if isinstance(form, Dense):
            tensors = (tensors[0].to(stored),)
        tensors = tuple(_kept(tensor, held) for tensor in tensors)
        every = form.group if isinstance(form, Grouped) and form.along == "token" else 1
        tables = (book,) if bytewise and book is not None else coded.tables
        levels = tables[0].data_ptr() if tables else 0
        for i, head in enumerate(coded.heads):
            fields = [number for tensor in tensors for number in _place(tensor, i)]
            yield head, [*fields, *(0,) * (9 - len(fields)), every, levels]


def _place(x: Tensor, head: int) -> tuple[int, int, int]:
    """Address of a head of x [B, H, n, width], bytes from batch to batch, items from row to row."""
    size = x.element_size()
    return x.data_ptr() + head * x.stride(1) * size, x.stride(0) * size, x.stride(2)


def _kept(x: Tensor, held: list[Tensor]) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    held.append(x)
    return x


def _dense_type(segments: Sequence[Segment]) -> torch.dtype:
    """One type that holds all dense numbers exactly."""
    types = [segment.dense.dtype for segment in segments if segment.dense is not None]
    forms = [c.packed.format for segment in segments for c in segment.coded]
    types += [form.dtype for form in forms if isinstance(form, Dense)]
    return reduce(torch.promote_types, types) if types else torch.float32


def _aligned(divisors: Iterable[int]) -> int:
    common = math.gcd(*divisors)
    return next(size for size in _ALIGNED if common % size == 0)


def _plane_align(source: list[int]) -> int:
    start, batch, row, nibbles, crumbs = *source[3:6], *source[13:15]
    return math.gcd(start, batch, row, nibbles, crumbs) if source[0] == Kind.PLANES else 0


def _code_align(source: list[int], same: Uniform | None) -> int:
    """Every class of pieces begins at a multiple of this."""
    if same is None or source[0] in (Kind.DENSE, Kind.PLANES):
        return 0
    at, starts = 0, [0]
    for size, low in cut(same.width):
        at += source[13] * size // 8
        starts += [at] * (low > 0)
    return math.gcd(*source[3:6], *starts)


def _dense_align(source: list[int], size: int) -> int:
    start, batch, row, count = *source[3:6], source[13]
    return math.gcd(start, batch, row * size, count * size) if source[0] == Kind.DENSE else 0

"""Where kernels find the bytes of a side: one row of numbers for each segment and KV head."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from kvsight.formats import Dense, Grouped
from kvsight.ops.attend.features import Blocks, Coding, Kind, Reading, blocks, most_pieces, plain, reading
from kvsight.ops.attend.ref import Segment

# no load is wider than this many bytes
_WIDEST = 16


@dataclass(frozen=True, eq=False)
class Side:
    """Keys or values as the kernels see them.

    ``ends``: tokens up to the end of each segment. ``readings``: one for each segment; ``groups``: the
    distinct ones. ``sources``: the rows that kernels.py describes, segments first; ``held`` keeps alive
    what they point to. ``stored``: the type of dense numbers. ``align`` divides all addresses of planes.
    """

    heads: int
    ends: tuple[int, ...]
    readings: tuple[Reading, ...]
    groups: tuple[Reading, ...]
    padded: Blocks
    stored: torch.dtype
    pieces: int
    align: int
    sources: list[list[int]]
    held: list[Tensor]


def read_side(segments: Sequence[Segment], dim: int, device: torch.device) -> Side:
    """Segments of one side, of head_dim ``dim``; empty ones are left out."""
    segments = [segment for segment in segments if segment.tokens]
    heads = kv_heads(segments[0])
    codings = [None if segment.dense is not None else Coding(segment.coded) for segment in segments]
    padded = blocks(codings, dim)
    dense = plain(heads, dim)
    found = [dense if coding is None else reading(coding, padded, dim, device) for coding in codings]
    groups = list(dict.fromkeys(found))
    ends = tuple(accumulate(segment.tokens for segment in segments))
    stored = _dense_type(segments)
    sources: list[list[int]] = []
    held: list[Tensor] = []
    for segment, own, end in zip(segments, found, ends, strict=True):
        start = [groups.index(own), end - segment.tokens - segment.skip]
        of_head = dict(_places(segment, stored, held))
        for head, (kind, sizes) in enumerate(zip(own.kinds, own.sizes, strict=True)):
            table = 0 if own.tables is None else own.tables[head].data_ptr()
            *place, levels = of_head[head]
            sources.append([int(kind), *start, *place, *sizes, table, levels])
    forms = [c.packed.format for segment in segments for c in segment.coded]
    return Side(
        heads,
        ends,
        tuple(found),
        tuple(groups),
        padded,
        stored,
        max(map(most_pieces, forms), default=0),
        reduce(math.gcd, map(_common, sources), _WIDEST),
        sources,
        held,
    )


def kv_heads(segment: Segment) -> int:
    if segment.dense is not None:
        return segment.dense.shape[1]
    return sum(len(coded.heads) for coded in segment.coded)


def _places(segment: Segment, stored: torch.dtype, held: list[Tensor]) -> Iterator[tuple[int, list[int]]]:
    """Fields 3 to 12, and 17, of every head."""
    if segment.dense is not None:
        dense = _kept(segment.dense.to(stored), held)
        for head in range(dense.shape[1]):
            yield head, [*_place(dense, head), *(0,) * 6, 1, 0]
    for coded in segment.coded:
        form, tensors = coded.packed.format, coded.packed.tensors
        if isinstance(form, Dense):
            tensors = (tensors[0].to(stored),)
        tensors = tuple(_kept(tensor, held) for tensor in tensors)
        every = form.group if isinstance(form, Grouped) and form.along == "token" else 1
        levels = coded.tables[0].data_ptr() if coded.tables else 0
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


def _common(source: list[int]) -> int:
    """What divides the addresses that a source of planes is read from."""
    if source[0] != Kind.PLANES:
        return 0
    nibbles, crumbs = source[13:15]
    return math.gcd(*source[3:6], nibbles, crumbs)

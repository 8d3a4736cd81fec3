"""Bit packing of one row of codes: any mix of widths 1 to 8, and nothing crosses a byte.

A code of width w is cut from its top into pieces of 4, 2 and 1 bits (w = 7 is 4 + 2 + 1, w = 8 is
4 + 4). A row stores all top nibbles, then the low nibbles of 8-bit codes, then all 2-bit pieces, then
all single bits, each in coordinate order, lowest bits of a byte first; only the row's end is padded.
A code is a sum of shifted pieces, so a score is linear in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_WIDTH = 8

# sum of b_i·2^(56-7i): times eight 0/1 bytes, the top byte of the product holds them as bits
_GATHER_BITS = 0x0102040810204080


@dataclass(frozen=True)
class _Plane:
    """Pieces of ``size`` bits, in storage order: piece j is code bits ``low[j]`` and up of ``owner[j]``.

    ``runs`` lists (first piece, last piece + 1, first owner): neighbours in both orders.
    """

    size: int
    start_bit: int
    owner: tuple[int, ...]
    low: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]


def packed_width(widths: Sequence[int]) -> int:
    """Bytes of one packed row; only the end of the row is padded."""
    return -(-sum(widths) // 8)


@lru_cache(maxsize=4096)
def _planes(widths: tuple[int, ...]) -> tuple[_Plane, ...]:
    stored = [w for w in widths if w > 0]
    cuts = [
        (4, [(i, w - 4) for i, w in enumerate(stored) if w >= 4]),
        (4, [(i, 0) for i, w in enumerate(stored) if w == 8]),
        (2, [(i, w & 1) for i, w in enumerate(stored) if w & 2 and w < 8]),
        (1, [(i, 0) for i, w in enumerate(stored) if w & 1]),
    ]
    planes: list[_Plane] = []
    start = 0
    for size, pieces in cuts:
        if pieces:
            owner, low = zip(*pieces, strict=True)
            planes.append(_Plane(size, start, owner, low, _runs(owner)))
        start += size * len(pieces)
    return tuple(planes)


def _runs(owner: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    runs: list[tuple[int, int, int]] = []
    for j, i in enumerate(owner):
        if runs and i == runs[-1][2] + j - runs[-1][0]:
            runs[-1] = (runs[-1][0], j + 1, runs[-1][2])
        else:
            runs.append((j, j + 1, i))
    return tuple(runs)


@lru_cache(maxsize=64)
def _piece_table(size: int, device: torch.device) -> Tensor:
    """[256] words: the bytes of word b are the ``8 / size`` pieces of byte b."""
    octets = torch.arange(256, dtype=torch.int64).unsqueeze(-1)
    pieces = (octets >> torch.arange(0, 8, size)) & ((1 << size) - 1)
    word = {4: torch.int16, 2: torch.int32, 1: torch.int64}[size]
    return pieces.to(torch.uint8).contiguous().view(word).flatten().to(device)


@lru_cache(maxsize=4096)
def _scale(widths: tuple[int, ...], index: int, device: torch.device) -> Tensor | None:
    """What shifts each piece of one plane to its place, as a factor; None when nothing moves."""
    low = _planes(widths)[index].low
    return torch.tensor([1 << s for s in low], dtype=torch.uint8, device=device) if any(low) else None


@lru_cache(maxsize=4096)
def _bit_order(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """For each stored bit of a row, where it lies among the eight bits of every code."""
    order = [
        8 * i + low + bit
        for plane in _planes(widths)
        for i, low in zip(plane.owner, plane.low, strict=True)
        for bit in range(plane.size)
    ]
    return torch.tensor(order, dtype=torch.int64, device=device)


def pack_row(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack uint8 codes ``[..., stored]`` into uint8 rows ``[..., packed_width(widths)]``."""
    if codes.shape[-1] == 0:
        return codes
    bits = _lookup(codes, _piece_table(1, codes.device))
    bits = bits.index_select(-1, _bit_order(tuple(widths), codes.device))
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    words = bits.view(torch.int64)
    return ((words * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_row(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """Inverse of ``pack_row``: uint8 codes ``[..., stored]``, zero widths left out."""
    widths = tuple(widths)
    stored = len(widths) - widths.count(0)
    codes: Tensor | None = None
    for i, plane in enumerate(_planes(widths)):
        pieces = _pieces(rows, plane)
        scale = _scale(widths, i, rows.device)
        pieces = pieces if scale is None else pieces * scale
        if codes is None and len(plane.owner) == stored:
            codes = pieces
            continue
        if codes is None:
            codes = torch.zeros(*rows.shape[:-1], stored, dtype=torch.uint8, device=rows.device)
        for first, last, owner in plane.runs:
            codes[..., owner : owner + last - first] |= pieces[..., first:last]
    return rows[..., :0] if codes is None else codes


def _pieces(rows: Tensor, plane: _Plane) -> Tensor:
    first, skip = plane.start_bit // 8, plane.start_bit % 8 // plane.size
    count = len(plane.owner)
    last = -(-(plane.start_bit + plane.size * count) // 8)
    return _lookup(rows[..., first:last], _piece_table(plane.size, rows.device))[..., skip : skip + count]


def _lookup(octets: Tensor, table: Tensor) -> Tensor:
    """Each byte's table word, as bytes: one gather yields all pieces of a byte."""
    words = table.index_select(0, octets.reshape(-1).int())
    return words.view(torch.uint8).view(*octets.shape[:-1], octets.shape[-1] * table.element_size())

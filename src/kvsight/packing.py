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
# a one in every byte of a word
_BYTES = 0x0101010101010101


@dataclass(frozen=True)
class _Plane:
    """Pieces of ``size`` bits, in storage order: piece j is code bits ``low[j]`` and up of ``owner[j]``.

    ``runs`` lists (first piece, last piece + 1, first owner, low): neighbours in both orders.
    """

    size: int
    start_bit: int
    owner: tuple[int, ...]
    low: tuple[int, ...]
    runs: tuple[tuple[int, int, int, int], ...]


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
            planes.append(_Plane(size, start, owner, low, _runs(owner, low)))
        start += size * len(pieces)
    return tuple(planes)


def _runs(owner: Sequence[int], low: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    runs: list[tuple[int, int, int, int]] = []
    for j, (i, shift) in enumerate(zip(owner, low, strict=True)):
        if runs and i == runs[-1][2] + j - runs[-1][0] and shift == runs[-1][3]:
            runs[-1] = (runs[-1][0], j + 1, runs[-1][2], shift)
        else:
            runs.append((j, j + 1, i, shift))
    return tuple(runs)


@lru_cache(maxsize=64)
def _shifts(size: int, device: torch.device) -> Tensor:
    """[8 / size, 1]: where the pieces of a byte begin."""
    return torch.arange(0, 8, size, device=device).unsqueeze(-1)


@lru_cache(maxsize=64)
def _bit_table(device: torch.device) -> Tensor:
    """[256] int64 words: the bytes of word b are the eight bits of b."""
    octets = torch.arange(256, dtype=torch.int64).unsqueeze(-1)
    bits = (octets >> torch.arange(8)) & 1
    return bits.to(torch.uint8).contiguous().view(torch.int64).flatten().to(device)


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
    words = _bit_table(codes.device).index_select(0, codes.reshape(-1).int())
    bits = words.view(torch.uint8).view(*codes.shape[:-1], 8 * codes.shape[-1])
    bits = bits.index_select(-1, _bit_order(tuple(widths), codes.device))
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    words = bits.view(torch.int64)
    return ((words * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_row(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """Inverse of ``pack_row``: uint8 codes ``[..., stored]``, zero widths left out."""
    flat = rows.unsqueeze(-2) if rows.dim() == 1 else rows
    codes = unpack_columns(flat, widths).mT
    return codes.squeeze(-2) if rows.dim() == 1 else codes


def unpack_columns(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes of rows ``[..., n, bytes]`` as ``[..., stored, n]``.

    Tokens run fastest, so eight of them share an int64 word: no piece leaves its byte when it moves.
    """
    widths = tuple(widths)
    stored, tokens = len(widths) - widths.count(0), rows.shape[-2]
    if rows.numel() == 0:
        return rows.new_empty(*rows.shape[:-2], stored, tokens)
    columns = rows.new_zeros(*rows.shape[:-2], rows.shape[-1], tokens + -tokens % 8)
    columns[..., :tokens] = rows.mT
    words = columns.view(torch.int64)
    codes = words.new_zeros(*words.shape[:-2], stored, words.shape[-1])
    for plane in _planes(widths):
        pieces = _pieces(words, plane)
        for first, last, owner, low in plane.runs:
            moved = pieces[..., first:last, :]
            codes[..., owner : owner + last - first, :] |= moved << low if low else moved
    return codes.view(torch.uint8)[..., :tokens]


def _pieces(words: Tensor, plane: _Plane) -> Tensor:
    """All pieces of one plane, each at the bottom of its byte: [..., pieces, n / 8]."""
    first, skip = plane.start_bit // 8, plane.start_bit % 8 // plane.size
    last = -(-(plane.start_bit + plane.size * len(plane.owner)) // 8)
    octets = words[..., first:last, :]
    mask = _BYTES * ((1 << plane.size) - 1)
    pieces = ((octets.unsqueeze(-2) >> _shifts(plane.size, words.device)) & mask).flatten(-3, -2)
    return pieces[..., skip : skip + len(plane.owner), :]

"""Bit packing of one row of codes: any mix of widths 1 to 8, and nothing crosses a byte.

A code of width w is cut from its top into pieces of 4, 2 and 1 bits (w = 7 is 4 + 2 + 1, w = 8 is
4 + 4). A row stores all top nibbles, then the low nibbles of 8-bit codes, then all 2-bit pieces, then
all single bits, each in coordinate order, lowest bits of a byte first; only the row's end is padded.
A code is a sum of shifted pieces, so a score is linear in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WIDTH = 8


@dataclass(frozen=True)
class _Plane:
    """Pieces of equal size: ``counts[w]`` coordinates of width w give bits ``shift[w]`` and up."""

    size: int
    widths: tuple[int, ...]

    def shift(self, width: int) -> int:
        match self.size:
            case 4:
                return width - 4
            case 2:
                return width & 1
            case _:
                return 0


_NIBBLES_HIGH = _Plane(4, (8, 7, 6, 5, 4))
_NIBBLES_LOW = _Plane(4, (8,))
_CRUMBS = _Plane(2, (7, 6, 3, 2))
_BITS = _Plane(1, (7, 5, 3, 1))


def packed_width(widths: Sequence[int]) -> int:
    """Bytes of one packed row; only the end of the row is padded."""
    return -(-sum(widths) // 8)


def _bands(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(width, start, stop) of each run of equal non-zero width."""
    bands: list[tuple[int, int, int]] = []
    for i, width in enumerate(widths):
        if width == 0:
            break
        if bands and bands[-1][0] == width:
            bands[-1] = (width, bands[-1][1], i + 1)
        else:
            bands.append((width, i, i + 1))
    return bands


def pack_row(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack uint8 codes ``[..., stored]`` into uint8 rows ``[..., packed_width(widths)]``."""
    bands = _bands(widths)
    sections = [
        _merge(codes, bands, _NIBBLES_HIGH),
        _merge(codes, [band for band in bands if band[0] == 8], _NIBBLES_LOW, low=True),
        _merge(codes, bands, _CRUMBS),
        _merge(codes, bands, _BITS),
    ]
    nibbles = torch.cat([sections[0], sections[1]], dim=-1)
    bits = torch.cat([_to_bits(nibbles, 4), _to_bits(sections[2], 2), _to_bits(sections[3], 1)], dim=-1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    octets = bits.reshape(*bits.shape[:-1], -1, 8)
    return (octets * weights).sum(dim=-1, dtype=torch.uint8)


def _merge(
    codes: Tensor, bands: Sequence[tuple[int, int, int]], plane: _Plane, low: bool = False
) -> Tensor:
    mask = (1 << plane.size) - 1
    pieces = [
        (codes[..., start:stop] >> (0 if low else plane.shift(width))) & mask
        for width, start, stop in bands
        if width in plane.widths
    ]
    return torch.cat(pieces, dim=-1) if pieces else codes[..., :0]


def _to_bits(pieces: Tensor, size: int) -> Tensor:
    shifts = torch.arange(size, dtype=torch.uint8, device=pieces.device)
    return ((pieces.unsqueeze(-1) >> shifts) & 1).flatten(-2)


def unpack_row(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """Inverse of ``pack_row``: uint8 codes ``[..., stored]``, zero widths left out."""
    bands = _bands(widths)
    counts = {width: stop - start for width, start, stop in bands}
    high = sum(counts.get(w, 0) for w in _NIBBLES_HIGH.widths)
    low = counts.get(8, 0)
    crumbs = sum(counts.get(w, 0) for w in _CRUMBS.widths)
    bits = sum(counts.get(w, 0) for w in _BITS.widths)
    crumb_start = 4 * (high + low)
    bit_start = crumb_start + 2 * crumbs
    nibble_pieces = _section(rows, 0, 4, high + low)
    crumb_pieces = _section(rows, crumb_start, 2, crumbs)
    bit_pieces = _section(rows, bit_start, 1, bits)
    out: list[Tensor] = []
    at_nibble = at_crumb = at_bit = 0
    for width, start, stop in bands:
        n = stop - start
        code: Tensor | None = None
        if width >= 4:
            code = nibble_pieces[..., at_nibble : at_nibble + n]
            at_nibble += n
            code = code << (width - 4) if width > 4 else code
        if width == 8:
            assert code is not None
            code = code | nibble_pieces[..., high : high + n]
        if width in _CRUMBS.widths:
            piece = crumb_pieces[..., at_crumb : at_crumb + n]
            at_crumb += n
            piece = piece << 1 if width & 1 else piece
            code = piece if code is None else code | piece
        if width in _BITS.widths:
            piece = bit_pieces[..., at_bit : at_bit + n]
            at_bit += n
            code = piece if code is None else code | piece
        assert code is not None
        out.append(code)
    if not out:
        return rows[..., :0]
    return out[0] if len(out) == 1 else torch.cat(out, dim=-1)


def _section(rows: Tensor, bit_start: int, size: int, count: int) -> Tensor:
    """``count`` pieces of ``size`` bits that start ``bit_start`` bits into each row."""
    if count == 0:
        return rows[..., :0]
    first, skip = bit_start // 8, bit_start % 8 // size
    last = -(-(bit_start + size * count) // 8)
    octets = rows[..., first:last]
    if size == 4:
        pieces = torch.stack((octets & 15, octets >> 4), dim=-1)
    else:
        shifts = torch.arange(0, 8, size, dtype=torch.uint8, device=rows.device)
        pieces = (octets.unsqueeze(-1) >> shifts) & ((1 << size) - 1)
    return pieces.flatten(-2)[..., skip : skip + count]

"""Bit packing of one row of codes: any mix of widths 1 to 8, and nothing crosses a byte; and trits.

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


def half(x: Tensor) -> Tensor:
    """fp16 of scales, norms and outliers; larger numbers than it has become its largest."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half()


@dataclass(frozen=True)
class Piece:
    """``size`` bits: stored from bit ``at`` of the row, they are bits ``low`` and up of code ``owner``."""

    size: int
    at: int
    owner: int
    low: int


@dataclass(frozen=True, eq=False)
class _Slot:
    """The first, second or third piece of every code: which byte, how far down, its mask, how far up."""

    octet: Tensor
    down: Tensor
    mask: Tensor
    up: Tensor | None


def packed_width(widths: Sequence[int]) -> int:
    """Bytes of one packed row; only the end of the row is padded."""
    return -(-sum(widths) // 8)


def cut(width: int) -> tuple[tuple[int, int], ...]:
    """(size, low) of the pieces of a code, top first."""
    if width == 8:
        return ((4, 4), (4, 0))
    return tuple((size, width & (size - 1)) for size in (4, 2, 1) if width & size)


@lru_cache(maxsize=4096)
def pieces(widths: tuple[int, ...]) -> tuple[Piece, ...]:
    """All pieces of a row in storage order."""
    of_code = [cut(w) for w in widths if w > 0]
    # top nibbles, the low nibbles of 8-bit codes, pairs, single bits; each in the order of codes
    every = [
        (size, owner, low, nth) for owner, own in enumerate(of_code) for nth, (size, low) in enumerate(own)
    ]
    every.sort(key=lambda piece: (-piece[0], piece[3] if piece[0] == 4 else 0))
    pieces: list[Piece] = []
    at = 0
    for size, owner, low, _ in every:
        pieces.append(Piece(size, at, owner, low))
        at += size
    return tuple(pieces)


@lru_cache(maxsize=4096)
def piece_table(widths: tuple[int, ...], block: int) -> Tensor:
    """[12, block] int32: octet, shift down, mask and shift up of each code's up to three pieces.

    Where a code has no such piece, and past the stored codes, all is zero.
    """
    table = torch.zeros(12, block, dtype=torch.int32)
    seen = [0] * len(widths)
    for piece in pieces(widths):
        row = 4 * seen[piece.owner]
        seen[piece.owner] += 1
        entries = (piece.at // 8, piece.at % 8, (1 << piece.size) - 1, piece.low)
        table[row : row + 4, piece.owner] = torch.tensor(entries, dtype=torch.int32)
    return table


@lru_cache(maxsize=4096)
def _slots(widths: tuple[int, ...], device: torch.device) -> tuple[_Slot, ...]:
    """Every code's pieces side by side, in as many slots as the longest code has pieces."""
    stored = len(widths) - widths.count(0)
    of_code: list[list[Piece]] = [[] for _ in range(stored)]
    for piece in pieces(widths):
        of_code[piece.owner].append(piece)
    slots: list[_Slot] = []
    for turn in range(max(map(len, of_code), default=0)):
        # a code without a piece in this slot masks everything away
        row = [own[turn] if turn < len(own) else Piece(0, 0, 0, 0) for own in of_code]
        up = [piece.low for piece in row]
        slots.append(
            _Slot(
                _column([piece.at // 8 for piece in row], device).flatten(),
                _column([piece.at % 8 for piece in row], device),
                _column([_BYTES * ((1 << piece.size) - 1) for piece in row], device),
                _column(up, device) if any(up) else None,
            )
        )
    return tuple(slots)


def _column(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device).unsqueeze(-1)


@lru_cache(maxsize=64)
def _bit_table(device: torch.device) -> Tensor:
    """[256] int64 words: the bytes of word b are the eight bits of b."""
    octets = torch.arange(256, dtype=torch.int64).unsqueeze(-1)
    bits = (octets >> torch.arange(8)) & 1
    return bits.to(torch.uint8).contiguous().view(torch.int64).flatten().to(device)


@lru_cache(maxsize=4096)
def _bit_order(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """For each stored bit of a row, where it lies among the eight bits of every code."""
    order = [8 * piece.owner + piece.low + bit for piece in pieces(widths) for bit in range(piece.size)]
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
    codes: Tensor | None = None
    for slot in _slots(widths, rows.device):
        piece = (words.index_select(-2, slot.octet) >> slot.down).bitwise_and_(slot.mask)
        piece = piece if slot.up is None else piece << slot.up
        codes = piece if codes is None else codes.bitwise_or_(piece)
    assert codes is not None
    return codes.view(torch.uint8)[..., :tokens]


# 3^5 = 243 codes of five trits fit a byte
_TRITS = 5


def packed_trits(count: int) -> int:
    """Bytes of one row of base-3 digits."""
    return -(-count // _TRITS)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack uint8 digits 0 to 2 ``[..., n]``, five a byte: Σ digit_i 3^i. The row's end is padded with 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % _TRITS))
    worth = torch.tensor([3**i for i in range(_TRITS)], dtype=torch.uint8, device=codes.device)
    digits: Tensor = padded.unflatten(-1, (-1, _TRITS))
    return (digits * worth).sum(-1, dtype=torch.uint8)


def unpack_trits(rows: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_trits``: uint8 digits ``[..., count]``."""
    return _trit_table(rows.device)[rows.int()].flatten(-2)[..., :count]


@lru_cache(maxsize=64)
def _trit_table(device: torch.device) -> Tensor:
    """[256, 5]: the digits of every byte, lowest first; bytes above 242 do not occur."""
    digits = torch.arange(256).unsqueeze(-1) // 3 ** torch.arange(_TRITS) % 3
    return digits.to(torch.uint8).to(device)

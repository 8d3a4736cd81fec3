"""Tile packing: 64 tokens of one head in the order in which tensor cores read them.

Widths are equal within chunks of 16 coordinates. As in rows, a code is cut from its top into pieces of
4, 2 and 1 bits; the pieces of one chunk and one size are a *block*. A tile lists all 4-bit blocks, then
the 2-bit blocks, then the 1-bit blocks, each in chunk order.

The 64 tokens are four groups of 16. A block of one group, 16 x 16 pieces, is what 32 lanes hold as one
byte each for four columns, and every byte holds two rows: row g in its low nibble, row g + 8 in its high
one. Keys have tokens as rows and coordinates as columns, values the reverse: either way lane 4g + t
holds what an ``mma`` of 8-bit integers wants of it, after a mask and nothing else. Four bits fill a
nibble. Two blocks of 2 bits share one, or four blocks of 1 bit; blocks left over share nibbles with
themselves, one token group beside the other. Bytes: docs/formats.md#tile.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kvsight.packing import cut

CHUNK = 16
TOKENS = 64
# a chunk is at most two blocks
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)
_GROUPS = TOKENS // 16
_LANES = 32

Rows = Literal["tokens", "coordinates"]


@dataclass(frozen=True)
class Block:
    """``size`` bits of every code of a chunk: bits ``low`` and up. ``slot`` is the place in a nibble.

    A block with ``slot=None`` is left over: its token groups take the slots in turn.
    """

    chunk: int
    size: int
    low: int
    slot: int | None


@dataclass(frozen=True)
class Tiling:
    """The tile of one head. ``widths`` has one entry per chunk, falling."""

    widths: tuple[int, ...]
    rows: Rows

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the order of storage."""
        out: list[Block] = []
        for size in (4, 2, 1):
            pieces = [
                (chunk, low)
                for chunk, width in enumerate(self.widths)
                for piece, low in cut(width)
                if piece == size
            ]
            share = 4 // size
            whole = len(pieces) // share * share
            out += [
                Block(chunk, size, low, i % share if i < whole else None)
                for i, (chunk, low) in enumerate(pieces)
            ]
        return tuple(out)

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """Blocks of 4, 2 and 1 bits."""
        sizes = [block.size for block in self.blocks]
        return sizes.count(4), sizes.count(2), sizes.count(1)

    @property
    def nbytes(self) -> int:
        """Bytes of 64 tokens."""
        return TOKENS * CHUNK // 8 * sum(self.widths)

    @property
    def stored(self) -> int:
        """Coordinates that have any bits."""
        return CHUNK * sum(width > 0 for width in self.widths)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 codes [..., 64·n, stored] to tiles [..., n, nbytes]."""
        lead, tiles = codes.shape[:-2], codes.shape[-2] // TOKENS
        flat = codes.reshape(lead.numel() * tiles, TOKENS, self.stored)
        parts = [_join([_lanes(flat, block, self.rows) for block in group], group) for group in self.groups]
        packed = torch.cat(parts, dim=-1) if parts else flat.new_empty(len(flat), 0)
        return packed.view(*lead, tiles, self.nbytes)

    def unpack(self, tiles: Tensor) -> Tensor:
        """Inverse of ``pack``."""
        lead, count = tiles.shape[:-2], tiles.shape[-2]
        flat = tiles.reshape(lead.numel() * count, self.nbytes)
        codes = flat.new_zeros(lead.numel() * count, TOKENS, self.stored)
        parts = flat.split([lane_bytes(group) * _LANES for group in self.groups], dim=-1)
        for group, part in zip(self.groups, parts, strict=True):
            for block, lanes in zip(group, _part(part, group), strict=True):
                columns = slice(CHUNK * block.chunk, CHUNK * (block.chunk + 1))
                codes[..., columns] |= _plain(lanes, block, self.rows) << block.low
        return codes.view(*lead, count * TOKENS, self.stored)

    @cached_property
    def groups(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks that share bytes, in the order of storage: whole nibbles first, then what is left over."""
        whole: list[tuple[Block, ...]] = []
        for size in (4, 2, 1):
            mine = [b for b in self.blocks if b.size == size and b.slot is not None]
            share = 4 // size
            whole += [tuple(mine[i : i + share]) for i in range(0, len(mine), share)]
        return (*whole, *((b,) for b in self.blocks if b.slot is None))


def lane_bytes(group: tuple[Block, ...]) -> int:
    """Bytes that each of 32 lanes reads of blocks that lie together."""
    return 16 if group[0].slot is not None else 4 * group[0].size


def _lanes(codes: Tensor, block: Block, rows: Rows) -> Tensor:
    """A block of [N, 64, stored] as bytes with a row in each nibble: [N, token group, lane, column]."""
    piece = (codes[..., CHUNK * block.chunk : CHUNK * (block.chunk + 1)] >> block.low) & _mask(block)
    if rows == "tokens":
        # token 8r + g, coordinate 4t + e
        x = piece.reshape(-1, _GROUPS, 2, 8, 4, 4)
    else:
        # token 8i + 2t + j is column 2j + i: how the product of scores leaves them; coordinate 8r + g
        x = piece.reshape(-1, _GROUPS, 2, 4, 2, 2, 8).permute(0, 1, 5, 6, 3, 4, 2)
    low, high = x.reshape(-1, _GROUPS, 2, _LANES, 4).unbind(2)
    return low | high << 4


def _plain(lanes: Tensor, block: Block, rows: Rows) -> Tensor:
    """Inverse of ``_lanes``: pieces [N, 64, 16]."""
    x = torch.stack([lanes & _mask(block), lanes >> 4 & _mask(block)], dim=2)
    if rows == "tokens":
        return x.reshape(-1, TOKENS, CHUNK)
    return x.reshape(-1, _GROUPS, 2, 8, 4, 2, 2).permute(0, 1, 6, 4, 5, 2, 3).reshape(-1, TOKENS, CHUNK)


def _join(lanes: list[Tensor], group: tuple[Block, ...]) -> Tensor:
    """The bytes [N, 32 · lane_bytes] of blocks that lie together."""
    size, share = group[0].size, 4 // group[0].size
    if group[0].slot is None:
        # the slots are token groups
        lanes = list(lanes[0].unflatten(1, (-1, share)).unbind(2))
    out = lanes[0]
    for slot, more in enumerate(lanes[1:], start=1):
        out = out | more << slot * size
    return out.transpose(1, 2).flatten(1)


def _part(part: Tensor, group: tuple[Block, ...]) -> list[Tensor]:
    """Inverse of ``_join``; what other blocks hold of a nibble is still in it."""
    size, share = group[0].size, 4 // group[0].size
    words = part.unflatten(1, (_LANES, -1, 4)).transpose(1, 2)
    slots = [words >> slot * size for slot in range(share)]
    return [torch.stack(slots, dim=2).flatten(1, 2)] if group[0].slot is None else slots


def _mask(block: Block) -> int:
    return (1 << block.size) - 1

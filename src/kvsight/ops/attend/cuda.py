"""Decode attention on tiles on NVIDIA GPUs: one launch of ``tiles.cu``, compiled at run time."""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.ops.attend.tiles import FoldedTiles
from kvsight.ops.nvrtc import NUMBERS, compiled
from kvsight.tiling import CHUNK, TOKENS

SOURCE = Path(__file__).with_name("tiles.cu")
_ROWS = 4
# shared memory that the blocks of a multiprocessor may use, and as much of it as a warp can put to use
_SHARED = 227 * 1024
_RING = 24 * 1024
_MOST_ROW_TILES = 4
MOST_ROWS = _ROWS * _MOST_ROW_TILES

_POINTERS = (
    "query",
    "heads",
    "fold",
    "fold_shift",
    "unfold",
    "unfold_shift",
    "items",
    "ranges",
    "seen",
    "first_keys",
    "first_values",
    "last_keys",
    "last_values",
    "sink_logits",
    "out",
    "partial",
    "masses",
    "done",
)


class Arguments(ctypes.Structure):
    """The kernel's one argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *(
            (n, ctypes.c_int)
            for n in ("head_count", "item_count", "rows", "queries", "first", "last", "after")
        ),
    )


@dataclass(frozen=True)
class Shape:
    """What a compiled kernel is made for."""

    head_dim: int
    key_blocks: int
    value_blocks: int
    row_tiles: int
    number: int
    warps: int = 8
    ring: int = 0
    blocks: int = 1

    def macros(self) -> dict[str, int]:
        return {
            "HEAD_DIM": self.head_dim,
            "KEY_BLOCKS": self.key_blocks,
            "VALUE_BLOCKS": self.value_blocks,
            "ROW_TILES": self.row_tiles,
            "NUMBER": self.number,
            "WARPS": self.warps,
            "RING": self.ring,
            "BLOCKS": self.blocks,
        }

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: rings and the folded query, or the merges that reuse them."""
        rows, keys = _ROWS * self.row_tiles, CHUNK * self.key_blocks
        fragments = (self.key_blocks + 1) * self.row_tiles * 256
        work = 4 * max(rows * (self.head_dim + keys), 2 * self.warps * rows)
        stream = self.warps * self.ring + 8 * rows + fragments + work
        exact = 4 * rows * (self.head_dim * (self.warps + 1) + 2 * self.warps)
        return max(stream, exact)

    @property
    def least_ring(self) -> int:
        """What a warp's sums take of its ring when warps are merged."""
        return 4 * _ROWS * self.row_tiles * CHUNK * self.value_blocks

    def fitting(self, tile_bytes: int) -> "Shape":
        """With as many warps as have room for rings of K and V tiles of ``tile_bytes`` together."""
        wanted = max(tile_bytes, self.least_ring)
        for warps in (8, 4, 2, 1):
            bare = replace(self, warps=warps, ring=0)
            ring = (_SHARED // self.blocks - bare.shared_bytes) // warps // 128 * 128
            if ring >= wanted:
                return replace(bare, ring=min(ring, max(wanted, _RING)))
        raise KVSightError(
            f"tiles of {tile_bytes} bytes do not fit the shared memory of a multiprocessor; "
            "fit the plan with fewer bits."
        )


@dataclass(frozen=True, eq=False)
class TiledTokens:
    """Coded tokens of one side: ``tiles[h]`` uint8 [B, n, nbytes], tiles of a sequence one behind another.

    ``tokens`` of them are stored; the first ``skip`` are no longer visible.
    """

    folded: FoldedTiles
    tiles: tuple[Tensor, ...]
    tokens: int
    skip: int = 0


@dataclass(frozen=True, eq=False)
class Exact:
    """Exact tokens of both sides, [B, H, n, d] each: before the coded ones and behind them."""

    first_keys: Tensor
    first_values: Tensor
    last_keys: Tensor
    last_values: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One launch: ``tensors`` are kept alive until it is queued."""

    shape: Shape
    grid: tuple[int, int, int]
    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    out: Tensor


def token_ranges(  # noqa: PLR0913
    batch: int,
    queries: int,
    first: int,
    coded: int,
    last: int,
    *,
    skip: int = 0,
    hidden: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Visible tokens of every query, int32 [B, queries, 6]: from and to of exact, coded and exact tokens.

    Args:
        first, coded, last: visible tokens of each kind, in order; the newest are the queries' own.
        skip: coded tokens that are stored before the visible ones.
        hidden: [B], how many of the first visible tokens are padding.
        window: a query sees this many tokens at most, itself included.
    """
    total = first + coded + last
    to = torch.arange(total - queries + 1, total + 1).expand(batch, -1)
    start = torch.zeros_like(to) if hidden is None else hidden.to(to).unsqueeze(-1).expand_as(to)
    if window is not None:
        start = torch.maximum(start, to - window)
    kinds = ((0, first, 0), (first, coded, skip), (first + coded, last, 0))
    bounds = [(x - at).clamp(0, size) + more for at, size, more in kinds for x in (start, to)]
    return torch.stack(bounds, dim=-1).int()


@dataclass(frozen=True, eq=False)
class TileReader:
    """What stays the same from launch to launch while tiles stay where they are."""

    sides: tuple[FoldedTiles, FoldedTiles]
    heads: Tensor
    fold: Tensor
    fold_shift: Tensor
    tiles: tuple[Tensor, ...]
    scaling: float

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of a K and a V tile of each head."""
        keys, values = (side.tilings for side in self.sides)
        return tuple(k.nbytes + v.nbytes for k, v in zip(keys, values, strict=True))

    @classmethod
    def of(cls, keys: TiledTokens, values: TiledTokens, scaling: float) -> "TileReader":
        """For the tiles of both sides, and scores that are scaled by ``scaling``."""
        log2 = scaling * math.log2(math.e)
        folded = keys.folded
        return cls(
            (folded, values.folded),
            _heads(keys, values).to(folded.matrix.device),
            folded.matrix * log2,
            folded.shift * log2,
            (*keys.tiles, *values.tiles),
            scaling,
        )

    def call(  # noqa: PLR0913
        self,
        q: Tensor,
        tokens: int,
        ranges: Tensor | None,
        *,
        seen: Tensor | None = None,
        after: int = 0,
        skip: int = 0,
        exact: Exact | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        workers: int = 132,
        shape: Mapping[str, int] | None = None,
    ) -> Call:
        """Prepare a launch.

        Args:
            q: [B, Hq, Q, d] with Q · Hq / H at most 16, contiguous.
            tokens, skip: stored coded tokens, and how many of the first are no longer visible.
            ranges: as from ``token_ranges``, on q's device; None for all tokens up to a query's own.
            seen: without ranges, int32 [1]: tokens of a sequence, the queries' own included.
            after: without ranges, how many of the newest are queries of other launches.
            workers: blocks of threads to share the work among, about.
            shape: settings of ``Shape``; without a ring, warps and ring are chosen to fit.
        """
        batch, query_heads, queries, dim = q.shape
        heads = len(self.sides[0].tilings)
        rows = query_heads // heads * queries
        row_tiles = -(-rows // _ROWS)
        if row_tiles > _MOST_ROW_TILES:
            raise KVSightError(f"a launch takes {MOST_ROWS} query rows a KV head; got {rows}.")
        kept = _no_exact(q, heads) if exact is None else exact
        first, last = kept.first_keys.shape[2], kept.last_keys.shape[2]
        blocks = [side.blocks for side in self.sides]
        made = Shape(dim, blocks[0], blocks[1], row_tiles, NUMBERS[q.dtype], **(shape or {}))
        if not made.ring:
            made = made.fitting(max(self.sizes))
        tiles = max(1, -(-tokens // TOKENS) - skip // TOKENS)
        items = _items(self.sizes, tiles, max(1, workers // batch), first + last > 0, q.device)
        room = (batch, len(items), _ROWS * row_tiles)
        tensors = {
            "query": q,
            "heads": self.heads,
            "fold": self.fold,
            "fold_shift": self.fold_shift,
            "unfold": self.sides[1].matrix,
            "unfold_shift": self.sides[1].shift,
            "items": items,
            "ranges": None if ranges is None else ranges.contiguous(),
            "seen": seen,
            "first_keys": kept.first_keys.to(q.dtype).contiguous(),
            "first_values": kept.first_values.to(q.dtype).contiguous(),
            "last_keys": kept.last_keys.to(q.dtype).contiguous(),
            "last_values": kept.last_values.to(q.dtype).contiguous(),
            "sink_logits": None if sink_logits is None else sink_logits.float().contiguous(),
            "out": q.new_empty(batch, queries, query_heads, dim),
            "partial": q.new_empty(*room, max(CHUNK * blocks[1], dim), dtype=torch.float32),
            "masses": q.new_empty(*room, 2, dtype=torch.float32),
            "done": _counters(batch * heads, q.device),
        }
        numbers = {
            "scaling": self.scaling,
            "softcap": 0.0 if softcap is None else softcap,
            "head_count": heads,
            "item_count": len(items),
            "rows": rows,
            "queries": queries,
            "first": first,
            "last": last,
            "after": after,
        }
        pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
        alive = (*(t for t in tensors.values() if t is not None), *self.tiles)
        out = tensors["out"]
        assert out is not None
        return Call(made, (len(items), batch, 1), {**pointers, **numbers}, alive, out)


def _no_exact(q: Tensor, heads: int) -> Exact:
    none = q.new_empty(q.shape[0], heads, 0, q.shape[3])
    return Exact(none, none, none, none)


def _heads(keys: TiledTokens, values: TiledTokens) -> Tensor:
    """The kernel's ``Head`` of every KV head as int64 [H, 7]: addresses, strides, counts of blocks."""
    rows: list[list[int]] = []
    for head in range(len(keys.tiles)):
        k, v = keys.tiles[head], values.tiles[head]
        counts = [*_counts(keys, head), *_counts(values, head)]
        pairs = [counts[i] | counts[i + 1] << 32 for i in (0, 2, 4)]
        rows.append([k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), *pairs])
    return torch.tensor(rows, dtype=torch.int64)


def _counts(side: TiledTokens, head: int) -> list[int]:
    """Blocks of 4, 2 and 1 bits."""
    sizes = [block.size for block in side.folded.tilings[head].blocks]
    return [sizes.count(size) for size in (4, 2, 1)]


@lru_cache(maxsize=4096)
def _items(sizes: tuple[int, ...], tiles: int, workers: int, exact: bool, device: torch.device) -> Tensor:
    """The kernel's ``Item`` of every block, int32 [n, 4]: splits in proportion to what each head reads."""
    out: list[list[int]] = []
    slot = 0
    for head, size in enumerate(sizes):
        coded = min(tiles, max(1, round(workers * size / max(1, sum(sizes)))))
        out += [[head, split, coded, slot] for split in range(coded + exact)]
        slot += coded + exact
    return torch.tensor(out, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _counters(count: int, device: torch.device) -> Tensor:
    # every launch leaves them at zero
    return torch.zeros(count, dtype=torch.int32, device=device)


def attend_tiles(call: Call) -> Tensor:
    """Queue a prepared launch on the current stream; [B, Q, Hq, d]."""
    shape = call.shape
    kernel = compiled(SOURCE, "attend_tiles", tuple(shape.macros().items()), shape.shared_bytes)
    kernel.launch(call.grid, 32 * shape.warps, Arguments(**call.values))
    return call.out

"""Decode attention on tiles on NVIDIA GPUs: ``tiles.cu``, compiled at run time."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.ops.attend.maps import chunk_tables, key_maps, most_products, value_maps
from kvsight.ops.attend.schedule import schedule
from kvsight.ops.attend.tiles import FoldedTiles, most_blocks
from kvsight.ops.builds import Source
from kvsight.ops.nvrtc import (
    HALVES_SOURCE,
    NUMBERS,
    NUMBERS_SOURCE,
    RESERVED_BYTES,
    SHARED_BYTES,
    Kernel,
    compiled,
    multiprocessors,
)
from kvsight.tiling import CHUNK, TOKENS, Tiling

_NAMES = ("intrinsics.cuh", "tiles.cuh", "maps.cuh", "products.cuh", "stream.cuh", "tiles.cu")
SOURCES = (NUMBERS_SOURCE, HALVES_SOURCE, *(Path(__file__).with_name(name) for name in _NAMES))
# query rows of a tensor core's product
_ROWS = 4
# the first compute capability that copies in bulk
_HOPPER = (9, 0)
# shared memory: what a warp can put to use, its barriers; an item without chunks, its stream and feeds
_RING, _BARRIERS, _ITEM, _STREAM = 24 * 1024, 128, 96, 96
# slots of a ring for each side
_MOST_STAGES = 8
# with more sums two blocks of threads no longer find registers
_LIGHT = 16
# bytes that could be read while a block and a tile apart from its blocks are worked on: with four query
# rows, and with eight. Heads that are read twice are cut better by the former (bench/attend.py)
_COSTS, _MORE_COSTS = (96, 4096), (200, 8192)
# and while a part apart from its tiles is
_ENTRY_COST = 300_000
# tiles of a warp: 33,025 products of bytes fit 32 bits, and contexts may be half as long again as a
# schedule was made for
_MOST_TILES = 33_025 // TOKENS // 2
# with more rows an item has no registers left, and with more of them a prefill is faster
_MOST_ROW_TILES, MOST_ROWS = 2, 16

_POINTERS = (
    "query",
    "key_maps",
    "value_maps",
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
        *((n, ctypes.c_int) for n in ("head_count", "rows", "queries", "first", "last", "after")),
    )


@dataclass(frozen=True)
class Shape:
    """What a compiled kernel is made for. Without ``ring``, ``fitting`` finds warps, ring and blocks."""

    head_dim: int
    key_blocks: int
    key_products: int
    value_blocks: int
    key_kinds: tuple[tuple[int, int, int], ...]
    value_kinds: tuple[tuple[int, int, int], ...]
    row_tiles: int
    number: int
    softcap: bool = False
    warps: int = 8
    ring: int = 0
    blocks: int = 1

    def macros(self) -> tuple[tuple[str, int | str], ...]:
        return (
            ("HEAD_DIM", self.head_dim),
            ("KEY_BLOCKS", self.key_blocks),
            ("KEY_PRODUCTS", self.key_products),
            ("VALUE_BLOCKS", self.value_blocks),
            ("KEY_KINDS", _listed(self.key_kinds)),
            ("VALUE_KINDS", _listed(self.value_kinds)),
            ("ROW_TILES", self.row_tiles),
            ("NUMBER", self.number),
            ("SOFTCAP", int(self.softcap)),
            ("WARPS", self.warps),
            ("RING", self.ring),
            ("BLOCKS", self.blocks),
        )

    @property
    def rows(self) -> int:
        return _ROWS * self.row_tiles

    @property
    def parts(self) -> int:
        """16-bit floats that hold a number of a map together."""
        return 1 if self.number == NUMBERS[torch.bfloat16] else 2

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        warp = self.ring + _BARRIERS + 8 * self.rows
        item = _ITEM + 2 * self.head_dim + _STREAM + 2 * self.parts * self.rows * self.head_dim
        return self.warps * warp + item + 256 * self.key_products * self.row_tiles + 16 * self.rows

    @property
    def least_ring(self) -> int:
        """What merges, which use the rings too, take of each."""
        rows, values, warps = self.rows, CHUNK * self.value_blocks, self.warps
        shares = max(1, 32 * warps // (rows * self.head_dim // 4))
        coded = warps * rows * (values + 8) + (shares + 1) * rows * (self.head_dim + 2)
        exact = rows * (self.head_dim * (warps + 1) + 2 * warps)
        return -(-4 * max(coded, exact) // warps)

    def stages(self, keys: int, values: int) -> int:
        """How many tiles of so many bytes a ring holds: of keys, and of values times 2^8."""
        counts = [max(1, min(_MOST_STAGES, self.ring // max(keys + values, 1)))] * 2
        for i, size in enumerate((keys, values)):
            if counts[i] < _MOST_STAGES and counts[0] * keys + counts[1] * values + size <= self.ring:
                counts[i] += 1
        return counts[0] | counts[1] << 8

    def fitting(self, tile_bytes: int) -> "Shape":
        """With as many warps as have room for rings of K and V tiles of ``tile_bytes`` together."""
        light = self.row_tiles == 1 and self.value_blocks <= _LIGHT
        for blocks, warps in ((2, 8), (1, 8), (1, 4), (1, 2))[not light :]:
            bare = replace(self, warps=warps, ring=0, blocks=blocks)
            room = SHARED_BYTES // blocks - RESERVED_BYTES
            ring = (room - bare.shared_bytes) // warps // 128 * 128
            wanted = max(tile_bytes, bare.least_ring)
            if ring >= wanted:
                return replace(bare, ring=min(ring, max(-(-wanted // 128) * 128, _RING)))
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

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """As the kernel reads them, by name."""
        return {name: _plain(getattr(self, name), dtype) for name in self.__dataclass_fields__}


@dataclass(frozen=True, eq=False)
class Call:
    """One launch; ``tensors`` are kept alive until it is queued. What ``values`` lack is zero."""

    shape: Shape
    grid: tuple[int, int, int]
    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    out: Tensor


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    # they mostly are as they should be, and every call asks
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


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


def placed(ranges: Tensor, device: torch.device) -> Tensor:
    """``ranges`` on a device, which is not waited for."""
    return ranges.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ranges


class _Size(NamedTuple):
    """What decides how a launch is set up: ``tiles`` about, ``workers`` and ``given`` as in ``call``."""

    batch: int
    rows: int
    dtype: torch.dtype
    tiles: int
    exact: bool
    softcap: bool
    workers: int
    given: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class _Setup:
    """What launches of one size share: the number of ``blocks``, ``tensors`` by the kernel's names.

    Launches that share scratch follow one another on one stream. These tensors and the tiles are what a
    launch wants ``alive`` besides its own.
    """

    shape: Shape
    blocks: int
    tensors: Mapping[str, Tensor]
    alive: tuple[Tensor, ...]

    @cached_property
    def pointers(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class TileReader:
    """What stays the same from launch to launch while tiles stay where they are."""

    sides: tuple[FoldedTiles, FoldedTiles]
    heads: Tensor
    tiles: tuple[Tensor, ...]
    scaling: float
    setups: dict[_Size, _Setup] = field(default_factory=dict)
    maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: TiledTokens, values: TiledTokens, scaling: float) -> "TileReader":
        """For the tiles of both sides, and scores that are scaled by ``scaling``."""
        return cls(
            (keys.folded, values.folded),
            _heads(keys, values).to(keys.folded.matrix.device),
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
        workers: int = 0,
        shape: Mapping[str, int] | None = None,
    ) -> Call:
        """Prepare a launch.

        Args:
            q: [B, Hq, Q, d] with Q · Hq / H at most 16, contiguous.
            tokens, skip: stored coded tokens, and how many of the first are no longer visible.
            ranges: as from ``token_ranges``, on q's device; None for all tokens up to a query's own.
            seen: without ranges, int32 [1]: tokens of a sequence, the queries' own included.
            after: without ranges, how many of the newest are queries of other launches.
            workers: blocks of threads that run at once; 0 to ask the device.
            shape: settings of ``Shape``; without a ring, warps, ring and blocks are chosen to fit.
        """
        batch, query_heads, queries, dim = q.shape
        heads = len(self.sides[0].tilings)
        rows = query_heads // heads * queries
        first, last = (0, 0) if exact is None else (exact.first_keys.shape[2], exact.last_keys.shape[2])
        tiles = _coarse(max(1, -(-tokens // TOKENS) - skip // TOKENS))
        given = tuple((shape or {}).items())
        size = _Size(batch, rows, q.dtype, tiles, first + last > 0, bool(softcap), workers, given)
        if size not in self.setups:
            self.setups[size] = self._setup(size)
        setup = self.setups[size]
        out = q.new_empty(batch, queries, query_heads, dim)
        own = {"query": q, "out": out}
        if seen is not None:
            own["seen"] = seen
        if ranges is not None:
            own["ranges"] = ranges.contiguous()
        if exact is not None:
            own |= exact.tensors(q.dtype)
        if sink_logits is not None:
            own["sink_logits"] = sink_logits.float().contiguous()
        values = {
            **setup.pointers,
            **{name: tensor.data_ptr() for name, tensor in own.items()},
            "scaling": self.scaling,
            "softcap": 0.0 if softcap is None else softcap,
            "head_count": heads,
            "rows": rows,
            "queries": queries,
            "first": first,
            "last": last,
            "after": after,
        }
        return Call(setup.shape, (setup.blocks, 1, 1), values, (*own.values(), *setup.alive), out)

    def _tile_costs(self, block: int, tile: int) -> list[int]:
        """What a K and a V tile of each head cost in bytes: its own, ``block`` a block, and ``tile``."""
        keys, values = (side.tilings for side in self.sides)
        return [
            k.nbytes + v.nbytes + block * (len(k.blocks) + len(v.blocks)) + tile
            for k, v in zip(keys, values, strict=True)
        ]

    def _setup(self, size: "_Size") -> "_Setup":
        device = self.heads.device
        keys, values = (side.tilings for side in self.sides)
        given = dict(size.given)
        shape = shape_of(keys, values, size.rows, size.dtype, softcap=size.softcap, given=given)
        blocks = size.workers or shape.blocks * multiprocessors(device)
        # heads of more rows than an item has are read more than once, at about the same time
        pieces = -(-size.rows // shape.rows)
        costs = self._tile_costs(*(_MORE_COSTS if shape.row_tiles > 1 and pieces == 1 else _COSTS))
        parts = schedule(
            costs,
            size.batch * pieces,
            size.tiles,
            blocks,
            entry=_ENTRY_COST,
            most=_MOST_TILES * shape.warps,
            exact=size.exact,
        )
        stages = [shape.stages(k.nbytes, v.nbytes) for k, v in zip(keys, values, strict=True)]
        rows = [
            (
                item.sequence // pieces,
                *item[1:],
                stages[item.head] | item.sequence % pieces * shape.rows << 16,
            )
            for item in parts
        ]
        items = torch.tensor(rows, dtype=torch.int32, device=device)
        heads = self.heads.view(torch.int32)[items[:, 1]]
        key_map, value_map = self._maps(shape.parts)
        scratch = partial(torch.empty, dtype=torch.float32, device=device)
        tensors = {
            "key_maps": key_map,
            "value_maps": value_map,
            "items": torch.cat([items, heads], dim=-1),
            "partial": scratch(len(parts), shape.rows, shape.head_dim),
            "masses": scratch(len(parts), shape.rows, 2),
            # every launch leaves them at zero; those of other readers may run at the same time
            "done": torch.zeros(size.batch * len(keys) * pieces, dtype=torch.int32, device=device),
        }
        return _Setup(shape, len(parts), tensors, (*tensors.values(), *self.tiles))

    def _maps(self, parts: int) -> tuple[Tensor, Tensor]:
        if parts not in self.maps:
            keys, values = self.sides
            log2 = self.scaling * math.log2(math.e)
            self.maps[parts] = key_maps(keys, log2, parts), value_maps(values, parts)
        return self.maps[parts]


def _row_tiles(rows: int) -> int:
    if rows > MOST_ROWS:
        raise KVSightError(f"a launch takes {MOST_ROWS} query rows a KV head; got {rows}.")
    return min(-(-rows // _ROWS), _MOST_ROW_TILES)


def shape_of(
    keys: Sequence[Tiling],
    values: Sequence[Tiling],
    rows: int,
    dtype: torch.dtype,
    *,
    softcap: bool,
    given: Mapping[str, int] | None = None,
) -> Shape:
    """For tiles of these heads and so many query rows of each; ``given`` as ``shape`` of a call."""
    shape = Shape(
        CHUNK * len(keys[0].widths),
        most_blocks(keys),
        most_products(keys),
        most_blocks(values),
        _kinds(keys),
        _kinds(values),
        _row_tiles(rows),
        NUMBERS[dtype],
        softcap,
        **(given or {}),
    )
    largest = max(k.nbytes + v.nbytes for k, v in zip(keys, values, strict=True))
    return shape if shape.ring else shape.fitting(largest)


def _kinds(tilings: Sequence[Tiling]) -> tuple[tuple[int, int, int], ...]:
    """The counts of blocks that heads have."""
    return tuple(sorted({tiling.counts for tiling in tilings}))


def _listed(kinds: Sequence[tuple[int, int, int]]) -> str:
    return " ".join(f"KIND({i},{n4},{n2},{n1})" for i, (n4, n2, n1) in enumerate(kinds))


def _heads(keys: TiledTokens, values: TiledTokens) -> Tensor:
    """The kernel's ``Head`` of every KV head, int64 [H, words]."""
    rows: list[list[int]] = []
    listed = _kinds(keys.folded.tilings), _kinds(values.folded.tilings)
    for head in range(len(keys.tiles)):
        k, v = keys.tiles[head], values.tiles[head]
        counts = [side.folded.tilings[head].counts for side in (keys, values)]
        found = [kinds.index(count) for kinds, count in zip(listed, counts, strict=True)]
        numbers = [*counts[0], *counts[1], *found]
        pairs = [numbers[i] | numbers[i + 1] << 32 for i in (0, 2, 4, 6)]
        rows.append([k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), *pairs])
    tables = [chunk_tables(side.folded).cpu().view(torch.int64) for side in (keys, values)]
    return torch.cat([torch.tensor(rows, dtype=torch.int64), *tables], dim=-1)


def _coarse(tiles: int) -> int:
    """``tiles`` to two binary digits, so that schedules can be kept while contexts grow."""
    step = 1 << max(0, tiles.bit_length() - 2)
    return tiles // step * step


@lru_cache(maxsize=16)
def reads_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of tiles run there: NVIDIA GPUs since Hopper, which copy in bulk.

    Those for desks have less shared memory than the kernels are made for.
    """
    if (
        dtype not in NUMBERS
        or device.type != "cuda"
        or torch.version.cuda is None
        or not hasattr(torch.cuda, "_compile_kernel")
    ):
        return False
    if torch.cuda.get_device_capability(device) < _HOPPER:
        return False
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor) >= SHARED_BYTES


def attend_tiles(call: Call) -> Tensor:
    """Queue a prepared call on its device's current stream; [B, Q, Hq, d]."""
    kernel = _kernel(call.shape, call.out.device)
    kernel.launch(call.grid, 32 * call.shape.warps, Arguments(**call.values))
    return call.out


# a module that is loaded again is never unloaded
@cache
def _kernel(shape: Shape, device: torch.device) -> Kernel:
    return compiled(attend_source(shape), shape.shared_bytes, device)


def attend_source(shape: Shape) -> Source:
    """The kernel of a shape."""
    return Source(SOURCES, "attend_tiles", shape.macros())

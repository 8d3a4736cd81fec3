"""``kvsight::attend_tiles`` and ``count_tokens``, which compiled graphs hold: a layer's tiles as tensors.

Eager calls skip it, and with it the dispatcher's cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kvsight.ops.attend.cuda import Exact, TiledTokens, TileReader, attend_tiles, token_ranges
from kvsight.ops.attend.tiles import FoldedTiles
from kvsight.ops.attend.tiles_ref import attend_tiles_ref
from kvsight.tiling import CHUNK, TOKENS, Rows, Tiling

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class _Kept(Generic[_T]):
    made: _T
    maps: tuple[Tensor, ...]
    tiles: tuple[StorageWeakRef, ...]

    def lives(self) -> bool:
        return not any(tile.expired() for tile in self.tiles)


class Shared(Generic[_T]):
    """What a graph's calls share from step to step, made once for tiles and maps where they lie.

    It stays as long as the tiles: a captured graph holds addresses of what was made, and tells nobody when
    it is replayed. Maps are kept alive, so that their addresses tell them apart.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], _Kept[_T]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._found)

    def get(
        self,
        tiles: Sequence[Tensor],
        maps: Sequence[Tensor],
        others: tuple[object, ...],
        make: Callable[[], _T],
    ) -> _T:
        """What was made for the same tiles, maps and other numbers, or ``make()``."""
        places = tuple((t.data_ptr(), *t.shape, *t.stride()) for t in tiles)
        key = places, tuple(m.data_ptr() for m in maps), others
        found = self._found.get(key)
        # new tiles may lie where others did
        if found is None or not found.lives():
            held = tuple(StorageWeakRef(t.untyped_storage()) for t in tiles)
            found = _Kept(make(), tuple(maps), held)
            with self._lock:
                self._found = {k: kept for k, kept in self._found.items() if kept.lives()} | {key: found}
        return found.made


@torch.library.custom_op("kvsight::count_tokens", mutates_args=("seen",))
def count_tokens_op(seen: Tensor, new: int, room: int) -> None:
    """Add new tokens to ``seen`` int32 [1]; more than there is room for fail, on a device some time later.

    One operator: plain additions get merged into other kernels, with a copy for every layer that reads.
    """
    torch._assert_async(
        seen <= room - new, "kvsight: a graph was replayed past the room of its cache; reserve more tokens."
    )
    seen.add_(new)


@count_tokens_op.register_fake
def _(seen: Tensor, new: int, room: int) -> None:
    return None


@torch.library.custom_op("kvsight::attend_tiles", mutates_args=())
def attend_tiles_op(  # noqa: PLR0913
    q: Tensor,
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: str,
    value_widths: str,
    seen: Tensor,
    exact: Sequence[Tensor],
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of the newest tokens' queries over exact first tokens and all coded ones.

    Args:
        q: [B, Hq, Q, d] with Q · Hq / H at most 16.
        key_tiles, value_tiles: uint8 [B, n, nbytes] of each of H heads.
        maps: ``FoldedTiles.matrix`` and ``shift`` of keys, then of values.
        key_widths, value_widths: ``Tiling.widths`` of one head after another, a digit each.
        seen: int32 [1], tokens of a sequence, the queries' own included.
        exact: keys and values of first tokens [B, H, n, d], or nothing.
        scaling, softcap, sink_logits: as in ``ops.attend.attend``.

    Returns: [B, Q, Hq, d].
    """
    first = exact[0].shape[2] if exact else 0
    none = q.new_empty(*key_tiles[0].shape[:1], len(key_tiles), 0, q.shape[-1])
    kept = Exact(exact[0], exact[1], none, none) if exact else None
    if q.is_cuda:
        # as many as there is room for: the kernel counts them itself
        tokens = TOKENS * key_tiles[0].shape[1]
        reader = _reader(key_tiles, value_tiles, maps, key_widths, value_widths, scaling)
        call = reader.call(
            q.contiguous(), tokens, None, seen=seen, exact=kept, softcap=softcap, sink_logits=sink_logits
        )
        return attend_tiles(call)
    tokens = int(seen) - first
    keys = TiledTokens(_folded(maps[:2], key_widths, "tokens"), tuple(key_tiles), tokens)
    values = TiledTokens(_folded(maps[2:], value_widths, "coordinates"), tuple(value_tiles), tokens)
    ranges = token_ranges(q.shape[0], q.shape[2], first, tokens, 0)
    return attend_tiles_ref(
        q, keys, values, ranges, scaling=scaling, exact=kept, softcap=softcap, sink_logits=sink_logits
    )


@attend_tiles_op.register_fake
def _(  # noqa: PLR0913
    q: Tensor,
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: str,
    value_widths: str,
    seen: Tensor,
    exact: Sequence[Tensor],
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim)


def widths(tilings: Sequence[Tiling]) -> str:
    """``Tiling.widths`` of one head after another, a digit each, as operators take them.

    A string is one constant of a graph, and one guard, where numbers would be hundreds.
    """
    return "".join(str(width) for tiling in tilings for width in tiling.widths)


def tilings(digits: str, dim: int, rows: Rows) -> tuple[Tiling, ...]:
    """Inverse of ``widths``."""
    step, numbers = dim // CHUNK, tuple(map(int, digits))
    return tuple(Tiling(numbers[i : i + step], rows) for i in range(0, len(numbers), step))


def _folded(maps: Sequence[Tensor], digits: str, rows: Rows) -> FoldedTiles:
    matrix, shift = maps
    return FoldedTiles(tilings(digits, matrix.shape[-1], rows), matrix, shift)


_readers: Shared[TileReader] = Shared()


def _reader(
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: str,
    value_widths: str,
    scaling: float,
) -> TileReader:
    def make() -> TileReader:
        keys = TiledTokens(_folded(maps[:2], key_widths, "tokens"), tuple(key_tiles), 0)
        values = TiledTokens(_folded(maps[2:], value_widths, "coordinates"), tuple(value_tiles), 0)
        # the caller keeps the tiles
        return replace(TileReader.of(keys, values, scaling), tiles=())

    others = key_widths, value_widths, scaling
    return _readers.get((*key_tiles, *value_tiles), maps, others, make)

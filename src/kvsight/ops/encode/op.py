"""``kvsight::encode_tiles``, the operator that compiled graphs hold: new tokens coded into a layer's tiles.

Eager calls skip it, and with it the dispatcher's cost.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from kvsight.ops.attend.tiles_op import tilings
from kvsight.ops.encode.tiles import FoldedEncoder, TileWriter, write_tiles_ref
from kvsight.tiling import Rows

_MOST_WRITERS = 256


@torch.library.custom_op("kvsight::encode_tiles", mutates_args=("key_tiles", "value_tiles"))
def encode_tiles_op(  # noqa: PLR0913
    k: Tensor,
    v: Tensor,
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: Sequence[int],
    value_widths: Sequence[int],
    seen: Tensor,
    first: int,
) -> None:
    """Code new tokens behind the others.

    Args:
        k, v: [B, H, n, d].
        key_tiles, value_tiles: uint8 [B, tiles, nbytes] of each of H heads, with room for them.
        maps: ``FoldedEncoder.map`` and ``shift`` of keys, then of values.
        key_widths, value_widths: ``Tiling.widths`` of one head after another.
        seen: int32 [1], tokens of a sequence, the new ones included.
        first: how many of them have no codes.
    """
    tiles = key_tiles, value_tiles
    if k.is_cuda:
        _writer(tiles, maps, tuple(key_widths), tuple(value_widths)).write(k, v, seen, first)
        return
    sides = _encoder(maps[:2], key_widths, "tokens"), _encoder(maps[2:], value_widths, "coordinates")
    write_tiles_ref(sides, tiles, k, v, int(seen) - k.shape[2] - first)


@encode_tiles_op.register_fake
def _(  # noqa: PLR0913
    k: Tensor,
    v: Tensor,
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: Sequence[int],
    value_widths: Sequence[int],
    seen: Tensor,
    first: int,
) -> None:
    return None


def _encoder(maps: Sequence[Tensor], numbers: Sequence[int], rows: Rows) -> FoldedEncoder:
    matrix, shift = maps
    return FoldedEncoder(tilings(numbers, matrix.shape[-1], rows), matrix, shift)


# as in ``ops.attend.tiles_op``
_writers: OrderedDict[tuple[object, ...], tuple[TileWriter, Sequence[Tensor]]] = OrderedDict()


def _writer(
    tiles: tuple[Sequence[Tensor], Sequence[Tensor]],
    maps: Sequence[Tensor],
    key_widths: tuple[int, ...],
    value_widths: tuple[int, ...],
) -> TileWriter:
    places = tuple((t.data_ptr(), *t.shape, *t.stride()) for side in tiles for t in side)
    key = places, tuple(m.data_ptr() for m in maps), key_widths, value_widths
    if key not in _writers:
        sides = _encoder(maps[:2], key_widths, "tokens"), _encoder(maps[2:], value_widths, "coordinates")
        _writers[key] = TileWriter.of(*sides, *tiles), list(maps)
        if len(_writers) > _MOST_WRITERS:
            _writers.popitem(last=False)
    _writers.move_to_end(key)
    return _writers[key][0]

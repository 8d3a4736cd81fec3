"""``kvsight::encode_tiles``, the operator that compiled graphs hold: new tokens coded into a layer's tiles.

Eager calls skip it, and with it the dispatcher's cost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsight.ops.attend.tiles_op import Shared, tilings
from kvsight.ops.encode.tiles import FoldedEncoder, TileWriter, write_tiles_ref
from kvsight.tiling import Rows


@torch.library.custom_op("kvsight::encode_tiles", mutates_args=("key_tiles", "value_tiles"))
def encode_tiles_op(  # noqa: PLR0913
    k: Tensor,
    v: Tensor,
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: str,
    value_widths: str,
    seen: Tensor,
    first: int,
) -> None:
    """Code new tokens behind the others.

    Args:
        k, v: [B, H, n, d].
        key_tiles, value_tiles: uint8 [B, tiles, nbytes] of each of H heads, with room for them.
        maps: ``FoldedEncoder.maps`` of keys, then of values.
        key_widths, value_widths: ``Tiling.widths`` of one head after another, a digit each.
        seen: int32 [1], tokens of a sequence, the new ones included.
        first: how many of them have no codes.
    """
    tiles = key_tiles, value_tiles
    if k.is_cuda:
        _writer(tiles, maps, key_widths, value_widths, k.dtype).write(k, v, seen, first)
        return
    sides = _encoder(maps[:3], key_widths, "tokens"), _encoder(maps[3:], value_widths, "coordinates")
    write_tiles_ref(sides, tiles, k, v, int(seen) - k.shape[2] - first)


@encode_tiles_op.register_fake
def _(  # noqa: PLR0913
    k: Tensor,
    v: Tensor,
    key_tiles: Sequence[Tensor],
    value_tiles: Sequence[Tensor],
    maps: Sequence[Tensor],
    key_widths: str,
    value_widths: str,
    seen: Tensor,
    first: int,
) -> None:
    return None


def _encoder(maps: Sequence[Tensor], digits: str, rows: Rows) -> FoldedEncoder:
    halves, scale, shift = maps
    return FoldedEncoder(tilings(digits, halves.shape[-1], rows), halves, scale, shift)


_writers: Shared[TileWriter] = Shared()


def _writer(
    tiles: tuple[Sequence[Tensor], Sequence[Tensor]],
    maps: Sequence[Tensor],
    key_widths: str,
    value_widths: str,
    dtype: torch.dtype,
) -> TileWriter:
    def make() -> TileWriter:
        sides = _encoder(maps[:3], key_widths, "tokens"), _encoder(maps[3:], value_widths, "coordinates")
        return TileWriter.of(*sides, *tiles, dtype)

    return _writers.get((*tiles[0], *tiles[1]), maps, (key_widths, value_widths, dtype), make)

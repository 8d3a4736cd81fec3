"""A layer's folded codecs as the tile kernel reads them: ``maps.cuh`` says what lies where."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvsight.ops.attend.tiles import FoldedTiles, middles
from kvsight.tiling import CHUNK, Block, Tiling

_BLOCKS = 4
# blocks of a chunk
_AT_MOST = 2


def key_maps(keys: FoldedTiles, factor: float, parts: int) -> Tensor:
    """What turns queries into factors of codes, and into ``factor`` times scores: uint8 [H, bytes]."""
    return _maps(keys.matrix * factor, keys.shift * factor, parts)


def value_maps(values: FoldedTiles, parts: int) -> Tensor:
    """What turns weighted sums of codes, from their middles, into outputs: uint8 [H, bytes]."""
    return _maps(values.matrix.mT, values.middle, parts)


def chunk_tables(side: FoldedTiles) -> Tensor:
    """Where products have the blocks of all chunks: int32 [H, d / 16 · 4], ``Chunk`` in ``tiles.cuh``."""
    chunks = side.matrix.shape[-1] // CHUNK
    tables = torch.tensor([_table(tiling, chunks) for tiling in side.tilings])
    blocks, numbers = tables.split([2, 3], dim=-1)
    # a view as another type looks at strides, also of a single head or chunk
    pairs = blocks.to(torch.int16).flatten().view(torch.int32).view(len(tables), chunks, 1)
    return torch.cat([pairs, numbers.float().view(torch.int32)], dim=-1).flatten(1)


def most_products(tilings: Sequence[Tiling]) -> int:
    """The most matrix products that 16 tokens of any head's keys take; rounded up as blocks are."""
    most = max(max(_places(tiling), default=0) // 2 + 1 for tiling in tilings)
    return -(-most // _BLOCKS) * _BLOCKS


def _maps(matrix: Tensor, shift: Tensor, parts: int) -> Tensor:
    """Maps with rows [H, d, d]."""
    scale = matrix.abs().amax(-1, keepdim=True)
    rest = matrix / torch.where(scale > 0, scale, 1.0)
    bytes_: list[Tensor] = []
    for _ in range(parts):
        half = rest.half()
        rest = rest - half
        bytes_.append(_operands(half))
    numbers = [scale.squeeze(-1).float(), shift.float()]
    return torch.cat([x.contiguous().flatten(1).view(torch.uint8) for x in (*bytes_, *numbers)], dim=-1)


def _operands(matrix: Tensor) -> Tensor:
    """[H, d, d] in 16 x 16 pieces: lane 4g + t has columns 4t to 4t + 3 of rows g and g + 8, in twos."""
    heads, dim, _ = matrix.shape
    pieces = matrix.view(heads, dim // CHUNK, 2, 8, dim // CHUNK, 4, 2, 2)
    return pieces.permute(0, 1, 4, 3, 5, 6, 2, 7)


def _places(tiling: Tiling) -> dict[int, Block]:
    """Blocks by where products have them. Values: by number. Keys: twice the product, and its half.

    Two blocks share a product: of a size first, then what is left over.
    """
    if tiling.rows == "coordinates":
        return dict(enumerate(tiling.blocks))
    fours = tiling.counts[0]
    alone = tiling.blocks[fours - 1 : fours] if fours % 2 else ()
    # sorting keeps the order of equals
    blocks = sorted(tiling.blocks, key=lambda block: block.slot is None or block in alone)
    return dict(enumerate(blocks))


@lru_cache(maxsize=1024)
def _table(tiling: Tiling, chunks: int) -> list[list[float]]:
    """Of each chunk: places of its blocks, or -1, what a unit of them is worth in codes, their middle."""
    found: list[list[tuple[int, Block]]] = [[] for _ in range(chunks)]
    for place, block in _places(tiling).items():
        found[block.chunk].append((place, block))
    middle = middles(tiling, CHUNK * chunks)[::CHUNK].tolist()
    return [[*_entry(own), number] for own, number in zip(found, middle, strict=True)]


def _entry(own: Sequence[tuple[int, Block]]) -> list[float]:
    places = [place for place, _ in own] + [-1] * (_AT_MOST - len(own))
    return [*places, *(_worth(block) for _, block in own), *[0.0] * (_AT_MOST - len(own))]


def _worth(block: Block) -> float:
    return math.ldexp(1.0, block.low - block.size * (block.slot or 0))

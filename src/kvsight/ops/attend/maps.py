"""A layer's folded codecs as the tile kernel reads them: ``maps.cuh`` says what lies where."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvsight.ops.attend.tiles import FoldedTiles
from kvsight.tiling import CHUNK, Block, Tiling

_BLOCKS = 4


def key_maps(keys: FoldedTiles, factor: float, parts: int) -> Tensor:
    """What turns queries into factors of codes, and into ``factor`` times scores: uint8 [H, bytes]."""
    return _maps(keys.matrix * factor, keys.shift * factor, [_places(t) for t in keys.tilings], parts)


def value_maps(values: FoldedTiles, parts: int) -> Tensor:
    """What turns weighted sums of codes into outputs: uint8 [H, bytes]."""
    places = [dict(enumerate(tiling.blocks)) for tiling in values.tilings]
    return _maps(values.matrix.mT, values.shift, places, parts)


def most_products(tilings: Sequence[Tiling]) -> int:
    """The most matrix products that 16 tokens of any head's keys take; rounded up as blocks are."""
    most = max(max(_places(tiling), default=0) // 2 + 1 for tiling in tilings)
    return -(-most // _BLOCKS) * _BLOCKS


def _maps(matrix: Tensor, shift: Tensor, places: Sequence[dict[int, Block]], parts: int) -> Tensor:
    """Maps with rows [H, d, d]; ``places`` of each head's blocks."""
    chunks = matrix.shape[-1] // CHUNK
    scale = matrix.abs().amax(-1, keepdim=True)
    rest = matrix / torch.where(scale > 0, scale, 1.0)
    bytes_: list[Tensor] = []
    for _ in range(parts):
        half = rest.half()
        rest = rest - half
        bytes_.append(_operands(half))
    tables = torch.tensor([_table(own, chunks) for own in places], device=matrix.device)
    blocks, factors = tables.split(2, dim=-1)
    table = torch.cat([blocks.int(), factors.float().view(torch.int32)], dim=-1)
    numbers = [scale.squeeze(-1).float(), shift.float(), table]
    return torch.cat([x.contiguous().flatten(1).view(torch.uint8) for x in (*bytes_, *numbers)], dim=-1)


def _operands(matrix: Tensor) -> Tensor:
    """[H, d, d] in 16 x 16 pieces: lane 4g + t has columns 4t to 4t + 3 of rows g and g + 8, in twos."""
    heads, dim, _ = matrix.shape
    pieces = matrix.view(heads, dim // CHUNK, 2, 8, dim // CHUNK, 4, 2, 2)
    return pieces.permute(0, 1, 4, 3, 5, 6, 2, 7)


def _places(tiling: Tiling) -> dict[int, Block]:
    """Keys' blocks by where products of scores have them: twice the product, and its half.

    Two blocks of a size share a product; left over ones of 1 bit have one each.
    """
    out: dict[int, Block] = {}
    product = 0
    for size in (4, 2, 1):
        mine = [block for block in tiling.blocks if block.size == size]
        whole = len(mine) // 4 * 4 if size == 1 else len(mine)
        for i, block in enumerate(mine[:whole]):
            out[2 * (product + i // 2) + i % 2] = block
        product += -(-whole // 2)
        for block in mine[whole:]:
            out[2 * product] = block
            product += 1
    return out


def _table(places: dict[int, Block], chunks: int) -> list[list[float]]:
    """Of each chunk: places of its blocks, or -1, and what a unit of them is worth in codes."""
    return [list(_entry(places, chunk)) for chunk in range(chunks)]


def _entry(places: dict[int, Block], chunk: int) -> Iterator[float]:
    own = [(place, block) for place, block in places.items() if block.chunk == chunk]
    assert len(own) <= 2  # noqa: PLR2004
    yield from (own[i][0] if i < len(own) else -1 for i in range(2))
    yield from (_worth(own[i][1]) if i < len(own) else 0.0 for i in range(2))


def _worth(block: Block) -> float:
    return math.ldexp(1.0, block.low - block.size * (block.slot or 0))

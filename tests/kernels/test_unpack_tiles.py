"""The kernel that unpacks tiles, run on the CPU by an emulator of its intrinsics, against its twin."""

import pytest
import torch

from kvsight.ops.attend.unpack import SOURCES, Unpacker, shared_bytes, unpack_ref, unpack_source
from kvsight.tiling import TOKENS, Tiling

# all sizes, with and without pieces that are left over; a head without any bits
WIDTHS = ((8, 6, 5, 3), (4, 4, 2, 2), (2, 2, 2, 1), (1, 1, 1, 0), (5, 3, 3, 1), (0, 0, 0, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", ["tokens", "coordinates"])
def test_unpacked_tiles_are_centred_codes(emulated, rows, dtype):
    batch, length, first, count, columns = 3, 4, 1, 2, 80
    last = slice(1, 3)
    draw = torch.Generator().manual_seed(0)
    tilings = [Tiling(widths, rows) for widths in WIDTHS]
    tiles, codes = [], []
    for tiling in tilings:
        most = torch.tensor([2**w - 1 for w in tiling.widths if w for _ in range(16)], dtype=torch.uint8)
        shape = (batch, length * TOKENS, tiling.stored)
        codes.append(torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) & most)
        tiles.append(tiling.pack(codes[-1]))
    wanted = unpack_ref(tilings, tiles, first, count, columns, dtype)
    own = codes[0][:, first * TOKENS : (first + count) * TOKENS].double()
    widths = torch.tensor([w for w in WIDTHS[0] for _ in range(16)])
    assert torch.equal(wanted[:, 0, :, :64].double(), own - (2.0**widths - 1) / 2)
    wanted = wanted[last]
    if torch.cuda.is_available():
        unpacker = Unpacker.of(tilings, [tile.cuda() for tile in tiles], columns)
        out = unpacker.codes(last, first, count, dtype).cpu()
    else:
        unpacker = Unpacker.of(tilings, tiles, columns)
        out = torch.full_like(wanted, float("nan"))
        launch = emulated("unpack_tiles.cpp", SOURCES, unpack_source(unpacker.columns, dtype).macros)
        arguments = unpacker.arguments(out, last, first, count)
        launch(unpacker.grid(last, count), arguments, shared_bytes(columns))
    assert torch.equal(out, wanted)

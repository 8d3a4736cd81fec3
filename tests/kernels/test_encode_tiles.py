"""The tile encoder, run on the CPU by an emulator of its intrinsics, against the codecs of a plan."""

import pytest
import torch

from kvsight.codec import Codec
from kvsight.ops.encode.tiles import (
    SOURCES,
    Encoder,
    FoldedEncoder,
    TileWriter,
    fold_encoder,
    shared_bytes,
    write_tiles_ref,
)
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.tiling import TOKENS
from kvsight.transforms import centre, linear

DIM = 64
WIDTHS = [(8, 5, 2, 1), (4, 4, 4, 4), (6, 3, 3, 0), (2, 2, 2, 1), (1, 1, 1, 1), (3, 1, 1, 0)]


def codec_of(widths, seed):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(1, DIM, DIM, generator=draw, dtype=torch.float64) / 8
    transform = centre(torch.randn(1, DIM, generator=draw, dtype=torch.float64)).then(linear(mix))
    row = tuple(w for w in widths for _ in range(16))
    return Codec("test", transform.stored(), row_quantizer(row, uniform))


def layer(widths, seed, rows):
    codecs = [codec_of(w, seed + i) for i, w in enumerate(widths)]
    parts = []
    for head, codec in enumerate(codecs):
        coded = codec.coded((head,), codec.encode(torch.zeros(1, 1, 0, DIM)))
        parts.append(Encoder(coded, codec.transform.matrix, codec.transform.shift))
    return codecs, fold_encoder(parts, rows)


def fractions(codec, x):
    """How far each coordinate lies from the nearest boundary between codes, in steps."""
    y = codec.transform.forward(x.double())[..., : codec.format.stored]
    levels, starts = codec.quantizer.tables
    first, second = levels[starts.long()].double(), levels[starts.long() + 1].double()
    return (((y - first) / (second - first) - 0.5).remainder(1) - 0.5).abs() - 0.5


def write_on_gpu(folded, tiles, new, seen, first):
    heads = len(tiles) // 2
    held = [tile.cuda() for tile in tiles]
    there = [FoldedEncoder(f.tilings, f.map.cuda(), f.shift.cuda()) for f in folded]
    writer = TileWriter.of(*there, held[:heads], held[heads:])
    writer.write(new[0].cuda(), new[1].cuda(), seen.cuda(), first)
    return [tile.cpu() for tile in held]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (5, 3), (62, 5), (64, 1), (120, 16)])
@pytest.mark.parametrize("first", [0, 2])
def test_new_tokens_join_their_tiles(emulated, start, count, first, dtype):
    batch, heads = 2, len(WIDTHS)
    chosen = ((WIDTHS, 0, "tokens"), (WIDTHS[::-1], 50, "coordinates"))
    sides = [layer(*choice) for choice in chosen]
    draw = torch.Generator().manual_seed(start)
    shape = (batch, start + count, heads, DIM)
    x = [torch.randn(shape, generator=draw).to(dtype).transpose(1, 2) for _ in sides]
    length = -(-(start + count) // TOKENS)
    tiles, before = [], []
    for codecs, folded in sides:
        for codec, tiling in zip(codecs, folded.tilings, strict=True):
            shape = (batch, length * TOKENS, tiling.stored)
            noise = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
            codes = noise & torch.tensor([2**w - 1 for w in codec.format.widths if w], dtype=torch.uint8)
            before.append(codes)
            tiles.append(tiling.pack(codes))
    writer = TileWriter.of(sides[0][1], sides[1][1], tiles[:heads], tiles[heads:])
    new = [tokens[:, :, start:] for tokens in x]
    seen = torch.tensor([start + count + first], dtype=torch.int32)
    twins = [tile.clone() for tile in tiles]
    encoders = sides[0][1], sides[1][1]
    write_tiles_ref(encoders, (twins[:heads], twins[heads:]), *new, start)
    if torch.cuda.is_available():
        tiles = write_on_gpu([folded for _, folded in sides], tiles, new, seen, first)
    else:
        launch = emulated("encode_tiles.cpp", SOURCES, writer.macros(dtype))
        launch(writer.grid(batch), writer.arguments(*new, seen, first), shared_bytes(DIM))
    for i, (codes, packed) in enumerate(zip(before, tiles, strict=True)):
        (codecs, folded), tokens = sides[i // heads], new[i // heads]
        head = i % heads
        own = tokens[:, head : head + 1]
        wanted = codecs[head].quantizer.codes(codecs[head].transform.forward(own.double()))[:, 0]
        got = folded.tilings[head].unpack(packed)
        apart = got[:, start : start + count].int() - wanted.int()
        clear = fractions(codecs[head], own)[:, 0].abs() > 1e-4
        assert not apart[clear].any()
        twin = encoders[i // heads].tilings[head].unpack(twins[i])[:, start : start + count]
        assert torch.equal(twin[clear], wanted[clear])
        assert apart.abs().max() <= 1
        # nothing else moved
        codes[:, start : start + count] = got[:, start : start + count]
        assert torch.equal(got, codes)

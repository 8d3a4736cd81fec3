"""The tile encoder, run on the CPU by an emulator of its intrinsics, against the codecs of a plan."""

from dataclasses import dataclass, replace

import pytest
import torch

from kvsight.codec import Codec
from kvsight.ops.encode.tiles import (
    SOURCES,
    Encoder,
    FoldedEncoder,
    TileWriter,
    aligned,
    encode_source,
    few_tokens,
    fold_encoder,
    many_tokens,
    parts_of,
    write_tiles_ref,
)
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.tiling import CHUNK, TOKENS
from kvsight.transforms import centre, linear

DIM = 64
# of the map, by halves that its numbers are sums of
ROUNDED = {1: 2.0**-11, 2: 2.0**-22}
WIDTHS = [(8, 5, 2, 1), (4, 4, 4, 4), (6, 3, 3, 0), (2, 2, 2, 1), (1, 1, 1, 1), (3, 1, 1, 0)]


def codec_of(widths, seed):
    draw = torch.Generator().manual_seed(seed)
    dim = CHUNK * len(widths)
    mix = torch.randn(1, dim, dim, generator=draw, dtype=torch.float64) / dim**0.5
    transform = centre(torch.randn(1, dim, generator=draw, dtype=torch.float64)).then(linear(mix))
    row = tuple(w for w in widths for _ in range(CHUNK))
    return Codec("test", transform.stored(), row_quantizer(row, uniform))


@dataclass
class Layer:
    """Both sides' codecs, and how the kernel has them."""

    codecs: list[list[Codec]]
    folded: list[FoldedEncoder]

    @classmethod
    def of(cls, widths):
        out = cls([], [])
        for rows, order in (("tokens", widths), ("coordinates", widths[::-1])):
            codecs = [codec_of(w, i) for i, w in enumerate(order, start=50 * len(out.codecs))]
            parts = []
            for head, codec in enumerate(codecs):
                coded = codec.coded((head,), codec.encode(torch.zeros(1, 1, 0, codec.format.dim)))
                parts.append(Encoder(coded, codec.transform.matrix, codec.transform.shift))
            out.codecs.append(codecs)
            out.folded.append(fold_encoder(parts, rows))
        return out

    def noise(self, batch, tokens, draw):
        """Tiles [B, n, bytes] of keys' heads, then of values', full of codes."""
        tilings = [tiling for folded in self.folded for tiling in folded.tilings]
        out = []
        for tiling in tilings:
            most = torch.tensor([2**w - 1 for w in tiling.widths if w for _ in range(CHUNK)])
            codes = torch.randint(0, 256, (batch, tokens, tiling.stored), generator=draw) & most
            out.append(tiling.pack(codes.to(torch.uint8)))
        return out

    def unpacked(self, tiles):
        tilings = [tiling for folded in self.folded for tiling in folded.tilings]
        return [tiling.unpack(own) for tiling, own in zip(tilings, tiles, strict=True)]


def write(emulated, layer, tiles, new, at, shape=None):
    """New tokens behind ``at`` of the coded ones, by the kernel that ``shape`` makes."""
    heads, first, blocks = len(tiles) // 2, at % 3, 3
    seen = torch.tensor([first + at + new[0].shape[2]], dtype=torch.int32)
    if torch.cuda.is_available():
        held = [tile.cuda() for tile in tiles]
        there = [FoldedEncoder(f.tilings, *(x.cuda() for x in f.maps)) for f in layer.folded]
        writer = TileWriter.of(*there, held[:heads], held[heads:], new[0].dtype)
        writer.write(*(x.cuda() for x in new), seen.cuda(), first, shape)
        return [tile.cpu() for tile in held]
    out = [tile.clone() for tile in tiles]
    writer = TileWriter.of(*layer.folded, out[:heads], out[heads:], new[0].dtype)
    shape = shape or few_tokens(new[0].shape[3])
    k, v = (aligned(x) for x in new)
    launch = emulated(
        "encode_tiles.cpp", SOURCES, encode_source(shape, new[0].shape[3], new[0].dtype).macros
    )
    arguments = writer.arguments(k, v, seen, first, blocks)
    dim, parts = new[0].shape[3], parts_of(new[0].dtype)
    launch((blocks, 1, 1), arguments, shape.shared_bytes(dim, parts, writer.image))
    return out


def check(layer, before, after, new, at):
    """Codes are the codecs' own but where a number lies in the middle of two; no other token moved."""
    heads, count = len(before) // 2, new[0].shape[2]
    twins = [tile.clone() for tile in before]
    write_tiles_ref(tuple(layer.folded), (twins[:heads], twins[heads:]), *new, at)
    known = zip(*(layer.unpacked(tiles) for tiles in (before, after, twins)), strict=True)
    for i, (old, got, twin) in enumerate(known):
        codec, folded, head = layer.codecs[i // heads][i % heads], layer.folded[i // heads], i % heads
        own, parts = new[i // heads][:, head], parts_of(new[0].dtype)
        own, map_ = own.double(), folded.map(parts)[head].double()
        real = (own @ map_ + folded.shift[head, parts - 1].double())[..., : codec.format.stored]
        summed = 2.0**-16 * (own.abs() @ map_.abs() + 1)[..., : codec.format.stored]
        slack = ROUNDED[parts] * ((own - codec.transform.shift).abs() @ map_.abs())
        coded = codec.quantizer.codes(codec.transform.forward(own.unsqueeze(1)))[:, 0]
        most = coded.amax((0, 1)).new_tensor([2**w - 1 for w in folded.tilings[head].widths if w])
        nearest = (real - 0.5).ceil().clamp_min(0).minimum(most.repeat_interleave(CHUNK))
        rounded = summed + slack[..., : codec.format.stored]
        # what a number may be off by, and the code that it should get
        for within, wanted in ((summed, nearest), (rounded, coded)):
            clear = ((real - 0.5).remainder(1) - 0.5).abs() < 0.5 - within
            assert clear.double().mean() > (0.95 if wanted is nearest else 0.8)
            for found in (got, twin):
                apart = found[:, at : at + count].int() - wanted.int()
                assert not apart[clear].any()
                assert apart.abs().max() <= 1
        old[:, at : at + count] = got[:, at : at + count]
        assert torch.equal(got, old)


def tokens(layer, batch, count, dtype, draw):
    """Keys and values [B, H, n, d] of a layer that has tokens before heads."""
    heads, dim = len(layer.codecs[0]), layer.codecs[0][0].format.dim
    shape = (batch, count, heads, dim)
    return [torch.randn(shape, generator=draw).to(dtype).transpose(1, 2) for _ in range(2)]


@pytest.fixture(scope="module")
def mixed():
    return Layer.of(WIDTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("at", "count"), [(0, 1), (5, 3), (62, 5), (64, 1), (120, 16)])
def test_new_tokens_join_their_tiles(emulated, mixed, at, count, dtype):
    draw = torch.Generator().manual_seed(at)
    new = tokens(mixed, 2, count, dtype, draw)
    before = mixed.noise(2, -(-(at + count) // TOKENS) * TOKENS, draw)
    after = write(emulated, mixed, before, new, at)
    check(mixed, before, after, new, at)


@pytest.mark.parametrize(("at", "count", "dtype"), [(0, 64, torch.bfloat16), (63, 66, torch.float16)])
def test_many_tokens_fill_tiles(emulated, mixed, at, count, dtype):
    draw = torch.Generator().manual_seed(count)
    new = tokens(mixed, 2, count, dtype, draw)
    before = mixed.noise(2, -(-(at + count) // TOKENS) * TOKENS, draw)
    after = write(emulated, mixed, before, new, at, many_tokens(DIM, dtype, 6 * 1024))
    check(mixed, before, after, new, at)


def test_codes_are_the_same_in_every_launch(emulated, mixed):
    draw = torch.Generator().manual_seed(1)
    new = tokens(mixed, 1, 69, torch.bfloat16, draw)
    before = mixed.noise(1, 3 * TOKENS, draw)
    together = write(emulated, mixed, before, new, 60, many_tokens(DIM, torch.bfloat16, 6 * 1024))
    apart = before
    for start, stop in ((0, 1), (1, 14), (14, 69)):
        apart = write(emulated, mixed, apart, [x[:, :, start:stop] for x in new], 60 + start)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


def scaled(layer, factor):
    """The layer for tokens that are ``factor`` times as large."""
    folded = [replace(f, scale=f.scale / factor) for f in layer.folded]
    return Layer(layer.codecs, folded)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 2.0**-40), (torch.float16, 2.0**-6)])
def test_the_unit_of_tokens_does_not_matter(emulated, mixed, dtype, factor):
    """Halves hold numbers from 6e-8 to 65,504; powers of two bring tokens there."""
    new = tokens(mixed, 1, 16, dtype, torch.Generator().manual_seed(3))
    before = mixed.noise(1, TOKENS, torch.Generator().manual_seed(4))
    small = write(emulated, scaled(mixed, factor), before, [x * factor for x in new], 0)
    for one, other in zip(write(emulated, mixed, before, new, 0), small, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_beyond_halves_get_the_last_codes(emulated, mixed, dtype):
    largest = torch.finfo(dtype).max
    new = [torch.full((1, len(WIDTHS), 1, DIM), sign * largest, dtype=dtype) for sign in (1, -1)]
    before = mixed.noise(1, TOKENS, torch.Generator().manual_seed(5))
    after = mixed.unpacked(write(emulated, mixed, before, new, 0))
    for i, own in enumerate(after):
        side, head = divmod(i, len(WIDTHS))
        signs = mixed.folded[side].map(1)[head].sum(0) * (1 - 2 * side)
        tiling = mixed.folded[side].tilings[head]
        most = torch.tensor([2**w - 1 for w in tiling.widths if w]).repeat_interleave(CHUNK)
        assert torch.equal(own[0, 0], torch.where(signs[: tiling.stored] > 0, most, 0).to(torch.uint8))


@pytest.mark.parametrize("parts", [1, 2])
def test_rounding_the_map_leaves_the_centre_alone(parts):
    """Keys whose mean is a hundred times what they vary by."""
    mean = 100 * torch.randn(1, DIM, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    codec = codec_of((8, 8, 4, 4), 7)
    matrix = codec.transform.matrix
    coded = codec.coded((0,), codec.encode(torch.zeros(1, 1, 0, DIM)))
    folded = fold_encoder([Encoder(coded, matrix, mean)], "tokens")
    x = torch.randn(500, DIM, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    plain = fold_encoder([Encoder(coded, matrix, torch.zeros_like(mean))], "tokens")
    real = (x + mean) @ folded.map(parts)[0].double() + folded.shift[0, parts - 1].double()
    exact = x @ plain.map(2)[0].double() + plain.shift[0, 1].double()
    # fp32 holds the shift, of up to 100 Σ |map|
    slack = 2.0**-24 * (mean.abs() @ plain.map(2)[0].double().abs() + 1)
    assert (
        (real - exact).abs() <= ROUNDED[parts] * (x.abs() @ plain.map(2)[0].double().abs()) + slack
    ).all()


@pytest.mark.parametrize(("dim", "few"), [(80, True), (96, False), (128, True), (256, False)])
def test_head_dims(emulated, dim, few):
    widths = [sorted(((3 + 2 * head, 4, 2, 1, 0) * 4)[: dim // CHUNK], reverse=True) for head in range(2)]
    layer = Layer.of([tuple(own) for own in widths])
    draw = torch.Generator().manual_seed(dim)
    new = tokens(layer, 1, 20, torch.bfloat16, draw)
    before = layer.noise(1, 2 * TOKENS, draw)
    shape = few_tokens(dim) if few else many_tokens(dim, torch.bfloat16, 1024)
    check(layer, before, write(emulated, layer, before, new, 50, shape), new, 50)


def test_tokens_may_lie_anywhere(emulated, mixed):
    draw = torch.Generator().manual_seed(2)
    wide = tokens(mixed, 1, 3, torch.bfloat16, draw)
    before = mixed.noise(1, TOKENS, draw)
    after = write(emulated, mixed, before, wide, 5)
    odd = [torch.cat([x[..., :1], x], dim=-1)[..., 1:] for x in wide]
    assert any(x.data_ptr() % 16 or x.stride(1) % 8 for x in odd)
    for one, other in zip(after, write(emulated, mixed, before, odd, 5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nearly_dead_coordinate_leaves_the_others_alone(emulated, dtype):
    draw = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=draw))[0]
    spread = torch.ones(DIM, dtype=torch.float64)
    # one that holds next to nothing, as a rotation to principal axes finds them, and a loud one
    spread[5], spread[7] = 1e-6, 20.0
    inverse = turn / spread.where(spread < 1, 1.0)
    codec = Codec(
        "dead",
        centre(torch.zeros(1, DIM)).then(linear(inverse[None])).stored(),
        row_quantizer((4,) * DIM, uniform),
    )
    coded = codec.coded((0,), codec.encode(torch.zeros(1, 1, 0, DIM)))
    encoder = Encoder(coded, codec.transform.matrix, codec.transform.shift)
    layer = Layer([[codec], [codec]], [fold_encoder([encoder], rows) for rows in ("tokens", "coordinates")])
    new = [
        (torch.randn(1, 1, 8, DIM, generator=draw, dtype=torch.float64) * spread @ turn.T).to(dtype)
        for _ in range(2)
    ]
    before = layer.noise(1, TOKENS, draw)
    found = layer.unpacked(write(emulated, layer, before, new, 0))
    for got, x in zip(found, new, strict=True):
        wanted = codec.quantizer.codes(codec.transform.forward(x.double()[0]))[0].int()
        apart = (got[0, :8].int() - wanted).abs()
        apart[:, 5] = 0
        assert apart.max() <= 1

"""The tile kernel, run on the CPU by an emulator of its intrinsics, against attention in plain torch."""

import math
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from kvsight.errors import KVSightError
from kvsight.formats import Packed, Row
from kvsight.ops.attend.cuda import (
    SOURCES,
    Arguments,
    Exact,
    Shape,
    TiledTokens,
    TileReader,
    attend_tiles,
    reads_tiles,
    token_ranges,
)
from kvsight.ops.attend.ref import Coded, Folded, Segment, attend
from kvsight.ops.attend.schedule import ONE, schedule
from kvsight.ops.attend.tiles import FoldedTiles, fold
from kvsight.ops.attend.tiles_ref import attend_tiles_ref
from kvsight.packing import pack_row, unpack_row
from kvsight.tiling import TOKENS, WIDTHS

# an emulator where there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MIXES = (
    ((4, 4, 4, 4), (4, 4, 4, 4)),
    ((2, 2, 2, 2), (2, 2, 1, 0)),
    ((3, 3, 2, 1), (5, 3, 2, 2)),
    ((8, 6, 5, 0), (6, 4, 1, 1)),
    ((1, 0, 0, 0), (8, 8, 3, 1)),
    ((1, 1, 1, 1), (1, 1, 1, 1)),
    ((4, 2, 1, 1), (2, 2, 2, 0)),
    ((0, 0, 0, 0), (4, 4, 4, 4)),
)


def side(widths, tokens, batch, dim, seed):
    """Random codes of heads with these widths per chunk, and what it takes to read them."""
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for head, chunks in enumerate(widths):
        row = Row(tuple(w for w in chunks for _ in range(16)))
        codes = [
            torch.randint(0, 2**w, (batch, 1, tokens, 1), generator=draw, dtype=torch.uint8)
            for w in row.widths
            if w
        ]
        rows = torch.zeros(batch, 1, tokens, row.row_bytes, dtype=torch.uint8)
        if codes:
            rows = pack_row(torch.cat(codes, dim=-1), row.widths)
        books = [
            torch.linspace(-1, 1, 2**w) * (0.5 + torch.rand(1, generator=draw)) for w in row.widths if w
        ]
        levels = torch.cat(books) if books else torch.zeros(0)
        sizes = torch.tensor([len(book) for book in books], dtype=torch.int32)
        starts = (sizes.cumsum(0) - sizes).int().view(1, -1)
        mix = torch.randn(1, row.stored, dim, generator=draw) / dim**0.25
        shift = torch.randn(1, dim, generator=draw)
        parts.append(Coded((head,), Packed(row, (rows,)), (levels, starts), Folded(mix, shift)))
    return tuple(parts)


def tiled(parts, rows, tokens, skip=0):
    """The same codes in tiles; what lies behind the last token is noise."""
    folded = fold(parts, rows)
    tiles = []
    for part, tiling in zip(parts, folded.tilings, strict=True):
        codes = unpack_row(part.packed.tensors[0][:, 0], part.packed.format.widths)
        whole = torch.randint(0, 256, (len(codes), -tokens % TOKENS, codes.shape[-1]), dtype=torch.uint8)
        limits = torch.tensor([2**w - 1 for w in part.packed.format.widths if w], dtype=torch.uint8)
        tiles.append(tiling.pack(torch.cat([codes, whole & limits], dim=1)))
    return TiledTokens(folded, tuple(tiles), tokens, skip)


def run(emulated, call):
    shape = call.shape
    call.out.fill_(float("nan"))
    if call.out.is_cuda:
        return attend_tiles(call).cpu()
    arguments = Arguments(**call.values)
    launch = emulated("attend_tiles.cpp", SOURCES, shape.macros())
    launch(call.grid, arguments, shape.shared_bytes)
    return call.out


def moved(x):
    """Whatever a call is made of, to the device that runs it."""
    match x:
        case torch.Tensor():
            return x.to(DEVICE)
        case TiledTokens() | FoldedTiles() | Exact():
            return replace(x, **{f.name: moved(getattr(x, f.name)) for f in fields(x)})
        case tuple():
            return tuple(map(moved, x))
    return x


def prepared(q, keys, values, ranges, *, scaling, **options):
    reader = TileReader.of(moved(keys), moved(values), scaling)
    more = {name: moved(option) for name, option in options.items()}
    return reader.call(moved(q), keys.tokens, moved(ranges), skip=keys.skip, **more)


SMALL = {"warps": 2, "ring": 32 * 1024}


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_every_mix_of_widths(emulated, mix):
    tokens = 200
    keys, values = (side([mix[i], mix[1 - i]], tokens, 2, 64, seed) for i, seed in ((0, 1), (1, 2)))
    q = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(0))
    segments = [(Segment(tokens, coded=part),) for part in (keys, values)]
    wanted = attend(q.double(), *segments, scaling=0.125)
    call = prepared(
        q,
        tiled(keys, "tokens", tokens),
        tiled(values, "coordinates", tokens),
        token_ranges(2, 1, 0, tokens, 0),
        scaling=0.125,
        workers=8,
        shape=SMALL,
    )
    out = run(emulated, call)
    assert (out - wanted).abs().max() < 1e-3 * wanted.abs().max()


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_sides(dim, heads, tokens, batch=1, seed=3):
    """Keys and values of heads with different widths each."""
    draw = torch.Generator().manual_seed(seed + dim)

    def widths():
        choice = torch.randint(0, 8, (dim // 16,), generator=draw)
        return tuple(sorted((WIDTHS[int(i)] for i in choice), reverse=True))

    return (side([widths() for _ in range(heads)], tokens, batch, dim, seed + i) for i in range(2))


def tile_attention(emulated, q, keys, values, tokens, shape=SMALL, workers=6, **options):
    """(the kernel's output, attention in plain torch in fp64)."""
    skip, exact = options.pop("skip", 0), options.pop("exact", None)
    hidden, window = options.pop("hidden", None), options.pop("window", None)
    first, last = (0, 0) if exact is None else (exact.first_keys.shape[2], exact.last_keys.shape[2])
    seen = tokens - skip
    queries = q.shape[2]
    ranges = token_ranges(len(q), queries, first, seen, last, skip=skip, hidden=hidden, window=window)
    sides = tiled(keys, "tokens", tokens, skip), tiled(values, "coordinates", tokens, skip)
    call = prepared(q, *sides, ranges, exact=exact, workers=workers, shape=shape, **options)
    if skip == 0 and hidden is None and window is None:
        # the kernel finds the ranges itself
        alone = prepared(
            q,
            *sides,
            None,
            exact=exact,
            workers=workers,
            shape=shape,
            seen=torch.tensor([first + tokens + last], dtype=torch.int32),
            **options,
        )
        assert torch.equal(run(emulated, alone), run(emulated, call))
    segments = [[], []]
    for i, parts in enumerate((keys, values)):
        if first:
            segments[i].append(Segment(first, dense=(exact.first_keys, exact.first_values)[i]))
        segments[i].append(Segment(seen, coded=parts, skip=skip))
        if last:
            segments[i].append(Segment(last, dense=(exact.last_keys, exact.last_values)[i]))
    total = first + seen + last
    at = torch.arange(total)
    newest = total - queries + torch.arange(queries)
    mask = (at <= newest[:, None]).expand(len(q), 1, -1, -1)
    if hidden is not None:
        mask = mask & (at >= hidden.view(-1, 1, 1, 1))
    if window is not None:
        mask = mask & (at > newest[:, None] - window)
    wanted = attend(q.double(), *segments, mask=mask, **options)
    twin = attend_tiles_ref(q.double(), *sides, ranges, exact=exact, **options)
    torch.testing.assert_close(twin, wanted, atol=1e-4, rtol=1e-4)
    return run(emulated, call), wanted


def assert_near(out, wanted, limit=1e-3):
    assert torch.isfinite(out).all()
    assert (out - wanted).abs().max() < limit * wanted.abs().max()


@pytest.mark.parametrize(
    ("group", "queries"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (16, 1), (1, 5), (4, 3)]
)
def test_query_heads_and_tokens(emulated, group, queries):
    keys, values = both_sides(64, 2, 131)
    q = drawn(1, 2 * group, queries, 64)
    out, wanted = tile_attention(emulated, q, keys, values, 131, scaling=0.125)
    assert_near(out, wanted)


@pytest.mark.parametrize("dim", [16, 80, 96, 128, 256])
def test_head_dims(emulated, dim):
    keys, values = both_sides(dim, 2, 70)
    out, wanted = tile_attention(emulated, drawn(1, 4, 1, dim), keys, values, 70, scaling=dim**-0.5)
    assert_near(out, wanted)


def test_an_item_may_be_larger_than_its_block_of_threads(emulated):
    keys, values = (side([(8,) * 32], 70, 1, 512, seed) for seed in (1, 2))
    # two warps, as tiles of this size leave room for
    shape = {"warps": 2, "ring": 64 * 1024}
    q = drawn(1, 2, 1, 512)
    out, wanted = tile_attention(emulated, q, keys, values, 70, shape=shape, scaling=512**-0.5)
    assert_near(out, wanted, 3e-3)


def test_one_head_of_one_chunk(emulated):
    keys, values = both_sides(16, 1, 70)
    out, wanted = tile_attention(emulated, drawn(1, 2, 1, 16), keys, values, 70, scaling=0.25)
    assert_near(out, wanted)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 129, 400])
@pytest.mark.parametrize("workers", [1, 7, 40])
def test_any_number_of_tokens_and_splits(emulated, tokens, workers):
    keys, values = both_sides(64, 2, tokens, seed=5)
    q = drawn(1, 8, 1, 64)
    out, wanted = tile_attention(emulated, q, keys, values, tokens, scaling=0.125, workers=workers)
    assert_near(out, wanted)


OPTIONS = {
    "softcap": {"softcap": 5.0},
    "sinks": {"sink_logits": torch.tensor([3.0, -2.0, 8.0, 0.0, 1.0, 6.0, -4.0, 2.0])},
    "skip": {"skip": 70},
    "window": {"window": 50},
    "padding": {"hidden": torch.tensor([0, 90])},
}


# four query rows a KV head, and twelve: in two pieces
@pytest.mark.parametrize(
    ("exact", "group", "queries"),
    [((0, 0), 2, 2), ((1, 0), 2, 2), ((0, 3), 4, 3), ((4, 37), 4, 3)],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_with_exact_tokens(emulated, options, exact, group, queries):
    if "sink_logits" in options:
        options = {"sink_logits": options["sink_logits"][: 2 * group]}
    keys, values = both_sides(64, 2, 200, batch=2, seed=9)
    kept = None
    if sum(exact):
        kept = Exact(
            *(drawn(2, 2, n, 64, seed=i) for i, n in enumerate(n for n in exact for _ in range(2)))
        )
    q = 2 * drawn(2, 2 * group, queries, 64)
    out, wanted = tile_attention(emulated, q, keys, values, 200, scaling=0.125, exact=kept, **options)
    assert_near(out, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_below_that_of_torch_in_the_same_precision(emulated, dtype):
    keys, values = both_sides(64, 2, 333, batch=2, seed=11)
    q = drawn(2, 8, 1, 64, dtype=dtype)
    exact = Exact(*(drawn(2, 2, n, 64, seed=i, dtype=dtype) for i, n in enumerate((2, 2, 9, 9))))
    out, wanted = tile_attention(emulated, q, keys, values, 333, scaling=0.125, exact=exact)
    decoded = [
        torch.cat([first, Segment(333, coded=parts).decode(dtype), last], dim=2)
        for first, parts, last in (
            (exact.first_keys, keys, exact.last_keys),
            (exact.first_values, values, exact.last_values),
        )
    ]
    torch_out = torch.nn.functional.scaled_dot_product_attention(q, *decoded, scale=0.125, enable_gqa=True)
    errors = [(x.double() - wanted).norm() for x in (out, torch_out.transpose(1, 2))]
    assert errors[0] <= 2 * errors[1]


def test_a_mean_of_many_values_around_zero_keeps_its_precision(emulated):
    keys, values = both_sides(64, 1, 1500, seed=11)
    values = [replace(v, folded=replace(v.folded, shift=torch.zeros(1, 64))) for v in values]
    q = 0.05 * drawn(1, 4, 1, 64, dtype=torch.bfloat16)
    out, wanted = tile_attention(emulated, q, keys, values, 1500, scaling=0.125)
    decoded = [Segment(1500, coded=parts).decode(q.dtype) for parts in (keys, values)]
    torch_out = torch.nn.functional.scaled_dot_product_attention(q, *decoded, scale=0.125, enable_gqa=True)
    ours, theirs = ((x.double() - wanted).norm() for x in (out, torch_out.transpose(1, 2)))
    assert ours <= 1.1 * theirs


def test_growing_scores_move_the_reference(emulated):
    """Later scores far above all earlier ones, and far below."""
    keys, values = both_sides(64, 1, 640, seed=13)
    for sign in (20.0, -20.0):
        q = sign * drawn(1, 4, 1, 64)
        out, wanted = tile_attention(emulated, q, keys, values, 640, scaling=0.5, workers=2)
        assert_near(out, wanted, 3e-3)


# first tokens score so far above the others, in log2 units, that these weigh 255, all in low bytes, or
# nearly 2^16
@pytest.mark.parametrize(("apart", "first"), [(14.5 - math.log2(255), 1), (-1.47, TOKENS)])
def test_sums_of_one_warp_over_many_tokens_do_not_overflow(emulated, apart, first):
    tokens = 36_000
    keys, values = (list(side([(8,)], tokens, 1, 16, seed)) for seed in (1, 2))
    for (part,), low in ((keys, 0), (values, 255)):
        codes = torch.full((tokens, 16), 255, dtype=torch.uint8)
        codes[:first] = low
        part.packed.tensors[0].copy_(pack_row(codes, part.packed.format.widths))
    decoded = Segment(tokens, coded=keys).decode(torch.float64)[0, 0]
    way = decoded[0] - decoded[-1]
    q = (apart * math.log(2) * way / way.square().sum()).float().expand(1, 4, 1, 16).contiguous()
    shape = {"warps": 1, "ring": 32 * 1024}
    out, wanted = tile_attention(emulated, q, keys, values, tokens, shape=shape, scaling=1.0, workers=1)
    assert_near(out, wanted)


@pytest.mark.parametrize("apart", [15.2, 16.0, 17.3])
def test_many_small_weights_count_beside_a_great_one(emulated, apart):
    """Each of them is nothing beside the first token's, and all of them are a tenth of it."""
    tokens = 8000
    keys, values = (list(side([(8,)], tokens, 1, 16, seed)) for seed in (1, 2))
    codes = torch.full((tokens, 16), 255, dtype=torch.uint8)
    codes[:1] = 0
    keys[0].packed.tensors[0].copy_(pack_row(codes, keys[0].packed.format.widths))
    decoded = Segment(tokens, coded=keys).decode(torch.float64)[0, 0]
    way = decoded[0] - decoded[-1]
    q = (apart * math.log(2) * way / way.square().sum()).expand(1, 4, 1, 16).bfloat16().contiguous()
    shape = {"warps": 1, "ring": 32 * 1024}
    out, wanted = tile_attention(emulated, q, keys, values, tokens, shape=shape, scaling=1.0, workers=1)
    decoded = [Segment(tokens, coded=parts).decode(q.dtype) for parts in (keys, values)]
    torch_out = torch.nn.functional.scaled_dot_product_attention(q, *decoded, scale=1.0, enable_gqa=True)
    ours, theirs = ((x.double() - wanted).norm() for x in (out, torch_out.transpose(1, 2)))
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("tokens", [1, 20, 200])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_in_a_query_is_none_in_its_row(emulated, wrong, tokens):
    keys, values = both_sides(64, 1, tokens)
    q = drawn(1, 4, 1, 64)
    clean, _ = tile_attention(emulated, q, keys, values, tokens, scaling=0.125)
    q[0, 2, 0, 5] = wrong
    sides = tiled(keys, "tokens", tokens), tiled(values, "coordinates", tokens)
    ranges = token_ranges(1, 1, 0, tokens, 0)
    out = run(emulated, prepared(q, *sides, ranges, scaling=0.125, workers=6, shape=SMALL))
    assert out[0, 0, 2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(out[0, 0, others], clean[0, 0, others])


def test_runs_are_equal_and_leave_the_counters_at_zero(emulated):
    keys, values = both_sides(64, 2, 300, batch=2)
    # twelve rows a KV head are two pieces
    q = drawn(2, 24, 1, 64)
    call = prepared(
        q,
        tiled(keys, "tokens", 300),
        tiled(values, "coordinates", 300),
        token_ranges(2, 1, 0, 300, 0),
        scaling=0.125,
        workers=12,
        shape=SMALL,
    )
    once = run(emulated, call).clone()
    assert torch.equal(run(emulated, call), once)
    done = next(t for t in call.tensors if t.data_ptr() == call.values["done"])
    assert done.shape == (8,) and not done.any()


def test_launches_of_two_caches_share_nothing_that_they_write():
    """They may run at the same time, on streams of their own."""
    calls = []
    for _ in range(2):
        keys, values = both_sides(64, 2, 300)
        sides = tiled(keys, "tokens", 300), tiled(values, "coordinates", 300)
        ranges = token_ranges(1, 1, 0, 300, 0)
        options = {"scaling": 0.125, "workers": 12, "shape": SMALL}
        calls.append(prepared(drawn(1, 8, 1, 64), *sides, ranges, **options))
    one, other = (call.values for call in calls)
    assert all(one[name] != other[name] for name in ("out", "partial", "masses", "done"))


@pytest.mark.parametrize("row_tiles", [1, 2])
@pytest.mark.parametrize("blocks", [4, 16, 32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_shapes_fit_a_multiprocessor(dim, blocks, row_tiles):
    widest = 2 * 128 * 4 * min(blocks, dim // 8)
    kinds = ((blocks, 0, 0),)
    shape = Shape(dim, blocks, blocks, blocks, kinds, kinds, row_tiles, 0).fitting(widest)
    assert shape.blocks * (shape.shared_bytes + 1024) <= 228 * 1024
    assert shape.ring >= widest and shape.ring % 128 == 0
    with pytest.raises(KVSightError, match="do not fit the shared memory"):
        shape.fitting(1 << 18)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("blocks", [1, 5, 64, 264])
@pytest.mark.parametrize(("batch", "tiles"), [(1, 1), (1, 2048), (3, 9), (32, 64), (40, 5000)])
def test_schedules_cover_every_tile_once_largest_parts_first(batch, tiles, blocks, exact):
    costs = (900, 5000, 1, 3000)
    items = schedule(costs, batch, tiles, blocks, entry=50, most=1000, exact=exact)
    seen = {}
    for item in items:
        seen.setdefault((item.sequence, item.head), []).append(item)
    assert set(seen) == {(b, h) for b in range(batch) for h in range(len(costs))}
    for parts in seen.values():
        parts.sort(key=lambda item: item.split)
        coded = [p for p in parts if p.split < p.coded]
        assert [p.split for p in parts] == list(range(len(coded) + exact))
        assert {p.coded for p in parts} == {len(coded)} and len({p.slot for p in parts}) == 1
        assert [p.start for p in coded] == [0, *(p.stop for p in coded[:-1])] and coded[-1].stop == ONE
    assert sorted(i.slot + i.split for i in items) == list(range(len(items)))
    spent = [costs[i.head] * (i.stop - i.start) / ONE if i.split < i.coded else 0 for i in items]
    heads, coded = batch * len(costs), sum(i.split < i.coded for i in items)
    assert coded >= min(heads, blocks)
    assert max(i.stop - i.start for i in items) * tiles <= 1.06 * 1000 * ONE
    # what begins at once may do so in any order
    behind = 0 if coded <= blocks else blocks
    assert min(spent[:behind], default=spent[0]) >= spent[behind] - 1
    assert all(a >= b - 1 for a, b in pairwise(spent[behind:]))


def test_wider_heads_get_more_parts():
    items = schedule((100, 300), 2, 3000, 16, entry=1000, most=3000, exact=False)
    assert [sum(i.head == h for i in items) for h in range(2)] == [4, 12]


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "kilobytes", "wanted"),
    [
        ("cuda", torch.bfloat16, (9, 0), 228, True),
        ("cuda", torch.float32, (10, 0), 228, True),
        ("cuda", torch.float32, (12, 0), 100, False),
        ("cuda", torch.bfloat16, (8, 6), 228, False),
        ("cuda", torch.float64, (9, 0), 228, False),
        ("cpu", torch.bfloat16, (9, 0), 228, False),
    ],
)
def test_tiles_are_read_by_gpus_since_hopper(monkeypatch, device, dtype, capability, kilobytes, wanted):
    about = SimpleNamespace(shared_memory_per_multiprocessor=1024 * kilobytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reads_tiles.__wrapped__(torch.device(device), dtype) is wanted

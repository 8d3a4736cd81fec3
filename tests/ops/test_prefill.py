"""Attention of many new tokens over tiles, against fp64 attention over what the codes decode to."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvsight.codec import Codec
from kvsight.errors import KVSightError
from kvsight.ops.attend import prefill
from kvsight.ops.attend.cuda import Exact, TiledTokens
from kvsight.ops.attend.prefill import PrefillReader
from kvsight.ops.attend.tiles import fold
from kvsight.packing import unpack_row
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.tiling import TOKENS
from kvsight.transforms import centre, linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what the fastest kernel of torch takes
NUMBER = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DIM, HEADS, BATCH = 32, 2, 2
WIDTHS = {"tokens": ((8, 3), (4, 1)), "coordinates": ((4, 0), (3, 2))}
SCALING = DIM**-0.5


def side(rows, tokens, seed, skip=0):
    """Tiles of heads with these widths and means far from zero; and the decoded tokens [B, H, n, d]."""
    draw = torch.Generator().manual_seed(seed)
    coded, tiles, decoded = [], [], []
    for head, widths in enumerate(WIDTHS[rows]):
        mix = torch.linalg.qr(torch.randn(1, DIM, DIM, generator=draw, dtype=torch.float64)).Q
        mean = 3 * torch.randn(1, DIM, generator=draw, dtype=torch.float64)
        row = tuple(w for w in widths for _ in range(16))
        codec = Codec("test", centre(mean).then(linear(mix)).stored(), row_quantizer(row, uniform))
        x = codec.transform.inverse(torch.randn(BATCH, 1, tokens, DIM, generator=draw, dtype=torch.float64))
        packed = codec.encode(x)
        coded.append(codec.coded((head,), packed))
        decoded.append(coded[-1].decode().double())
        codes = unpack_row(packed.tensors[0][:, 0], row)
        noise = torch.full((BATCH, -tokens % TOKENS, codes.shape[-1]), 1, dtype=torch.uint8)
        tiles.append((codes, noise))
    folded = fold(coded, rows)
    held = tuple(
        tiling.pack(torch.cat(pair, dim=1)) for tiling, pair in zip(folded.tilings, tiles, strict=True)
    )
    return TiledTokens(folded, held, tokens, skip), torch.cat(decoded, dim=1)[:, :, skip:]


def layer(first, tokens, last, dtype=torch.float64, skip=0, seed=0):
    """Keys, values, exact tokens, and all decoded keys and values."""
    (keys, k), (values, v) = side("tokens", tokens, seed, skip), side("coordinates", tokens, seed + 1, skip)
    draw = torch.Generator().manual_seed(seed + 2)
    own = [torch.randn(BATCH, HEADS, n, DIM, generator=draw).to(dtype) for n in (first, first, last, last)]
    k, v = (torch.cat([own[i].double(), x, own[i + 2].double()], dim=2) for i, x in enumerate((k, v)))
    return keys, values, Exact(*own) if first + last else None, k, v


def attended(q, keys, values, exact, **options):
    """On the device that runs it."""
    on = [
        replace(
            side,
            folded=replace(
                side.folded, matrix=side.folded.matrix.to(DEVICE), shift=side.folded.shift.to(DEVICE)
            ),
            tiles=tuple(tile.to(DEVICE) for tile in side.tiles),
        )
        for side in (keys, values)
    ]
    if exact is not None:
        exact = Exact(*(getattr(exact, f.name).to(DEVICE) for f in fields(exact)))
    if options.get("sink_logits") is not None:
        options["sink_logits"] = options["sink_logits"].to(DEVICE)
    reader = PrefillReader.of(*on, SCALING)
    return reader.attend(q.to(DEVICE), keys.tokens, skip=keys.skip, exact=exact, **options).cpu()


def queries(count, group, dtype=torch.float64, seed=9):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS * group, count, DIM, generator=draw).to(dtype)


def wanted(q, k, v, hidden=None, window=None, softcap=None, sink_logits=None):
    """The definition, with whole matrices; [B, Q, Hq, d]."""
    group, tokens = q.shape[1] // HEADS, k.shape[2]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = SCALING * q.double() @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(tokens)
    own = at[tokens - q.shape[2] :, None]
    seen = (at <= own).expand(BATCH, 1, -1, -1)
    if window is not None:
        seen = seen & (at > own - window)
    if hidden is not None:
        seen = seen & (at >= hidden.view(-1, 1, 1, 1))
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.double().view(1, -1, 1, 1).expand(BATCH, -1, q.shape[2], 1)
        scores = torch.cat([scores, extra], dim=-1)
    return (scores.softmax(-1).nan_to_num()[..., :tokens] @ v).transpose(1, 2)


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces and blocks of queries without many tokens."""
    # cuDNN knows no smaller ones
    monkeypatch.setattr(prefill, "_USUAL", 64 if DEVICE == "cuda" else 16)
    monkeypatch.setattr(prefill, "_ROWS", 64)
    monkeypatch.setattr(prefill, "_PIECE_BYTES", 64 * 4 * HEADS * DIM)
    monkeypatch.setattr(prefill, "_PLAIN_PIECE", 40)
    monkeypatch.setattr(prefill, "_PLAIN_SCORES", 40 * 8 * 7)


LAYOUTS = [
    (0, 70, 0, 70),
    (3, 150, 0, 40),
    (3, 67, 0, 70),
    (2, 100, 45, 45),
    (0, 90, 20, 50),
    (5, 0, 30, 30),
]


@pytest.mark.parametrize("kernel", [None, "plain"])
@pytest.mark.parametrize(("group", "skip"), [(1, 0), (4, 10)])
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_layouts(small_pieces, shape, group, skip, kernel):
    first, coded, last, count = shape
    number = torch.float64 if kernel == "plain" else NUMBER
    keys, values, exact, k, v = layer(first, coded + skip, last, number, skip)
    sinks = torch.linspace(-2, 2, HEADS * group)
    q = queries(count, group, number)
    near = 5e-2 if number == torch.bfloat16 else 2e-5
    for more in (
        {},
        {"hidden": torch.tensor([0, 21])},
        {"hidden": torch.tensor([7, 7]), "sink_logits": sinks},
    ):
        out = attended(q, keys, values, exact, kernel=kernel, **more)
        assert out.dtype == number
        torch.testing.assert_close(out.double(), wanted(q, k, v, **more), rtol=0, atol=near)


@pytest.mark.parametrize(("first", "coded", "last", "count"), LAYOUTS[1:4])
def test_what_no_kernel_of_torch_does(small_pieces, first, coded, last, count):
    keys, values, exact, k, v = layer(first, coded, last)
    q = 4 * queries(count, 2)
    for more in (
        {"softcap": 3.0},
        {"window": 25},
        {"softcap": 3.0, "window": 60, "hidden": torch.tensor([0, 21]), "sink_logits": torch.zeros(4)},
    ):
        out = attended(q, keys, values, exact, **more)
        torch.testing.assert_close(out, wanted(q, k, v, **more), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (None, torch.bfloat16),
        (None, torch.float16),
        (None, torch.float32),
        ("plain", torch.bfloat16),
        ("plain", torch.float32),
    ],
)
@pytest.mark.parametrize("first", [0, 3])
def test_error_is_at_most_twice_that_of_attention_over_decoded_tokens(small_pieces, kernel, first, dtype):
    keys, values, exact, k, v = layer(first, 300, 0, dtype)
    q = queries(100, 4, dtype)
    true = wanted(q, k, v)
    mask = torch.ones(100, k.shape[2], dtype=torch.bool).tril(k.shape[2] - 100)
    stock = sdpa(q, k.to(dtype), v.to(dtype), attn_mask=mask, scale=SCALING, enable_gqa=True)
    out = attended(q, keys, values, exact, kernel=kernel)
    for measure in (torch.linalg.vector_norm, lambda x: x.abs().max()):
        mine, theirs = measure(out.double() - true), measure(stock.transpose(1, 2).double() - true)
        assert mine <= 2 * theirs


@pytest.mark.parametrize("kernel", [None, "plain"])
def test_chunks_are_the_whole(kernel):
    keys, values, exact, *_ = layer(2, 200, 0)
    q = queries(180, 2, torch.float32 if kernel else NUMBER)
    whole = attended(q, keys, values, exact, kernel=kernel)
    parts = []
    for start, stop in ((0, 50), (50, 51), (51, 180)):
        held = [replace(side, tokens=20 + stop) for side in (keys, values)]
        parts.append(attended(q[:, :, start:stop], *held, exact, kernel=kernel))
    near = 5e-2 if whole.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=near)


def test_query_heads_that_no_kv_head_serves():
    keys, values, *_ = layer(0, 70, 0)
    with pytest.raises(KVSightError, match="3 query heads cannot share 2"):
        attended(queries(10, 2)[:, :3], keys, values, None)

"""Models on a GPU: caches in tiles and in rows, eager, compiled and as CUDA graphs, against the CPU."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kvsight
from kvsight.assets import model_path, text
from kvsight.cache.side import append, start
from kvsight.cache.tiles import Tiles
from kvsight.codec import Codec, Placement
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.retention import Retention
from kvsight.text import windows
from kvsight.transforms import haar

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FIT = {"bits": 4.0, "options": {"layout": "tiles"}, "allocate": "uniform"}


@pytest.fixture(scope="module")
def fitted():
    """Two layers of a real model, on the CPU: kernels are compiled for every layer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, num_hidden_layers=2)
    plan = kvsight.fit(model.eval(), [windows(tokenizer, text("calibration"), 256, 8)], **FIT)
    return model, plan, windows(tokenizer, text("evaluation"), 160, 2)


@pytest.fixture(scope="module")
def there(fitted):
    model, plan, ids = fitted
    return copy.deepcopy(model).to(DEVICE), plan, ids.to(DEVICE)


def caches(plan, **options):
    """In tiles and in rows."""
    return [kvsight.PackedCache(plan, tiles=tiles, **options) for tiles in (True, False)]


def read(model, cache, ids, sizes, mask=None):
    """Logits of all tokens, so many at a time."""
    parts, at = [], 0
    with torch.no_grad(), kvsight.enable(model):
        for size in sizes:
            stop, more = at + size, {}
            if mask is not None:
                places = (mask.cumsum(1) - 1).clamp_min(0)
                more = {"attention_mask": mask[:, :stop], "position_ids": places[:, at:stop]}
            parts.append(model(ids[:, at:stop], past_key_values=cache, use_cache=True, **more).logits)
            at = stop
    assert at == ids.shape[1] and cache.reads.decoded == 0
    return torch.cat(parts, dim=1).float().cpu()


def alike(found, wanted, median=2e-2, same=0.95):
    # a code flips where a number lies between two, and one that did moves all that follow a little
    assert float((found - wanted).abs().median()) < median
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > same


def test_decoding_on_a_gpu_is_decoding_on_the_cpu(fitted, there):
    model, plan, ids = fitted
    sizes = [100, *[1] * 60]
    wanted = read(model, kvsight.PackedCache(plan), ids, sizes)
    for tiles in (None, False):
        cache = kvsight.PackedCache(plan, tiles=tiles)
        alike(read(there[0], cache, there[2], sizes), wanted)
        assert [layer.tiles is not None for layer in cache.layers] == [tiles is None] * len(cache.layers)


def test_generation_in_tiles_is_generation_in_rows(there):
    model, plan, ids = there
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with kvsight.enable(model):
        tiled, rows = (model.generate(ids, past_key_values=c, **settings) for c in caches(plan))
    # where two tokens are next to equal a flipped code decides, and the rest of that text differs
    assert tiled.shape == (2, 184) and bool((tiled == rows).all(-1).any())


# whole tiles and parts of them, for the decoding kernel (up to 16) and for torch's
@pytest.mark.parametrize("prefill", ["packed", "raw"])
@pytest.mark.parametrize("sizes", [(160,), (100, 40, 1, 19), (30, 64, 16, 2, 48)], ids=str)
def test_prefill_in_tiles_is_prefill_in_rows(there, prefill, sizes):
    model, plan, ids = there
    tiled, rows = caches(plan, prefill=prefill)
    alike(read(model, tiled, ids, sizes), read(model, rows, ids, sizes))
    assert all(layer.tiles is not None for layer in tiled.layers)


def test_prefill_in_half_precision(there):
    model, plan, ids = there
    model, sizes = copy.deepcopy(model).bfloat16(), (100, 40, 1, 19)
    tiled, rows = (read(model, cache, ids, sizes) for cache in caches(plan))
    alike(tiled, rows, 0.1, 0.9)


def test_sequences_of_unequal_length(there):
    model, plan, ids = there
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    tiled, rows = caches(plan)
    sizes = (90, 1, 1, 4, 40, *[1] * 24)
    found, wanted = (read(model, cache, ids, sizes, mask)[mask.bool().cpu()] for cache in (tiled, rows))
    alike(found, wanted)
    # and each of them is what it would be alone
    alone = read(model, kvsight.PackedCache(plan, tiles=True), ids[:1, 37:], (80, *[1] * 43))
    alike(found[: 160 - 37], alone[0])
    assert all(layer.tiles is not None for layer in tiled.layers)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
KINDS = {
    "gemma2": {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0},
    "gpt_oss": {"num_local_experts": 4, "max_position_embeddings": 131072},
}


@pytest.mark.parametrize("window", [24, 90], ids=["rows", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_beside_softcap_and_sink_logits(kind, window):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind], sliding_window=window)
    config._attn_implementation = "eager"
    more = {"experts_implementation": "eager"} if kind == "gpt_oss" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            elif name.endswith("sinks"):
                parameter.fill_(4.0)
    ids = torch.randint(2, 64, (4, 240))
    plan = kvsight.fit(model, [ids], **FIT)
    model, ids = model.to(DEVICE), ids[:2].to(DEVICE)
    tiled, rows = caches(plan)
    # tiles of the window are moved twice
    sizes = (90, *[1] * 10, 20, *[1] * 110, 3, 7)
    alike(read(model, tiled, ids, sizes), read(model, rows, ids, sizes))
    assert [layer.tiles is not None for layer in tiled.layers] == [window > 64, True]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_can_be_a_graph(there, compiled):
    model, plan, ids = there
    wanted = read(model, kvsight.PackedCache(plan), ids, [120, *[1] * 40])[:, 120:]
    cache = kvsight.PackedCache(plan)
    read(model, cache, ids[:, :120], [120])
    cache.reserve(160)
    token, at = ids[:, 120:121].clone(), torch.full((2, 1), 120, device=DEVICE)

    def step():
        return model(token, position_ids=at, past_key_values=cache, use_cache=True).logits

    if compiled:
        step = torch.compile(step, fullgraph=True, dynamic=False)

    def move(to):
        token.copy_(ids[:, to : to + 1]), at.fill_(to)

    with torch.no_grad(), kvsight.enable(model):
        # twice as it is: kernels are compiled, and tiles made
        found = [step().clone()]
        move(121)
        found.append(step().clone())
        move(122)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        # past the end of a tile
        for i in range(122, 159):
            move(i)
            graph.replay()
            found.append(out.clone())
        # the host learns what graphs counted, and goes on from there
        assert cache.get_seq_length() == 159
        found.append(model(ids[:, 159:160], past_key_values=cache, use_cache=True).logits)
    alike(torch.cat(found, dim=1).float().cpu(), wanted)


DIM, HEADS = 64, 2


def tokens(count, seed, heads=HEADS):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, count, DIM, generator=draw).to(DEVICE, torch.bfloat16)


def held(count):
    """Tiles of one layer, two exact first tokens, and widths of its own for every head."""
    states = []
    for side in range(2):
        x = tokens(count, side)
        placements = tuple(
            Placement((h,), Codec("sight", haar(DIM, h).stored(), row_quantizer(widths, uniform)))
            for h, widths in enumerate([(6 - side,) * 16 + (4,) * 16 + (2,) * 32, (3,) * 48 + (0,) * 16])
        )
        states.append(append(start(placements, Retention(2, 0), torch.bfloat16, x[:, :, :0]), x))
    return Tiles(*states)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_is_an_eager_one(backend):
    torch.compiler.reset()
    # so many tiles that those with room for more are read in the same order
    tiles, eager = held(340), held(340)

    def step(tiles, k, v, q):
        tiles.append(k, v)
        return 2 * tiles.attend(q, scaling=0.2)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch.no_grad():
        for turn in range(3):
            new = tokens(1, turn + 7), tokens(1, turn + 17), tokens(1, turn + 27, 4 * HEADS)
            assert torch.equal(compiled(tiles, *new), step(eager, *new))
    assert tiles.tokens == eager.tokens == 341
    assert int(tiles.seen) == int(eager.seen) == 343
    for side, other in zip(tiles.tiles, eager.tiles, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(side, other, strict=True))
    torch.compiler.reset()

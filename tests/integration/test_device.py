"""Caches on a GPU, whose launches, captures and copies run on a device that is only pretended."""

import copy

import pytest
import torch
import zoo
from pretended import pretended
from zoo import build, tokens

import kvsight
from emulated import builder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does it on a real one"),
]
LAYOUT = (("layout", "tiles"),)
SIZES = (100, 1, 1, 5, 17, 31, 1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return builder(tmp_path_factory.mktemp("device"))


@pytest.fixture
def device(monkeypatch, kernels):
    with pretended(monkeypatch, kernels) as there:
        yield there


def read(subject, cache, ids, sizes=SIZES, mask=None):
    out = zoo.read(subject, cache, ids, sizes, mask=mask)
    return getattr(out, "here", out).float()


def near(found, wanted, most=2e-3):
    # a code may differ, and moves what follows a little
    return float((found - wanted).abs().median()) < most


@pytest.mark.parametrize("prefill", ["packed", "raw"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_any_size(device, model, plan, prefill, padded, dtype):
    if dtype == torch.bfloat16 and (padded or prefill == "raw"):
        pytest.skip("said by fp32")
    subject, fitted = (
        model("llama-1layer"),
        plan("llama-1layer", "sight", bits=4.0, options=LAYOUT, sinks=3),
    )
    ids = tokens(2, sum(SIZES))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    masks = [mask, device.move(mask)] if padded else [None, None]
    wanted = read(subject, kvsight.PackedCache(fitted, tiles=True, prefill=prefill), ids, mask=masks[0])
    there, cache = device.move(subject.to(dtype)), kvsight.PackedCache(fitted, prefill=prefill)
    subject.float()
    with device:
        found = read(there, cache, device.move(ids), mask=masks[1])
    seen = mask.bool() if padded else slice(None)
    assert near(found[seen], wanted[seen], 2e-3 if dtype == torch.float32 else 0.1)
    assert cache.layers[0].tiles is not None and cache.reads.decoded == 0
    assert device.launches["attend_tiles"] and device.launches["encode_tiles"]


def test_steps_wait_for_nothing(device, model, plan):
    fitted = plan("llama-1layer", "sight", bits=4.0, options=LAYOUT, sinks=3)
    there, cache, ids = device.move(model("llama-1layer")), kvsight.PackedCache(fitted), tokens(2, 110)
    with device:
        ids = device.move(ids)
        read(there, cache, ids[:, :103], (100, 1, 1, 1))
        device.events.clear()
        with torch.no_grad(), kvsight.enable(there):
            at = device.move(torch.full((2, 1), 103))
            there(ids[:, 103:104], position_ids=at, past_key_values=cache, use_cache=True)
        assert not device.events


def test_graphs_are_replayed_between_other_steps(device, model, plan):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    ids = tokens(2, 215)
    wanted = read(subject, kvsight.PackedCache(fitted, tiles=True), ids, (120, *[1] * 95))
    there, cache = device.move(subject), kvsight.PackedCache(fitted)
    token, at = device.move(ids[:, :1]), device.move(torch.full((2, 1), 0))

    def written():
        held = [layer.tiles for layer in cache.layers]
        return [t for tiles in held for side in tiles.tiles for t in side] + [held[0].seen]

    with device, torch.no_grad(), kvsight.enable(there):
        there(device.move(ids[:, :120]), past_key_values=cache, use_cache=True)
        cache.reserve(190)

        def step():
            return there(token, position_ids=at, past_key_values=cache, use_cache=True).logits

        def go(i, run):
            token.copy_(device.move(ids[:, i : i + 1]))
            at.fill_(i)
            assert near(run().here, wanted[:, i : i + 1]), i

        for i in range(120, 122):
            go(i, step)
        replay = device.capture(step, written)
        for i in range(122, 140):
            go(i, step if i in (128, 129, 133) else replay)
        assert {layer.cumulative_length for layer in cache.layers} == {140}
        fork = copy.deepcopy(cache)
        assert fork.get_seq_length() == 140
        for i in range(140, 192 + 3):
            go(i, replay)
        with pytest.raises(RuntimeError, match="past the room"):
            go(195, replay)
        cache.crop(-5)
        # more than there was room for
        for i in range(190, 215):
            go(i, step)


def test_more_query_heads_than_a_launch_takes(device):
    heads = {"num_attention_heads": 34, "num_key_value_heads": 2, "head_dim": 16}
    subject = build("llama-1layer", hidden_size=68, **heads)
    ids = tokens(2, 110)
    fitted = kvsight.fit(subject, [tokens(2, 160, seed=5)], bits=4.0, options=dict(LAYOUT))
    wanted = read(subject, kvsight.PackedCache(fitted, tiles=True), ids, (100, 1, 3, 6))
    with device:
        found = read(device.move(subject), kvsight.PackedCache(fitted), device.move(ids), (100, 1, 3, 6))
    assert near(found, wanted) and device.launches["attend_tiles"] > 3


@pytest.mark.parametrize("padded", [False, True])
def test_windows(device, padded):
    subject = build("gemma2", sliding_window=90, max_position_embeddings=512)
    sizes = (100, *[1] * 70, 3, 16, 40, 1, 1)
    ids = tokens(2, sum(sizes))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    fitted = kvsight.fit(subject, [tokens(2, 160, seed=5)], bits=4.0, options=dict(LAYOUT), window=4)
    masks = [mask, device.move(mask)] if padded else [None, None]
    wanted = read(subject, kvsight.PackedCache(fitted, subject.config, tiles=True), ids, sizes, masks[0])
    cache = kvsight.PackedCache(fitted, subject.config)
    with device:
        found = read(device.move(subject), cache, device.move(ids), sizes, masks[1])
    seen = mask.bool() if padded else slice(None)
    assert near(found[seen], wanted[seen])
    assert all(layer.tiles is not None for layer in cache.layers) and cache.reads.decoded == 0

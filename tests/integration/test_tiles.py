"""Caches in tiles hold and give what caches in rows do."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig
from zoo import near, tokens

import kvsight
from kvsight.cache.packed import left_padding
from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.eval.selftest import checked_bytes
from kvsight.plan import LayerPlan, Plan
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.transforms import haar

LAYOUT = (("layout", "tiles"),)


def caches(fitted, **options):
    return [kvsight.PackedCache(fitted, tiles=tiles, **options) for tiles in (False, True)]


def step(subject, cache, ids, mask=None):
    more = {} if mask is None else {"attention_mask": mask[:, : cache.get_seq_length() + ids.shape[1]]}
    if mask is not None:
        at = (mask.cumsum(1) - 1).clamp_min(0)
        more["position_ids"] = at[:, cache.get_seq_length() :][:, : ids.shape[1]]
    with torch.no_grad():
        return subject(ids, past_key_values=cache, use_cache=True, **more).logits


MIXED, LATE, WHOLE = (70, 1, 1, 5, 16, 40, 1, 3, 32, 1), (2, 41, 1, 50, 1, 3, 60, 12), (170,)


@pytest.mark.parametrize(
    ("name", "sinks", "sizes", "prefill"),
    [
        ("llama", 0, MIXED, "packed"),
        ("llama", 3, MIXED, "raw"),
        ("llama-1layer", 3, MIXED, "packed"),
        ("llama", 3, LATE, "packed"),
        ("llama-1layer", 3, LATE, "raw"),
        ("llama", 3, WHOLE, "packed"),
        ("llama", 0, WHOLE, "raw"),
    ],
)
def test_steps_of_any_size(name, sinks, sizes, prefill, model, plan):
    subject, fitted = model(name), plan(name, "sight", bits=4.0, options=LAYOUT, sinks=sinks)
    ids = tokens(2, 170)
    rows, tiled = caches(fitted, prefill=prefill)
    with kvsight.enable(subject):
        at = 0
        for size in sizes:
            piece = ids[:, at : at + size]
            assert near(step(subject, rows, piece), step(subject, tiled, piece))
            at += size
            held = [layer.tiles is not None for layer in tiled.layers]
            assert held == [at - sinks >= 64] * len(held)
        assert tiled.get_seq_length() == rows.get_seq_length() == at
    assert tiled.reads.packed > 0 == tiled.reads.decoded
    if sizes == WHOLE:
        assert tiled.drift.mean == pytest.approx(rows.drift.mean, rel=1e-3)
    # a tile may be part empty
    assert rows.nbytes == fitted.nbytes(at, 2) <= tiled.nbytes <= rows.nbytes * 192 / (at - sinks)
    key = [cache.layers[0].key_state or cache.layers[0].tiles.states()[0] for cache in (rows, tiled)]
    same = [(a == b).float().mean() for a, b in zip(*(k.coded[0].tensors for k in key), strict=True)]
    assert min(same) > 0.999
    assert torch.equal(key[0].sinks, key[1].sinks)


def test_generation_and_whatever_else_a_cache_does(model, plan):
    subject, fitted = model("llama"), plan("llama", "sight", bits=6.0, options=LAYOUT)
    ids = tokens(1, 80)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        with kvsight.enable(subject):
            out = [subject.generate(ids, past_key_values=c, **settings, **more) for c in caches(fitted)]
        assert out[0].tolist() == out[1].tolist()
    cache = caches(fitted)[1]
    with kvsight.enable(subject):
        step(subject, cache, ids)
        step(subject, cache, ids[:, :1])
        fork = copy.deepcopy(cache)
        first, second = (step(subject, c, ids[:, 1:2]) for c in (cache, fork))
        assert torch.equal(first, second)
        cache.crop(-1)
        assert near(step(subject, cache, ids[:, 1:2]), first)
    with pytest.warns(UserWarning, match="decodes this cache"):
        outside = step(subject, fork, ids[:, 2:3])
    with kvsight.enable(subject):
        assert near(step(subject, cache, ids[:, 2:3]), outside)


@pytest.mark.parametrize("prefill", ["packed", "raw"])
def test_chunks_are_the_whole(prefill, model, plan):
    subject = model("llama")
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    ids = tokens(2, 150)
    whole, chunked = (kvsight.PackedCache(fitted, tiles=True, prefill=prefill) for _ in range(2))
    with kvsight.enable(subject):
        wanted = step(subject, whole, ids)
        found = torch.cat([step(subject, chunked, piece) for piece in ids.split(50, dim=1)], dim=1)
    # chunks see codes where the whole sees the tokens themselves
    assert near(wanted[:, :50], found[:, :50])
    assert near(wanted[:, 50:], found[:, 50:]) == (prefill == "packed")


def test_readers_that_know_no_tiles(model, plan):
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    cache = kvsight.PackedCache(fitted, tiles=True, prefill="raw")
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 80, 16, generator=draw).bfloat16().float() for _ in range(2))
    for at, stop in ((0, 70), (70, 80)):
        handles = cache.update(k[:, :, at:stop], v[:, :, at:stop], 0)
        assert cache.layers[0].tiles is not None
        with pytest.warns(UserWarning, match="decodes this cache") if at == 0 else nullcontext():
            decoded = [handle.clone() for handle in handles]
        for got, x in zip(decoded, (k, v), strict=True):
            assert torch.equal(got[:, :, at:], x[:, :, at:stop])
            apart = (got - x[:, :, :stop]).abs()
            assert not apart[:, :, : min(3, at)].any()
            # the plan was not fitted to these numbers
            assert apart[:, :, 3:at].sum() <= apart[:, :, 3:at].numel()
    with pytest.raises(KVSightError, match="batch of 2; got 1"):
        cache.update(k[:1], v[:1], 0)
    k[0, 0, 40] = float("nan")
    with pytest.raises(KVSightError, match="must be finite"):
        cache.update(k, v, 0)
    assert cache.get_seq_length() == 80


def test_the_ledger_counts_rows(model, plan):
    subject = model("llama")
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3)
    cache, ids = caches(fitted)[1], tokens(2, 90)
    with kvsight.enable(subject):
        step(subject, cache, ids)
    assert cache.nbytes > fitted.nbytes(90, 2)
    assert checked_bytes(cache, fitted, ids) == fitted.nbytes(90, 2)


def test_saved_and_loaded(model, plan, tmp_path):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT)
    cache = caches(fitted)[1]
    with kvsight.enable(subject):
        step(subject, cache, tokens(1, 70))
        step(subject, cache, tokens(1, 1))
        assert cache.layers[0].tiles is not None
        cache.save(tmp_path / "cache.safetensors")
        loaded = kvsight.PackedCache.load(tmp_path / "cache.safetensors", fitted, tiles=True, monitor=False)
        assert loaded.tiles and loaded.monitor is None
        assert near(step(subject, loaded, tokens(1, 1)), step(subject, cache, tokens(1, 1)))


def test_left_padding(model, plan):
    subject = model("llama")
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=0)
    ids = tokens(2, 110)
    ids[0, :9] = 0
    mask = (ids > 0).long()
    rows, tiled = caches(fitted)
    with kvsight.enable(subject):
        for start, stop in ((0, 80), (80, 81), (81, 85), (85, 110)):
            piece, real = ids[:, start:stop], mask[:, start:stop].bool()
            both = [step(subject, cache, piece, mask)[real] for cache in (rows, tiled)]
            assert near(*both)
    assert tiled.layers[0].tiles is not None


def test_a_mask_may_change_between_steps(model, plan):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT)
    ids, found = tokens(2, 81), []
    for cache in caches(fitted):
        mask = torch.ones(2, 1, 1, 81, dtype=torch.bool)
        with torch.no_grad(), kvsight.enable(subject):
            step(subject, cache, ids[:, :80])
            for hidden in (0, 40):
                mask[0, ..., :hidden] = False
                more = {"attention_mask": mask, "position_ids": torch.full((2, 1), 80)}
                found.append(subject(ids[:, 80:], past_key_values=cache, use_cache=True, **more).logits)
                cache.crop(-1)
    assert near(found[0][0], found[2][0]) and near(found[1][0], found[3][0])


def test_biases_of_a_mask_count(model, plan):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT)
    ids, found = tokens(2, 81), []
    bias = torch.linspace(0, 3, 81).expand(2, 1, 1, 81)
    more = {"attention_mask": bias, "position_ids": torch.full((2, 1), 80), "use_cache": True}
    for cache in caches(fitted):
        with torch.no_grad(), kvsight.enable(subject):
            step(subject, cache, ids[:, :80])
            found.append(subject(ids[:, 80:], past_key_values=cache, **more).logits)
    assert near(*found)


def test_gradients_of_a_few_tokens_are_refused(model, plan):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT)
    rows, tiled = caches(fitted)
    for cache in (rows, tiled):
        with kvsight.enable(subject):
            step(subject, cache, tokens(1, 70))
            inputs = subject.get_input_embeddings()(tokens(1, 2)).detach().requires_grad_()
            loss = subject(inputs_embeds=inputs, past_key_values=cache, use_cache=True).logits.sum()
        if cache is rows:
            loss.backward()
            assert inputs.grad is not None and inputs.grad.any()
            continue
        with pytest.raises(KVSightError, match=r"tiles has no gradient; generate under torch.no_grad\(\)"):
            loss.backward()


def test_masks_that_hide_more_than_padding():
    plain = torch.ones(2, 1, 3, 8, dtype=torch.bool).tril(5)
    assert left_padding(plain).tolist() == [0, 0]
    padded = plain.clone()
    padded[1, :, :, :2] = False
    assert left_padding(padded).tolist() == [0, 2]
    assert left_padding(torch.where(padded, 0.0, -1e9)).tolist() == [0, 2]
    for bias in (0.5, -0.5):
        biased = torch.where(padded, 0.0, -1e9)
        biased[1, 0, 1, 3] = bias
        assert left_padding(biased) is None
    padded[0, 0, 2, 4] = False
    assert left_padding(padded) is None
    assert left_padding(plain.expand(-1, 4, -1, -1)) is None


def test_other_plans_stay_in_rows(model, plan):
    subject = model("llama")
    for settings in ({"options": ()}, {"options": LAYOUT, "window": 4}):
        cache = caches(plan("llama", "sight", bits=8.0, **settings))[1]
        with kvsight.enable(subject):
            step(subject, cache, tokens(1, 70))
            step(subject, cache, tokens(1, 1))
        assert all(layer.tiles is None for layer in cache.layers)


def test_heads_without_bits():
    """A budget may leave a head nothing: it decodes to its mean, in tiles as in rows."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )

    def side(widths, seed):
        found = [
            Codec("sight", haar(32, seed + h).stored(), row_quantizer(own, uniform))
            for h, own in enumerate(widths)
        ]
        return tuple(Placement((h,), codec) for h, codec in enumerate(found))

    widths = (0,) * 32, (4,) * 16 + (3,) * 16
    layer = LayerPlan(0, None, 2, side(widths, 0), side(widths[::-1], 5))
    made = {"layout": "tiles"}, 0, 0, torch.float32, 1024, ""
    fitted = Plan((layer,), "sight", *made, config.to_dict())
    held = []
    for tiles in (True, False):
        torch.manual_seed(0)
        cache = kvsight.PackedCache(fitted, config, tiles=tiles, monitor=False)
        for new in (80, 1, 3):
            handles = cache.update(*torch.randn(2, 2, 2, new, 32), 0)
        held.append([handle.segments[0].decode(torch.float32) for handle in handles])
        assert (cache.layers[0].tiles is not None) == tiles
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


@pytest.mark.parametrize("tiles", [None, False])
def test_slow_rows_are_said_once(tiles, model, plan, monkeypatch):
    monkeypatch.setattr("kvsight.integrations.layers.reads_tiles", lambda device, dtype: True)
    monkeypatch.setattr("kvsight.integrations.layers._LONG", 20)
    subject = model("llama")
    cache = kvsight.PackedCache(plan("llama", "kivi", bits=8.0), tiles=tiles)
    with kvsight.enable(subject):
        for _ in range(20):
            step(subject, cache, tokens(1, 1))
        with (
            nullcontext() if tiles is False else pytest.warns(UserWarning, match="layout.*faster than BF16")
        ):
            step(subject, cache, tokens(1, 1))
        step(subject, cache, tokens(1, 1))
        step(subject, copy.deepcopy(cache), tokens(1, 1))

"""A plan that claims to compress and does not is caught, whatever broke; one that copies is not accused."""

import pytest
import torch
from zoo import batches, build, tokens

import kvsight
from kvsight.cache import side
from kvsight.errors import KVSightError
from kvsight.eval.selftest import codes
from kvsight.integrations import layers
from kvsight.ops.attend import Segment

METHODS = ("sight", "kivi", "turboquant")


def uncoded_reads(monkeypatch):
    """Caches whose bytes are right, and whose readers are given the numbers as they were."""
    start = layers.PackedLayer.__init__

    def broken(layer, plan, planned, reads, raw_prefill, *rest):
        start(layer, plan, planned, reads, True, *rest)

    monkeypatch.setattr(layers.PackedLayer, "__init__", broken)


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_the_uncompressed_model_are_caught(method, model, plan, monkeypatch):
    subject, fitted = model("llama"), plan("llama", method, bits=6.0)
    assert kvsight.evaluate(subject, fitted, batches()).kl.mean > 1e-6
    uncoded_reads(monkeypatch)
    with pytest.raises(KVSightError, match="its logits are those of the uncompressed model"):
        kvsight.evaluate(subject, fitted, batches())


def test_a_model_that_reads_around_the_cache_is_caught(model, plan, monkeypatch):
    def around(cache_layer, key_states, value_states, *args, **kwargs):
        cache_layer_update(cache_layer, key_states, value_states)
        return key_states, value_states

    cache_layer_update = layers.PackedLayer.update
    monkeypatch.setattr(layers.PackedLayer, "update", around)
    with pytest.raises(KVSightError, match="attention does not read the codes"):
        kvsight.evaluate(model("qwen3"), plan("qwen3", "sight"), batches())


def test_half_precision_does_not_hide_it(monkeypatch):
    subject = build("llama").to(torch.bfloat16)
    fitted = kvsight.fit(subject, batches(), bits=6)
    kvsight.evaluate(subject, fitted, batches())
    uncoded_reads(monkeypatch)
    with pytest.raises(KVSightError, match="to the bit those of the uncompressed numbers"):
        kvsight.evaluate(subject, fitted, batches())


@pytest.mark.parametrize("method", METHODS)
def test_bytes_of_the_uncompressed_cache_are_caught(method, model, plan, monkeypatch):
    """The ledger and the cache agree, on too much."""
    subject, fitted = model("llama"), plan("llama", method)

    def copied(plan, tokens, batch=1):
        return 2 * plan.elements(tokens, batch)

    monkeypatch.setattr(kvsight.Plan, "nbytes", copied)
    monkeypatch.setattr(kvsight.PackedCache, "nbytes", property(lambda cache: copied(cache.plan, 48, 2)))
    with pytest.raises(KVSightError, match=r"copies would take \d+: nothing is compressed"):
        kvsight.evaluate(subject, fitted, batches())


def test_a_codec_that_gives_back_what_it_got_is_caught(model, plan, monkeypatch):
    """Right bytes, and decoding that remembers."""
    subject, fitted = model("llama"), plan("llama", "sight")
    segments = side.segments
    seen = {}
    append = side.append

    def remembered(state, x):
        out = append(state, x)
        seen[id(out)] = x
        return out

    def exact(state, last=None):
        found = segments(state, last)
        return (Segment(state.visible, dense=seen[id(state)]),) if id(state) in seen else found

    monkeypatch.setattr(side, "append", remembered)
    monkeypatch.setattr(side, "segments", exact)
    with pytest.raises(KVSightError, match="attention does not read the codes"):
        kvsight.evaluate(subject, fitted, batches())


def test_copies_are_not_accused(model, plan):
    subject = model("llama")
    exact = plan("llama", "sight", sinks=0, window=100)
    assert not codes(exact, 48)
    assert codes(exact, 101)
    assert not codes(plan("llama", "identity"), 48)
    for fitted in (exact, plan("llama", "identity"), plan("llama", "sight", sinks=64)):
        kvsight.evaluate(subject, fitted, [tokens(2, 48)])


def test_a_block_that_is_not_full_claims_nothing(model, plan):
    fitted = plan("llama", "kivi")
    block = max(p.codec.format.block for layer in fitted.layers for p in (*layer.key, *layer.value))
    assert block > 1
    assert codes(fitted, block)
    keys_only = [p.codec.format.block for layer in fitted.layers for p in layer.value]
    assert codes(fitted, block - 1) == (min(keys_only) < block)

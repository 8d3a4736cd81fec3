"""Keys that are coded before RoPE, inside models: every path turns each key by its own place."""

import copy

import pytest
import torch
from transformers import DynamicCache
from zoo import tokens

import kvsight

# 8-bit codes with a few exact outliers: near enough that a wrong place would be seen at once
FINE = {"bits": 11.0, "method": "kvquant"}


def read(model, cache, ids, cuts=(), mask=None):
    """Logits of all tokens, read in pieces that end at ``cuts``."""
    out = []
    with torch.no_grad():
        for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            more = {}
            if mask is not None:
                at = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
                more = {"attention_mask": mask[:, :stop], "position_ids": at}
            out.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(out, dim=1)


def exact(model, ids, mask=None):
    return read(model, DynamicCache(config=model.config), ids, mask=mask)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3", "gpt2"])
def test_fine_codes_give_nearly_the_models_logits(name, model, plan):
    subject, fitted = model(name), plan(name, **FINE)
    turning = fitted.layers[0].key[0].codec.rope is not None
    assert turning == (name != "gpt2")
    ids = tokens(2, 40)
    wanted = exact(subject, ids)
    scale = float(wanted.std())
    for cuts in ((), (25, 26, 33)):
        with kvsight.enable(subject):
            on_codes = read(subject, kvsight.PackedCache(fitted), ids, cuts)
        assert float((on_codes - wanted).abs().mean()) < 0.05 * scale
        cache = kvsight.PackedCache(fitted)
        with pytest.warns(UserWarning, match="attention decodes this cache on every read"):
            decoded = read(subject, cache, ids, cuts)
        assert float((decoded - on_codes).abs().mean()) < 0.01 * scale
    # a cache that takes every key for one seven places on
    wrong = kvsight.PackedCache(fitted)
    with kvsight.enable(subject):
        read(subject, wrong, ids[:, :30])
        for layer in wrong.layers:
            object.__setattr__(layer.key_state, "freed", layer.key_state.freed + 7)
        off = read(subject, wrong, ids[:, 30:])
    gaps = [float((logits[:, -10:] - wanted[:, 30:]).abs().mean()) for logits in (off, on_codes)]
    assert not turning or gaps[0] > 2 * gaps[1]


def test_left_padding_changes_nothing_but_rounding(model, plan):
    subject, fitted = model("llama"), plan("llama", **FINE)
    ids = tokens(1, 30)
    padded = torch.nn.functional.pad(ids, (9, 0))
    mask = (padded > 0).long()
    with kvsight.enable(subject):
        alone = read(subject, kvsight.PackedCache(fitted), ids)
        behind = read(subject, kvsight.PackedCache(fitted), padded, (20,), mask)[:, 9:]
    # channels are coded when turned by a constant, so their fixed ranges fit less well
    wanted, scale = exact(subject, ids), float(alone.std())
    assert float((alone - wanted).abs().mean()) < 0.05 * scale
    assert float((behind - wanted).abs().mean()) < 0.2 * scale


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cropped_saved_and_copied_caches_keep_places(name, model, plan, tmp_path):
    subject, fitted = model(name), plan(name, **FINE)
    ids = tokens(2, 40, seed=3)

    def started():
        cache = kvsight.PackedCache(fitted)
        if name == "gemma3":
            cache.activate_past_recording()
        read(subject, cache, ids[:, :33], (21,))
        cache.crop(-6)
        return cache

    with kvsight.enable(subject):
        plain = kvsight.PackedCache(fitted)
        read(subject, plain, ids[:, :27], (21,))
        wanted = read(subject, plain, ids[:, 27:])
        cache = started()
        cache.save(tmp_path / "cache")
        loaded = kvsight.PackedCache.load(tmp_path / "cache", fitted)
        twin = copy.deepcopy(cache)
        for each in (cache, loaded, twin):
            assert torch.allclose(read(subject, each, ids[:, 27:]), wanted, atol=1e-4)

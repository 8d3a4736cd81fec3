"""Prompt-time calibration: a plan fitted to one short prompt serves that prompt."""

import pytest
import torch
from zoo import tokens

import kvsight
from kvsight.trace import SpyCache

METHODS = {"smaq-vq": 2.0, "smaq-fold": 4.0, "residual-vq": 2.0}


def fitted(model, prompt, method):
    return kvsight.fit(model, [prompt], method=method, bits=METHODS[method])


@pytest.mark.filterwarnings("ignore:kvsight. attention decodes")
@pytest.mark.parametrize("method", METHODS)
# sliding layers, and layers that read the cache of others
@pytest.mark.parametrize("name", ["gemma3", "gemma3n"])
def test_a_plan_of_one_prompt_serves_it(name, method, model, caplog):
    prompt = tokens(1, 40)
    plan = fitted(model(name), prompt, method)
    assert plan.true_bits <= METHODS[method]
    assert "calibration is short: 40 tokens" in caplog.text
    assert plan.provenance["calibration_tokens"] == "40"
    cache = kvsight.PackedCache(plan)
    with torch.no_grad():
        read = model(name)(prompt, past_key_values=cache, use_cache=True).logits
        assert cache.nbytes == plan.nbytes(40)
        with kvsight.enable(model(name)):
            cache = kvsight.PackedCache(plan)
            attended = model(name)(prompt, past_key_values=cache, use_cache=True).logits
    assert bool(read.isfinite().all())
    assert torch.allclose(read, attended, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_another_prompt_is_another_plan(method, model):
    def learned(seed):
        codec = fitted(model("llama"), tokens(1, 40, seed=seed), method).layers[0].key[0].codec
        return codec.quantizer.tables[0] if codec.transform.matrix is None else codec.transform.matrix

    assert not torch.equal(learned(1), learned(2))
    assert torch.equal(learned(1), learned(1))


@pytest.mark.filterwarnings("ignore:kvsight. attention decodes")
def test_a_prompt_codes_itself_better_than_another_would(model):
    """Codebooks of the prompt's own keys against those of another one."""
    prompt = tokens(1, 64, seed=3)
    caught = {}

    def keep(layer, k, v):
        caught[layer] = k

    with torch.no_grad():
        model("llama")(prompt, past_key_values=SpyCache(model("llama").config, keep), use_cache=True)
    errors = []
    for text in (prompt, tokens(1, 64, seed=4)):
        codec = fitted(model("llama"), text, "smaq-vq").layers[0].key[0].codec
        errors.append(float((codec.decode(codec.encode(caught[0])) - caught[0]).square().mean()))
    assert errors[0] < errors[1]

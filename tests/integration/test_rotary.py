"""What observation says about RoPE, against keys of the same text with every position set to nought."""

import pytest
import torch
import zoo
from zoo import KINDS, tokens

from kvsight.errors import KVSightError
from kvsight.rope import pairs
from kvsight.stats import Moments, SideStats, before_rope
from kvsight.trace import SpyCache, observe, summarise

# deepseek-v3 caches latents in place of keys
STILL = {"gpt2", "opt", "bloom", "deepseek-v3"}


def keys(model, ids, positions=None):
    """Keys [H, B·T, d] by cached layer."""
    seen = {}

    def sink(layer, k, v):
        seen[layer] = k.transpose(0, 1).flatten(1, 2)

    moved = {} if positions is None else {"position_ids": positions}
    with torch.no_grad():
        model(ids, past_key_values=SpyCache(model.config, sink), use_cache=True, **moved)
    return seen


@pytest.mark.parametrize("name", KINDS)
def test_keys_before_rope_are_those_of_position_nought(name, model):
    subject, ids = model(name), tokens(2, 6)
    stats = summarise(observe(subject, [ids]))
    first = stats.layers[0]
    assert all(layer.key.rope_unknown is None for layer in stats.layers)
    assert all((layer.key.rope is None) == (name in STILL) for layer in stats.layers)
    if name not in STILL and KINDS[name].stateful is False:
        pre = keys(subject, ids, torch.zeros_like(ids))[first.index]
        assert not torch.allclose(first.key.sample, pre, atol=0.1)
        assert torch.allclose(before_rope(first.key).sample, pre, atol=1e-4)


def test_layers_have_rotations_of_their_own(model):
    # sliding layers of gemma3 turn faster than full ones
    layers = summarise(observe(model("gemma3"), [tokens(1, 6)])).layers
    slow, fast = (layers[i].key.rope.frequencies.abs().sort().values[2:] for i in (1, 0))
    assert bool((slow <= fast).all()) and not torch.equal(slow, fast)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotation_that_changes_with_the_length_is_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    side = summarise(observe(zoo.build("llama", rope_parameters=rope), [tokens(1, 6)])).layers[0].key
    with pytest.raises(KVSightError, match=f"frequencies of its {kind} RoPE change with the length"):
        before_rope(side)


def test_a_hidden_rotation_is_refused():
    subject = zoo.build("llama")
    rotary = subject.model.rotary_emb
    hidden = {name: getattr(rotary, name) for name in ("inv_freq", "original_inv_freq")}
    for name, buffer in hidden.items():
        delattr(rotary, name)
        object.__setattr__(rotary, name, buffer)
    side = summarise(observe(subject, [tokens(1, 6)])).layers[0].key
    with pytest.raises(KVSightError, match="change with the position as no RoPE that kvsight knows"):
        before_rope(side)


def test_read_metrics_are_turned_back():
    draw = torch.Generator().manual_seed(0)
    x, q = torch.randn(2, 2, 40, 6, generator=draw)
    rope, places = pairs(torch.tensor([1.0, 0.2]), 6, first=2), torch.arange(40)
    metric = (q.double().mT @ q.double()) / 40
    side = SideStats(Moments.zero(2, 6).add(x), metric, x, rope=rope, places=places)
    still = before_rope(side)
    e = torch.randn(2, 6, generator=draw).double()
    turned = rope.turn(e.unsqueeze(1).expand(-1, 40, -1), places)
    wanted = ((turned @ metric) * turned).sum(-1).mean(-1)
    torch.testing.assert_close(((e.unsqueeze(1) @ still.metric).squeeze(1) * e).sum(-1), wanted)
    torch.testing.assert_close(rope.forth(still.sample.double()), x.double(), atol=1e-6, rtol=0)
    assert before_rope(still) is still

"""Norms of key and value projections, against the linear maps that attention modules really apply."""

import pytest
import torch
from zoo import batches

from kvsight.trace import SpyCache, observe

ATTENTION = {
    "llama": "model.layers.{}.self_attn",
    "qwen2": "model.layers.{}.self_attn",
    "qwen3": "model.layers.{}.self_attn",
    "mistral": "model.layers.{}.self_attn",
    "gemma2": "model.layers.{}.self_attn",
    "phi3": "model.layers.{}.self_attn",
    "gpt2": "transformer.h.{}.attn",
    "gpt-neox": "gpt_neox.layers.{}.attention",
    "opt": "model.decoder.layers.{}.self_attn",
}
# a norm follows the key projection, so only values are linear in what the module is given
NORMED = {"qwen3"}


def applied(model, path, layer):
    """Weights [kv_heads·d, hidden] of the maps from a module's input to the keys and values it caches.

    Keys of the first token are not rotated.
    """
    cached = {}

    def replaced(module, args, kwargs):
        kwargs = dict(kwargs)
        old = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        cached["x"] = torch.randn(old.shape, generator=torch.Generator().manual_seed(layer))
        return (cached["x"], *args[1:]), kwargs

    def sink(index, key, value):
        if index == layer:
            cached["k"], cached["v"] = key, value

    hook = model.get_submodule(path.format(layer)).register_forward_pre_hook(replaced, with_kwargs=True)
    try:
        with torch.no_grad():
            ids = torch.full((200, 1), 5)
            model(ids, past_key_values=SpyCache(model.config, sink), use_cache=True)
    finally:
        hook.remove()
    x = cached["x"].flatten(0, 1).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=-1)
    out = []
    for name in ("k", "v"):
        y = cached[name].flatten(1).double()
        solved = torch.linalg.lstsq(x, y).solution
        out.append((solved[:-1].mT, float((x @ solved - y).abs().max())))
    return out


@pytest.mark.parametrize("name", ATTENTION)
def test_norms_are_those_of_the_maps_that_make_keys_and_values(name, model):
    subject = model(name)
    trace = observe(subject, batches(1))
    assert len(trace.layers) == 2
    for layer, seen in trace.layers.items():
        assert seen.norms is not None
        maps = applied(subject, ATTENTION[name], layer)
        for side, norms, (weight, misfit) in zip("kv", seen.norms, maps, strict=True):
            if side == "k" and name in NORMED:
                assert misfit > 0.1
                continue
            assert misfit < 1e-4
            assert norms.frobenius == pytest.approx(float(torch.linalg.matrix_norm(weight)), rel=1e-4)
            assert norms.spectral == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
            # the two differ, or a mistaken norm would pass
            assert norms.spectral < 0.9 * norms.frobenius


def test_latents_have_no_key_projection(model):
    trace = observe(model("deepseek-v3"), batches(1))
    assert trace.layers
    assert all(seen.norms is None for seen in trace.layers.values())

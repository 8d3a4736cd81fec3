"""Plans without a model's forward pass: calibration vectors are drawn, not observed."""

from types import SimpleNamespace

import torch
from transformers import AutoConfig

from kvsight.fit import Request, plan_from_stats
from kvsight.stats import LayerStats, Moments, SideStats, Stats

HEADS, DIM, LAYERS = 3, 24, 2
SLIDING = 20


def config(sliding=False):
    """Two cached layers: full attention, and a sliding window if asked for."""
    kinds = ["full_attention", "sliding_attention" if sliding else "full_attention"]
    return AutoConfig.for_model(
        "gemma3_text",
        vocab_size=16,
        hidden_size=HEADS * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        sliding_window=SLIDING,
        layer_types=kinds,
    )


def vectors(batch, tokens, seed):
    """[batch, HEADS, tokens, DIM] with unequal variances and a mean, as keys have."""
    noise = torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.1, 3, DIM) + torch.linspace(-2, 2, DIM)


def _side(seed):
    x = vectors(1, 200, seed)[0]
    return SideStats(Moments.zero(HEADS, DIM).add(x), None, x)


def plan(method, bits=4.0, sliding=False, sinks=0, window=0, **options):
    """A plan for ``config(sliding)``; ``options`` are the method's."""
    settings = config(sliding)
    layers = tuple(
        LayerStats(i, SLIDING if sliding and i else None, _side(2 * i), _side(2 * i + 1))
        for i in range(LAYERS)
    )
    model = SimpleNamespace(dtype=torch.float32, config=settings, named_parameters=list)
    limit = None if method == "identity" else bits
    request = Request({"k": method, "v": method}, {"k": limit, "v": limit}, options, sinks, window, 256)
    return plan_from_stats(model, Stats(layers, 200), request, {})

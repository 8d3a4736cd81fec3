"""Summaries: exact against torch, whatever the order of merging, and safe where nothing varies."""

import pytest
import torch

from kvsight.errors import KVSightError
from kvsight.methods import get
from kvsight.methods.base import Budget
from kvsight.retention import Retention
from kvsight.stats import Moments, SideStats, shrunk
from kvsight.testing import random_stats


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_those_of_all_vectors_in_any_order():
    x = draw(2, 90, 5) + 3
    parts = [Moments.zero(2, 5).add(part) for part in x.split([1, 40, 49], dim=1)]
    whole = Moments.zero(2, 5).add(x)
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = Moments.zero(2, 5)
        for i in order:
            merged = merged.merge(parts[i])
        assert merged.count == 90
        assert torch.allclose(merged.outer, whole.outer, rtol=1e-13)
        assert torch.equal(merged.peak, x.abs().amax(1))
    for head in range(2):
        assert torch.allclose(whole.mean[head], x[head].mean(0))
        assert torch.allclose(whole.covariance[head], torch.cov(x[head].T, correction=0))
        assert torch.allclose(whole.second[head], x[head].T @ x[head] / 90)


def test_moments_refuse_nan_and_other_models():
    with pytest.raises(KVSightError, match="NaN or inf in attention"):
        Moments.zero(1, 2).add(torch.full((1, 3, 2), torch.nan))
    with pytest.raises(KVSightError, match=r"shapes \(1, 2\) and \(2, 2\)"):
        Moments.zero(1, 2).merge(Moments.zero(2, 2))


def test_shrinking_keeps_the_trace_and_makes_any_metric_positive():
    stats = random_stats(2, 8, seed=3)
    rank_one = draw(2, 8, 1, seed=4)
    metric = rank_one @ rank_one.mT
    mixed = shrunk(metric, stats, 0.01)
    assert torch.linalg.eigvalsh(metric).min() < 1e-12
    assert torch.linalg.eigvalsh(mixed).min() > 0
    traces = [m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (mixed, metric)]
    assert torch.allclose(*traces)
    assert torch.equal(shrunk(None, stats, 0.01), torch.eye(8, dtype=torch.float64).expand(2, 8, 8))


@pytest.mark.parametrize("dead", ["vectors", "metric", "both"])
def test_a_head_that_is_always_zero_gets_a_finite_codec(dead):
    stats = random_stats(1, 64, seed=5)
    zeros = torch.zeros_like(stats.sample)
    moments = stats.moments if dead == "metric" else Moments.zero(1, 64).add(zeros)
    metric = stats.metric if dead == "vectors" else torch.zeros_like(stats.metric)
    recipe = get("sight")
    budget = Budget(3.0, 1024, Retention(0, 0), torch.bfloat16)
    side = SideStats(moments, metric, zeros)
    placement = recipe.build("k", side, budget, recipe.with_defaults({}))[0]
    stored = placement.codec.transform.stored()
    for tensor in (stored.shift, stored.matrix, stored.inverse_matrix):
        assert torch.isfinite(tensor).all()
    codec = placement.codec
    assert torch.isfinite(codec.decode(codec.encode(torch.full((1, 1, 4, 64), 6e4)))).all()

"""Bases of rank reduction, against what defines them."""

from dataclasses import replace

import pytest
import torch

from kvsight.codec import Codec
from kvsight.errors import KVSightError
from kvsight.formats import Dense
from kvsight.methods import get
from kvsight.methods.base import Budget
from kvsight.methods.subspaces import metric_basis, principal, ranks, read_basis
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.retention import Retention
from kvsight.stats import Moments, SideStats
from kvsight.testing import random_stats

HEADS, DIM, TOKENS, RANK = 2, 16, 200, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x):
    return Moments.zero(*x.shape[::2]).add(x)


def skewed(seed, tokens=TOKENS):
    """[HEADS, tokens, DIM] with unequal directions."""
    return draw(HEADS, tokens, DIM, seed=seed) @ draw(HEADS, DIM, DIM, seed=seed + 100)


def projected(basis, x, rank=RANK):
    codec = Codec("rank", basis.first(rank), DenseQuantizer(Dense(rank, torch.float64)))
    return codec.decode(codec.encode(x)).double()


def test_the_read_basis_keeps_attention_outputs_best():
    """Errors of o = αV under PPᵀ are the eigenvalues of VᵀαᵀαV that were dropped (V-theorem)."""
    v = skewed(1)
    alpha = (3 * draw(HEADS, TOKENS, TOKENS, seed=2)).softmax(-1)
    out = alpha @ v
    stats = SideStats(moments(v), None, v.float(), read=moments(out), focus=moments(out * 0.5))
    lost = {
        name: (alpha @ projected(basis, v) - out).square().sum((-1, -2))
        for name, basis in {
            "read": read_basis("v", stats, centred=False, entropy=False),
            "pca": principal(stats.moments, centred=False),
            "focus": read_basis("v", stats, centred=False, entropy=True),
        }.items()
    }
    values = torch.linalg.eigvalsh((alpha @ v).mT @ (alpha @ v))
    assert torch.allclose(lost["read"], values[:, : DIM - RANK].sum(-1))
    assert (lost["pca"] > 1.02 * lost["read"]).all()
    # a weight that all tokens share changes nothing
    assert torch.allclose(lost["focus"], lost["read"])


def test_keys_have_no_read_basis_and_get_principal_components():
    stats = random_stats(HEADS, DIM)
    read, plain = read_basis("k", stats, True, False), principal(stats.moments, True)
    assert torch.equal(read.first(RANK).matrix, plain.first(RANK).matrix)


def test_principal_components_leave_the_smallest_eigenvalues():
    x = skewed(3) + 2
    for centred in (False, True):
        error = (projected(principal(moments(x), centred), x) - x).square().sum(-1).mean(-1)
        second = moments(x).covariance if centred else moments(x).second
        assert torch.allclose(error, torch.linalg.eigvalsh(second)[:, : DIM - RANK].sum(-1))


def test_the_metric_basis_is_the_best_approximation_of_all_scores():
    """‖K̂Qᵀ - KQᵀ‖ is what the singular values of K Qᵀ leave (Eckart and Young)."""
    k, q = skewed(5), skewed(6, 300)
    stats = SideStats(moments(k), moments(q).second, k.float())
    error = (projected(metric_basis(stats, centred=False), k) @ q.mT - k @ q.mT).square().sum((-1, -2))
    best = torch.linalg.svdvals(k @ q.mT)[:, RANK:].square().sum(-1)
    # the metric is shrunk by a thousandth
    assert torch.allclose(error, best, rtol=0.01)
    assert (error >= best * (1 - 1e-9)).all()
    other = (projected(principal(stats.moments, False), k) @ q.mT - k @ q.mT).square().sum((-1, -2))
    assert (other > 1.1 * error).all()


@pytest.mark.parametrize("name", ["rank-v", "rank-k", "kq-svd"])
def test_ranks_are_paid_at_sixteen_bits(name):
    stats = random_stats(HEADS, DIM)
    (placement,) = place(name, stats, 4.2)
    assert placement.codec.format == Dense(DIM // 4, torch.bfloat16)
    assert budget(4.2).cost(placement.codec.format, DIM) == 4.0
    with pytest.raises(KVSightError, match=f"{name} cannot meet 0.5 bits; its cheapest .* stores 1"):
        place(name, stats, 0.5)


def test_integers_have_static_scales_and_no_metadata():
    stats = random_stats(HEADS, DIM)
    (placement,) = place("rank-int8", stats, 4.2)
    assert placement.codec.format.widths == (8,) * (DIM // 2)
    y = placement.codec.transform.forward(stats.sample.double())
    assert torch.allclose(y.abs().amax(-2), torch.tensor(127.0, dtype=torch.float64))
    (placement,) = place("rank-int8", stats, 4.2, bits=4, basis="metric")
    assert placement.codec.format.widths == (4,) * DIM
    with pytest.raises(KVSightError, match="'basis' is read, pca or metric; got 'svd'"):
        place("rank-int8", stats, 4, basis="svd")
    with pytest.raises(KVSightError, match="'bits' is 2 to 8; got 16"):
        place("rank-int8", stats, 4, bits=16)


def test_large_heads_offer_few_ranks():
    assert ranks(48) == list(range(48, 0, -1))
    assert (len(ranks(256)), ranks(256)[0], ranks(96)[:3]) == (64, 256, [96, 94, 92])


def budget(bits):
    return Budget(bits, 1024, Retention(0, 0), torch.bfloat16)


def place(name, stats, limit, **options):
    method = get(name)
    stats = replace(stats, read=stats.moments)
    return method.build("v", stats, budget(limit), method.with_defaults(options))

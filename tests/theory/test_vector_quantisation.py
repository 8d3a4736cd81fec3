"""What theory says of codebooks that are learned from the data."""

import math

import pytest
import torch

from kvsight.formats import Indexed
from kvsight.quantizers.vector import VectorQuantizer, kmeans, residual_kmeans
from kvsight.transforms import haar


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coded(x, centres, metric=None):
    """x [n, s] at its nearest centres [K, s] in the metric."""
    form = Indexed(x.shape[-1], x.shape[-1], int(math.log2(len(centres))))
    near = None if metric is None else metric.view(1, 1, *metric.shape)
    quantizer = VectorQuantizer(form, centres.view(1, 1, 1, *centres.shape).float(), near)
    return quantizer.decode(quantizer.encode(x.view(1, 1, *x.shape)))[0, 0].double()


def query_metric(cond, dim=8, seed=3):
    """One strong direction, as in SMAQ's synthetic setting."""
    values = torch.ones(dim, dtype=torch.float64)
    values[0] = cond
    basis = haar(dim, seed).matrix[0]
    return (basis * values) @ basis.T


def shaped(metric, shape):
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * shape(values)) @ vectors.T


def test_learned_codebooks_do_not_feel_a_rotation():
    # SMAQ, T1: the distortion of k-means is that of the rotated sample
    x = draw(4000, 8) * torch.linspace(0.3, 2, 8)
    turn = haar(8, 5).matrix[0]
    plain, turned = (float((y - coded(y, kmeans(y[None], 64)[0])).square().mean()) for y in (x, x @ turn))
    assert plain / turned == pytest.approx(1, abs=0.05)


def gain(cond, shape, keys, test):
    """How much logit error shaping saves over plain VQ of white keys, exact E[(q·e)²] = eᵀ Σ_q e."""
    metric = query_metric(cond)

    def error(near):
        centres = kmeans(keys[None], 256, metric=None if near is None else near[None], sweeps=12)[0]
        e = test - coded(test, centres, near)
        return float(((e @ metric) * e).sum(-1).mean())

    return 1 - error(shaped(metric, shape)) / error(None)


@pytest.mark.parametrize(
    ("cond", "raw", "log"), [(5, 0.185, 0.125), (40, 0.73, 0.50), (100, 0.87, 0.61), (1000, 0.98, 0.73)]
)
def test_the_queries_own_metric_is_the_best_one(cond, raw, log):
    # SMAQ says that raw Mahalanobis collapses at low rate; at 1 bit it is ahead at every condition number
    keys, test = draw(4000, 8, seed=1), draw(4000, 8, seed=2)
    ours = gain(cond, lambda v: v, keys, test)
    theirs = gain(cond, lambda v: torch.log1p(5 * v), keys, test)
    assert ours == pytest.approx(raw, abs=0.04)
    assert theirs == pytest.approx(log, abs=0.05)
    assert ours > theirs


def test_log_shaping_depends_on_the_scale_of_the_queries():
    def effective(scale):
        values = torch.linalg.eigvalsh(shaped(scale * query_metric(40), lambda v: torch.log1p(5 * v)))
        return float(values.max() / values.min())

    found = [effective(scale) for scale in (0.001, 0.01, 0.1, 1, 10, 100)]
    assert found == pytest.approx([36.6, 22.5, 7.5, 2.96, 1.93, 1.59], rel=0.01)


def test_the_best_single_stage_beats_the_same_bits_in_two():
    # greedy stages cannot use what a larger codebook could: 2 bits as 4-D / 256 and as two of 4-D / 16
    x, test = draw(1, 4096, 4, seed=4), draw(4096, 4, seed=5)
    one = test - coded(test, kmeans(x, 256)[0])
    books = residual_kmeans(x, 16, 2)[0].double()
    two = test
    for book in books:
        two = two - coded(two, book)
    assert float(one.square().mean()) < float(two.square().mean())
    # and both beat scalars of two bits
    assert float(one.square().mean()) < 0.1175

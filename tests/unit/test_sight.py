"""sight's predictions against codecs that really code the sample, and its rows to the byte."""

from dataclasses import replace

import pytest
import torch

from kvsight.errors import KVSightError
from kvsight.formats import Row
from kvsight.methods import get
from kvsight.methods.base import Budget
from kvsight.methods.sight import rows
from kvsight.ops.attend.tiles import tileable
from kvsight.quantizers import lloyd_max
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.retention import Retention
from kvsight.stats import Moments, SideStats
from kvsight.testing import random_stats
from kvsight.waterfill import reverse_water_fill, share_bytes

pytestmark = pytest.mark.usefixtures("stretched_once")

HEADS, DIM = 3, 16
DISTORTION = [1.0, *(gaussian(bits).distortion for bits in range(1, 9))]
SIGHT = get("sight")


def maker(stats, **options):
    """Without shrinking, so that the metric is exactly diagonal in the coordinates."""
    return rows("k", stats, SIGHT.with_defaults({"shrink": 0.0, "codebook": "gaussian", **options}))


def heavy_stats(tokens=400):
    """Tails heavier than Gaussian, and a metric and a salience of their own."""
    draw = torch.Generator().manual_seed(7)
    stats = random_stats(HEADS, DIM, tokens=tokens, seed=3)
    loud = 1 + 2 * (torch.rand(HEADS, tokens, 1, generator=draw) < 0.1)
    centre = stats.moments.mean.float().unsqueeze(1)
    x = centre + loud * torch.randn(HEADS, tokens, DIM, generator=draw) @ torch.randn(
        HEADS, DIM, DIM, generator=draw
    )
    return SideStats(Moments.zero(HEADS, DIM).add(x), stats.metric, x)


def coded_cost(placements, stats, metric, judges):
    """Σ_t j_t e_tᵀ G e_t / Σ_t j_t of each head, one token after another."""
    out = [0.0] * stats.heads
    for placement in placements:
        heads = list(placement.heads)
        x = stats.sample[heads]
        error = (placement.codec.decode(placement.codec.encode(x)) - x).double()
        for head, e in zip(heads, error, strict=True):
            costs = torch.stack([row @ metric[head] @ row for row in e])
            out[head] = float((judges[head] * costs).sum() / judges[head].sum())
    return out


def eye():
    return torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1)


@pytest.mark.parametrize("size", [0, 1, 3, 6, 11, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_predicted_damage_is_what_the_placed_codecs_cost(size, weighted):
    stats, judges = heavy_stats(), torch.ones(HEADS, 400, dtype=torch.float64)
    if weighted:
        salience = torch.rand(HEADS, 400, generator=torch.Generator().manual_seed(1)) + 0.1
        stats = replace(stats, salience=salience)
        judges = salience.double().square()
    fitted = maker(stats)
    cost = coded_cost(fitted.place([size] * HEADS), stats, stats.metric, judges)
    # a thousandth of the mean salience is added to all tokens
    assert fitted.damage[:, size].tolist() == pytest.approx(cost, rel=5e-3 if weighted else 1e-5)


@pytest.mark.parametrize("size", [0, 2, 5, 16])
def test_predicted_error_is_what_the_placed_codecs_lose(size):
    # principal components: storage error is diagonal too
    stats = heavy_stats()
    fitted = maker(stats, metric="storage")
    everyone = torch.ones(HEADS, 400, dtype=torch.float64)
    cost = coded_cost(fitted.place([size] * HEADS), stats, eye(), everyone)
    assert fitted.error[:, size].tolist() == pytest.approx(cost, rel=1e-5)


def test_damage_at_the_output_replaces_the_read_metric():
    stats = heavy_stats()
    mix = torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    stats = replace(stats, damage=mix @ mix.mT)
    everyone = torch.ones(HEADS, 400, dtype=torch.float64)
    seen = maker(stats)
    cost = coded_cost(seen.place([4] * HEADS), stats, stats.damage, everyone)
    assert seen.damage[:, 4].tolist() == pytest.approx(cost, rel=1e-5)
    # other coordinates are judged by the same damage, and are worse in every head
    for metric in ("attention", "storage"):
        other = maker(stats, metric=metric)
        blind = coded_cost(other.place([4] * HEADS), stats, stats.damage, everyone)
        assert all(a < b for a, b in zip(cost, blind, strict=True))
    same = maker(replace(stats, damage=None), metric="attention")
    assert torch.equal(maker(stats, metric="attention").variances, same.variances)


@pytest.mark.parametrize("size", [1, 5, 10])
def test_cross_terms_that_are_ignored_are_small(size):
    # read in coordinates that the metric is not diagonal in, as for metric=attention
    stats = heavy_stats(tokens=4000)
    mix = torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    stats = replace(stats, damage=mix @ mix.mT)
    fitted = maker(stats, metric="attention")
    everyone = torch.ones(HEADS, 4000, dtype=torch.float64)
    cost = coded_cost(fitted.place([size] * HEADS), stats, stats.damage, everyone)
    assert fitted.damage[:, size].tolist() == pytest.approx(cost, rel=0.15)


def test_static_scales_cost_what_the_codebook_says():
    fitted = maker(heavy_stats(), scales="static")
    for head in range(HEADS):
        for size in range(DIM + 1):
            widths = reverse_water_fill(fitted.variances[head], 8 * size, DISTORTION)
            wanted = sum(
                v * DISTORTION[w] for v, w in zip(fitted.variances[head].tolist(), widths, strict=True)
            )
            assert fitted.damage[head, size].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", [1, 4, 8, 13])
def test_fitted_levels_are_at_least_as_good_as_predicted(size, monkeypatch):
    monkeypatch.setattr(lloyd_max, "_TAIL_SHARE", 0.0)
    stats = heavy_stats()
    fitted = maker(stats, codebook="fitted")
    everyone = torch.ones(HEADS, 400, dtype=torch.float64)
    cost = coded_cost(fitted.place([size] * HEADS), stats, stats.metric, everyone)
    predicted = maker(stats).damage[:, size].tolist()
    assert fitted.damage[:, size].tolist() == predicted
    assert all(a <= b * (1 + 1e-5) for a, b in zip(cost, predicted, strict=True))


def test_a_head_that_nothing_depends_on_is_fitted_all_the_same():
    stats = heavy_stats()
    plain = maker(stats)
    silent = maker(replace(stats, salience=torch.zeros(HEADS, 400)))
    assert torch.allclose(silent.damage, plain.damage, rtol=1e-9)
    assert torch.allclose(silent.stretches.factors, plain.stretches.factors)


@pytest.mark.parametrize("codebook", ["gaussian", "uniform", "fitted"])
@pytest.mark.parametrize("asked", [(1, 1, 1), (5, 5, 5), (16, 1, 7), (2, 9, 2), (16, 16, 16)])
def test_rows_have_exactly_the_bytes_asked_for(codebook, asked):
    placements = maker(heavy_stats(), codebook=codebook).place(asked)
    stored = {head: p.codec.format for p in placements for head in p.heads}
    assert sorted(stored) == [0, 1, 2]
    for head, size in enumerate(asked):
        assert isinstance(stored[head], Row)
        assert stored[head].nbytes(10) == 10 * size
        assert sum(stored[head].widths) == 8 * size
        assert not stored[head].norm
    # one placement for each list of widths
    assert len(placements) == len({form.widths for form in stored.values()})


def test_a_layer_alone_shares_its_bytes_by_water_filling():
    stats = heavy_stats()
    options = SIGHT.with_defaults({})
    budget = Budget(3.3, 1024, Retention(0, 0), torch.bfloat16)
    placements = SIGHT.build("k", stats, budget, options)
    stored = {head: p.codec.format.row_bytes for p in placements for head in p.heads}
    variances = rows("k", stats, options).variances
    shares = share_bytes(variances, int(3.3 * HEADS * DIM / 8), DISTORTION)
    assert [stored[head] for head in range(HEADS)] == shares


@pytest.mark.parametrize("widths", ["any", "1,2,4,8"])
def test_chunks_share_a_width(widths):
    fitted = maker(heavy_stats(), codebook="uniform", chunk=8, widths=widths)
    assert list(fitted.sizes) == list(range(1, DIM + 1))
    for size in fitted.sizes:
        for placement in fitted.place([size] * HEADS):
            row = placement.codec.format
            assert len(set(row.widths[:8])) == len(set(row.widths[8:])) == 1
            assert row.row_bytes == size or (widths != "any" and row.row_bytes < size)
            assert set(row.widths) <= {0, 1, 2, 4, 8} or widths == "any"


def test_longer_chunks_cost_more():
    free, coarse = (maker(heavy_stats(), chunk=chunk) for chunk in (1, 16))
    assert list(coarse.sizes) == list(range(2, DIM + 1, 2))
    assert (coarse.damage[:, list(coarse.sizes)] >= free.damage[:, list(coarse.sizes)]).all()


@pytest.mark.parametrize("options", [{"chunk": 4}, {"chunk": 24}, {"chunk": 32}, {"chunk": 0}])
def test_chunks_divide_the_head(options):
    with pytest.raises(KVSightError, match="multiple of 8 that divides head_dim 16; got"):
        maker(heavy_stats(), **options)


@pytest.mark.parametrize("widths", ["2,4", "1,9", "one", ""])
def test_widths_that_rows_cannot_have(widths):
    with pytest.raises(KVSightError, match="'widths' is any, or widths from 1 to 8"):
        maker(heavy_stats(), widths=widths)


def test_tiles_are_what_kernels_read():
    stats = heavy_stats()
    fitted = maker(stats, layout="tiles")
    for size in fitted.sizes:
        for placement in fitted.place([size] * HEADS):
            empty = placement.codec.encode(stats.sample[list(placement.heads), :0])
            assert tileable(placement.codec.coded(placement.heads, empty))
    free = maker(stats).place([8] * HEADS)[0]
    assert not tileable(free.codec.coded(free.heads, free.codec.encode(stats.sample[list(free.heads)])))
    with pytest.raises(KVSightError, match="'layout' is one of free, tiles; got 'rows'"):
        maker(stats, layout="rows")

"""KVQuant's parts: fitted levels, ranges between outliers, outliers apart, keys before RoPE."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import kvsight
from kvsight.codec import Codec
from kvsight.errors import KVSightError
from kvsight.formats import Joined, Row, Scaled, Sparse
from kvsight.methods.base import Budget
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.quantizers.scaled import ScaledQuantizer, matched, normalise, signposts
from kvsight.quantizers.sparse import SparseQuantizer
from kvsight.retention import Retention
from kvsight.rope import pairs
from kvsight.stats import Moments, SideStats
from kvsight.testing import check_codec, random_stats
from kvsight.transforms import identity

DIM = 64


def place(side, bits, stats=None, **options):
    method = kvsight.method_info("kvquant")
    budget = Budget(bits, 1024, Retention(0, 0), torch.bfloat16)
    stats = random_stats(2, DIM, seed=1) if stats is None else stats
    (placement,) = method.build(side, stats, budget, method.with_defaults(options))
    return placement.codec


def test_signposts_of_a_gaussian_are_lloyd_and_max():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits in (1, 2, 3):
        book = gaussian(bits)
        levels = signposts(x, torch.ones_like(x), bits)
        torch.testing.assert_close(levels, torch.tensor(book.levels).double(), atol=0.03, rtol=0)


def test_signposts_minimise_the_weighted_error():
    draw = torch.Generator().manual_seed(1)
    x, w = torch.randn(5000, generator=draw).double(), torch.rand(5000, generator=draw).double() ** 4
    levels = signposts(x, w, 2)

    def error(at):
        return float((w * (x.unsqueeze(-1) - at).square().amin(-1)).sum())

    least = error(levels)
    for i in range(4):
        for step in (-0.02, 0.02):
            moved = levels.clone()
            moved[i] += step
            assert error(moved) > least
    assert least < error(signposts(x, torch.ones_like(x), 2))


def test_signposts_of_few_numbers_stay_in_order():
    for x in (torch.ones(5), torch.tensor([0.0, 1.0, 1.0]), torch.tensor([3.0])):
        levels = signposts(x, torch.ones_like(x), 3)
        assert torch.isfinite(levels).all() and bool((levels.diff() >= 0).all())
        assert float((x.double().unsqueeze(-1) - levels).abs().amin(-1).max()) < 1e-9


def test_q_norm_keeps_mean_and_variance():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(2)).double() + 0.3
    ones = torch.ones_like(x)
    levels = signposts(x, ones, 2)
    wide = matched(levels, x, ones)
    codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    torch.testing.assert_close(wide[codes].mean(), x.mean(), atol=1e-9, rtol=0)
    torch.testing.assert_close(wide[codes].std(correction=0), x.std(correction=0), atol=1e-9, rtol=0)
    # least squares levels shrink what they code by √(1 - D)
    assert float(levels[codes].std()) == pytest.approx((1 - gaussian(2).distortion) ** 0.5, rel=0.02)


def test_ranges_leave_out_the_furthest_numbers():
    y = torch.tensor([1.0, 2.0, 3.0, -50.0, 4.0, 5.0, 90.0])
    scale, zero = normalise(y, 2)
    assert (float(zero), float(scale)) == (3, 2)
    scale, zero = normalise(y, 0)
    assert (float(zero), float(scale)) == (20, 70)


@pytest.mark.parametrize("dim", [5, 300])
def test_parts_keep_the_laws(dim):
    levels = torch.tensor([-1.0, -0.2, 0.1, 1.0])
    check_codec(Codec("scaled", identity(dim), ScaledQuantizer(Scaled(dim, 2, 1), levels)), seed=3)
    check_codec(Codec("sparse", identity(dim), SparseQuantizer(Sparse(dim, 3))), seed=3)


def test_outliers_are_stored_as_index_and_value():
    codec = place("v", 4.0)
    x = torch.randn(1, 2, 6, DIM, generator=torch.Generator().manual_seed(3))
    x[..., 17] = 40.0
    packed = codec.encode(x)
    named = {f.name: t for f, t in zip(packed.format.fields, packed.tensors, strict=True)}
    assert named["1.index"].unique().tolist() == [17]
    error = codec.decode(packed) - x
    assert float(error[..., 17].abs().max()) < 0.02
    rest = torch.cat([error[..., :17], error[..., 18:]], dim=-1)
    without = place("v", 4.0, outliers=0)
    worse = without.decode(without.encode(x)) - x
    assert float(rest.square().mean()) < 0.1 * float(worse.square().mean())


@pytest.mark.parametrize(
    ("side", "bits", "dim", "outliers", "wanted"),
    [
        # 24 bits an outlier, 32 of scale and zero point for values
        ("k", 3.375, 64, 0.01, Joined((Row((3,) * 64), Sparse(64, 1)))),
        ("k", 3.37, 64, 0.01, Joined((Row((2,) * 64), Sparse(64, 1)))),
        ("k", 3.37, 64, 0.0, Row((3,) * 64)),
        ("v", 3.4375, 128, 0.01, Joined((Scaled(128, 3, 1), Sparse(128, 1)))),
        ("v", 3.25, 128, 0.0, Scaled(128, 3)),
        ("k", 4.6875, 128, 0.07, Joined((Row((3,) * 128), Sparse(128, 9)))),
    ],
)
def test_the_dearest_width_within_the_budget(side, bits, dim, outliers, wanted):
    codec = place(side, bits, random_stats(2, dim, seed=1), outliers=outliers)
    assert codec.format == wanted
    assert 8 * codec.format.nbytes(10) / (10 * dim) <= bits


def turning_stats():
    """Keys with channels of unequal offset and range before RoPE, and as a cache has them after it."""
    draw = torch.Generator().manual_seed(4)
    pre = torch.randn(2, 2048, DIM, generator=draw) * torch.logspace(0, -2, DIM)
    pre += 4 * torch.randn(2, 1, DIM, generator=draw)
    rope, places = pairs(torch.logspace(0, -2, DIM // 2), DIM), torch.arange(2048) % 700
    x = rope.turn(pre.double(), places).float()
    return SideStats(Moments.zero(2, DIM).add(x), None, x, rope=rope, places=places), pre


def test_keys_have_steadier_channels_before_rope():
    stats, pre = turning_stats()
    x = stats.rope.forth(pre[:, :700].double()).float()
    before, after = (place("k", 2.4, stats, rope=when) for when in ("before", "after"))
    assert before.rope is stats.rope and after.rope is None
    errors = [float((c.decode(c.encode(x)) - x).square().mean()) for c in (before, after)]
    assert errors[0] < 0.05 * errors[1]
    # the same codes as a codec that is given the keys before RoPE
    still = replace(before, rope=None)
    theirs = still.encode(pre[:, :700])
    different = (before.encode(x).tensors[0] != theirs.tensors[0]).double().mean()
    assert float(different) < 0.01


def test_unknown_rotations_are_refused_and_absent_ones_are_not():
    stats = replace(random_stats(2, DIM), rope_unknown="its keys turn oddly")
    with pytest.raises(KVSightError, match=r"not known: its keys turn oddly\. Choose a method"):
        place("k", 4.0, stats)
    assert place("k", 4.0, stats, rope="after").rope is None
    assert place("v", 4.0, stats).rope is None
    assert place("k", 4.0).rope is None


def test_fisher_weights_move_the_levels():
    stats = random_stats(2, DIM, seed=1)
    # only one channel counts, and its numbers are in the upper half
    damage = torch.zeros(2, DIM, DIM, dtype=torch.float64)
    damage[:, 3, 3] = 1
    sample = stats.sample.clone()
    sample[..., 3] = sample[..., 3].abs().sqrt()
    stats = replace(stats, sample=sample, moments=Moments.zero(2, DIM).add(sample))
    plain = place("k", 4.4, stats)
    weighed = place("k", 4.4, replace(stats, damage=damage, salience=torch.ones(2, sample.shape[1])))
    error = [((c.decode(c.encode(sample)) - sample)[..., 3]).square().mean() for c in (plain, weighed)]
    assert error[1] < error[0]


def test_more_outliers_never_hurt():
    stats = random_stats(2, DIM, seed=5)
    heavy = replace(stats, sample=stats.sample**3)
    errors = []
    for share in (0.01, 0.05, 0.2):
        codec = place("k", 2.2 + 24 * max(1, round(share * DIM)) / DIM, heavy, outliers=share)
        errors.append(float((codec.decode(codec.encode(heavy.sample)) - heavy.sample).square().mean()))
    assert all(a > b for a, b in pairwise(errors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": 1.0}, "'outliers' is a share from 0 to below 1; got 1"),
        ({"rope": "never"}, "'rope' is one of before, after; got 'never'"),
    ],
)
def test_misfitting_options(options, message):
    with pytest.raises(KVSightError, match=message):
        place("k", 4.0, **options)

"""What theory says of integers, repairs and tiers."""

import math

import pytest
import torch

from kvsight.formats import Grouped, Patched, Symmetric, Ternary, Tiered
from kvsight.quantizers.patched import PatchedQuantizer, low_rank
from kvsight.quantizers.tiered import TieredQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.stats import Moments, expected_mass


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coded(quantizer, x):
    return quantizer.decode(quantizer.encode(x)).double()


def ratio(bits, group, symmetric=False):
    """Squared error of dropping a number over that of rounding it, on Gaussian numbers."""
    x = draw(1, 1, 2**18 // group, group)
    kind = Symmetric if symmetric else Grouped
    error = coded(GroupedQuantizer(kind(group, bits, group, "channel")), x) - x
    return float(x.square().mean() / error.square().mean()), x


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("group", [32, 128])
def test_rounding_beats_dropping_by_twelve_four_to_the_b_over_the_range(bits, group):
    """12 (2^b - 1)² / ρ² for a range of ρ standard deviations: the variance of a uniform error."""
    found, x = ratio(bits, group)
    squared_range = float((x.amax(-1) - x.amin(-1)).square().mean())
    # the smallest and the largest of a group have no error
    exact = 1 - 2 / group
    assert found * exact == pytest.approx(12 * (2**bits - 1) ** 2 / squared_range, rel=0.03)
    # "3 · 4^b" wants a range of two standard deviations
    assert found < 3 * 4**bits / 3


def test_the_ratio_at_four_bits_is_far_from_768():
    assert ratio(4, 32)[0] == pytest.approx(163, rel=0.05)
    assert ratio(4, 512)[0] == pytest.approx(72, rel=0.05)
    assert ratio(4, 512, symmetric=True)[0] == pytest.approx(54, rel=0.08)


def test_integers_move_with_shifts_and_scales():
    """x → a x + c moves what is decoded in the same way (a a power of two, so that fp16 agrees)."""
    x = draw(1, 2, 64, 16).mul(64).round() / 64
    for form in (Grouped(16, 3, 8, "channel"), Grouped(16, 3, 16, "token"), Ternary(16, 16, "token")):
        quantizer = GroupedQuantizer(form)
        assert torch.allclose(coded(quantizer, 4 * x + 2), 4 * coded(quantizer, x) + 2, atol=0.02)
    mirrored = GroupedQuantizer(Symmetric(16, 4, 16, "channel"))
    assert torch.equal(coded(mirrored, -x), -coded(mirrored, x))


def test_a_clipped_range_serves_the_middle():
    x = draw(1, 1, 4096, 64)
    form = Grouped(64, 2, 64, "channel")
    errors = [
        float((coded(GroupedQuantizer(form, torch.tensor([clip])), x) - x).square().mean())
        for clip in (1.0, 0.95, 0.7)
    ]
    assert errors[0] > errors[1] > errors[2]
    whole = GroupedQuantizer(form)
    assert torch.equal(coded(whole, x), coded(GroupedQuantizer(form, torch.tensor([1.0])), x))


@pytest.mark.parametrize("along", ["channel", "token"])
def test_outliers_come_back_exactly(along):
    x = draw(2, 2, 64, 32)
    lines = x if along == "channel" else x.mT
    lines[..., 3] = 40.0
    lines[..., 7] = -57.125
    lines[..., 11] += 9
    quantizer = PatchedQuantizer(Patched(Grouped(32, 2, 32, along), 64, 4, 2))
    found = coded(quantizer, x)
    extreme = torch.cat([lines.topk(2).indices, lines.topk(2, largest=False).indices], dim=-1)
    back = found if along == "channel" else found.mT
    assert torch.equal(back.gather(-1, extreme), lines.gather(-1, extreme).half().double())
    # and no longer spoil the others' range
    alone = coded(GroupedQuantizer(quantizer.format.base), x)
    assert float((found - x).square().mean()) < 0.05 * float((alone - x).square().mean())


def test_the_low_rank_term_is_near_the_best_of_its_rank():
    """Eckart and Young: no rank r leaves less than the smaller singular values."""
    spectrum = torch.logspace(0, -2, 16, dtype=torch.float64)
    left, right = (torch.linalg.qr(draw(3, n, 16, seed=n)).Q for n in (64, 32))
    error = left * spectrum @ right.mT
    for rank in (1, 2, 4):
        a, b = low_rank(error, rank)
        rest = (error - a @ b).square().sum((-2, -1))
        best = spectrum[rank:].square().sum()
        assert (rest >= best * (1 - 1e-9)).all()
        assert (rest <= 1.1 * best).all()
        # both factors share the scale
        assert torch.allclose(a.norm(dim=-2), b.norm(dim=-1))


def test_a_term_of_more_rank_than_the_error_has_is_exact():
    error = draw(1, 32, 1) @ draw(1, 1, 16, seed=1)
    left, right = low_rank(error, 4)
    assert torch.allclose(left @ right, error)
    assert torch.equal(left[..., 1:], torch.zeros(1, 32, 3, dtype=torch.float64))
    assert not low_rank(torch.zeros(1, 32, 16, dtype=torch.float64), 2)[0].any()


def test_repairs_lower_the_error():
    x = draw(1, 2, 256, 64)
    errors = [
        float(
            (coded(PatchedQuantizer(Patched(Grouped(64, 2, 64, "token"), 64, s, r)), x) - x).square().sum()
        )
        for s, r in ((0, 0), (0, 4), (4, 4))
    ]
    assert errors[0] > errors[1] > errors[2]


def test_tiers_give_the_heavy_tokens_their_bits():
    """Each tier is exactly a grouped quantizer over its own tokens."""
    x = draw(1, 1, 16, 8)
    form = Tiered(8, 16, (4, 2), 40, "channel")
    quantizer = TieredQuantizer(form, torch.eye(8)[:1], torch.zeros(1, 0, 8), torch.zeros(1))
    found = coded(quantizer, x)
    heavy = x[0, 0, :, 0].argsort(descending=True)[:4]
    for tokens, bits in ((heavy, 4), (sorted(set(range(16)) - set(heavy.tolist())), 2)):
        alone = GroupedQuantizer(Grouped(8, bits, 8, "channel"))
        assert torch.equal(found[:, :, tokens], coded(alone, x[:, :, tokens]))


def test_expected_mass_is_the_mean_of_gaussian_attention():
    dim, count = 4, 400_000
    mixed = draw(1, count, dim) @ draw(dim, dim, seed=1) + draw(dim, seed=2)
    keys = draw(1, 5, dim, seed=3)
    found = expected_mass(keys, Moments.zero(1, dim).add(mixed))
    scores = mixed @ keys.mT / math.sqrt(dim)
    assert torch.allclose(found, scores.exp().mean(1).log(), atol=0.05)

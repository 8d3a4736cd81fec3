"""Reverse water-filling: the optimum, by brute force and by its conditions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsight.errors import KVSightError
from kvsight.formats import Tiered
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.waterfill import falling_gains, reverse_water_fill, row_widths, share_bytes, tiers

DISTORTION = [1.0, *(gaussian(bits).distortion for bits in range(1, 9))]
variances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4).map(lambda v: sorted(v, reverse=True))


def cost(values, widths, distortion=DISTORTION):
    return sum(v * distortion[w] for v, w in zip(values, widths, strict=True))


@given(variances, st.integers(0, 4 * 3))
def test_no_other_integers_do_better(values, bits):
    bits = min(bits, 3 * len(values))
    widths = reverse_water_fill(torch.tensor(values, dtype=torch.float64), bits, DISTORTION[:4])
    assert sum(widths) == bits
    others = [w for w in itertools.product(range(4), repeat=len(values)) if sum(w) == bits]
    best = min(cost(values, other) for other in others)
    assert cost(values, widths) <= best * (1 + 1e-12)


@given(
    st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=64).map(lambda v: sorted(v, reverse=True)),
    st.integers(0, 8 * 64),
)
def test_one_price_separates_bits_taken_from_bits_left(values, bits):
    # KKT: some λ lies between the least gain of a bit that was bought and the most of one that was not
    bits = min(bits, 8 * len(values))
    widths = reverse_water_fill(torch.tensor(values, dtype=torch.float64), bits, DISTORTION)
    assert sum(widths) == bits
    assert list(widths) == sorted(widths, reverse=True)
    drop = [a - b for a, b in itertools.pairwise(DISTORTION)]
    bought = [v * drop[w - 1] for v, w in zip(values, widths, strict=True) if w > 0]
    left = [v * drop[w] for v, w in zip(values, widths, strict=True) if w < 8]
    assert min(bought, default=float("inf")) >= max(left, default=0.0) * (1 - 1e-12)


def test_equal_variances_differ_by_one_bit_at_most_and_first_ones_first():
    assert reverse_water_fill(torch.ones(5), 13, DISTORTION) == (3, 3, 3, 2, 2)
    assert reverse_water_fill(torch.zeros(3), 4, DISTORTION) == (2, 1, 1)


def test_a_factor_of_four_in_variance_is_worth_one_bit_at_high_rate():
    widths = reverse_water_fill(torch.tensor([4.0**3, 4.0**2, 4.0, 1.0]), 4 * 5 + 6 - 8, DISTORTION)
    assert widths == (6, 5, 4, 3)


def test_the_widest_takes_all_it_can():
    assert reverse_water_fill(torch.tensor([1e30, 1.0, 1e-30]), 9, DISTORTION) == (8, 1, 0)


@pytest.mark.parametrize("bits", [-1, 25])
def test_budgets_that_no_widths_meet(bits):
    with pytest.raises(KVSightError, match=f"cannot spend {bits} bits on 3 coordinates of at most 8"):
        reverse_water_fill(torch.ones(3), bits, DISTORTION)


def shared_cost(heads, shares):
    filled = (
        reverse_water_fill(torch.tensor(v), 8 * n, DISTORTION) for v, n in zip(heads, shares, strict=True)
    )
    return sum(cost(v, widths) for v, widths in zip(heads, filled, strict=True))


@given(
    st.lists(st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8), min_size=1, max_size=3),
    st.integers(1, 24),
)
def test_heads_share_bytes_almost_as_well_as_any_whole_bytes_can(values, total):
    heads = [sorted(v, reverse=True) for v in values]
    total = min(max(total, len(heads)), 8 * len(heads))
    shares = share_bytes(torch.tensor(heads, dtype=torch.float64), total, DISTORTION)
    assert sum(shares) == total
    assert all(1 <= share <= 8 for share in shares)
    options = [o for o in itertools.product(range(1, 9), repeat=len(heads)) if sum(o) == total]
    best = min(shared_cost(heads, option) for option in options)
    # rounding to whole bytes moves less than a byte per head from where unrounded bits would lie
    moved = [o for o in options if all(abs(a - b) <= 1 for a, b in zip(o, shares, strict=True))]
    assert min(shared_cost(heads, option) for option in moved) <= best * (1 + 1e-9)


def test_a_louder_head_gets_more_bytes():
    # a factor of 4^2 in variance is worth two bits per coordinate at a high rate
    heads = torch.ones(2, 16, dtype=torch.float64) * torch.tensor([[16.0], [1.0]])
    assert share_bytes(heads, 2 * 16 * 5 // 8, DISTORTION) == [12, 8]
    assert share_bytes(torch.tensor([[1e9] * 8, [1.0] * 8]), 9, DISTORTION) == [8, 1]


@pytest.mark.parametrize("total", [1, 17])
def test_bytes_that_no_heads_can_share(total):
    with pytest.raises(KVSightError, match=f"cannot share {total} bytes among 2 heads of 1 to 8 bytes"):
        share_bytes(torch.ones(2, 8), total, DISTORTION)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6).map(lambda v: sorted(v, reverse=True)))
def test_falling_gains_are_all_water_fillings_at_once(values):
    lam = torch.tensor(values, dtype=torch.float64)
    coordinate, width = falling_gains(lam, DISTORTION)
    for bits in range(8 * len(values) + 1):
        counts = torch.bincount(coordinate[:bits], minlength=len(values)).tolist()
        assert tuple(counts) == reverse_water_fill(lam, bits, DISTORTION)
    # each coordinate is widened by one bit at a time
    for i in range(len(values)):
        assert width[coordinate == i].tolist() == list(range(1, 9))


def test_falling_gains_take_heads_apart():
    lam = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coordinate, width = falling_gains(lam, DISTORTION)
    assert coordinate.shape == width.shape == (2, 3, 40)
    for index in itertools.product(range(2), range(3)):
        alone = falling_gains(lam[index], DISTORTION)
        assert torch.equal(coordinate[index], alone[0])
        assert torch.equal(width[index], alone[1])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6).map(lambda v: sorted(v, reverse=True)))
def test_free_rows_are_water_fillings(values):
    lam = torch.tensor(values, dtype=torch.float64)
    rows = row_widths(lam, DISTORTION)
    for size, widths in enumerate(rows.tolist()):
        assert tuple(widths) == reverse_water_fill(lam, 8 * size, DISTORTION)


@pytest.mark.parametrize("allowed", [None, (0, 1, 2, 4, 8), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_no_row_of_its_length_is_better(chunk, allowed):
    """Wherever a row is full, no other widths under the same limits cost less."""
    generator = torch.Generator().manual_seed(chunk)
    lam = torch.rand(2, 4 * chunk, generator=generator, dtype=torch.float64).pow(4)
    lam = lam.sort(descending=True).values
    rows = row_widths(lam, DISTORTION, chunk, allowed)
    assert rows.shape == (2, 4 * chunk + 1, 4 * chunk)
    steps = allowed or range(9)
    full = 0
    for head, size in itertools.product(range(2), range(4 * chunk + 1)):
        widths = rows[head, size].tolist()
        assert widths == sorted(widths, reverse=True)
        assert set(widths) <= set(steps)
        assert all(len(set(widths[i : i + chunk])) == 1 for i in range(0, len(widths), chunk))
        assert sum(widths) <= 8 * size
        if sum(widths) < 8 * size:
            continue
        full += 1
        others = [w for w in itertools.product(steps, repeat=4) if chunk * sum(w) == 8 * size]
        costs = [
            sum(
                DISTORTION[w] * float(lam[head, i * chunk : (i + 1) * chunk].sum())
                for i, w in enumerate(other)
            )
            for other in others
        ]
        mine = sum(DISTORTION[w] * v for w, v in zip(widths, lam[head].tolist(), strict=True))
        assert mine == pytest.approx(min(costs))
    assert full > 4


def test_shares_are_whole_units():
    heads = torch.tensor([[8.0] * 32, [1.0] * 32])
    assert share_bytes(heads, 27, DISTORTION, 2) == [16, 10]
    with pytest.raises(KVSightError, match="cannot share 3 bytes among 2 heads of 2 to 32 bytes"):
        share_bytes(heads, 3, DISTORTION, 2)


log_weights = st.lists(st.floats(-8, 8), min_size=6, max_size=6)


@given(log_weights, st.sampled_from([((4, 2), 16), ((4, 3, 2), 18), ((5, 3, 2), 18), ((3, 2, 1), 13)]))
def test_no_other_tiers_of_this_mean_do_better(logs, case):
    widths, total = case
    form = Tiered(1, 6, widths, total, "token")
    chosen = tiers(torch.tensor([logs], dtype=torch.float64), widths, form.counts)[0].tolist()
    mine = [widths[i] for i in chosen]
    assert sum(mine) == total
    weights = torch.tensor(logs, dtype=torch.float64).exp().tolist()
    others = [w for w in itertools.product(widths, repeat=6) if sum(w) == total]
    best = min(sum(v * (2.0**b - 1) ** -2 for v, b in zip(weights, w, strict=True)) for w in others)
    assert sum(v * (2.0**b - 1) ** -2 for v, b in zip(weights, mine, strict=True)) == pytest.approx(best)


@given(st.integers(0, 2**32), st.sampled_from([(6, 4, 3), (4, 2, 1), (8, 6, 5)]), st.integers(-8, 8))
def test_every_block_meets_its_mean_exactly(seed, widths, spare):
    form = Tiered(1, 64, widths, widths[1] * 64 + spare, "token")
    logs = 4 * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.tensor(widths)[tiers(logs, widths, form.counts)]
    assert (found.sum(-1) == form.total).all()
    # heavier tokens never get less
    ordered = found.gather(-1, logs.argsort(dim=-1, descending=True))
    assert (ordered.diff(dim=-1) <= 0).all()


def test_tiers_follow_half_the_log_of_the_weight():
    """b + ½ (log2 w - mean): a weight of 4^2 buys two bits more, one of 4^-1 one bit less."""
    logs = torch.log(torch.tensor([[16.0, 1.0, 1.0, 0.25, 0.25, 1.0]], dtype=torch.float64))
    form = Tiered(1, 6, (5, 3, 2), 18, "token")
    assert tiers(logs, form.widths, form.counts).tolist() == [[0, 1, 1, 2, 2, 1]]


def test_equal_weights_need_no_tiers():
    form = Tiered(1, 8, (5, 3, 2), 24, "token")
    assert tiers(torch.zeros(1, 8), form.widths, form.counts).tolist() == [[1] * 8]
    assert tiers(torch.zeros(1, 8), (4, 2), ((3, 5),)).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]

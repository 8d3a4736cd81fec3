"""Reverse water-filling: the optimum, by brute force and by its conditions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsight.errors import KVSightError
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.waterfill import reverse_water_fill

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

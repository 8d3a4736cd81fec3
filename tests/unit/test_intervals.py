"""Intervals against textbook numbers and by their coverage."""

import math

import numpy as np
import pytest

from kvsight.errors import KVSightError
from kvsight.eval.intervals import mean_interval, paired_interval, perplexity_interval


def test_t_interval_of_three_values():
    # t_{0.975, 2} = 4.302653, s = 1, n = 3
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate.n == 3


def test_one_window_has_no_interval():
    estimate = mean_interval([0.5])
    assert math.isnan(estimate.low)
    assert estimate.to_json() == {"mean": 0.5, "low": None, "high": None, "n": 1}


def test_interval_ends_where_the_quantity_ends():
    estimate = mean_interval([0.0, 1.0], least=0.0, most=1.0)
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_coverage_is_nominal():
    # seed 5, 2,000 repeats of 6 Gaussian windows: a nominal interval misses outside 93..97 % once in 10,000
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(2000):
        estimate = mean_interval(rng.normal(3.0, 2.0, 6).tolist())
        hits += estimate.low <= 3.0 <= estimate.high
    assert 0.93 <= hits / 2000 <= 0.97


def test_perplexity_is_the_exponential_of_the_mean_loss():
    estimate = perplexity_interval([math.log(10), math.log(1000)])
    assert estimate.mean == pytest.approx(100)
    assert estimate.low < 100 < estimate.high


def test_pairs_are_made_by_name():
    # differences 1, 2, 3: as above
    estimate = paired_interval({"a": 2.0, "b": 5.0, "c": 4.0}, {"c": 1.0, "a": 1.0, "b": 3.0})
    assert (estimate.mean, estimate.n) == (2.0, 3)
    assert estimate.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    with pytest.raises(KVSightError, match="samples do not pair: 2 of them, such as 'b', are on one side"):
        paired_interval({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})

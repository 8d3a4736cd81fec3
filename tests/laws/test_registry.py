"""Every registered method keeps the public laws.

Sides, head_dims with and without a power of two, and budgets meet in pairs: their product says no more.
"""

import pytest

import kvsight
from kvsight.testing import check_method

CASES = [
    ("k", 32, (16.0, 4.5, 2.0)),
    ("v", 32, (16.0, 3.0)),
    ("k", 48, (8.5, 3.0)),
    ("v", 48, (16.0, 8.5, 4.5, 2.0)),
]


@pytest.mark.parametrize(("side", "dim", "budgets"), CASES, ids=str)
@pytest.mark.parametrize("name", kvsight.methods())
def test_method(name, side, dim, budgets):
    check_method(kvsight.method_info(name), heads=2, dim=dim, seed=7, sides=[side], budgets=budgets)

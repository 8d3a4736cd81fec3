"""Every registered method keeps the public laws, at head_dims with and without powers of two."""

import pytest

import kvsight
from kvsight.testing import check_method


@pytest.mark.parametrize("name", kvsight.methods())
@pytest.mark.parametrize("dim", [64, 80])
def test_method(name, dim):
    check_method(kvsight.method_info(name), heads=2, dim=dim, seed=7)

import pytest


@pytest.fixture(autouse=True, scope="module")
def plans_share_stretches(stretched_once):
    """Plans of many budgets are fitted to the same drawn vectors."""

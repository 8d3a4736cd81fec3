import pytest

from interpreter import DEVICE


@pytest.fixture
def kernels(monkeypatch):
    """Some parts of triton are imported at the first launch only, and look again."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")

from functools import cache

import pytest
import torch
import zoo

import kvsight


@cache
def _model(name, attention=None):
    return zoo.build(name, attention=attention)


@cache
def _plan(name, method, items):
    settings = dict(items)
    settings["options"] = dict(settings.get("options", ()))
    if method != "identity":
        settings.setdefault("bits", 4.0)
    return kvsight.fit(_model(name), zoo.batches(), method=method, **settings)


@pytest.fixture(scope="session")
def model():
    """The model of a kind; tests must not change it."""
    return _model


@pytest.fixture(scope="session")
def plan():
    """A plan fitted to random tokens: plan(kind, method, **settings of fit)."""
    return lambda name, method="identity", **settings: _plan(name, method, tuple(settings.items()))


@pytest.fixture(autouse=True, scope="module")
def plans_share_stretches(stretched_once):
    """Plans of many budgets are fitted to the same samples."""


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """Tiny models: waking a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

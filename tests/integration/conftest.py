import hashlib
from functools import cache

import pytest
import torch
import zoo

import kvsight
from kvsight.methods import sight
from kvsight.quantizers.lloyd_max import fitted_stretches

_stretches = {}


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


def _content(tensor):
    if tensor is None:
        return None
    digest = hashlib.blake2b(tensor.detach().contiguous().numpy().tobytes()).digest()
    return tuple(tensor.shape), tensor.dtype, digest


def _stretched_once(y, codebook, weights=None, judges=None):
    key = codebook, *map(_content, (y, weights, judges))
    if key not in _stretches:
        _stretches[key] = fitted_stretches(y, codebook, weights, judges)
    return _stretches[key]


@pytest.fixture(autouse=True, scope="module")
def same_samples_are_stretched_once():
    """Most of a fit is this function of the sample alone, and plans of many budgets share samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sight, "fitted_stretches", _stretched_once)
        yield


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """Tiny models: waking a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

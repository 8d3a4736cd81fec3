"""Memory that kvsight allocates without filling is poisoned, so that a forgotten write cannot pass."""

import hashlib
import sys

import pytest
import torch
from hypothesis import settings

import interpreter

interpreter.load()

# derandomised: every run draws the same examples, which hypothesis derives from the test's source
settings.register_profile("kvsight", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("kvsight")


def poison(tensor):
    """NaN for real numbers, bytes of 0xA5 for integers."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    if tensor.dtype == torch.bool or tensor.dtype.is_complex or tensor.device.type == "meta":
        return tensor
    size = tensor.element_size()
    return tensor.fill_(int.from_bytes(b"\xa5" * size, sys.byteorder, signed=tensor.dtype.is_signed))


def poisoned(allocate):
    def call(*args, **kwargs):
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(out) if caller.split(".")[0] == "kvsight" else out

    return call


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(autouse=True)
def one_thread(request):
    """Small tensors: waking a second thread costs more than it brings. Real models keep all of them."""
    if request.node.path.parent.name == "integration":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_stretches = {}


def _content(tensor):
    if tensor is None:
        return None
    digest = hashlib.blake2b(tensor.detach().contiguous().numpy().tobytes()).digest()
    return tuple(tensor.shape), tensor.dtype, digest


@pytest.fixture(scope="module")
def stretched_once():
    """Stretches, most of what a fit of sight takes, are computed once per sample.

    They are a function of the sample alone. Tests of the function and of its law suite do without this.
    """
    from kvsight.methods import sight
    from kvsight.quantizers.lloyd_max import fitted_stretches

    def stretches(y, codebook, weights=None, judges=None):
        key = codebook, *map(_content, (y, weights, judges))
        if key not in _stretches:
            _stretches[key] = fitted_stretches(y, codebook, weights, judges)
        return _stretches[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sight, "fitted_stretches", stretches)
        yield

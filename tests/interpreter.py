"""Triton's kernels on CPUs, in its interpreter.

Triton decides when it is imported, and transformers imports it; so the root conftest does so first, with
TRITON_INTERPRET set for that moment only. Where there is a GPU the kernels run on it instead.
"""

import importlib.util
import sys

import pytest
import torch

KERNELS = ("kvsight.ops.attend.triton", "kvsight.ops.encode.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load():
    """Import triton and our kernels, interpreted unless there is a GPU."""
    if importlib.util.find_spec("triton") is None or DEVICE == "cuda":
        return
    assert "triton" not in sys.modules, "triton was imported before the tests could choose its interpreter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from triton.runtime import interpreter

        for name in KERNELS:
            importlib.import_module(name)
    _mend(interpreter)


def _mend(interpreter):
    """Two defects of the interpreter, neither of which touches what kernels compute."""
    tensors, language, done = interpreter._patch_lang_tensor, interpreter._patch_lang, set()

    def indexable(tensor):
        # numpy 2.4 takes no array of one dimension for an integer, so that range(lo, hi) failed
        tensors(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def once(function):
        # patching the language again at each call of a function takes most of the time
        if function in done:
            return None
        undo = language(function)
        if undo is None:
            done.add(function)
        return undo

    interpreter._patch_lang_tensor, interpreter._patch_lang = indexable, once


available = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed on this platform"
)

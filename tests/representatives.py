"""Which methods stand for which formats.

Caches, kernels and plan files look at formats, never at methods. So what they do is tested with one method
per format, over all models and settings; and every method is tested on its own in
tests/integration/test_every_method.py, tests/laws/test_registry.py and tests/unit/test_pages.py.
"""

from functools import cache
from zlib import crc32

import torch

import kvsight
from kvsight.errors import KVSightError
from kvsight.methods.base import Budget
from kvsight.retention import Retention
from kvsight.testing import random_stats

# a method whose formats are none of these joins them; test_every_method.py says so
REPRESENTATIVES = (
    "gear",
    "headq",
    "identity",
    "int",
    "kivi",
    "kvquant",
    "polarquant",
    "qjl",
    "qkqv",
    "residual-vq",
    "sight",
    "smaq-vq",
    "turboquant",
    "zipcache",
)
_BUDGETS = (16.0, 8.0, 5.0, 3.0)


def dealt(name, choices, count=1):
    """``count`` of the choices; which ones depends on the name alone, and names take different ones."""
    start = crc32(name.encode())
    return [choices[(start + i) % len(choices)] for i in range(min(count, len(choices)))]


def shape(form):
    """What code that meets a format can tell: its class, its fields, and whether tokens share blocks."""
    return type(form).__name__, tuple(field.name for field in form.fields), form.block > 1


@cache
def shapes(name):
    """The shapes of all formats that a method chooses by default, from high budgets to low ones."""
    method, stats = kvsight.method_info(name), random_stats(2, 16, tokens=256, seed=1)
    found = set()
    for side in ("k", "v"):
        for bits in _BUDGETS:
            budget = Budget(bits, 1024, Retention(0, 0), torch.bfloat16)
            try:
                placements = method.build(side, stats, budget, method.with_defaults({}))
            except KVSightError:
                break
            found |= {shape(placement.codec.format) for placement in placements}
    return found


def in_blocks(name):
    """Whether a method codes blocks of tokens, for which a short sliding window has no room."""
    return any(blocks for _, _, blocks in shapes(name))

"""KV (D'Alberto, arXiv 2605.08114), the baseline: no sketch on either side."""

from kvsight.methods.base import Method
from kvsight.methods.schemes import scheme

METHOD = Method(
    "kv",
    "scalar codes of the same bits on both sides, without rotation unless asked for",
    "D'Alberto, arXiv 2605.08114",
    scheme("kv", frozenset()),
    {"rotation": "none", "seed": 0},
)

"""KQV (D'Alberto, arXiv 2605.08114), the residual sketch on values only."""

from kvsight.methods.base import Method
from kvsight.methods.schemes import SKETCHED, scheme

METHOD = Method(
    "kqv",
    "rotated codes; values spend one bit on signs of the residual",
    "D'Alberto, arXiv 2605.08114",
    scheme("kqv", frozenset({"v"})),
    SKETCHED,
)

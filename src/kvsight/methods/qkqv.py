"""QKQV (D'Alberto, arXiv 2605.08114), the residual sketch on both sides."""

from kvsight.methods.base import Method
from kvsight.methods.schemes import SKETCHED, scheme

METHOD = Method(
    "qkqv",
    "rotated codes; keys and values spend one bit on signs of the residual",
    "D'Alberto, arXiv 2605.08114",
    scheme("qkqv", frozenset({"k", "v"})),
    SKETCHED,
)

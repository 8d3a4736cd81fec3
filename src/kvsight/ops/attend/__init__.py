"""Attention over packed keys and values. ``ref.py`` is the definition, README.md tells of the kernels."""

from kvsight.ops.attend import op as op
from kvsight.ops.attend.dispatch import attend
from kvsight.ops.attend.ref import Coded, Folded, Segment

__all__ = ["Coded", "Folded", "Segment", "attend"]

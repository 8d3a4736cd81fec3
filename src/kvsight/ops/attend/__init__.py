"""Attention over packed keys and values."""

from kvsight.ops.attend.ref import Coded, Folded, Segment, attend

__all__ = ["Coded", "Folded", "Segment", "attend"]

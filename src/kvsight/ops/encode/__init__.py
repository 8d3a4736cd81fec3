"""Keys and values to packed rows and tiles. ``ref.py`` is the definition of rows in plain torch."""

from kvsight.ops.encode.dispatch import encode
from kvsight.ops.encode.ref import Rounding, rounding

__all__ = ["Rounding", "encode", "rounding"]

"""Plain numbers: the identity quantizer, and the exact tokens of windows and sinks."""

from dataclasses import dataclass

from torch import Tensor

from kvsight.formats import Dense, Packed
from kvsight.quantizers.base import Tableless


@dataclass(frozen=True)
class DenseQuantizer(Tableless):
    """Round to the dense number type and nothing else."""

    format: Dense

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] in ``format.dtype``."""
        return Packed(self.format, (y.to(self.format.dtype),))

    def decode(self, packed: Packed) -> Tensor:
        return packed.read()

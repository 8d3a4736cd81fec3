"""The few largest coordinates of a token, exact to fp16, and where they are."""

from dataclasses import dataclass

from torch import Tensor

from kvsight.formats import Packed, Sparse
from kvsight.packing import half
from kvsight.quantizers.base import Tableless


@dataclass(frozen=True)
class SparseQuantizer(Tableless):
    """Keeps ``format.count`` coordinates; of equal ones the first."""

    format: Sparse

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to ascending indices and their values."""
        order = y.abs().sort(dim=-1, descending=True, stable=True).indices
        index = order[..., : self.format.count].sort(dim=-1).values
        values = half(y.gather(-1, index))
        return Packed(self.format, (index.to(self.format.fields[0].dtype), values))

    def decode(self, packed: Packed) -> Tensor:
        return packed.read()

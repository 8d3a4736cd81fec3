"""Signs of a sketch and the norm of what was sketched (QJL, arXiv 2406.03482, Def. 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Packed, Sketch
from kvsight.packing import half, pack_row
from kvsight.quantizers.base import Unguided

# singular values below this share of the largest are directions that the sketch does not see
_UNSEEN = 1e-6


@dataclass(frozen=True, eq=False)
class SketchQuantizer(Unguided):
    """``unsketch`` [H or 1, m, d] fp64 gives back what was sketched, for the sake of its norm."""

    format: Sketch
    unsketch: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Self:
        """For sketches y = x @ matrix [H or 1, d, m] of m channels or fewer."""
        wide = matrix.shape[-1]
        channels = int((matrix.abs().amax(-1) > 0).sum(-1).max())
        if wide < channels:
            raise KVSightError(
                f"a sketch of {wide} signs loses the norm of {channels} channels; store {channels} or more."
            )
        return cls(Sketch(wide), torch.linalg.pinv(matrix.double(), rtol=_UNSEEN))

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return ()

    def encode(self, y: Tensor) -> Packed:
        """Sketches [..., H, n, m] to signs (a zero counts as negative) and norms."""
        norm = torch.linalg.vector_norm(y.double() @ self.unsketch, dim=-1, keepdim=True)
        signs = pack_row((y > 0).to(torch.uint8), (1,) * self.format.dim)
        return Packed(self.format, (signs, half(norm)))

    def decode(self, packed: Packed) -> Tensor:
        """norm · (±1), [..., H, n, m]; the sketch's inverse map holds the estimator's factor."""
        return packed.read()

    def to(self, device: torch.device | str) -> Self:
        return replace(self, unsketch=self.unsketch.to(device))

    def heads(self, index: Sequence[int]) -> Self:
        """The quantizer of a subset of heads; a shared sketch stays shared."""
        return self if self.unsketch.shape[0] == 1 else replace(self, unsketch=self.unsketch[list(index)])

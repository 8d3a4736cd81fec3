"""Few directions instead of few bits: bases of falling importance, and codecs of the first coordinates."""

from dataclasses import dataclass

import torch

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Dense, Row
from kvsight.methods.base import Budget, Side, all_heads
from kvsight.packing import MAX_WIDTH
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import RowQuantizer
from kvsight.stats import Moments, SideStats, shrunk
from kvsight.transforms import Transform, centre, karhunen_loeve, scale, subspace

# a metric that short calibration left singular has no inverse root
_SHRINK = 1e-3
# configurations from one coordinate to all
_RANKS = 64


@dataclass(frozen=True, eq=False)
class Basis:
    """All d coordinates, most important first; ``shift`` [H, d] is subtracted before, or None."""

    full: Transform
    shift: torch.Tensor | None

    def first(self, rank: int) -> Transform:
        """The map to the first ``rank`` coordinates and back."""
        matrix, inverse = self.full.matrix, self.full.inverse_matrix
        assert matrix is not None and inverse is not None
        cut = matrix[..., :rank].contiguous(), inverse[..., :rank, :].contiguous()
        oblique = self.full.kept and rank < self.full.dim
        chosen = Transform(self.full.dim, None, *cut, kept=oblique)
        return chosen if self.shift is None else centre(self.shift).then(chosen)


def principal(moments: Moments, centred: bool) -> Basis:
    """Principal components of these moments: the orthonormal basis of least squared error."""
    second = moments.covariance if centred else moments.second
    vectors = torch.linalg.eigh(second.double()).eigenvectors.flip(-1)
    return Basis(subspace(vectors.contiguous()), moments.mean if centred else None)


def read_basis(side: Side, stats: SideStats, centred: bool, entropy: bool) -> Basis:
    """Of values, the top directions of VᵀαᵀαV, the second moment of what attention reads; else PCA.

    With ``entropy``, tokens whose attention is sharp count more.
    """
    moments = stats.focus if entropy else stats.read
    return principal(stats.moments if side == "k" or moments is None else moments, centred)


def metric_basis(stats: SideStats, centred: bool) -> Basis:
    """The oblique projection of least metric-weighted error: M^½ Σ M^½ = U Λ Uᵀ, cut in U."""
    second = stats.moments.covariance if centred else stats.moments.second
    turned, _ = karhunen_loeve(shrunk(stats.metric, stats, _SHRINK), shrunk(second, stats, _SHRINK))
    full = Transform(turned.dim, None, turned.matrix, turned.inverse_matrix, kept=True)
    return Basis(full, stats.moments.mean if centred else None)


def place_dense(name: str, stats: SideStats, budget: Budget, basis: Basis) -> tuple[Placement, ...]:
    """As many coordinates as the budget pays for, at 16 bits each."""
    # bfloat16, because fp16 overflows where rotated outliers meet
    forms = [Dense(rank, torch.bfloat16) for rank in ranks(stats.dim)]
    form = budget.best(forms, name, stats.dim)
    return all_heads(name, stats, basis.first(form.dim), DenseQuantizer(form))


def place_integers(
    name: str, stats: SideStats, budget: Budget, basis: Basis, bits: int
) -> tuple[Placement, ...]:
    """As many coordinates as the budget pays for, as symmetric integers of ``bits`` with static scales.

    The scale of a coordinate is its largest size in the calibration's sample over 2^(bits-1) - 1.
    """
    if not 2 <= bits <= MAX_WIDTH:
        raise KVSightError(f"{name} option 'bits' is 2 to {MAX_WIDTH}; got {bits}.")
    form = budget.best([Row((bits,) * rank) for rank in ranks(stats.dim)], name, stats.dim)
    most = 2 ** (bits - 1)
    transform = basis.first(form.dim)
    peak = transform.forward(stats.sample.double()).abs().amax(-2)
    step = torch.where(peak > 0, peak / (most - 1), torch.ones_like(peak))
    levels = torch.arange(-most, most, dtype=torch.float32)
    quantizer = RowQuantizer(form, levels, torch.zeros(1, form.dim, dtype=torch.int32))
    return all_heads(name, stats, transform.then(scale(step)), quantizer)


def ranks(dim: int) -> list[int]:
    """The ranks on offer, falling: every one of small heads, 64 of larger ones."""
    step = -(-dim // _RANKS)
    return list(range(dim, 0, -step))

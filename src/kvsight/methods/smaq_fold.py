"""SMAQ in front of rotate-and-scalar coding (zenodo 19537052): fold the metric into keys, then TurboQuant.

For "fold E, take out the norm, rotate, code every coordinate alike, undo", the logit error is
D(b)·tr(A Σ_k)·tr(A⁻¹ Σ_q) / d with A = EᵀE. It is least at A = Σ_k⁻¹ # Σ_q (docs/methods/smaq-fold.md).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from kvsight.codec import Placement
from kvsight.formats import Row
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.rotated import rotation
from kvsight.methods.shaping import check_shape, shaped
from kvsight.quantizers.lloyd_max import RowQuantizer, gaussian, row_quantizer, sphere
from kvsight.stats import SideStats, shrunk
from kvsight.transforms import Transform, centre, linear, sqrtm

PAPER = "paper"
_SHRINK = 0.001


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """Folded rows for keys, plain TurboQuant for values; whole widths only."""
    rows = [Row((bits,) * stats.dim, norm=True) for bits in range(8, 0, -1)]
    return folded("smaq-fold", side, stats, budget.best(rows, "smaq-fold"), options)


def folded(
    name: str, side: Side, stats: SideStats, row: Row, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """Codecs for rows of this format."""
    shape = str(options["shape"])
    check_shape(name, shape, float(options["strength"]), (PAPER,))
    turn = rotation(name, str(options["rotation"]), stats.dim, int(options["seed"]))
    quantizer = row_quantizer(row.widths, lambda bits: sphere(bits, stats.dim), norm=True)
    if side == "v":
        return all_heads(name, stats, turn, quantizer)
    if shape == PAPER:
        return all_heads(name, stats, turn, widened(row, stats, turn, float(options["strength"])))
    transform = fold(stats, shape, float(options["strength"]), bool(options["centre"])).then(turn)
    return all_heads(name, stats, transform, quantizer)


def fold(stats: SideStats, shape: str, strength: float, centred: bool) -> Transform:
    """y = (k - mean) E with E the root of the shaped metric."""
    moments = stats.moments
    spread = moments.covariance if centred else moments.second
    metric = shaped(shrunk(stats.metric, stats, _SHRINK), shrunk(spread, stats, _SHRINK), shape, strength)
    root, inverse_root = sqrtm(metric)
    bent = linear(root, inverse_root)
    return centre(moments.mean).then(bent) if centred else bent


def widened(row: Row, stats: SideStats, turn: Transform, strength: float) -> RowQuantizer:
    """The paper's own fold: keys are not folded, the levels of coordinate j are √d·scale_j times as wide.

    scale_j² is the diagonal of H M Hᵀ with M the log-shaped metric at trace one. For y = x H that diagonal
    belongs to no coordinate of y (it should be HᵀM H); the published code has it so, and so has this.
    """
    assert turn.matrix is not None
    eye = torch.eye(stats.dim, dtype=torch.float64)
    metric = shaped(shrunk(stats.metric, stats, _SHRINK), eye, "log1p", strength)
    scale = (turn.matrix @ metric @ turn.matrix.mT).diagonal(dim1=-2, dim2=-1).sqrt()
    quantizer = row_quantizer(row.widths, gaussian, norm=True)
    size = len(quantizer.levels)
    levels = scale.unsqueeze(-1) * quantizer.levels
    starts = torch.arange(0, levels.numel(), size, dtype=torch.int32).view(stats.heads, stats.dim)
    return replace(quantizer, levels=levels.flatten().float(), starts=starts)


METHOD = Method(
    "smaq-fold",
    "query metric folded into keys before norm, rotation and Lloyd-Max codebook; values as turboquant",
    "SMAQ, zenodo 19537052",
    build,
    {"shape": "geometric", "strength": 0.0, "centre": True, "rotation": "hadamard", "seed": 42},
    calibrated=True,
)

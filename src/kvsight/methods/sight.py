"""sight: transform coding in the coordinates that queries (or W_O) see (docs/design.md, section 2).

Centre, whiten the read metric, diagonalise: an error in coordinate i costs λ_i D(b_i), so integer bits
follow from reverse water-filling on λ. Scales are static; a row is codes and nothing else.
"""

from collections.abc import Mapping

from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.packing import MAX_WIDTH
from kvsight.quantizers.lloyd_max import CODEBOOKS, row_quantizer
from kvsight.stats import SideStats, shrunk
from kvsight.transforms import centre, karhunen_loeve
from kvsight.waterfill import reverse_water_fill


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    name = str(options["codebook"])
    if name not in CODEBOOKS:
        raise KVSightError(f"sight option 'codebook' is one of {', '.join(CODEBOOKS)}; got {name!r}.")
    codebook = CODEBOOKS[name]
    strength = float(options["shrink"])
    metric = shrunk(stats.metric if options["metric"] else None, stats, strength)
    covariance = shrunk(stats.moments.covariance, stats, strength)
    transform, variances = karhunen_loeve(metric, covariance)
    transform = centre(stats.moments.mean).then(transform)
    distortion = [1.0, *(codebook(bits).distortion for bits in range(1, MAX_WIDTH + 1))]
    rows = row_bytes(stats, budget)
    widths = [
        reverse_water_fill(variances[head], 8 * rows[head], distortion) for head in range(stats.heads)
    ]
    placements: list[Placement] = []
    for shared in dict.fromkeys(widths):
        heads = [head for head, own in enumerate(widths) if own == shared]
        codec = Codec("sight", transform.heads(heads), row_quantizer(shared, codebook))
        placements.append(Placement(tuple(heads), codec))
    return tuple(placements)


def row_bytes(stats: SideStats, budget: Budget) -> list[int]:
    """Whole bytes per head: the layer's budget, split evenly, spare bytes to the first heads."""
    most = stats.dim * MAX_WIDTH // 8
    total = min(int(budget.coded_bits() * stats.heads * stats.dim / 8 + 1e-9), most * stats.heads)
    if total < stats.heads:
        raise KVSightError(
            f"sight cannot meet {budget.bits:.4g} bits; its smallest row stores "
            f"{8 / stats.dim:.4g}. Raise the budget."
        )
    base, spare = divmod(total, stats.heads)
    return [base + (head < spare) for head in range(stats.heads)]


METHOD = Method(
    "sight",
    "query-aware transform coding: bits by reverse water-filling, static scales, no metadata",
    "kvsight, docs/design.md",
    build,
    {"codebook": "gaussian", "metric": True, "shrink": 0.001},
    fine=True,
)

"""sight: transform coding in the coordinates that queries (or W_O) see (docs/design.md, section 2).

Centre, whiten the read metric, diagonalise: an error in coordinate i costs λ_i D(b_i), so integer bits
follow from reverse water-filling on λ, over all heads of a layer together. Scales are static: the
calibration's standard deviation, stretched for the least squared error where tails are heavy. A row is
codes and nothing else.
"""

from collections.abc import Iterable, Mapping

from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.packing import MAX_WIDTH
from kvsight.quantizers.lloyd_max import CODEBOOKS, fitted_stretch, row_quantizer
from kvsight.stats import SideStats, shrunk
from kvsight.transforms import centre, karhunen_loeve, scale
from kvsight.waterfill import reverse_water_fill, share_bytes


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    codebook = CODEBOOKS[choice("codebook", options["codebook"], CODEBOOKS)]
    scales = choice("scales", options["scales"], ("fitted", "static"))
    strength = float(options["shrink"])
    if not 0 <= strength <= 1:
        raise KVSightError(
            f"sight option 'shrink' is a share from 0 to 1; got {strength:g}. Default: 0.001."
        )
    metric = shrunk(stats.metric if options["metric"] else None, stats, strength)
    covariance = shrunk(stats.moments.covariance, stats, strength)
    transform, variances = karhunen_loeve(metric, covariance)
    transform = centre(stats.moments.mean).then(transform)
    distortion = [1.0, *(codebook(bits).distortion for bits in range(1, MAX_WIDTH + 1))]
    rows = share_bytes(variances, row_bytes(stats, budget), distortion)
    widths = [
        reverse_water_fill(variances[head], 8 * rows[head], distortion) for head in range(stats.heads)
    ]
    placements: list[Placement] = []
    for shared in dict.fromkeys(widths):
        heads = [head for head, own in enumerate(widths) if own == shared]
        quantizer = row_quantizer(shared, codebook)
        mine = transform.heads(heads)
        if scales == "fitted":
            sample = mine.forward(stats.sample[heads].double())
            mine = mine.then(scale(fitted_stretch(quantizer, sample)))
        placements.append(Placement(tuple(heads), Codec("sight", mine, quantizer)))
    return tuple(placements)


def row_bytes(stats: SideStats, budget: Budget) -> int:
    """Whole bytes per token for all heads of the layer: at least one and at most d per head."""
    bits = budget.coded_bits()
    total = int(bits * stats.heads * stats.dim / 8 + 1e-9)
    if total < stats.heads:
        raise KVSightError(
            f"sight cannot meet {budget.named}; its smallest row stores "
            f"{8 / stats.dim:.4g}. Raise the budget, or keep fewer tokens exact."
        )
    return min(total, stats.heads * (stats.dim * MAX_WIDTH // 8))


def choice(option: str, value: Option, allowed: Iterable[str]) -> str:
    """The value of an option that takes one of a few words."""
    if value not in tuple(allowed):
        raise KVSightError(f"sight option {option!r} is one of {', '.join(allowed)}; got {value!r}.")
    return str(value)


METHOD = Method(
    "sight",
    "query-aware transform coding: bits by reverse water-filling, static scales, no metadata",
    "kvsight, docs/design.md",
    build,
    {"codebook": "gaussian", "scales": "fitted", "metric": True, "shrink": 0.001},
    fine=True,
)

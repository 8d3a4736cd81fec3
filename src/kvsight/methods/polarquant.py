"""PolarQuant (Han et al., arXiv 2502.02617): random rotation, then recursive polar coordinates."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Polar
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.rotated import rotation
from kvsight.quantizers.polar import polar_quantizer
from kvsight.stats import SideStats

# the first level's angles go all the way round, four times as far as the others'
_AROUND = 2


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest widths within the budget; (4, 2, 2, 2) are the paper's."""
    form = budget.best(formats(stats.dim, int(options["block"])), "polarquant")
    turn = rotation("polarquant", str(options["rotation"]), stats.dim, int(options["seed"]))
    return all_heads("polarquant", stats, turn, polar_quantizer(form))


def formats(dim: int, block: int) -> list[Polar]:
    """Widths (b + 2, b, b, ...) for b from 6 to 1, in blocks of at most ``block`` that tile head_dim."""
    if block < 2 or block & (block - 1):
        raise KVSightError(f"polarquant option 'block' is a power of two from 2; got {block}.")
    if dim % 2:
        raise KVSightError(f"polarquant pairs coordinates and needs an even head_dim; got {dim}.")
    levels = block.bit_length() - 1
    while dim % (1 << levels):
        levels -= 1
    return [Polar(dim, (bits + _AROUND, *(bits,) * (levels - 1))) for bits in range(6, 0, -1)]


METHOD = Method(
    "polarquant",
    "random rotation, then angles of recursive polar coordinates and one radius per block",
    "PolarQuant, arXiv 2502.02617",
    build,
    {"block": 16, "rotation": "haar", "seed": 0},
)

"""TurboQuant, MSE form (arXiv 2504.19874, Alg. 1): norm, random rotation, sphere codebook."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Row
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.quantizers.lloyd_max import row_quantizer, sphere
from kvsight.stats import SideStats
from kvsight.transforms import Transform, centre, haar, hadamard


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    rows = [Row((bits,) * stats.dim, norm=True) for bits in range(8, 0, -1)]
    row = budget.best(rows, "turboquant")
    quantizer = row_quantizer(row.widths, lambda bits: sphere(bits, stats.dim), norm=True)
    transform = rotation(str(options["rotation"]), stats.dim, int(options["seed"]))
    if options["centre"]:
        transform = centre(stats.moments.mean).then(transform)
    return all_heads("turboquant", stats, transform, quantizer)


def rotation(name: str, dim: int, seed: int) -> Transform:
    match name:
        case "haar":
            return haar(dim, seed)
        case "hadamard":
            return hadamard(dim, seed)
    raise KVSightError(f"turboquant option 'rotation' is 'haar' or 'hadamard'; got {name!r}.")


METHOD = Method(
    "turboquant",
    "per-token norm, random rotation, Lloyd-Max codebook of the sphere (MSE form)",
    "TurboQuant, arXiv 2504.19874, Alg. 1",
    build,
    {"centre": False, "rotation": "haar", "seed": 0},
)

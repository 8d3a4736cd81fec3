"""TurboQuant, product form (arXiv 2504.19874, Alg. 2): b - 1 bits, then the signs of a residual sketch."""

from collections.abc import Mapping

from kvsight.codec import Codec, Placement
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.methods.rotated import Scheme, place, product, product_form, rotation
from kvsight.stats import SideStats


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    seed, sketch = int(options["seed"]), str(options["sketch"])

    def make(dim: int, bits: int) -> Codec:
        turn = rotation("turboquant-prod", str(options["rotation"]), dim, seed)
        return product(dim, bits, turn, sketch, seed)

    return place("turboquant-prod", stats, budget, options, Scheme(product_form, make))


METHOD = Method(
    "turboquant-prod",
    "TurboQuant whose last bit is the signs of a sketch of the residual: unbiased scores (product form)",
    "TurboQuant, arXiv 2504.19874, Alg. 2",
    build,
    {"centre": False, "rotation": "haar", "sketch": "gaussian", "seed": 0, "outliers": 0},
)

"""TurboQuant, MSE form (arXiv 2504.19874, Alg. 1): norm, random rotation, sphere codebook."""

from collections.abc import Mapping

from kvsight.codec import Codec, Placement
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.methods.rotated import Scheme, mse, mse_form, place, rotation
from kvsight.stats import SideStats


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    def make(dim: int, bits: int) -> Codec:
        turn = rotation("turboquant", str(options["rotation"]), dim, int(options["seed"]))
        return mse(dim, bits, turn, bool(options["unshrink"]))

    return place("turboquant", stats, budget, options, Scheme(mse_form, make))


METHOD = Method(
    "turboquant",
    "per-token norm, random rotation, Lloyd-Max codebook of the sphere (MSE form)",
    "TurboQuant, arXiv 2504.19874, Alg. 1",
    build,
    {"centre": False, "rotation": "haar", "seed": 0, "outliers": 0, "unshrink": False},
)

"""Which side gets the residual sketch, at the same bits for all (D'Alberto, arXiv 2605.08114)."""

from collections.abc import Mapping, Set

from kvsight.codec import Codec, Placement
from kvsight.methods.base import Budget, Build, Option, Side
from kvsight.methods.rotated import Scheme, mse, mse_form, place, product, product_form, rotation
from kvsight.stats import SideStats
from kvsight.transforms import Transform, identity

SKETCHED: Mapping[str, Option] = {"rotation": "hadamard", "sketch": "orthogonal", "seed": 0}


def scheme(name: str, sketched: Set[Side]) -> Build:
    """The builder of a scheme whose ``sketched`` sides spend their last bit on signs of the residual."""

    def build(
        side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
    ) -> tuple[Placement, ...]:
        turned, seed = str(options["rotation"]), int(options["seed"])

        def turn(dim: int) -> Transform:
            return identity(dim) if turned == "none" else rotation(name, turned, dim, seed)

        def plain(dim: int, bits: int) -> Codec:
            return mse(dim, bits, turn(dim))

        def with_signs(dim: int, bits: int) -> Codec:
            return product(dim, bits, turn(dim), str(options["sketch"]), seed)

        chosen = Scheme(product_form, with_signs) if side in sketched else Scheme(mse_form, plain)
        return place(name, stats, budget, options, chosen)

    return build

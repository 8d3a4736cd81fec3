"""No compression: the control that every integration is tested with."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Dense
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    dense = Dense(stats.dim, budget.dense_dtype)
    own = 8 * budget.dense_dtype.itemsize
    # 16 is the highest budget there is, and asks for no compression whatever the model runs in
    if budget.bits < min(own, 16):
        raise KVSightError(
            f"identity cannot meet {budget.named}: it copies the model's own {own}-bit numbers. "
            "Leave the budget out, or choose another method."
        )
    return all_heads("identity", stats, identity(stats.dim), DenseQuantizer(dense))


METHOD = Method(
    "identity", "keys and values as they are: the control for everything else", "", build, fixed=True
)

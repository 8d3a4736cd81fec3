"""HeadQ's A² policy (arXiv 2605.03562): bits of a value by squared attention, at an exact mean."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Grouped, Tiered
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.kivi import GROUPS
from kvsight.methods.weights import token_weights
from kvsight.quantizers.tiered import TieredQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity

LEAST_SPAN = 8
# means around the middle tier that a budget may choose, in bits
STEPS = (0.25, 0.0, -0.25, -0.5)


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest mean within the budget; every block spends it by reverse water-filling."""
    if side == "k":
        # the policy is about values: keys as in KIVI
        keys = [Grouped(stats.dim, bits, g, "token") for bits in range(8, 0, -1) for g in GROUPS]
        return all_heads("a2", stats, identity(stats.dim), GroupedQuantizer(budget.best(keys, "a2")))
    span = int(options["span"])
    if span < LEAST_SPAN or span % LEAST_SPAN:
        raise KVSightError(f"a2 option 'span' is a multiple of {LEAST_SPAN} tokens; got {span}.")
    forms = [
        Tiered(stats.dim, span, tiers(bits), round(mean * span), "channel")
        for bits in range(6, 0, -1)
        for mean in means(bits)
    ]
    # the damage of an error is p² times its square, which is in proportion to that of the value
    weights = token_weights("a2", str(options["saliency"]), side, stats, mass=2, power=1)
    form = budget.best(forms, "a2")
    quantizer = TieredQuantizer(form, weights.linear, weights.factor, weights.power)
    return all_heads("a2", stats, identity(stats.dim), quantizer)


def tiers(bits: int) -> tuple[int, ...]:
    """b + 2, b and b - 1, as far as they are bits."""
    return (bits + 2, bits, bits - 1) if bits > 1 else (3, 1)


def means(bits: int) -> list[float]:
    """Means [bits] of the tiers around ``bits``."""
    return [bits + step for step in STEPS] if bits > 1 else [1.5, 1.25]


METHOD = Method(
    "a2",
    "bits of a value by squared attention and norm, at an exact mean; keys as in kivi",
    "HeadQ, arXiv 2605.03562, its value policy",
    build,
    {"span": 64, "saliency": "gradient"},
    gradients=True,
)

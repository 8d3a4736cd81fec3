"""ZipCache (arXiv 2405.14256): tokens that draw attention get more bits."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Tiered
from kvsight.formats.affine import Along
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.weights import token_weights
from kvsight.quantizers.tiered import TieredQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity

PAIRS = ((8, 4), (4, 2), (2, 1))
# eighths of a block, where the share is free
STEPS = 8


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest (pair of widths, share of salient tokens) within the budget."""
    span = int(options["span"])
    along: Along = "token" if side == "k" else "channel"
    forms = [
        Tiered(stats.dim, span, pair, pair[0] * many + pair[1] * (span - many), along, side == "v")
        for pair in pairs(str(options["tiers"]))
        for many in salient(float(options["salient"]), span)
    ]
    # an error costs the square of what the output feels; that of a value is in proportion to the value
    power = 0.0 if side == "k" else 1.0
    weights = token_weights("zipcache", str(options["saliency"]), side, stats, 2.0, power)
    form = budget.best(forms, "zipcache")
    quantizer = TieredQuantizer(form, weights.linear, weights.factor, weights.power)
    return all_heads("zipcache", stats, identity(stats.dim), quantizer)


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """The widths of ``4,2``, or all that may be chosen."""
    if text == "any":
        return PAIRS
    try:
        high, low = map(int, text.split(","))
    except ValueError:
        raise KVSightError(
            f"zipcache option 'tiers' is any, or two widths as in 4,2; got {text!r}."
        ) from None
    return ((high, low),)


def salient(share: float, span: int) -> list[int]:
    """Tokens of a block in the higher tier."""
    if span < STEPS or not 0 <= share < 1:
        raise KVSightError(
            f"zipcache options are 'span' of at least {STEPS} tokens and 'salient' from 0 to 1; "
            f"got {span} and {share:g}."
        )
    return [span * i // STEPS for i in range(STEPS - 1, 0, -1)] if share == 0 else [round(share * span)]


METHOD = Method(
    "zipcache",
    "two bit widths by how much attention a token should draw; keys per channel, values per token",
    "ZipCache, arXiv 2405.14256",
    build,
    {"tiers": "any", "salient": 0.0, "span": 128, "saliency": "gradient"},
    gradients=True,
)

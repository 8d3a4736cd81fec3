"""GEAR (arXiv 2403.05527): grouped integers, a few exact outliers, and a low-rank term for the error."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Grouped, Patched
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.quantizers.patched import PatchedQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity

GROUP = 128


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest bits within the budget."""
    span, share, rank = int(options["span"]), float(options["sparse"]), int(options["rank"])
    if not 0 <= share <= 0.5 or not 0 <= rank <= stats.dim:
        raise KVSightError(
            f"gear options are 'sparse' from 0 to 0.5 and 'rank' from 0 to head_dim {stats.dim}; "
            f"got {share:g} and {rank}."
        )
    forms = [_form(stats.dim, side, bits, span, share, rank) for bits in range(8, 0, -1)]
    quantizer = PatchedQuantizer(budget.best(forms, "gear"))
    return all_heads("gear", stats, identity(stats.dim), quantizer)


def _form(dim: int, side: Side, bits: int, span: int, share: float, rank: int) -> Patched:
    """Keys in lines of one channel of a block, values in lines of one token."""
    if side == "k":
        return Patched(Grouped(dim, bits, min(GROUP, span), "token"), span, outliers(share, span), rank)
    return Patched(Grouped(dim, bits, min(GROUP, dim), "channel"), span, outliers(share, dim), rank)


def outliers(share: float, line: int) -> int:
    """As many large as small ones."""
    return 2 * round(share * line / 2)


METHOD = Method(
    "gear",
    "grouped integers, the most extreme numbers exact, and a low-rank term for the error",
    "GEAR, arXiv 2403.05527",
    build,
    {"rank": 2, "sparse": 0.02, "span": 128},
)

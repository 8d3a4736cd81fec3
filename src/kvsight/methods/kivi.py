"""KIVI (arXiv 2402.02750): keys per channel over blocks of tokens, values per token over channels."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Grouped
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.retention import Hold
from kvsight.stats import SideStats
from kvsight.transforms import identity

GROUPS = (32, 64, 128)


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest (bits, group) within the budget; of equals, more bits and larger groups."""
    asked, residual = int(options["group"]), int(options["residual"])
    groups: tuple[int, ...] = GROUPS if asked == 0 else (asked,)
    if residual:
        groups = tuple(g for g in groups if residual > 0 and residual % g == 0)
    if not groups:
        raise KVSightError(
            f"kivi option 'residual' is 0, or a multiple of the group (32, 64 or 128 if 0); got {residual} "
            f"with group {asked}."
        )
    hold = Hold(commit=max(1, residual)) if side == "k" else Hold(window=residual)
    if side == "k":
        formats = [Grouped(stats.dim, b, g, "token") for b in range(8, 0, -1) for g in groups]
    else:
        fitting = sorted({min(g, stats.dim) for g in groups})
        formats = [Grouped(stats.dim, b, g, "channel") for b in range(8, 0, -1) for g in fitting]
    quantizer = GroupedQuantizer(budget.best(formats, "kivi", hold=hold))
    return all_heads("kivi", stats, identity(stats.dim), quantizer, hold)


METHOD = Method(
    "kivi",
    "asymmetric integers: keys per channel over token blocks, values per token over channel groups",
    "KIVI, arXiv 2402.02750",
    build,
    {"group": 0, "residual": 0},
)

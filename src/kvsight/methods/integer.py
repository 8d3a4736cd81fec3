"""Plain asymmetric integers: per token over the whole head, or per channel over blocks of tokens."""

from collections.abc import Mapping
from typing import Literal

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Grouped
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    along = grouping(str(options["axis"]))
    size = int(options["group"])
    default = stats.dim if along == "channel" else 64
    group = default if size == 0 else size if along == "token" else min(size, stats.dim)
    formats = [Grouped(stats.dim, bits, group, along) for bits in range(8, 0, -1)]
    quantizer = GroupedQuantizer(budget.best(formats, "int"))
    return all_heads("int", stats, identity(stats.dim), quantizer)


def grouping(axis: str) -> Literal["channel", "token"]:
    """ "token" scales each token (groups of channels); "channel" each channel (groups of tokens)."""
    match axis:
        case "token":
            return "channel"
        case "channel":
            return "token"
    raise KVSightError(f"int option 'axis' is 'token' or 'channel'; got {axis!r}.")


METHOD = Method(
    "int",
    "asymmetric integers, one scale per token (axis=token) or per channel and block (axis=channel)",
    "",
    build,
    {"axis": "token", "group": 0},
)

"""SMAQ's hybrid cache (zenodo 19537052): folded keys of 3 bits, grouped values of 2."""

from collections.abc import Mapping, Sequence

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Grouped, Row
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.smaq_fold import folded
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The widths asked for, or with 0 the dearest within the budget."""
    if side == "k":
        rows = [Row((bits,) * stats.dim, norm=True) for bits in widths(options, "key_bits")]
        row = budget.best(rows, "smaq-hybrid")
        return folded("smaq-hybrid", side, stats, row, options)
    group = min(int(options["group"]), stats.dim)
    formats = [Grouped(stats.dim, bits, group, "channel") for bits in widths(options, "value_bits")]
    quantizer = GroupedQuantizer(budget.best(formats, "smaq-hybrid"))
    return all_heads("smaq-hybrid", stats, identity(stats.dim), quantizer)


def widths(options: Mapping[str, Option], name: str) -> Sequence[int]:
    asked = int(options[name])
    if not 0 <= asked <= 8:
        raise KVSightError(f"smaq-hybrid option {name!r} is 1 to 8, or 0 for the budget's; got {asked}.")
    return (asked,) if asked else range(8, 0, -1)


METHOD = Method(
    "smaq-hybrid",
    "folded keys of 3 bits, values of 2 bits in groups of 32; with window=128 the paper's exact buffer",
    "SMAQ, zenodo 19537052",
    build,
    {
        "key_bits": 3,
        "value_bits": 2,
        "group": 32,
        "shape": "geometric",
        "strength": 0.0,
        "centre": True,
        "rotation": "hadamard",
        "seed": 42,
    },
    calibrated=True,
)

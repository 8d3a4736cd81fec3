"""Quantize What Counts (arXiv 2502.15075): integers, and more of them for keys than for values."""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Affine, Grouped, Ternary
from kvsight.formats.affine import Along
from kvsight.methods.base import Budget, Family, Method, Option, Side, all_heads
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.retention import Hold
from kvsight.stats import SideStats
from kvsight.transforms import identity

PAPER = "Quantize What Counts, arXiv 2502.15075"
TERNARY = "1.58"
LADDER = ("8", "6", "4", "2", TERNARY, "1")
GROUPS = (32, 64, 128)
_PAIR = re.compile(r"k([1-8]|1\.58)v([1-8]|1\.58)")


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest bits of the published ladder within the budget."""
    hold = residual("qwc", side, options)
    forms = [form(stats.dim, bits, g, side, options) for bits in LADDER for g in groups(options, (64,))]
    quantizer = GroupedQuantizer(budget.best(forms, "qwc", hold=hold))
    return all_heads("qwc", stats, identity(stats.dim), quantizer, hold)


def build_pair(
    pair: Mapping[Side, str], side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest group size within the budget; one budget for both sides is their mean."""
    name = f"k{pair['k']}v{pair['v']}"
    hold = residual(name, side, options)
    sizes = groups(options, GROUPS)
    mine: dict[Side, list[Affine]] = {
        s: [form(stats.dim, bits, g, s, options) for g in sizes] for s, bits in pair.items()
    }
    chosen = (
        budget.best(mine[side], name, hold=hold)
        if budget.total is None
        else mine[side][_together(mine["k"], mine["v"], budget, name, hold)]
    )
    return all_heads(name, stats, identity(stats.dim), GroupedQuantizer(chosen), hold)


def _together(
    keys: Sequence[Affine], values: Sequence[Affine], budget: Budget, name: str, hold: Hold
) -> int:
    """Place of the dearest pair whose mean is within the budget."""
    pairs = zip(keys, values, strict=True)
    costs = [(budget.cost(k, hold=hold) + budget.cost(v, hold=hold)) / 2 for k, v in pairs]
    affordable = [i for i, cost in enumerate(costs) if cost <= budget.bits + 1e-9]
    if not affordable:
        raise KVSightError(
            f"{name} cannot meet {budget.named}; its cheapest configuration here stores {min(costs):.4g} "
            "over keys and values. Raise the budget or choose another pair."
        )
    return max(affordable, key=costs.__getitem__)


def form(dim: int, bits: str, group: int, side: Side, options: Mapping[str, Option]) -> Affine:
    along = axis(str(options["axis"]), side)
    group = group if along == "token" else min(group, dim)
    return Ternary(dim, group, along) if bits == TERNARY else Grouped(dim, int(bits), group, along)


def axis(name: str, side: Side) -> Along:
    """ "token" scales each token (Quanto), "channel" each channel (HQQ), "mixed" channels of keys only."""
    match name, side:
        case ("token", _) | ("mixed", "v"):
            return "channel"
        case ("channel", _) | ("mixed", "k"):
            return "token"
    raise KVSightError(f"qwc option 'axis' is 'token', 'channel' or 'mixed'; got {name!r}.")


def groups(options: Mapping[str, Option], free: tuple[int, ...]) -> tuple[int, ...]:
    """The group that was asked for, or all that may be chosen."""
    size = int(options["group"])
    return free if size == 0 else (size,)


def residual(name: str, side: Side, options: Mapping[str, Option]) -> Hold:
    """A buffer of exact tokens that is coded when it is full."""
    size = int(options["residual"])
    if size == 0:
        return Hold()
    along, sizes = axis(str(options["axis"]), side), groups(options, GROUPS)
    if size < 0 or (along == "token" and any(size % g for g in sizes)):
        raise KVSightError(
            f"{name} option 'residual' is 0 or a multiple of the group ({', '.join(map(str, sizes))}) that "
            f"runs along tokens; got {size}."
        )
    return Hold(commit=size)


OPTIONS: Mapping[str, Option] = {"axis": "token", "group": 0, "residual": 0}
METHOD = Method(
    "qwc",
    "integers of 8, 6, 4, 2, 1.58 or 1 bits; layers and sides share them by weight norms",
    PAPER,
    build,
    OPTIONS,
    allocate="weight-norm",
)


def named(name: str) -> Method | None:
    """The pair that a name such as k4v2 or k4v1.58 spells."""
    found = _PAIR.fullmatch(name)
    if found is None:
        return None
    pair: dict[Side, str] = {"k": found[1], "v": found[2]}
    summary = f"integers of {pair['k']} bits for keys and {pair['v']} for values (k1v1 to k8v8, 1.58)"
    return Method(name, summary, PAPER, partial(build_pair, pair), OPTIONS, fixed=True, page="qwc")


FAMILY = Family(tuple(filter(None, map(named, ("k2v4", "k4v2", "k8v4")))), named)

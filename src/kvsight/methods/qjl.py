"""QJL (arXiv 2406.03482): keys as signs of a random sketch and a norm, values as integers per token.

A few loud channels of each head get a sketch of their own. The paper finds them per group of tokens;
here they are those of the calibration.
"""

from collections.abc import Mapping

from kvsight.codec import Placement, joined
from kvsight.errors import KVSightError
from kvsight.formats import Format, Grouped, Joined, Sketch
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.rotated import finished, loudest, on_channels, signs
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import identity

# signs per channel, at most
_MOST = 8


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    if side == "k":
        return _keys(stats, budget, options)
    group = min(int(options["group"]), stats.dim)
    forms = [Grouped(stats.dim, bits, group, "channel") for bits in range(8, 0, -1)]
    quantizer = GroupedQuantizer(budget.best(forms, "qjl"))
    return all_heads("qjl", stats, identity(stats.dim), quantizer)


def _keys(stats: SideStats, budget: Budget, options: Mapping[str, Option]) -> tuple[Placement, ...]:
    dim, seed = stats.dim, int(options["seed"])
    # small heads have few channels to set apart
    outliers = min(int(options["outliers"]), dim // 4)
    kind, centred = str(options["sketch"]), bool(options["centre"])
    if outliers == 0:
        plain: dict[Format, int] = {Sketch(count): count for count in _counts(dim, dim)}
        count = plain[budget.best(list(plain), "qjl", dim)]
        return finished("qjl", stats, signs(dim, count, kind, seed), centred)
    loud, quiet = loudest(stats, outliers, centred, "qjl")
    rest = dim - outliers
    split: dict[Format, tuple[int, int]] = {}
    for count in _counts(rest, dim):
        # as in the paper's code: half as many signs for the loud channels as for all others
        own = max(count // 16 * 8, -(-outliers // 8) * 8)
        split[Joined((Sketch(own), Sketch(count)))] = own, count
    own, count = split[budget.best(list(split), "qjl", dim)]
    parts = (
        on_channels(signs(outliers, own, kind, seed), loud, dim),
        on_channels(signs(rest, count, kind, seed + _MOST * dim), quiet, dim),
    )
    return finished("qjl", stats, joined("qjl", *parts), centred)


def _counts(least: int, dim: int) -> list[int]:
    """Signs that a token may have, falling: whole bytes, and no fewer than channels."""
    step = max(8, dim // 32 * 8)
    first = -(-least // 8) * 8
    if _MOST * dim < first:
        raise KVSightError(f"qjl cannot serve head_dim {dim}.")
    return list(range(first, _MOST * dim + 1, step))[::-1]


METHOD = Method(
    "qjl",
    "keys as signs of a random sketch and a norm; values as integers per token",
    "QJL, arXiv 2406.03482",
    build,
    {"sketch": "orthogonal", "outliers": 8, "group": 32, "centre": False, "seed": 0},
)

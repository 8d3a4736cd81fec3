"""Rank and bits together (arXiv 2604.11501, Table 2): the first r directions as integers."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.methods.subspaces import Basis, metric_basis, place_integers, principal, read_basis
from kvsight.stats import SideStats


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    return place_integers("rank-int8", stats, budget, _basis(side, stats, options), int(options["bits"]))


def _basis(side: Side, stats: SideStats, options: Mapping[str, Option]) -> Basis:
    centred = bool(options["centre"])
    match options["basis"]:
        case "read":
            return read_basis(side, stats, centred, bool(options["entropy"]))
        case "pca":
            return principal(stats.moments, centred)
        case "metric":
            return metric_basis(stats, centred)
    raise KVSightError(f"rank-int8 option 'basis' is read, pca or metric; got {options['basis']!r}.")


METHOD = Method(
    "rank-int8",
    "the r directions that attention reads most as symmetric integers with static scales",
    "Salfati, arXiv 2604.11501, Table 2",
    build,
    {"bits": 8, "basis": "read", "entropy": False, "centre": False},
    calibrated=True,
)

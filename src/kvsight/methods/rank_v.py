"""Rank reduction in the V-theorem basis (arXiv 2604.11501, Thm. 1): values as r of d numbers.

Keys, which that basis says nothing of, get their principal components, as in the paper."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.methods.subspaces import place_dense, read_basis
from kvsight.stats import SideStats


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    basis = read_basis(side, stats, bool(options["centre"]), bool(options["entropy"]))
    return place_dense("rank-v", stats, budget, basis)


METHOD = Method(
    "rank-v",
    "the r directions that attention reads most (V-theorem basis), 16 bits each; keys by PCA",
    "Salfati, arXiv 2604.11501, Thm. 1",
    build,
    {"entropy": False, "centre": False},
    calibrated=True,
)

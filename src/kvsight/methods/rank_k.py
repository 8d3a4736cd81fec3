"""Rank reduction in principal components: keys (and values) as r of d numbers of 16 bits."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.methods.subspaces import place_dense, principal
from kvsight.stats import SideStats


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    return place_dense("rank-k", stats, budget, principal(stats.moments, bool(options["centre"])))


METHOD = Method(
    "rank-k",
    "the first r principal components, 16 bits each (K-PCA)",
    "Salfati, arXiv 2604.11501",
    build,
    {"centre": True},
    calibrated=True,
)

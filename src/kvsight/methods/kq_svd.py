"""KQ-SVD (arXiv 2512.05916): the rank-r approximation of K that keeps K Qᵀ best, 16 bits a number.

For values the same with the output projection in place of the queries."""

from collections.abc import Mapping

from kvsight.codec import Placement
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.methods.subspaces import metric_basis, place_dense
from kvsight.stats import SideStats


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    return place_dense("kq-svd", stats, budget, metric_basis(stats, bool(options["centre"])))


METHOD = Method(
    "kq-svd",
    "the r coordinates that keep scores (keys) or outputs (values) best, 16 bits each",
    "KQ-SVD, arXiv 2512.05916",
    build,
    {"centre": False},
    calibrated=True,
)

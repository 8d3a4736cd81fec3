"""Where a plan's bits went and what they cost there: rows for heat maps and spectra."""

from typing import Any

import torch
from torch import Tensor

from kvsight.codec import Placement
from kvsight.curves import coding_cost
from kvsight.formats import Row
from kvsight.methods import get, sight
from kvsight.plan import SIDES, Plan
from kvsight.stats import SideStats, Stats, shrunk

Rows = list[dict[str, Any]]
HOW = "predicted: the calibration sample coded and decoded, its errors weighed by the output's gradients"


def bits(plan: Plan) -> Rows:
    """Stored bits per element of every layer, head and side."""
    return [
        {"layer": r.layer, "head": r.head, "side": r.side, "true_bits": _short(r.true_bits)}
        for r in plan.ledger()
    ]


def damage(plan: Plan, stats: Stats) -> Rows:
    """Predicted final KL [nats per token] that each layer's side causes, alone; empty without gradients.

    The calibration sample is coded and decoded, and its errors are weighed by ``SideStats.damage``.
    """
    if not stats.weighed:
        return []
    known = {layer.index: layer for layer in stats.layers}
    out: Rows = []
    for layer in plan.layers:
        for side in SIDES:
            seen = known[layer.index].side(side)
            cost, _ = coding_cost(layer.side(side), seen, shrunk(seen.cost, seen, 0.0))
            out.append({"layer": layer.index, "side": side, "kl": _short(float(cost.sum()))})
    return out


def spectra(plan: Plan, stats: Stats) -> Rows:
    """Of a plan of ``sight``, head by head: what its coordinates are worth, and the widths they got.

    ``lambda`` and ``widths`` are by coordinate; ``metric`` and ``covariance`` are eigenvalues of what an
    error costs and of the vectors, falling.
    """
    options = get(sight.METHOD.name).with_defaults(plan.options)
    known = {layer.index: layer for layer in stats.layers}
    out: Rows = []
    for layer in plan.layers:
        for side in SIDES:
            seen = known[layer.index].side(side)
            variances = sight.rows(side, seen, options).variances
            out += [
                _spectrum(seen, placement, head, variances[head]) | {"layer": layer.index, "side": side}
                for placement in layer.side(side)
                for head in placement.heads
            ]
    return out


def _spectrum(seen: SideStats, placement: Placement, head: int, variances: Tensor) -> dict[str, Any]:
    form = placement.codec.format
    return {
        "head": head,
        "widths": list(form.widths) if isinstance(form, Row) else [],
        "lambda": [_short(x) for x in variances.tolist()],
        "metric": _eigenvalues(shrunk(seen.cost, seen, 0.0)[head]),
        "covariance": _eigenvalues(seen.moments.covariance[head]),
    }


def _eigenvalues(matrix: Tensor) -> list[float]:
    return [_short(x) for x in torch.linalg.eigvalsh(matrix).flip(0).tolist()]


def _short(x: float) -> float:
    """Five digits: what is drawn needs no more."""
    return float(f"{x:.5g}")

"""What damage in one layer's keys or values costs at the output, without gradients: code it alone.

Gradients (``trace.observe``) are the better answer where a model has them; this one needs forward
passes only, two for every layer.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsight.methods import get
from kvsight.methods.base import Budget, Side
from kvsight.plan import SIDES, Plan
from kvsight.probe import Probe
from kvsight.retention import Retention
from kvsight.spend import Placed, Progress, layer_plans
from kvsight.stats import LayerStats, SideStats, Stats, shrunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the rate at which each side is tried; its KL is still proportional to its distortion there
_BITS = 3.0


def by_perturbation(
    model: "PreTrainedModel",
    stats: Stats,
    batches: Iterable[Tensor],
    bare_plan: Plan,
    progress: Progress | None = None,
) -> Stats:
    """``stats`` whose ``damage`` is the read metric times (final KL / predicted distortion) of each side.

    Every layer's keys, then its values, are coded alone by ``sight`` at 3 bits. ``bare_plan`` is a plan
    of this model; its layers are replaced.
    """
    probe = Probe(model, batches)
    method = get("sight")
    options = method.with_defaults({"metric": "attention"})
    assert method.rows is not None
    exact = _exact(stats, model.dtype)
    layers: list[LayerStats] = []
    for position, layer in enumerate(stats.layers):
        sides: dict[Side, SideStats] = {}
        for side in SIDES:
            seen = replace(layer.side(side), damage=None, salience=None)
            maker, size = method.rows(side, seen, options), max(1, round(_BITS * seen.dim / 8))
            alone = exact | {(position, side): maker.place([size] * seen.heads)}
            kl = probe.kl(_plan(bare_plan, stats, alone, model.dtype))
            predicted = float(maker.damage[:, size].sum())
            weight = kl / predicted if predicted > 0 else 0.0
            sides[side] = replace(seen, damage=weight * shrunk(seen.metric, seen, 0.0))
            if progress is not None:
                progress("propagate", 2 * position + SIDES.index(side) + 1, 2 * len(stats.layers))
        layers.append(replace(layer, key=sides["k"], value=sides["v"]))
    return replace(stats, layers=tuple(layers))


def _exact(stats: Stats, dtype: torch.dtype) -> Placed:
    identity = get("identity")
    budget = Budget(8.0 * dtype.itemsize, 1, Retention(0, 0), dtype)
    return {
        (position, side): identity.build(side, layer.side(side), budget, {})
        for position, layer in enumerate(stats.layers)
        for side in SIDES
    }


def _plan(plan: Plan, stats: Stats, placed: Placed, dtype: torch.dtype) -> Plan:
    return replace(plan, layers=layer_plans(placed, stats), sinks=0, window=0, dense_dtype=dtype)

"""What coding costs, from storage error to what attention and the residual stream see of it.

Vectors: what keys or values lose as they lie, and through a metric of the queries. Rows: what one query's
attention loses. Damage: all row measures of a layer in one pass over a trace of any length.
docs/distortion.md says what each is for and when it misleads.
"""

from kvsight.distortion.damage import AttentionDamage, Reference, attention_damage
from kvsight.distortion.jensen import rotated_gain, uniform_gain
from kvsight.distortion.rows import (
    attention_kl,
    fisher,
    l1_drift,
    output_metric,
    output_mse,
    projected_error,
    route_flips,
    score_error,
    score_gap,
    score_mse,
    scores,
    value_distortion,
)
from kvsight.distortion.vectors import (
    angle_error,
    axis_capture,
    logit_mse,
    paired_logit_mse,
    query_basis,
    query_metric,
    relative_error,
    storage_mse,
    write_surrogate,
)

__all__ = [
    "AttentionDamage",
    "Reference",
    "angle_error",
    "attention_damage",
    "attention_kl",
    "axis_capture",
    "fisher",
    "l1_drift",
    "logit_mse",
    "output_metric",
    "output_mse",
    "paired_logit_mse",
    "projected_error",
    "query_basis",
    "query_metric",
    "relative_error",
    "rotated_gain",
    "route_flips",
    "score_error",
    "score_gap",
    "score_mse",
    "scores",
    "storage_mse",
    "uniform_gain",
    "value_distortion",
    "write_surrogate",
]

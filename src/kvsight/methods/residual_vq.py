"""Residual VQ (Kumar, arXiv 2410.15704): one residual quantiser for all channel groups of a side."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Indexed
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.smaq_vq import most_bits
from kvsight.quantizers.vector import VectorQuantizer, residual_kmeans
from kvsight.stats import SideStats
from kvsight.transforms import identity

# more stages than this take long to fit, and the paper stops at 8
STAGES = 16
# vectors that a centroid learns from at most
_MOST = 32
_SWEEPS = 6


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """As many stages as the budget pays for."""
    form = budget.best(formats(side, stats, options), "residual-vq")
    vectors = unit_cells(form, stats.sample)
    # every k-th would take the same groups and heads of every token
    some = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: _MOST * 2**form.bits]
    made = residual_kmeans(vectors[None, some], 2**form.bits, form.stages, sweeps=_SWEEPS)
    return all_heads("residual-vq", stats, identity(stats.dim), VectorQuantizer(form, made.unsqueeze(0)))


def formats(side: Side, stats: SideStats, options: Mapping[str, Option]) -> list[Indexed]:
    """One to ``STAGES`` stages, or the number asked for."""
    block, stages = int(options["block"]), int(options["stages"])
    if block < 1 or not 0 <= stages <= STAGES:
        raise KVSightError(
            f"residual-vq takes a block of 1 or more and 1 to {STAGES} stages (0 chooses); "
            f"got block={block}, stages={stages}."
        )
    span = max(size for size in range(1, min(block, stats.dim) + 1) if stats.dim % size == 0)
    vectors = stats.sample.shape[1] * stats.heads * (stats.dim // span)
    # a later stage sees noise only where the ones before had few vectors for each centroid
    bits = most_bits("residual-vq", int(options["centroids"]), vectors // 4)
    strided = side == "k" and bool(options["strided"])
    counts = [stages] if stages else range(STAGES, 0, -1)
    return [Indexed(stats.dim, span, bits, count, strided, norm=True) for count in counts]


def unit_cells(form: Indexed, sample: Tensor) -> Tensor:
    """Channel groups of all heads [N, span] of a sample [H, n, d], every token at unit root mean square."""
    level = sample.double().square().mean(-1, keepdim=True).sqrt()
    return form.cut(sample.double() / torch.where(level > 0, level, 1.0)).flatten(0, -2)


METHOD = Method(
    "residual-vq",
    "per-token scale, then stages of one shared codebook over groups of channels",
    "Kumar, arXiv 2410.15704",
    build,
    {"block": 32, "centroids": 256, "stages": 0, "strided": True},
    calibrated=True,
)

"""SMAQ's block VQ (zenodo 19537052): k-means codebooks under the queries' metric, read by lookup."""

from collections.abc import Mapping
from math import log2

import torch
from torch import Tensor

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Indexed
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.methods.shaping import check_shape, shaped
from kvsight.quantizers.vector import VectorQuantizer, residual_kmeans
from kvsight.stats import SideStats, shrunk
from kvsight.transforms import identity

BLOCKS = (8, 4, 2, 1)
VALUES = ("identity", "output", "a2")
# vectors that a centroid needs, and more than which only take time
FEWEST, _MOST = 4, 32
_SHRINK = 0.001


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The dearest codebooks within the budget; of equals, those of the largest blocks."""
    form = budget.best(formats(stats, options), "smaq-vq")
    metric = block_metric(form, side, stats, options)
    centroids = codebooks(form, stats.sample, metric, token_weights(side, stats, options))
    return all_heads("smaq-vq", stats, identity(stats.dim), VectorQuantizer(form, centroids, metric))


def formats(stats: SideStats, options: Mapping[str, Option]) -> list[Indexed]:
    """Blocks from the largest down, each with all numbers of centroids that the sample can place."""
    block, stages = int(options["block"]), int(options["stages"])
    if block < 0 or (block and stats.dim % block) or stages < 1:
        raise KVSightError(
            f"smaq-vq takes a block that divides head_dim {stats.dim} (0 chooses) and one stage or more; "
            f"got block={block}, stages={stages}."
        )
    spans = [block] if block else [span for span in BLOCKS if stats.dim % span == 0]
    most = most_bits("smaq-vq", int(options["centroids"]), stats.sample.shape[1])
    strided = bool(options["strided"])
    return [
        Indexed(stats.dim, span, bits, stages, strided) for span in spans for bits in range(most, 0, -1)
    ]


def most_bits(method: str, centroids: int, vectors: int) -> int:
    """Bits of an index into at most ``centroids``, of which each gets ``FEWEST`` of the vectors."""
    if centroids < 2 or centroids & (centroids - 1) or centroids > 1 << 16:
        raise KVSightError(
            f"{method} option 'centroids' is a power of two from 2 to 65536; got {centroids}."
        )
    return max(1, min(int(log2(centroids)), int(log2(max(1, vectors / FEWEST)))))


def block_metric(
    form: Indexed, side: Side, stats: SideStats, options: Mapping[str, Option]
) -> Tensor | None:
    """What an error in each block costs, [H, cells, span, span] fp32; None is the identity."""
    shape, values = str(options["shape"]), str(options["values"])
    check_shape("smaq-vq", shape, float(options["strength"]))
    if values not in VALUES:
        raise KVSightError(f"smaq-vq option 'values' is one of {', '.join(VALUES)}; got {values!r}.")
    shape = shape if side == "k" else "raw" if values == "output" else "identity"
    if stats.metric is None or shape == "identity" or form.span == 1:
        return None
    cell = form.cut(torch.arange(stats.dim))
    rows, columns = cell.unsqueeze(-1), cell.unsqueeze(-2)
    metric = shrunk(stats.metric, stats, _SHRINK)[:, rows, columns]
    covariance = shrunk(stats.moments.covariance, stats, _SHRINK)[:, rows, columns]
    return shaped(metric, covariance, shape, float(options["strength"])).float()


def token_weights(side: Side, stats: SideStats, options: Mapping[str, Option]) -> Tensor | None:
    """A² weights of values [H, n]: how strongly the output depends on a token, squared."""
    if side == "k" or options["values"] != "a2":
        return None
    if stats.salience is None:
        raise KVSightError(
            "smaq-vq with values=a2 weighs tokens by gradients, which were not read. "
            "Fit with allocate='measured', or choose other values."
        )
    return stats.salience.double().square() + torch.finfo(torch.float32).tiny


def codebooks(form: Indexed, sample: Tensor, metric: Tensor | None, weights: Tensor | None) -> Tensor:
    """Centroids [H, cells, stages, 2^bits, span] for a sample [H, n, d] and weights [H, n]."""
    every = max(1, sample.shape[1] // (_MOST * 2**form.bits))
    cells = form.cut(sample[:, ::every]).transpose(1, 2)
    if weights is not None:
        weights = weights[:, None, ::every].expand(cells.shape[:-1]).flatten(0, 1)
    metric = None if metric is None else metric.flatten(0, 1)
    made = residual_kmeans(cells.flatten(0, 1), 2**form.bits, form.stages, metric=metric, weights=weights)
    return made.view(*cells.shape[:2], *made.shape[1:])


METHOD = Method(
    "smaq-vq",
    "block vector quantisation: k-means codebooks under the queries' metric, read by lookup",
    "SMAQ, zenodo 19537052",
    build,
    {
        "shape": "raw",
        "strength": 0.0,
        "block": 0,
        "centroids": 256,
        "stages": 1,
        "strided": False,
        "values": "output",
    },
    calibrated=True,
)

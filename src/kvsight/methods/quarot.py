"""QuaRot (arXiv 2404.00456), its cache: Hadamard, then integers with one scale per token and head."""

from collections.abc import Mapping

import torch

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Affine, Grouped, Symmetric
from kvsight.methods.base import Budget, Method, Option, Side, all_heads
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.stats import SideStats
from kvsight.transforms import centre, hadamard


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    group = min(int(options["group"]) or stats.dim, stats.dim)
    kind, least = (Symmetric, 2) if options["symmetric"] else (Grouped, 1)
    forms: list[Affine] = [kind(stats.dim, bits, group, "channel") for bits in range(8, least - 1, -1)]
    clip = float(options["clip"])
    if not 0 < clip <= 1:
        raise KVSightError(
            f"quarot option 'clip' is a share of the range, above 0 and up to 1; got {clip:g}."
        )
    table = None if clip == 1 else torch.tensor([clip])
    transform = hadamard(stats.dim, int(options["seed"]))
    if options["centre"]:
        transform = centre(stats.moments.mean).then(transform)
    quantizer = GroupedQuantizer(budget.best(forms, "quarot"), table)
    return all_heads("quarot", stats, transform, quantizer)


METHOD = Method(
    "quarot",
    "Hadamard rotation, then integers with one range per token and head",
    "QuaRot, arXiv 2404.00456, cache only",
    build,
    {"centre": False, "symmetric": False, "clip": 0.95, "group": 0, "seed": 0},
)

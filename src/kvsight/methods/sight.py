"""sight: transform coding in the coordinates that the model's output sees (docs/methods/sight.md).

Centre, whiten the read metric, diagonalise: an error in coordinate i costs λ_i D(b_i), so integer bits
follow from reverse water-filling on λ, over all heads of a layer together, or over the whole model
where an allocator shares out the bytes. Scales are static: the calibration's standard deviation,
stretched for the least squared error where tails are heavy. A row is codes and nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.packing import MAX_WIDTH
from kvsight.quantizers.lloyd_max import (
    CODEBOOKS,
    Stretches,
    fitted_levels,
    fitted_stretches,
    row_quantizer,
)
from kvsight.stats import SideStats, shrunk
from kvsight.tiling import CHUNK, WIDTHS
from kvsight.transforms import Transform, centre, karhunen_loeve, scale
from kvsight.waterfill import row_widths, share_bytes

METRICS = ("output", "attention", "storage")
# what the tile kernels read: evenly spaced levels, and chunks that are at most two blocks
TILES: Mapping[str, Option] = {
    "codebook": "uniform",
    "chunk": CHUNK,
    "widths": ",".join(str(width) for width in WIDTHS if width),
}
# D(b) of the Gaussian for levels that a sample chooses: close enough to order coordinates by
_SHAPES = {**CODEBOOKS, "fitted": CODEBOOKS["gaussian"]}


@dataclass(frozen=True, eq=False)
class SightRows:
    """The coordinates of one layer's side, and what each of them wants at every width."""

    stats: SideStats
    options: Mapping[str, Option]
    transform: Transform
    variances: Tensor
    _fitted: dict[tuple[tuple[int, ...], tuple[int, ...]], Codec] = field(default_factory=dict)

    @cached_property
    def sample(self) -> Tensor:
        """The sample in unit coordinates, [H, n, d]."""
        return self.transform.forward(self.stats.sample.double())

    @cached_property
    def weights(self) -> Tensor | None:
        """How much each sampled token counts in fits: its gradient's norm, [H, n].

        Its square would be what an error there costs, but leaves few tokens to fit to.
        """
        salience = self.stats.salience
        # where nothing depends on a head, every token counts the same
        return (
            None
            if salience is None
            else salience.double() + salience.double().mean(-1, keepdim=True) * 1e-3 + 1e-30
        )

    @cached_property
    def stretches(self) -> Stretches:
        weights = self.weights
        judges = None if weights is None else weights.square()
        return fitted_stretches(self.sample, _SHAPES[str(self.options["codebook"])], weights, judges)

    @property
    def static(self) -> bool:
        """Whether nothing is fitted to the sample: the codebook as it is, at the standard deviation."""
        return self.options["scales"] == "static"

    @property
    def sizes(self) -> Sequence[int]:
        step = unit_bytes(self.options)
        return range(step, self.stats.dim + 1, step)

    @cached_property
    def _widths(self) -> Tensor:
        """Widths of rows of 0..d bytes, [H, d + 1, d]."""
        chunk, allowed = int(self.options["chunk"]), allowed_widths(self.options)
        return row_widths(self.variances, distortion(self.options), chunk, allowed)

    @property
    def damage(self) -> Tensor:
        return self._remaining(shrunk(self.stats.cost, self.stats, 0.0))

    @property
    def error(self) -> Tensor:
        return self._remaining(shrunk(None, self.stats, 0.0))

    def _remaining(self, metric: Tensor) -> Tensor:
        """Σ_i cost_i D_i(b_i) for rows of 0..d bytes, with D_i as measured on the sample, [H, d + 1]."""
        assert self.transform.inverse_matrix is not None
        back = self.transform.inverse_matrix
        costs = ((back @ metric) * back).sum(-1)
        left = costs.unsqueeze(-1) * (
            torch.tensor(distortion(self.options)).expand(*costs.shape, -1)
            if self.static
            else self.stretches.errors
        )
        per_row = left.unsqueeze(1).expand(-1, self._widths.shape[1], -1, -1)
        return per_row.gather(-1, self._widths.unsqueeze(-1)).squeeze(-1).sum(-1)

    def place(self, rows: Sequence[int]) -> tuple[Placement, ...]:
        """Codecs whose heads store ``rows`` bytes per token; heads of equal widths share one."""
        widths = [tuple(self._widths[head, size].tolist()) for head, size in enumerate(rows)]
        placements: list[Placement] = []
        for shared in dict.fromkeys(widths):
            heads = [head for head, own in enumerate(widths) if own == shared]
            # plans of one fit often agree on a head
            key = shared, tuple(heads)
            if key not in self._fitted:
                self._fitted[key] = self._codec(shared, heads)
            placements.append(Placement(tuple(heads), self._fitted[key]))
        return tuple(placements)

    def _codec(self, widths: tuple[int, ...], heads: list[int]) -> Codec:
        codebook = str(self.options["codebook"])
        quantizer, transform = row_quantizer(widths, _SHAPES[codebook]), self.transform.heads(heads)
        if self.static:
            return Codec("sight", transform, quantizer)
        factors = self.stretches.of(widths, heads)
        if codebook == "fitted":
            weights = None if self.weights is None else self.weights[heads]
            quantizer = fitted_levels(quantizer, self.sample[heads] / factors.unsqueeze(-2), weights)
        return Codec("sight", transform.then(scale(factors)), quantizer)


def rows(side: Side, stats: SideStats, options: Mapping[str, Option]) -> SightRows:
    """Fit the coordinates of one side of a layer."""
    options = laid_out(options)
    check(options, stats.dim)
    strength = float(options["shrink"])
    seen = {"output": stats.cost, "attention": stats.metric}
    metric = shrunk(seen.get(str(options["metric"])), stats, strength)
    covariance = shrunk(stats.moments.covariance, stats, strength)
    transform, variances = karhunen_loeve(metric, covariance)
    return SightRows(stats, options, centre(stats.moments.mean).then(transform), variances)


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    """The layer's own best use of the budget."""
    fitted, options = rows(side, stats, options), laid_out(options)
    total, unit = row_bytes(stats, budget, options), unit_bytes(options)
    return fitted.place(share_bytes(fitted.variances, total, distortion(options), unit))


def distortion(options: Mapping[str, Option]) -> list[float]:
    """D(0), D(1), ... of the chosen codebook for a coordinate of unit variance."""
    codebook = _SHAPES[str(options["codebook"])]
    return [1.0, *(codebook(bits).distortion for bits in range(1, MAX_WIDTH + 1))]


def row_bytes(stats: SideStats, budget: Budget, options: Mapping[str, Option]) -> int:
    """Whole bytes per token for all heads of the layer: at least one unit and at most d per head."""
    bits, least = budget.coded_bits(), unit_bytes(options)
    total = int(bits * stats.heads * stats.dim / 8 + 1e-9)
    if total < stats.heads * least:
        raise KVSightError(
            f"sight cannot meet {budget.named}; its smallest row stores "
            f"{8 * least / stats.dim:.4g}. Raise the budget, or keep fewer tokens exact."
        )
    return min(total, stats.heads * (stats.dim * MAX_WIDTH // 8))


def laid_out(options: Mapping[str, Option]) -> Mapping[str, Option]:
    """The options with what ``layout`` implies."""
    choice("layout", options["layout"], ("free", "tiles"))
    return {**options, **TILES} if options["layout"] == "tiles" else options


def unit_bytes(options: Mapping[str, Option]) -> int:
    """Row sizes are multiples of this: one more bit for one chunk, in whole bytes."""
    return -(-int(options["chunk"]) // 8)


def allowed_widths(options: Mapping[str, Option]) -> tuple[int, ...] | None:
    """The option ``widths`` as numbers; None allows all."""
    text = str(options["widths"])
    if text == "any":
        return None
    try:
        widths = sorted({0, *map(int, text.split(","))})
    except ValueError:
        widths = []
    if widths[:2] != [0, 1] or widths[-1] > MAX_WIDTH:
        raise KVSightError(
            f"sight option 'widths' is any, or widths from 1 to {MAX_WIDTH} with 1 among them, "
            f"such as 1,2,4,8; got {text!r}."
        )
    return tuple(widths)


def check(options: Mapping[str, Option], dim: int) -> None:
    """Raise for a word or a share that the options do not allow."""
    choice("codebook", options["codebook"], _SHAPES)
    choice("scales", options["scales"], ("fitted", "static"))
    choice("metric", options["metric"], METRICS)
    chunk = int(options["chunk"])
    if options["layout"] == "tiles" and dim % chunk:
        raise KVSightError(
            f"sight option 'layout=tiles' takes a head_dim that is a multiple of {chunk}; got {dim}. "
            "Leave it out."
        )
    if chunk != 1 and (chunk < 8 or chunk % 8 or dim % chunk):
        raise KVSightError(
            f"sight option 'chunk' is 1, or a multiple of 8 that divides head_dim {dim}; got {chunk}."
        )
    allowed_widths(options)
    strength = float(options["shrink"])
    if not 0 <= strength <= 1:
        raise KVSightError(
            f"sight option 'shrink' is a share from 0 to 1; got {strength:g}. Default: 0.001."
        )


def choice(option: str, value: Option, allowed: Iterable[str]) -> None:
    """Raise unless the value is one of a few words."""
    if value not in tuple(allowed):
        raise KVSightError(f"sight option {option!r} is one of {', '.join(allowed)}; got {value!r}.")


METHOD = Method(
    "sight",
    "output-aware transform coding: bits by reverse water-filling, static scales, no metadata",
    "kvsight, docs/design.md",
    build,
    {
        "codebook": "fitted",
        "scales": "fitted",
        "metric": "output",
        "shrink": 0.001,
        "layout": "free",
        "chunk": 1,
        "widths": "any",
    },
    rows=rows,
    allocate="measured",
)

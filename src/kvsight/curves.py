"""Distortion against stored bits: what every configuration of a method costs, head by head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Format, Row
from kvsight.methods.base import Budget, Method, Option, Rows, Side
from kvsight.retention import Retention
from kvsight.stats import LayerStats, SideStats, shrunk

Floats = NDArray[np.float64]

# a multiple of every block
_REFERENCE = 1024
# rates [bits per coordinate] between which a fitted β is meant
_FIT = (1.5, 4.5)


@dataclass(frozen=True, eq=False)
class Curve:
    """One head of one side: its configurations in the order of their cost.

    Args:
        bits: stored bits per coded element, metadata included, [n].
        code_bits: the part that is codes, [n].
        damage: predicted final KL in nats per token, [n].
        error: squared error per element over the variance per element, [n].
        formats: kinds of format (``formats.KINDS``), one per configuration.
    """

    layer: int
    side: Side
    head: int
    bits: Floats
    code_bits: Floats
    damage: Floats
    error: Floats
    formats: tuple[str, ...]

    def beta(self) -> tuple[float, float]:
        """(α, β) of error ≈ α β^(-bits), least squares in the logarithm over 1.5 to 4.5 code bits.

        RateQuant (arXiv 2605.06675): β is a quantiser's own, not 4. NaN with fewer than two points.
        """
        inside = (self.code_bits >= _FIT[0]) & (self.code_bits <= _FIT[1]) & (self.error > 0)
        if len(np.unique(self.code_bits[inside])) < 2:
            return float("nan"), float("nan")
        slope, level = np.polyfit(self.code_bits[inside], np.log(self.error[inside]), 1)
        return float(np.exp(level)), float(np.exp(-slope))


@dataclass(frozen=True, eq=False)
class Candidates:
    """Every configuration of a method for one layer's side.

    ``curves`` has one entry per head, with the same list of options. ``nbytes`` gives the bytes of each
    option for one head, exact tokens included, after ``Budget.seen`` tokens. ``place`` fits a choice.
    """

    curves: tuple[Curve, ...]
    nbytes: Callable[[Budget], NDArray[np.int64]]
    place: Callable[[Sequence[int]], tuple[Placement, ...]]


def candidates(
    method: Method, side: Side, layer: LayerStats, dense: torch.dtype, options: Mapping[str, Option]
) -> Candidates:
    """The configurations of ``method`` for one side of a layer, measured on the layer's sample."""
    if method.rows is not None:
        return _of_rows(method.rows, side, layer, options)
    return _of_ladder(method, side, layer, dense, options)


def _of_rows(rows: Rows, side: Side, layer: LayerStats, options: Mapping[str, Option]) -> Candidates:
    """Rows of whole bytes per token."""
    stats = layer.side(side)
    maker = rows(side, stats, options)
    damage, error = maker.damage, maker.error
    sizes = np.array(maker.sizes)
    bits = 8.0 * sizes / stats.dim
    variance = stats.dim * _variance(stats)
    curves = tuple(
        Curve(
            layer.index,
            side,
            head,
            bits,
            bits,
            _column(damage[head, sizes]),
            _column(error[head, sizes]) / variance[head],
            ("row",) * len(sizes),
        )
        for head in range(stats.heads)
    )

    def nbytes(budget: Budget) -> NDArray[np.int64]:
        kept = budget.retention.stored(budget.seen, 1)
        return sizes * kept.coded + kept.dense * stats.dim * budget.dense_dtype.itemsize

    def place(choice: Sequence[int]) -> tuple[Placement, ...]:
        return maker.place([int(sizes[i]) for i in choice])

    return Candidates(curves, nbytes, place)


def _of_ladder(
    method: Method, side: Side, layer: LayerStats, dense: torch.dtype, options: Mapping[str, Option]
) -> Candidates:
    """Every step of a method that rounds down to its next configuration, coded and decoded."""
    stats = layer.side(side)
    ladder = _ladder(method, side, stats, dense, options)
    forms = [placements[0].codec.format for placements in ladder]
    damage = shrunk(stats.cost, stats, 0.0)
    measured = [coding_cost(placements, stats, damage) for placements in ladder]
    variance = _variance(stats)
    curves = tuple(
        Curve(
            layer.index,
            side,
            head,
            np.array([_rate(form) for form in forms]),
            np.array([_rate(form, meta=False) for form in forms]),
            np.array([float(d[head]) for d, _ in measured]),
            np.array([float(e[head]) for _, e in measured]) / variance[head],
            tuple(str(form.spec()["kind"]) for form in forms),
        )
        for head in range(stats.heads)
    )

    def nbytes(budget: Budget) -> NDArray[np.int64]:
        # all heads commit the same tokens, so the largest block decides how many stay exact
        kept = budget.retention.stored(budget.seen, max(form.block for form in forms))
        exact = kept.dense * stats.dim * budget.dense_dtype.itemsize
        return np.array([form.nbytes(kept.coded) + exact for form in forms])

    def place(choice: Sequence[int]) -> tuple[Placement, ...]:
        out: list[Placement] = []
        for option in dict.fromkeys(choice):
            heads = [head for head, own in enumerate(choice) if own == option]
            out += _of_heads(ladder[option], heads)
        return tuple(out)

    return Candidates(curves, nbytes, place)


def _ladder(
    method: Method, side: Side, stats: SideStats, dense: torch.dtype, options: Mapping[str, Option]
) -> list[tuple[Placement, ...]]:
    """Configurations from the cheapest up, found from the dearest down: each a hair less than the last."""
    ladder: list[tuple[Placement, ...]] = []
    # nothing exact and whole blocks of any size: the ladder is about codes
    plain = Budget(8.0 * dense.itemsize, _REFERENCE, Retention(0, 0), dense)
    while True:
        try:
            placements = method.build(side, stats, plain, options)
        except KVSightError:
            if not ladder:
                raise
            return ladder[::-1]
        ladder.append(placements)
        cost = max(plain.cost(p.codec.format) for p in placements)
        plain = replace(plain, bits=cost - 1e-6)


def coding_cost(
    placements: tuple[Placement, ...], stats: SideStats, damage: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean eᵀ·damage·e and mean ‖e‖²/d on the sample, [H] each."""
    cost = torch.zeros(stats.heads, dtype=torch.float64)
    error = torch.zeros(stats.heads, dtype=torch.float64)
    for placement in placements:
        heads, block = list(placement.heads), placement.codec.format.block
        x = (stats.sample if stats.passages is None else stats.passages)[heads]
        # the sample is a multiple of the block only if the text was long enough
        x = x.repeat(1, -(-block // x.shape[1]), 1)
        x = x[:, : x.shape[1] // block * block]
        e = (placement.codec.decode(placement.codec.encode(x)) - x).double()
        cost[heads] = ((e @ damage[heads]) * e).sum(-1).mean(-1)
        error[heads] = e.square().mean((-1, -2))
    return cost, error


def _variance(stats: SideStats) -> Floats:
    """Variance per element of each head, [H]; one where a head never changes."""
    variance = stats.moments.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    return _column(torch.where(variance > 0, variance, torch.ones_like(variance)))


def _column(x: Tensor) -> Floats:
    return x.detach().double().cpu().numpy()


def _rate(form: Format, meta: bool = True) -> float:
    """Stored bits per element of one block, with or without metadata."""
    if isinstance(form, Row) and not meta:
        return sum(form.widths) / form.dim
    stored = form.nbytes(form.block) - (0 if meta else form.meta_nbytes(form.block))
    return 8 * stored / (form.block * form.dim)


def _of_heads(placements: tuple[Placement, ...], heads: list[int]) -> list[Placement]:
    out: list[Placement] = []
    for placement in placements:
        mine = [i for i, head in enumerate(placement.heads) if head in heads]
        if mine:
            chosen = tuple(placement.heads[i] for i in mine)
            out.append(Placement(chosen, placement.codec.of_heads(mine)))
    return out

"""Vector quantisation: weighted k-means, block VQ and greedy residual VQ.

Sources: Lloyd 1982; Linde, Buzo and Gray 1980; k-means++ (Arthur and Vassilvitskii 2007); SMAQ
(zenodo 19537052) for codebooks under a query metric; Kumar (arXiv 2410.15704) for residual stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Indexed, Packed
from kvsight.packing import half

# scores that are held at once
_SCORES = 1 << 22
_SWEEPS = 20
# vectors that k-means++ sees for each centre that it draws
_SEEDED = 4


@dataclass(frozen=True, eq=False)
class VectorQuantizer:
    """Each cell's nearest centroid, then the nearest to what is left, stage by stage.

    ``centroids`` [H or 1, cells or 1, stages, 2^bits, span] are decoded as they are. ``metric``
    [H or 1, cells or 1, span, span], or None for the identity, says what near means while encoding:
    (x - c)ᵀ·metric·(x - c). Reading never uses it.
    """

    format: Indexed
    centroids: Tensor
    metric: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return (self.centroids,)

    @property
    def guides(self) -> Mapping[str, Tensor]:
        return {} if self.metric is None else {"metric": self.metric}

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to rows of indices, and norms where the format has them."""
        y = y.double()
        norms: tuple[Tensor, ...] = ()
        if self.format.norm:
            rms = half(y.square().mean(dim=-1, keepdim=True).sqrt())
            y = torch.where(rms > 0, y / rms.to(y), torch.zeros_like(y))
            norms = (rms,)
        # tokens of a cell side by side: [H, cells, lead·n, span]
        cells = self.format.cut(y).movedim(-2, -3).unsqueeze(0).flatten(0, -5).movedim(0, 2)
        index = self._search(cells.flatten(2, 3))
        index = index.unflatten(-1, (cells.shape[2], cells.shape[3])).movedim(3, 0)
        index = index.permute(0, 1, 4, 3, 2).reshape(*y.shape[:-1], self.format.stages, self.format.cells)
        return Packed(self.format, (self.format.pack(index), *norms))

    def _search(self, x: Tensor) -> Tensor:
        """Indices [H, cells, stages, N] of cells x [H, cells, N, span]."""
        left, found = x, []
        for stage in range(self.format.stages):
            book, scorer = self._books[stage]
            found.append(scorer.nearest(left))
            left = left - _look_up(book, found[-1])
        return torch.stack(found, dim=2)

    @cached_property
    def _books(self) -> "list[tuple[Tensor, _Scorer]]":
        """Centroids [H or 1, cells or 1, 2^bits, span] of each stage in fp64, and what finds them."""
        metric = None if self.metric is None else self.metric.double()
        books = [book.double() for book in self.centroids.unbind(2)]
        return [(book, _Scorer.of(book, metric)) for book in books]

    def decode(self, packed: Packed) -> Tensor:
        """Indices to [..., H, n, d] in fp32."""
        return packed.read(self.tables)

    def to(self, device: torch.device | str) -> Self:
        metric = None if self.metric is None else self.metric.to(device)
        return replace(self, centroids=self.centroids.to(device), metric=metric)

    def heads(self, index: Sequence[int]) -> Self:
        """The quantizer of a subset of heads; shared tables stay shared."""

        def pick(t: Tensor) -> Tensor:
            return t if t.shape[0] == 1 else t[list(index)]

        metric = None if self.metric is None else pick(self.metric)
        return replace(self, centroids=pick(self.centroids), metric=metric)


@dataclass(frozen=True, eq=False)
class _Scorer:
    """The nearest centroid is the one with the largest x·slope - half."""

    slope: Tensor
    half: Tensor

    @classmethod
    def of(cls, centroids: Tensor, metric: Tensor | None) -> Self:
        """``centroids`` [..., K, s], ``metric`` [..., s, s] symmetric or None."""
        slope = centroids if metric is None else centroids @ metric
        return cls(slope.mT, (slope * centroids).sum(-1).unsqueeze(-2) / 2)

    def nearest(self, x: Tensor) -> Tensor:
        """Indices [..., N] of vectors x [..., N, s]; the first of equals."""
        lines = x.shape[:-2].numel() * self.half.shape[-1]
        parts = [
            (part @ self.slope).sub_(self.half).argmax(-1)
            for part in x.split(max(1, _SCORES // max(1, lines)), dim=-2)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _look_up(centroids: Tensor, index: Tensor) -> Tensor:
    """Rows [..., N, s] of centroids [..., K, s], leading dimensions of either may be one."""
    centroids = centroids.expand(*index.shape[:-1], *centroids.shape[-2:])
    return centroids.gather(-2, index.unsqueeze(-1).expand(*index.shape, centroids.shape[-1]))


def kmeans(
    x: Tensor,
    size: int,
    *,
    metric: Tensor | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
    sweeps: int = _SWEEPS,
) -> Tensor:
    """Codebooks [P, size, s] of P samples x [P, n, s], fp64: Lloyd's iteration from k-means++ seeds.

    A sweep never raises Σ w (x - c)ᵀ·metric·(x - c), c being the nearest centroid in that metric. For any
    metric the best centre of a cell is its weighted mean, so the metric only says who belongs where.
    Empty cells keep their centre. ``metric`` [P, s, s], ``weights`` [P, n]. It takes samples on the CPU.
    """
    mean = x.double().mean(1, keepdim=True)
    level = (x.double() - mean).square().mean((1, 2), keepdim=True).sqrt()
    level = torch.where(level > 0, level, torch.ones_like(level))
    # near zero and of unit size, single precision decides as well as double
    unit = ((x.double() - mean) / level).float()
    weight = torch.ones_like(unit[..., 0]) if weights is None else weights.float()
    near = None if metric is None else _unit(metric)
    centres = _seeds(unit, size, near, weight, seed).double()
    heavy, place = weight.double(), size * torch.arange(len(x)).unsqueeze(-1)
    pulls = (unit * heavy.unsqueeze(-1)).flatten(0, 1)
    before: Tensor | None = None
    for _ in range(sweeps):
        index = _nearest_fast(unit, centres.float(), near)
        if before is not None and torch.equal(index, before):
            break
        before, flat = index, (index + place).flatten()
        mass = heavy.new_zeros(len(x) * size).index_add_(0, flat, heavy.flatten()).view(len(x), size)
        total = heavy.new_zeros(len(x) * size, x.shape[-1]).index_add_(0, flat, pulls).view_as(centres)
        moved = total / mass.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
        centres = torch.where((mass > 0).unsqueeze(-1), moved, centres)
    return centres * level + mean


def _unit(metric: Tensor) -> Tensor:
    """Metrics [P, s, s] of trace s in fp32; their level does not matter to who is nearest."""
    trace = metric.double().diagonal(dim1=-2, dim2=-1).mean(-1)
    return (metric / torch.where(trace > 0, trace, 1.0)[:, None, None]).float()


def _nearest_fast(x: Tensor, centroids: Tensor, metric: Tensor | None) -> Tensor:
    """``_Scorer.nearest`` on the CPU, where numpy's argmax is several times as fast as torch's."""
    scorer = _Scorer.of(centroids, metric)
    out = torch.empty(x.shape[:-1], dtype=torch.int64)
    size = centroids.shape[-2]
    many = max(1, _SCORES // (x.shape[1] * size))
    step = max(1, _SCORES // (many * size))
    for first in range(0, len(x), many):
        some = slice(first, first + many)
        for start in range(0, x.shape[1], step):
            lines = slice(start, start + step)
            scores = torch.baddbmm(scorer.half[some], x[some, lines], scorer.slope[some], beta=-1)
            out[some, lines] = torch.from_numpy(scores.numpy().argmax(-1))
    return out


def _seeds(x: Tensor, size: int, metric: Tensor | None, weights: Tensor, seed: int) -> Tensor:
    """k-means++: centres are drawn with probability ∝ weight · squared distance to the nearest one so far.

    Each round draws a quarter as many again, spread evenly over the probability, so that hardly a vector
    is drawn twice; vectors are every k-th, ``_SEEDED`` for each centre.
    """
    skip = max(1, x.shape[1] // (_SEEDED * size))
    x, weights = x[:, ::skip].contiguous(), weights[:, ::skip]
    draws = torch.Generator().manual_seed(seed)
    slope = x if metric is None else x @ metric
    length = (slope * x).sum(-1)
    centres = x[:, :0]
    nearest = torch.ones_like(weights)
    while centres.shape[1] < size:
        many = min(size - centres.shape[1], max(1, centres.shape[1] // 4))
        cumulative = (weights * nearest).double().cumsum(-1)
        spread = (torch.arange(many) + torch.rand(len(x), 1, generator=draws, dtype=torch.float64)) / many
        # where all distances are zero, the last vector is as good as any
        at = torch.searchsorted(cumulative, spread * cumulative[:, -1:], right=True)
        at = at.clamp_max(x.shape[1] - 1)
        chosen = x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        product = slope @ chosen.mT
        distance = (length.unsqueeze(-1) - 2 * product + length.gather(1, at).unsqueeze(1)).amin(-1)
        first = centres.shape[1] == 0
        nearest = distance.clamp_min(0) if first else torch.minimum(nearest, distance.clamp_min(0))
        centres = torch.cat((centres, chosen), dim=1)
    return centres


def residual_kmeans(
    x: Tensor,
    size: int,
    stages: int,
    *,
    metric: Tensor | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
    sweeps: int = _SWEEPS,
) -> Tensor:
    """Codebooks [P, stages, size, s]: each stage is fitted to what the stages before it leave."""
    books: list[Tensor] = []
    metric = None if metric is None else metric.double()
    for stage in range(stages):
        books.append(
            kmeans(x, size, metric=metric, weights=weights, seed=seed + stage, sweeps=sweeps).float()
        )
        book = books[-1].double()
        x = x - _look_up(book, _Scorer.of(book, metric).nearest(x.double()))
    return torch.stack(books, dim=1)

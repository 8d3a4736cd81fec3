"""Lloyd-Max codebooks and static scalar quantisation into rows.

Sources: Max 1960, Lloyd 1982; TurboQuant (arXiv 2504.19874), Alg. 1, for the sphere's Beta density.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Self

import numpy as np
import torch
from scipy import special
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Packed, Row
from kvsight.ops.encode.ref import Rounding, nearest, quantize, rounding
from kvsight.packing import MAX_WIDTH

_GRID = 1 << 17
_SWEEPS = 4000


@dataclass(frozen=True)
class Codebook:
    """2^b ascending levels for a unit-variance source and their mean squared error."""

    levels: tuple[float, ...]
    distortion: float


@cache
def gaussian(bits: int) -> Codebook:
    """Lloyd-Max for N(0, 1): distortion .3634, .1175, .03455, .00950, ... for 1, 2, 3, 4 bits."""
    return _lloyd_max(bits, 12.0, lambda x: np.exp(-0.5 * x * x))


@cache
def sphere(bits: int, dim: int) -> Codebook:
    """Lloyd-Max for √d times one coordinate of a uniform unit vector: density (1 - x²/d)^((d-3)/2)."""
    if dim < 4:
        raise KVSightError(f"the sphere codebook needs a head_dim of at least 4; got {dim}.")
    edge = math.sqrt(dim)
    return _lloyd_max(bits, edge, lambda x: np.clip(1 - (x / edge) ** 2, 0, None) ** ((dim - 3) / 2))


@cache
def uniform(bits: int) -> Codebook:
    """The best evenly spaced levels for N(0, 1): a little worse, but linear in the code."""
    from scipy.optimize import minimize_scalar

    centred = np.arange(2**bits) - (2**bits - 1) / 2

    def error(step: float) -> float:
        return _gaussian_error(centred * step)

    best = minimize_scalar(error, bounds=(1e-3, 4.0), method="bounded", options={"xatol": 1e-9})
    return Codebook(tuple(float(c * best.x) for c in centred), float(best.fun))


@cache
def angle(bits: int, level: int) -> tuple[float, ...]:
    """Lloyd-Max levels on [0, π/2] for the angle between the norms of two Gaussian halves.

    At ``level`` 2 and up of PolarQuant's recursion (arXiv 2502.02617) a half has 2^(level-1)
    coordinates, and the density is sin^(2^(level-1) - 1)(2ψ).
    """
    power, edge = 2 ** (level - 1) - 1, math.pi / 4

    def density(x: np.ndarray) -> np.ndarray:
        weight: np.ndarray = np.clip(np.cos(2 * x), 0, None) ** power
        return weight

    x = np.linspace(-edge, edge, _GRID + 1)
    weight = density(x)
    spread = math.sqrt(_integral(x, weight * x**2)[-1] / _integral(x, weight)[-1])
    return tuple(edge + spread * level for level in _lloyd_max(bits, edge, density).levels)


CODEBOOKS: dict[str, Callable[[int], Codebook]] = {"gaussian": gaussian, "uniform": uniform}


def _gaussian_error(levels: np.ndarray) -> float:
    """E (x - nearest level)² for N(0, 1), in closed form."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    mass = np.diff(special.ndtr(edges))
    pdf = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    first = -np.diff(pdf)
    return float(1 - 2 * (levels * first).sum() + (levels**2 * mass).sum())


def _lloyd_max(bits: int, edge: float, density: Callable[[np.ndarray], np.ndarray]) -> Codebook:
    if not 1 <= bits <= MAX_WIDTH:
        raise KVSightError(f"codebooks have 1 to {MAX_WIDTH} bits; got {bits}.")
    x = np.linspace(-edge, edge, _GRID + 1)
    weight = density(x)
    cumulative = [_integral(x, weight * x**k) for k in range(3)]
    total, variance = cumulative[0][-1], cumulative[2][-1] / cumulative[0][-1]
    # Panter-Dite: optimal levels are dense as density^(1/3), which starts Lloyd close to its fixed point
    companding = _integral(x, weight ** (1 / 3))
    quantiles = (np.arange(2**bits) + 0.5) / 2**bits * companding[-1]
    levels = np.interp(quantiles, companding, x)
    for _ in range(_SWEEPS):
        edges = np.concatenate([[-edge], (levels[1:] + levels[:-1]) / 2, [edge]])
        mass, first = (np.diff(np.interp(edges, x, c)) for c in cumulative[:2])
        updated = first / mass
        updated = (updated - updated[::-1]) / 2
        moved = float(np.abs(updated - levels).max())
        levels = updated
        if moved < 1e-12:
            break
    edges = np.concatenate([[-edge], (levels[1:] + levels[:-1]) / 2, [edge]])
    mass, first, second = (np.diff(np.interp(edges, x, c)) for c in cumulative)
    error = float((second - 2 * levels * first + levels**2 * mass).sum() / total)
    scale = math.sqrt(variance)
    return Codebook(tuple(float(v) for v in levels / scale), error / variance)


def _integral(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    steps = np.diff(x) * (y[1:] + y[:-1]) / 2
    return np.concatenate([[0.0], np.cumsum(steps)])


@dataclass(frozen=True)
class RowQuantizer:
    """Static scalar codebooks on transform coordinates, stored as rows.

    ``levels`` [N] holds the codebooks end to end; ``starts`` [H or 1, stored] says where the one of each
    stored coordinate begins. With ``format.norm`` a token is divided by its root mean square first.
    """

    format: Row
    levels: Tensor
    starts: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return (self.levels, self.starts)

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to rows [..., H, n, bytes]."""
        return Packed(self.format, quantize(y, self.rounding))

    def codes(self, y: Tensor) -> Tensor:
        """uint8 codes [..., H, n, stored] of coordinates [..., H, n, d], without packing (or norm)."""
        return nearest(y[..., : self.format.stored].float(), self.rounding.edges)

    @property
    def guides(self) -> Mapping[str, Tensor]:
        """None: encoding reads nothing but ``tables``."""
        return {}

    @cached_property
    def rounding(self) -> Rounding:
        """Boundaries between levels."""
        return rounding(self.format, self.levels, self.starts)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, levels=self.levels.to(device), starts=self.starts.to(device))

    def heads(self, index: Sequence[int]) -> Self:
        """The quantizer of a subset of heads; shared tables stay shared."""
        return self if self.starts.shape[0] == 1 else replace(self, starts=self.starts[list(index)])

    def rounded(self, y: Tensor) -> Tensor:
        """Stored coordinates [H, n, stored] at their nearest levels, without packing (or norm)."""
        index = nearest(y, self.rounding.edges).long() + self.starts.unsqueeze(-2)
        return self.levels.to(y)[index]

    def decode(self, packed: Packed) -> Tensor:
        """Rows to stored coordinates [..., H, n, stored] in fp32."""
        return packed.read(self.tables)


def row_quantizer(
    widths: tuple[int, ...], codebook: Callable[[int], Codebook], norm: bool = False
) -> RowQuantizer:
    """One shared codebook for each width that occurs in ``widths`` (falling)."""
    row = Row(widths, norm)
    used = sorted({w for w in widths if w > 0})
    start_of: dict[int, int] = {}
    levels: list[float] = []
    for width in used:
        start_of[width] = len(levels)
        levels.extend(codebook(width).levels)
    starts = [start_of[w] for w in widths if w > 0]
    return RowQuantizer(
        row,
        torch.tensor(levels, dtype=torch.float32),
        torch.tensor([starts], dtype=torch.int32).reshape(1, -1),
    )


# Other text has larger vectors than the calibration's, and a clipped one costs far more than a coarse
# one: fits count this share of the sample once more, this many times as large (docs/results.md).
_TAIL_SHARE = 0.1
_TAIL = 2.0
# heavy tails want up to two and a half times the Gaussian range: a coarse search, then finer ones
_STRETCH = tuple(0.5 * 1.16**i for i in range(13))
_REFINE = ((0.928, 1.0, 1.077), (0.964, 1.0, 1.037), (0.982, 1.0, 1.018))


@dataclass(frozen=True, eq=False)
class Stretches:
    """What every coordinate of a sample wants at every width 0..8.

    ``factors`` [H, d, 9] is what to divide it by before coding, for the least squared error;
    ``errors`` [H, d, 9] is the mean squared error then, about D(b) for a coordinate of unit variance.
    """

    factors: Tensor
    errors: Tensor

    def of(self, widths: Sequence[int], heads: Sequence[int]) -> Tensor:
        """Factors [len(heads), d] for coordinates of these widths; one where nothing is stored."""
        index = torch.tensor(widths, device=self.factors.device)
        return self.factors[list(heads)][:, torch.arange(len(widths)), index]


def fitted_stretches(
    y: Tensor,
    codebook: Callable[[int], Codebook],
    weights: Tensor | None = None,
    judges: Tensor | None = None,
) -> Stretches:
    """Stretches of a sample y [H, n, d] of unit-variance coordinates.

    ``weights`` [H, n] say how much each token's error counts in the fit, ``judges`` [H, n] in ``errors``.
    An empty sample keeps factor one and the codebook's own distortion.
    """
    heads, count, dim = y.shape
    books = [codebook(width) for width in range(1, MAX_WIDTH + 1)]
    factors = torch.ones(heads, dim, MAX_WIDTH + 1, dtype=torch.float64)
    errors = torch.tensor([1.0, *(book.distortion for book in books)], dtype=torch.float64)
    errors = errors.expand(heads, dim, -1).clone()
    if not count:
        return Stretches(factors, errors)
    sample = _SortedSample.of(y, weights)
    judge = sample if judges is None else _SortedSample.of(y, judges)
    total, energy = judge.sums[:, 0, -1], judge.sums[:, 2, -1]
    errors[..., 0] = (energy / total).view(heads, dim)
    silent = (energy <= 0).unsqueeze(-1)
    for width, book in enumerate(books, start=1):
        levels = torch.tensor(book.levels, dtype=torch.float64)
        best = torch.ones(heads * dim, 1, dtype=torch.float64)
        for trials in (_STRETCH, *_REFINE):
            tried = best * torch.tensor(trials, dtype=torch.float64)
            risks = sample.risk(tried.unsqueeze(-1) * levels)
            best = tried.gather(-1, risks.argmin(-1, keepdim=True))
        best = torch.where(silent, torch.ones_like(best), best)
        factors[..., width] = best.view(heads, dim)
        errors[..., width] = (judge.error((best * levels).unsqueeze(1)).squeeze(-1) / total).view(
            heads, dim
        )
    return Stretches(factors, errors)


# a level moves as if this many tokens more already sat on it, so that rare levels stay put
_PRIOR = 20
_LLOYD = 15
# finer codebooks have more levels than a sample can place, and little to gain
_OWN_WIDTH = 5


def fitted_levels(quantizer: RowQuantizer, y: Tensor, weights: Tensor | None = None) -> RowQuantizer:
    """Codebooks of their own for every head and coordinate: Lloyd's iteration on the sample y [H, n, d].

    It starts from the quantizer's levels, so y should be stretched to them first (``fitted_stretches``).
    """
    widths = quantizer.format.widths[: quantizer.format.stored]
    heads, count = y.shape[0], y.shape[1]
    if not y.numel() or not widths:
        return quantizer
    if weights is not None:
        weights = weights / weights.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    shared = quantizer.starts.long().expand(heads, -1)
    sizes = torch.tensor([2**w for w in widths])
    own = sizes.cumsum(0) - sizes
    starts = own + sizes.sum() * torch.arange(heads).unsqueeze(-1)
    levels = torch.empty(heads * int(sizes.sum()), dtype=torch.float64)
    prior = min(_PRIOR, count)
    for width in sorted(set(widths)):
        columns = [i for i, w in enumerate(widths) if w == width]
        sample = _SortedSample.of(y[..., columns], weights)
        span = torch.arange(2**width)
        table = quantizer.levels.double()[shared[:, columns, None] + span].flatten(0, 1)
        for _ in range(_LLOYD if width <= _OWN_WIDTH else 0):
            table = sample.centroids(table, prior)
        levels[starts[:, columns, None] + span] = table.view(heads, len(columns), -1)
    return RowQuantizer(quantizer.format, levels.float(), starts.int())


@dataclass(frozen=True, eq=False)
class _SortedSample:
    """Coordinates [C, n] in order, and running sums of weight, first and second moment [C, 3, n + 1].

    The squared error of any codebook is then exact from its edges alone, without touching the sample.
    """

    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, y: Tensor, weights: Tensor | None) -> Self:
        """From a sample [H, n, c] and weights [H, n]; C = H·c, heads first."""
        heads, count, columns = y.shape
        flat = y.double().mT.reshape(heads * columns, count).contiguous()
        values, order = flat.sort(dim=-1)
        weight = torch.ones_like(values)
        if weights is not None:
            every = weights.to(values).unsqueeze(1).expand(-1, columns, -1)
            weight = every.reshape(heads * columns, count).gather(-1, order)
        powers = torch.stack([weight, weight * values, weight * values.square()], dim=1)
        return cls(values, torch.nn.functional.pad(powers.cumsum(-1), (1, 0)))

    def cells(self, levels: Tensor) -> Tensor:
        """Weight, first and second moment of what falls to each level, [C, 3, T, K].

        ``levels`` [C, T, K] are T codebooks for every coordinate.
        """
        edges = (levels[..., 1:] + levels[..., :-1]) / 2
        inner = torch.searchsorted(self.values, edges.flatten(1).contiguous()).view(edges.shape)
        bounds = torch.nn.functional.pad(inner, (1, 0))
        bounds = torch.nn.functional.pad(bounds, (0, 1), value=self.values.shape[-1])
        found = self.sums.gather(-1, bounds.flatten(1).unsqueeze(1).expand(-1, 3, -1))
        cells: Tensor = found.unflatten(-1, bounds.shape[1:]).diff(dim=-1)
        return cells

    def error(self, levels: Tensor) -> Tensor:
        """Weighted sum of squared errors at the nearest of ascending levels [C, T, K], [C, T]."""
        weight, first, second = self.cells(levels).unbind(1)
        return (second - 2 * levels * first + levels.square() * weight).sum(-1)

    def risk(self, levels: Tensor) -> Tensor:
        """``error`` of the sample and of its tail (see ``_TAIL_SHARE``), [C, T]."""
        return self.error(levels) + _TAIL_SHARE * _TAIL**2 * self.error(levels / _TAIL)

    def centroids(self, levels: Tensor, prior: float) -> Tensor:
        """Where each of the levels [C, K] has the least risk, given what is nearest to it now."""
        near, far = (self.cells((levels / reach).unsqueeze(1)).squeeze(2) for reach in (1.0, _TAIL))
        weight = near[:, 0] + _TAIL_SHARE * far[:, 0] + prior
        first = near[:, 1] + _TAIL_SHARE * _TAIL * far[:, 1] + prior * levels
        return first / weight

"""Lloyd-Max codebooks and static scalar quantisation into rows.

Sources: Max 1960, Lloyd 1982; TurboQuant (arXiv 2504.19874), Alg. 1, for the sphere's Beta density.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Self

import numpy as np
import torch
from scipy import special
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Packed, Row
from kvsight.packing import MAX_WIDTH, pack_row

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
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        norms: tuple[Tensor, ...] = ()
        if self.format.norm:
            largest = torch.finfo(torch.float16).max
            rms = y.square().mean(dim=-1, keepdim=True).sqrt().clamp_max(largest).half()
            y = torch.where(rms > 0, y / rms.to(y), torch.zeros_like(y))
            norms = (rms,)
        codes = self._nearest(y[..., : self.format.stored].float())
        return Packed(self.format, (pack_row(codes, self.format.widths), *norms))

    @cached_property
    def _edges(self) -> Tensor:
        """Midpoints between levels, [H or 1, stored, K], filled up with inf; [K] when all are equal."""
        widths = self.format.widths[: self.format.stored]
        most = 2 ** max(widths, default=0) - 1
        levels, starts = self.levels, self.starts.long()
        edges = levels.new_full((*starts.shape, most), torch.inf)
        for i, width in enumerate(widths):
            table = levels[starts[:, i, None] + torch.arange(2**width, device=levels.device)]
            edges[:, i, : 2**width - 1] = (table[:, 1:] + table[:, :-1]) / 2
        flat = edges.flatten(0, 1)
        same = len(flat) > 0 and bool((flat == flat[:1]).all())
        return flat[0].contiguous() if same else edges

    def _nearest(self, y: Tensor) -> Tensor:
        edges = self._edges.to(y)
        if edges.dim() == 1:
            return torch.bucketize(y.contiguous(), edges).to(torch.uint8)
        columns = y.movedim(-3, 0).movedim(-1, 1)
        flat = columns.flatten(2).contiguous()
        found = torch.searchsorted(edges.expand(len(flat), -1, -1).contiguous(), flat).to(torch.uint8)
        return found.view(columns.shape).movedim(1, -1).movedim(0, -3).contiguous()

    def to(self, device: torch.device | str) -> Self:
        return replace(self, levels=self.levels.to(device), starts=self.starts.to(device))

    def rounded(self, y: Tensor) -> Tensor:
        """Stored coordinates [H, n, stored] at their nearest levels, without packing (or norm)."""
        index = self._nearest(y).long() + self.starts.unsqueeze(-2)
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


# heavy tails want up to two and a half times the Gaussian range: a coarse search, then two halvings
_STRETCH = (0.74, 1.0, 1.35, 1.82, 2.46)
_REFINE = (0.928, 1.162, 0.963, 1.078)


def fitted_stretch(quantizer: RowQuantizer, y: Tensor) -> Tensor:
    """Factors [H, d] by which to divide each coordinate of the sample y [H, n, d] for least squares.

    Unstored coordinates and empty samples keep factor one.
    """
    stored = quantizer.format.stored
    factors = torch.ones(y.shape[0], y.shape[2], dtype=torch.float64)
    if not y.numel():
        return factors
    y = y[..., :stored].float()
    best, least = torch.ones(y.shape[0], stored), torch.full((y.shape[0], stored), torch.inf)
    for trials in (_STRETCH, _REFINE[:2], _REFINE[2:]):
        centre = best if trials is not _STRETCH else torch.ones_like(best)
        for trial in trials:
            stretch = centre * trial
            step = stretch.unsqueeze(-2)
            error = (quantizer.rounded(y / step) * step - y).square().mean(dim=1)
            best = torch.where(error < least, stretch, best)
            least = torch.minimum(error, least)
    factors[:, :stored] = best.double()
    return factors

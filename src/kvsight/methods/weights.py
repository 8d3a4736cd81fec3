"""How much a token counts, as far as its own key or value can tell: the tables of a tiered quantizer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.methods.base import Side
from kvsight.stats import SideStats, shrunk
from kvsight.transforms import sqrtm

SALIENCIES = ("gradient", "attention", "norm", "random")
# as a share of the variance of the vectors: so many coordinates cannot follow the sample's noise
_RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class Weights:
    """log w = linear · x + ½ ‖factor · x‖² + power · log(mean square of x): ``TieredQuantizer``."""

    linear: Tensor
    factor: Tensor
    power: Tensor


def token_weights(
    method: str, saliency: str, side: Side, stats: SideStats, mass: float, power: float
) -> Weights:
    """w = (expected salience)^mass · (mean square)^power, or a control.

    "gradient": a linear guess of how strongly the output depended on the vectors of the calibration sample.
    "attention": of the attention that Gaussian queries would pay; keys know it from the moments of the
    queries, values guess at that of the key beside them. What calibration did not see gives way to what
    comes next.
    """
    match saliency, side:
        case ("gradient", _) if stats.salience is not None:
            seen = stats.salience.double()
            # where nothing depends on a head, all tokens are alike
            floor = 1e-3 * seen.mean(-1, keepdim=True) + 1e-30
            return _weights(mass * _guess(stats, (seen + floor).log()), None, power)
        case ("gradient" | "attention", "k") if stats.query is not None:
            root, _ = sqrtm(shrunk(stats.query.covariance, stats, 1e-6))
            return _weights(
                mass * stats.query.mean / stats.dim**0.5, (mass / stats.dim) ** 0.5 * root, power
            )
        case ("gradient" | "attention", "v") if stats.mass is not None:
            return _weights(mass * _guess(stats, stats.mass.double()), None, power)
        case "gradient" | "attention" | "norm", _:
            return _weights(torch.zeros(1, stats.dim), None, 1.0)
        case "random", _:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(stats.heads, stats.dim, generator=generator, dtype=torch.float64)
            spread = (drawn.unsqueeze(-2) @ shrunk(stats.moments.covariance, stats, 1e-6)).squeeze(-2)
            # weights as far apart as true ones are, a factor e
            return _weights(drawn / (spread * drawn).sum(-1, keepdim=True).sqrt(), None, 0.0)
    raise KVSightError(f"{method} option 'saliency' is one of {', '.join(SALIENCIES)}; got {saliency!r}.")


def _weights(linear: Tensor, factor: Tensor | None, power: float) -> Weights:
    none = torch.zeros(1, 0, linear.shape[-1])
    return Weights(linear.float(), none if factor is None else factor.float(), torch.tensor([power]))


def _guess(stats: SideStats, log_salience: Tensor) -> Tensor:
    """Ridge regression of the sampled tokens' log salience [H, n] on their vectors, [H, d]."""
    x, y = stats.sample.double(), log_salience
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-1, keepdim=True)
    moments = x.mT @ x / x.shape[-2]
    ridge = shrunk(moments, stats, _RIDGE)
    found: Tensor = torch.linalg.solve(ridge, (x.mT @ y.unsqueeze(-1)) / x.shape[-2])
    return found.squeeze(-1)

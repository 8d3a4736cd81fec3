"""What SMAQ makes of the query metric Σ_q before anything is coded in it (zenodo 19537052)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.transforms import geometric_mean

# the paper's c, and the optimum for white keys
DEFAULTS = {"log1p": 5.0, "power": 0.5}
SHAPES = ("identity", "raw", "power", "log1p", "geometric")


def shaped(metric: Tensor, covariance: Tensor, shape: str, strength: float) -> Tensor:
    """The metric [..., s, s] that ``shape`` makes of Σ_q, of trace s, fp64.

    ``metric`` is Σ_q and ``covariance`` Σ_k, both positive definite. "raw" is Σ_q itself, "power"
    Σ_q^strength (½ for 0), "log1p" log(1 + strength·λ) of its eigenvalues (5 for 0), and "geometric"
    Σ_k⁻¹ # Σ_q. Eigenvalues are those at trace s, because a logarithm depends on the scale of the queries.
    """
    metric = _levelled(metric.double())
    strength = strength or DEFAULTS.get(shape, 0.0)
    match shape:
        case "identity":
            return torch.eye(metric.shape[-1], dtype=torch.float64).expand_as(metric)
        case "raw":
            return metric
        case "power":
            return _levelled(_of_eigenvalues(metric, lambda v: v**strength))
        case "log1p":
            return _levelled(_of_eigenvalues(metric, lambda v: torch.log1p(strength * v)))
        case "geometric":
            return _levelled(geometric_mean(torch.linalg.inv(_levelled(covariance.double())), metric))
    raise AssertionError(shape)


def check_shape(method: str, shape: str, strength: float, others: tuple[str, ...] = ()) -> None:
    """Raise ``KVSightError`` for a word that is no shape, and for a strength that is no strength."""
    if not 0 <= strength <= 1e6:
        raise KVSightError(
            f"{method} option 'strength' is above 0, or 0 for the default; got {strength:g}."
        )
    if shape not in (*SHAPES, *others):
        known = ", ".join((*SHAPES, *others))
        raise KVSightError(f"{method} option 'shape' is one of {known}; got {shape!r}.")


def _levelled(metric: Tensor) -> Tensor:
    """Scaled to trace s."""
    level = metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    return metric / level[..., None, None]


def _of_eigenvalues(metric: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(metric)
    made: Tensor = vectors * function(values.clamp_min(0)).unsqueeze(-2) @ vectors.mT
    return made

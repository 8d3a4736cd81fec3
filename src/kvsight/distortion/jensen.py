"""What score errors add to a key's share of attention on average, for caches that mix exact and coded keys.

E exp(s + ε) exceeds exp(s) for every error ε of mean zero (Jensen). Where all keys are coded alike the
factor cancels in softmax; where some stay exact, coded keys take mass from them. Subtract what these
functions give from the scores of coded keys, and only of those. The correction is quadratic in the query
and differs between tokens, so no static map of keys can hold it: attention on codes does not apply it.
"""

import math

import torch
from torch import Tensor

from kvsight.distortion import checks


def rotated_gain(queries: Tensor, norms: Tensor, distortion: float, scaling: float | None = None) -> Tensor:
    """½ Var(δs) [..., n, T] in nats of a randomly rotated scalar code; exact for Gaussian errors.

    Var(δs_ij) = scaling² ‖q_i‖² D ‖k_j‖² / d, of queries [..., n, d], key norms [..., T] and the codebook's
    mean squared error D at unit variance (``lloyd_max.sphere``); scaling is 1/√d if None.
    """
    q, k = checks.finite("queries", queries), checks.finite("norms", norms)
    dim = q.shape[-1]
    factor = (dim**-0.5 if scaling is None else scaling) ** 2 * distortion / dim
    return factor / 2 * q.square().sum(-1, keepdim=True) * k.square().unsqueeze(-2)


def uniform_gain(queries: Tensor, steps: Tensor, scaling: float | None = None) -> Tensor:
    """log E exp(δs) [..., n, T] in nats, of errors uniform within ± steps/2 of each coordinate.

    Σ_c log(sinh x_c / x_c), x_c = scaling q_c Δ_jc / 2, of queries [..., n, d] and steps Δ [..., T, d]. Its
    second order Σ_c x_c² / 6 is too much for large x (D'Alberto, arXiv 2605.08114).
    """
    q, step = checks.finite("queries", queries), checks.finite("steps", steps)
    factor = q.shape[-1] ** -0.5 if scaling is None else scaling
    x = (factor / 2 * q.unsqueeze(-2) * step.unsqueeze(-3)).abs()
    # log sinh x = x + log(1 - e^-2x) - log 2 does not overflow; the ratio tends to 1 at zero
    small = x < 1e-4
    safe = torch.where(small, torch.ones_like(x), x)
    full = safe + torch.log(-torch.expm1(-2 * safe)) - math.log(2) - safe.log()
    return torch.where(small, x.square() / 6, full).sum(-1)

"""What attention loses, row by row: one query against the keys it sees, the last axis of every row.

Leading axes are free; keys, values and metrics have those of their queries or outputs, 1 where heads share
them, or none at all. Results are fp64. A key that a query does not see has score -inf and probability 0.
Shapes that do not fit, NaN and +inf raise ``KVSightError``. HeadQ is Ruiz Williams, arXiv 2605.03562v2.
"""

import torch
from torch import Tensor

from kvsight.distortion import checks
from kvsight.errors import KVSightError


def scores(
    queries: Tensor, keys: Tensor, scaling: float | None = None, softcap: float | None = None
) -> Tensor:
    """s_ij = scaling · q_i·k_j, [..., n, T] from [..., n, d] and [..., T, d]; scaling is 1/√d if None.

    With a softcap c it is c·tanh(s/c), as in Gemma 2 (arXiv 2408.00118).
    """
    _shared("keys", keys, (*queries.shape[:-2], -1, queries.shape[-1]), 2)
    q, k = checks.finite("queries", queries), checks.finite("keys", keys)
    s = q * (q.shape[-1] ** -0.5 if scaling is None else scaling) @ k.mT
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def score_error(s: Tensor, coded: Tensor) -> Tensor:
    """δs = ŝ − s [..., T], 0 at hidden keys; without a softcap δs_j = scaling · q·(k̂_j − k_j) (HeadQ)."""
    s, coded = _pair("scores", s, coded)
    hidden = torch.isneginf(s)
    if not torch.equal(hidden, torch.isneginf(coded)):
        raise KVSightError(
            "scores and coded scores hide different keys (-inf); both must hide the same. Mask both alike."
        )
    return (coded - s).masked_fill(hidden, 0.0)


def score_mse(ds: Tensor, visible: Tensor | None = None) -> Tensor:
    """Mean of δs_j² over the visible keys, [...] from [..., T]; visible [..., T] is bool, None = all."""
    ds = checks.finite("score errors", ds)
    if visible is None:
        return ds.square().mean(dim=-1)
    _same("score errors", ds, "visible", visible)
    return (ds.square() * visible).sum(dim=-1) / visible.sum(dim=-1)


def fisher(p: Tensor, ds: Tensor) -> Tensor:
    """I = δsᵀ(diag p − p pᵀ)δs = Σ_j p_j (δs_j − Σ_i p_i δs_i)² (HeadQ, eq. 4 and 6).

    A constant added to δs changes nothing, and KL(p‖p̂) = ½I + O(‖δs‖³).
    """
    _same("probabilities", p, "score errors", ds)
    p, ds = checks.finite("probabilities", p), checks.finite("score errors", ds)
    return (p * (ds - (p * ds).sum(dim=-1, keepdim=True)).square()).sum(dim=-1)


def attention_kl(log_p: Tensor, coded_log_p: Tensor) -> Tensor:
    """KL(p‖p̂) = Σ_j p_j (log p_j − log p̂_j) in nats, the reference first (HeadQ, §2); takes logarithms."""
    log_p, coded_log_p = _pair("log probabilities", log_p, coded_log_p)
    terms = log_p.exp() * (log_p - coded_log_p)
    return terms.masked_fill(torch.isneginf(log_p), 0.0).sum(dim=-1)


def l1_drift(p: Tensor, coded_p: Tensor) -> Tensor:
    """‖p − p̂‖₁, 0 to 2: twice the total variation (HeadQ)."""
    _same("probabilities", p, "coded probabilities", coded_p)
    return (checks.finite("coded probabilities", coded_p) - checks.finite("probabilities", p)).abs().sum(-1)


def score_gap(s: Tensor) -> Tensor:
    """s_(1) − s_(2): how far the best key's score is above the next one's; inf where one key is visible."""
    s = checks.scorelike("scores", s)
    if s.shape[-1] == 1:
        return torch.full_like(s[..., 0], torch.inf)
    best = s.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def route_flips(s: Tensor, coded: Tensor) -> Tensor:
    """Bool [...]: argmax_j ŝ_j ≠ argmax_j s_j (Salfati, arXiv 2604.11501, §3.2).

    Coarse codes make ties: a row whose old winner shares the first place has not flipped.
    """
    s, coded = _pair("scores", s, coded)
    winners = s == s.amax(dim=-1, keepdim=True)
    return coded.masked_fill(~winners, -torch.inf).amax(dim=-1) < coded.amax(dim=-1)


def output_mse(outputs: Tensor, coded: Tensor) -> Tensor:
    """‖ô − o‖² / d of attention outputs o = Σ_j p_j v_j, [...] from [..., d] (HeadQ)."""
    return _output_error(outputs, coded).square().mean(dim=-1)


def projected_error(outputs: Tensor, coded: Tensor, metric: Tensor) -> Tensor:
    """Σ_g ‖W_g (ô_g − o_g)‖², [..., n] from outputs [..., G, n, d] and W_gᵀW_g [..., G, d, d].

    What each head adds to the residual stream by itself: cross terms between heads are dropped.
    """
    error = _output_error(outputs, coded)
    if error.dim() < 3:
        raise KVSightError(
            f"wrong shape of outputs: got {tuple(error.shape)}; wanted [..., G, n, d] with a group. "
            "Add the group axis with unsqueeze."
        )
    _shared("output metric", metric, (*error.shape[:-2], error.shape[-1], error.shape[-1]), 3)
    return (error @ checks.finite("output metric", metric) * error).sum(dim=(-3, -1))


def output_metric(weight: Tensor, heads: int, group: int) -> Tensor:
    """W_gᵀW_g for every query head, [H, G, d, d], of an output projection [D, H·G·d] (torch's Linear)."""
    checks.rank("output projection", weight, "D, H·G·d")
    if heads < 1 or group < 1 or weight.shape[1] % (heads * group):
        raise KVSightError(
            f"an output projection {tuple(weight.shape)} has no equal columns for {heads} KV heads of "
            f"{group} query heads. Pass torch's Linear.weight, and the model's head counts."
        )
    columns = checks.finite("output projection", weight).T.reshape(heads, group, -1, weight.shape[0])
    return columns @ columns.mT


def value_distortion(p: Tensor, values: Tensor, coded: Tensor) -> Tensor:
    """Σ_j p_j² ‖v̂_j − v_j‖² / d, [..., n] from p [..., n, T] and values [..., T, d] (HeadQ, eq. 12 to 14).

    It is ‖Σ_j p_j (v̂_j − v_j)‖² / d without the cross terms: its mean when the errors are uncorrelated.
    """
    _same("values", values, "coded values", coded)
    _shared("values", values, (*p.shape[:-2], p.shape[-1], -1), 2)
    error = checks.finite("coded values", coded) - checks.finite("values", values)
    weights = checks.finite("probabilities", p).square()
    return (weights @ error.square().mean(dim=-1, keepdim=True)).squeeze(-1)


def _output_error(outputs: Tensor, coded: Tensor) -> Tensor:
    _same("outputs", outputs, "coded outputs", coded)
    return checks.finite("coded outputs", coded) - checks.finite("outputs", outputs)


def _pair(name: str, x: Tensor, coded: Tensor) -> tuple[Tensor, Tensor]:
    _same(name, x, f"coded {name}", coded)
    return checks.scorelike(name, x), checks.scorelike(f"coded {name}", coded)


def _same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    checks.shape(other, y, tuple(x.shape), f"that of the {name}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise KVSightError(
            f"wrong shape of {name}: got {tuple(x.shape)}; the last axis must not be 0. Pass whole rows."
        )


def _shared(name: str, x: Tensor, wanted: tuple[int, ...], own: int) -> None:
    """x has the wanted shape (-1 is free); its axes before the last ``own`` may be 1, or all left out."""
    lead, tail = tuple(x.shape[:-own]), tuple(x.shape[-own:])
    fits = len(lead) in (0, len(wanted) - own) and len(tail) == own
    fits = fits and all(have in (1, want) for have, want in zip(lead, wanted, strict=False))
    if not fits or any(want not in (-1, have) for have, want in zip(tail, wanted[-own:], strict=True)):
        raise KVSightError(
            f"wrong shape of {name}: got {tuple(x.shape)}; wanted {wanted}, 1 where heads share them. "
            "Add the group axis with unsqueeze."
        )

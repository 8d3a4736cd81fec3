"""Reverse water-filling: integer bits over coordinates of unequal variance (Cover & Thomas, §10.3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsight.errors import KVSightError


def reverse_water_fill(variances: Tensor, bits: int, distortion: Sequence[float]) -> tuple[int, ...]:
    """Widths 0..len(distortion)-1 that minimise Σ λ_i D(b_i) with Σ b_i = bits.

    Args:
        variances: [d], falling.
        bits: total bits to spend, at most d times the largest width.
        distortion: D(0), D(1), ...: convex and falling, so that taking the largest gains is optimal.
    """
    widest = len(distortion) - 1
    if not 0 <= bits <= widest * len(variances):
        raise KVSightError(
            f"cannot spend {bits} bits on {len(variances)} coordinates of at most {widest} bits."
        )
    gains = _gains(variances, distortion)
    # a stable sort of step-major gains: ties go to lower steps, then to earlier coordinates
    order = gains.T.flatten().sort(descending=True, stable=True).indices[:bits]
    widths = torch.bincount(order % len(variances), minlength=len(variances)).tolist()
    return tuple(sorted(widths, reverse=True))


def share_bytes(variances: Tensor, total: int, distortion: Sequence[float], unit: int = 1) -> list[int]:
    """Bytes per head, multiples of ``unit``: reverse water-filling over all heads [H, d], to the total.

    Each head gets at least one unit and at most what its widest codes take.
    """
    heads, dim = variances.shape
    widest = len(distortion) - 1
    most = dim * widest // (8 * unit)
    units = total // unit
    if not heads <= units <= heads * most:
        raise KVSightError(
            f"cannot share {total} bytes among {heads} heads of {unit} to {most * unit} bytes."
        )
    gains = _gains(variances, distortion)
    best = gains.flatten().sort(descending=True, stable=True).indices[: 8 * unit * units]
    filled = torch.bincount(best // (dim * widest), minlength=heads)
    wanted = (filled.double() / (8 * unit)).tolist()
    shares = [min(max(int(w), 1), most) for w in wanted]
    while sum(shares) != units:
        step = 1 if sum(shares) < units else -1
        open_to = [h for h in range(heads) if 1 <= shares[h] + step <= most]
        shares[max(open_to, key=lambda h: step * (wanted[h] - shares[h]))] += step
    return [unit * share for share in shares]


def row_widths(
    variances: Tensor, distortion: Sequence[float], chunk: int = 1, allowed: Sequence[int] | None = None
) -> Tensor:
    """Widths of every coordinate in rows of 0..d bytes, int64 [..., d + 1, d], falling within a row.

    Each row is reverse water-filling under two limits: ``chunk`` neighbours (a divisor of d) share a
    width, and widths are among ``allowed`` (rising, from 0). A row may then end some bits short.

    Args:
        variances: [..., d], falling.
    """
    dim = variances.shape[-1]
    steps = list(range(len(distortion))) if allowed is None else list(allowed)
    d = torch.tensor([distortion[w] for w in steps], dtype=torch.float64)
    growth = torch.tensor(steps).diff()
    shared = variances.double().unflatten(-1, (-1, chunk)).sum(-1)
    gains = shared.unsqueeze(-2) * ((d[:-1] - d[1:]) / growth).unsqueeze(-1)
    # step-major: ties go to lower steps, then to earlier coordinates
    order = gains.flatten(-2).sort(dim=-1, descending=True, stable=True).indices
    bits = (chunk * growth).repeat_interleave(shared.shape[-1]).expand(order.shape)
    spent = torch.empty_like(order).scatter_(-1, order, bits.gather(-1, order).cumsum(-1))
    taken = spent.unsqueeze(-2) <= 8 * torch.arange(dim + 1).unsqueeze(-1)
    level = taken.unflatten(-1, (len(growth), -1)).sum(-2)
    return torch.tensor(steps)[level].repeat_interleave(chunk, dim=-1)


def falling_gains(variances: Tensor, distortion: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Every step of reverse water-filling over coordinates [..., d], best first.

    Returns the coordinate that each step widens and its width after the step, [..., d·widest] each.
    """
    flat = _gains(variances, distortion).mT.flatten(-2)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    dim = variances.shape[-1]
    return order % dim, torch.div(order, dim, rounding_mode="floor") + 1


def tiers(log_weights: Tensor, widths: Sequence[int], counts: Sequence[Sequence[int]]) -> Tensor:
    """Which of ``widths`` every token gets, so that Σ_j w_j / (2^b_j - 1)² is least.

    That is the squared error of b_j bits over a fixed range; 4^-b, its limit, flatters one and two bits.

    Args:
        log_weights: [..., n] in nats; ties go to earlier tokens.
        widths: falling.
        counts: the allowed numbers of tokens of each width, n together (``Tiered.counts``).

    Returns: places in ``widths``, int64 [..., n].
    """
    order = log_weights.sort(dim=-1, descending=True, stable=True).indices
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).double().exp().gather(-1, order)
    sums = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    ends = torch.tensor(counts, device=weights.device).cumsum(-1)
    errors = torch.tensor([(2.0**w - 1) ** -2 for w in widths], dtype=torch.float64, device=weights.device)
    # heavier tokens never get less: a split is judged by where the tiers end
    of_tiers = sums[..., ends].diff(dim=-1, prepend=torch.zeros_like(sums[..., ends[:, :1]]))
    best = (of_tiers * errors).sum(-1).argmin(-1)
    rank = torch.arange(log_weights.shape[-1], device=weights.device)
    found = (rank.unsqueeze(-1) >= ends[best].unsqueeze(-2)).sum(-1)
    return torch.empty_like(order).scatter_(-1, order, found)


def _gains(variances: Tensor, distortion: Sequence[float]) -> Tensor:
    """What each next bit of each coordinate saves, [..., d, widest], fp64."""
    d = torch.tensor(distortion, dtype=torch.float64)
    return variances.double().unsqueeze(-1) * (d[:-1] - d[1:])

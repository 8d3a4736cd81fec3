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


def share_bytes(variances: Tensor, total: int, distortion: Sequence[float]) -> list[int]:
    """Whole bytes per head: reverse water-filling over all heads [H, d], rounded to the total.

    Each head gets at least one byte and at most what its widest codes take.
    """
    heads, dim = variances.shape
    widest = len(distortion) - 1
    most = dim * widest // 8
    if not heads <= total <= heads * most:
        raise KVSightError(f"cannot share {total} bytes among {heads} heads of 1 to {most} bytes.")
    gains = _gains(variances, distortion)
    best = gains.flatten().sort(descending=True, stable=True).indices[: 8 * total]
    wanted = (torch.bincount(best // (dim * widest), minlength=heads).double() / 8).tolist()
    shares = [min(max(int(w), 1), most) for w in wanted]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        open_to = [h for h in range(heads) if 1 <= shares[h] + step <= most]
        shares[max(open_to, key=lambda h: step * (wanted[h] - shares[h]))] += step
    return shares


def falling_gains(variances: Tensor, distortion: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Every step of reverse water-filling over coordinates [..., d], best first.

    Returns the coordinate that each step widens and its width after the step, [..., d·widest] each.
    """
    flat = _gains(variances, distortion).mT.flatten(-2)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    dim = variances.shape[-1]
    return order % dim, torch.div(order, dim, rounding_mode="floor") + 1


def _gains(variances: Tensor, distortion: Sequence[float]) -> Tensor:
    """What each next bit of each coordinate saves, [..., d, widest], fp64."""
    d = torch.tensor(distortion, dtype=torch.float64)
    return variances.double().unsqueeze(-1) * (d[:-1] - d[1:])

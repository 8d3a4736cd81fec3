"""KVQuant (arXiv 2401.18079): keys per channel before RoPE, values per token, outliers apart."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvsight.codec import Codec, Placement, joined
from kvsight.errors import KVSightError
from kvsight.formats import Format, Joined, Row, Scaled, Sparse
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.packing import MAX_WIDTH
from kvsight.quantizers.lloyd_max import RowQuantizer
from kvsight.quantizers.scaled import ScaledQuantizer, matched, normalise, signposts
from kvsight.quantizers.sparse import SparseQuantizer
from kvsight.stats import SideStats, before_rope
from kvsight.transforms import centre, identity, scale

ROPE = ("before", "after")
# numbers that a codebook is fitted to
_MOST = 1 << 18


def build(
    side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
) -> tuple[Placement, ...]:
    share, when = float(options["outliers"]), str(options["rope"])
    if not 0 <= share < 1:
        raise KVSightError(f"kvquant option 'outliers' is a share from 0 to below 1; got {share:g}.")
    if when not in ROPE:
        raise KVSightError(f"kvquant option 'rope' is one of {', '.join(ROPE)}; got {when!r}.")
    count = max(1, round(share * stats.dim)) if share else 0
    forms = [_format(side, stats.dim, bits, count) for bits in range(MAX_WIDTH, 0, -1)]
    bits = MAX_WIDTH - forms.index(budget.best(forms, "kvquant", stats.dim))
    turning = side == "k" and when == "before"
    rope, seen = (stats.rope, before_rope(stats)) if turning else (None, stats)
    fit = _keys if side == "k" else _values
    dense = fit(seen, bits, share, count, bool(options["qnorm"]))
    codec = dense
    if count:
        apart = Codec("kvquant", identity(stats.dim), SparseQuantizer(Sparse(stats.dim, count)))
        codec = joined("kvquant", dense, apart)
    codec = Codec("kvquant", codec.transform, codec.quantizer, rope)
    return (Placement(tuple(range(stats.heads)), codec),)


def _format(side: Side, dim: int, bits: int, count: int) -> Format:
    dense: Format = Row((bits,) * dim) if side == "k" else Scaled(dim, bits, count)
    return Joined((dense, Sparse(dim, count))) if count else dense


def _keys(stats: SideStats, bits: int, share: float, count: int, qnorm: bool) -> Codec:
    """Static offset and range of each channel, between its outliers; one codebook for the layer."""
    x = stats.sample.double()
    low, high = (_quantile(x, at) for at in (share / 2, 1 - share / 2))
    offset, reach = (low + high) / 2, (high - low) / 2
    # a channel that never changes has no range
    reach = torch.where(reach > 1e-20, reach, torch.ones_like(reach))
    unit = (x - offset.unsqueeze(1)) / reach.unsqueeze(1)
    levels = _codebook(unit, _weights(stats) * reach.unsqueeze(1).square(), bits, qnorm)
    starts = torch.zeros(1, stats.dim, dtype=torch.int32)
    quantizer = RowQuantizer(Row((bits,) * stats.dim), levels, starts)
    return Codec("kvquant", centre(offset).then(scale(reach)), quantizer)


def _values(stats: SideStats, bits: int, share: float, count: int, qnorm: bool) -> Codec:
    """Offset and range of each token; one codebook for the layer."""
    x = stats.sample.double()
    reach, zero = (part.double() for part in normalise(x, count))
    unit = (x - zero) / torch.where(reach > 0, reach, torch.ones_like(reach))
    levels = _codebook(unit, _weights(stats) * reach.square(), bits, qnorm)
    return Codec("kvquant", identity(stats.dim), ScaledQuantizer(Scaled(stats.dim, bits, count), levels))


def _codebook(unit: Tensor, weights: Tensor, bits: int, qnorm: bool) -> Tensor:
    """Signposts for what lies between the outliers, fp32 [2^bits]."""
    every = -(-unit.numel() // _MOST)
    x, w = (part.expand(unit.shape)[:, ::every].flatten() for part in (unit, weights))
    inside = (x.abs() <= 1) & (w > 0)
    if not bool(inside.any()):
        inside = torch.ones_like(inside)
        w = torch.ones_like(w)
    levels = signposts(x[inside], w[inside], bits)
    return (matched(levels, x[inside], w[inside]) if qnorm else levels).float()


def _weights(stats: SideStats) -> Tensor:
    """How much the loss depends on each sampled number, [H, n or 1, d].

    The squared gradient of a number, as far as it is known: the token's squared norm of gradients times
    the channel's share of Fisher information. Without gradients the read metric's diagonal, or one.
    """
    cost = stats.cost
    if cost is None:
        return torch.ones(stats.heads, 1, stats.dim, dtype=torch.float64)
    channels = cost.diagonal(dim1=-2, dim2=-1).clamp_min(0).unsqueeze(1)
    tokens = 1.0 if stats.salience is None else stats.salience.double().square().unsqueeze(-1)
    return channels * tokens


def _quantile(x: Tensor, at: float) -> Tensor:
    """Of the tokens of each channel, [H, d]: an order statistic, so that ties and few tokens are exact."""
    ordered = x.sort(dim=1).values
    return ordered[:, min(x.shape[1] - 1, round(at * (x.shape[1] - 1)))]


METHOD = Method(
    "kvquant",
    "keys per channel before RoPE, values per token, fitted non-uniform levels, sparse outliers",
    "KVQuant, arXiv 2401.18079",
    build,
    {"outliers": 0.01, "qnorm": False, "rope": "before"},
    gradients=True,
)

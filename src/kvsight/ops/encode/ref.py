"""Encoding rows in plain torch: the definition that kernels are judged against.

Centre, map, divide by the norm where one is stored, find the nearest level, pack. Kernels work in fp32,
this in fp64; codes agree except where a coordinate lies within fp32 rounding of a decision boundary:
nearer than 2^-20 (Σ_i |x_i - shift_i| |matrix_ij| / norm + the coordinate's largest boundary), the norm
being 1 where none is stored.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.formats import Row
from kvsight.packing import half, pack_row

# boundaries this close to evenly spaced, relative to the largest, are so: fp32 stores them no better
_STRAIGHT = 2.0**-22


@dataclass(frozen=True, eq=False)
class Rounding:
    """Decision boundaries of a row format.

    ``edges`` ascend in the last dimension and are filled up with inf: [H or 1, stored, K], or [K] where
    all coordinates share them.
    """

    format: Row
    edges: Tensor

    @cached_property
    def lines(self) -> tuple[Tensor, Tensor] | None:
        """First boundary and inverse spacing [H or 1, stored] fp32 where all are evenly spaced."""
        widths = [width for width in self.format.widths if width]
        if not widths:
            return None
        last = torch.tensor([2**width - 2 for width in widths]).unsqueeze(-1)
        edges = self.edges.double().cpu()
        edges = edges.expand(1 if edges.dim() == 1 else -1, len(widths), -1)
        index = torch.arange(edges.shape[-1]).expand(len(widths), -1)
        first = edges[..., :1]
        end = edges.gather(-1, last.expand(len(edges), -1, 1))
        # a single boundary may have any spacing
        step = torch.where(last > 0, (end - first) / last.clamp_min(1), 1.0)
        off = (edges - first - step * index).masked_fill(index > last, 0).abs().amax(-1, keepdim=True)
        straight = (off <= _STRAIGHT * torch.maximum(first.abs(), end.abs())) & (step > 0)
        if not bool(straight.all()):
            return None
        device = self.edges.device
        return first.squeeze(-1).float().to(device), (1 / step).squeeze(-1).float().to(device)


def rounding(format: Row, levels: Tensor, starts: Tensor) -> Rounding:
    """Midpoints between the levels of each stored coordinate: levels[starts[h, i]] and on."""
    widths = format.widths[: format.stored]
    most = 2 ** max(widths, default=0) - 1
    starts = starts.long()
    edges = levels.new_full((*starts.shape, most), torch.inf)
    for i, width in enumerate(widths):
        table = levels[starts[:, i, None] + torch.arange(2**width, device=levels.device)]
        edges[:, i, : 2**width - 1] = (table[:, 1:] + table[:, :-1]) / 2
    flat = edges.flatten(0, 1)
    same = len(flat) > 0 and bool((flat == flat[:1]).all())
    return Rounding(format, flat[0].contiguous() if same else edges)


def encode(x: Tensor, shift: Tensor | None, matrix: Tensor | None, rule: Rounding) -> tuple[Tensor, ...]:
    """[..., H, n, d] to rows [..., H, n, bytes] and, where the format has one, norms [..., H, n, 1].

    Coordinates are (x - shift) @ matrix; ``shift`` [H or 1, d] and ``matrix`` [H or 1, d, d] or None.
    """
    if shift is not None or matrix is not None:
        # products of a few or of many tokens round differently; in fp64 that does not reach the codes
        x = x.double()
    if shift is not None:
        x = x - shift.unsqueeze(-2).to(x)
    return quantize(x if matrix is None else x @ matrix.to(x), rule)


def quantize(y: Tensor, rule: Rounding) -> tuple[Tensor, ...]:
    """Coordinates [..., H, n, d] to what ``encode`` gives."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    norms: tuple[Tensor, ...] = ()
    if rule.format.norm:
        rms = half(y.square().mean(dim=-1, keepdim=True).sqrt())
        y = torch.where(rms > 0, y / rms.to(y), torch.zeros_like(y))
        norms = (rms,)
    codes = nearest(y[..., : rule.format.stored].float(), rule.edges)
    return pack_row(codes, rule.format.widths), *norms


def nearest(y: Tensor, edges: Tensor) -> Tensor:
    """Codes uint8 of stored coordinates [..., H, n, stored]: how many boundaries lie below each."""
    edges = edges.to(y)
    if edges.dim() == 1:
        return torch.bucketize(y.contiguous(), edges).to(torch.uint8)
    columns = y.movedim(-3, 0).movedim(-1, 1)
    flat = columns.flatten(2).contiguous()
    found = torch.searchsorted(edges.expand(len(flat), -1, -1).contiguous(), flat).to(torch.uint8)
    return found.view(columns.shape).movedim(1, -1).movedim(0, -3).contiguous()

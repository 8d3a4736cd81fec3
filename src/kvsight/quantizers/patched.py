"""Grouped integers, exact outliers, and a low-rank term for what is left (GEAR, arXiv 2403.05527)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsight.formats import Packed, Patched
from kvsight.packing import half, pack_row
from kvsight.quantizers.base import Tableless
from kvsight.quantizers.uniform import GroupedQuantizer

_LOOPS = 4
# a direction that holds less of the error than this is rounding, and is left out
_NOTHING = 1e-9


@dataclass(frozen=True)
class PatchedQuantizer(Tableless):
    """Outliers of a line are its smallest and largest numbers, half of each; the odd one is large."""

    format: Patched

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d]; n must be a multiple of ``format.block``."""
        form, y = self.format, y.double()
        index = self._outliers(y) if form.outliers else None
        # the mean of its line takes the place of an outlier
        base = GroupedQuantizer(form.base).encode(y if index is None else self._put(y, index, None))
        tensors = base.tensors
        if index is not None:
            exact = half(self._lines(y).gather(-1, index))
            widths = (form.index_bits,) * (form.lines * form.outliers)
            tensors += (pack_row(self._row(index).to(torch.uint8), widths), self._row(exact))
        if form.rank:
            error = y - base.read().double()
            # outliers are restored without it
            error = error if index is None else self._put(error, index, 0.0)
            left, right = low_rank(error.unflatten(-2, (-1, form.span)), form.rank)
            tensors += (half(left).flatten(-3, -2), half(right).flatten(-2))
        return Packed(form, tensors)

    def decode(self, packed: Packed) -> Tensor:
        """[..., H, n, d] in fp32."""
        return packed.read()

    def _outliers(self, y: Tensor) -> Tensor:
        """Places of the outliers in every line, rising, [..., outliers]."""
        lines, count = self._lines(y), self.format.outliers
        small, large = lines.topk(count // 2, largest=False), lines.topk(count - count // 2)
        return torch.cat([small.indices, large.indices], dim=-1).sort(dim=-1).values

    def _put(self, y: Tensor, index: Tensor, number: float | None) -> Tensor:
        """y with a number, or the mean of its line, at ``index``."""
        lines = self._lines(y)
        fill = lines.mean(-1, keepdim=True) if number is None else lines.new_full((1,), number)
        out = lines.scatter(-1, index, fill.expand(index.shape))
        return out.mT.flatten(-3, -2) if self.format.base.along == "token" else out

    def _row(self, found: Tensor) -> Tensor:
        """All lines of a stored row side by side."""
        return found.flatten(-2) if self.format.base.along == "token" else found

    def _lines(self, y: Tensor) -> Tensor:
        """[..., blocks, d, span] for channels, [..., n, d] for tokens."""
        if self.format.base.along == "channel":
            return y
        lines: Tensor = y.unflatten(-2, (-1, self.format.span)).mT
        return lines


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [..., n, rank] and right [..., rank, d] whose product is near the best of that rank.

    Power iteration from fixed directions, so that the same block gives the same bytes. Both factors
    carry the root of the singular value, which suits a narrow number type.
    """
    dim = error.shape[-1]
    n = torch.arange(dim, dtype=error.dtype, device=error.device)
    # cosines of all frequencies: orthogonal, and alike to no channel
    start = torch.cos(torch.pi * (n[:, None] + 0.5) * (n[None, :rank] + 1) / dim)
    basis = start.expand(*error.shape[:-2], -1, -1)
    for _ in range(_LOOPS):
        basis = torch.linalg.qr(error.mT @ (error @ basis)).Q
    # of both signs the one whose largest entry is positive
    largest = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0).to(basis)
    left = error @ basis
    size = left.norm(dim=-2, keepdim=True)
    kept = size > _NOTHING * error.norm(dim=(-2, -1)).unsqueeze(-1).unsqueeze(-1)
    root = torch.where(kept, size, torch.ones_like(size)).sqrt()
    zero = torch.zeros((), dtype=error.dtype, device=error.device)
    # -0 is another byte than 0
    return torch.where(kept, left / root, zero) + 0.0, torch.where(kept, basis * root, zero).mT + 0.0

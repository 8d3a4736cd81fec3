"""Asymmetric integers over groups, with an fp16 scale and zero point (KIVI, arXiv 2402.02750, §3).

code = round((x - min) / scale), scale = (max - min) / (2^b - 1), x̂ = code · scale + min. Scale and
minimum are rounded to fp16 *before* the codes are chosen, so the codes fit what is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Grouped, Packed
from kvsight.packing import pack_row

_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class GroupedQuantizer:
    """Groups along channels (per token) or along tokens (per channel, whole blocks)."""

    format: Grouped

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to codes and parameters; n must be a multiple of ``format.block``."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        groups = _group(y, self.format)
        low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
        zero = low.clamp(-_HALF_MAX, _HALF_MAX).half()
        scale = ((high - zero.to(y)) / (2**self.format.bits - 1)).clamp(0, _HALF_MAX).half()
        step = scale.to(y)
        safe = torch.where(step > 0, step, torch.ones_like(step))
        codes = ((groups - zero.to(y)) / safe).round().clamp(0, 2**self.format.bits - 1)
        codes = torch.where(step > 0, codes, torch.zeros_like(codes)).to(torch.uint8)
        rows = pack_row(_ungroup(codes, self.format), (self.format.bits,) * self.format.dim)
        return Packed(self.format, (rows, scale.squeeze(-1), zero.squeeze(-1)))

    def decode(self, packed: Packed) -> Tensor:
        """Codes and parameters to [..., H, n, d] in fp32."""
        return packed.read()

    def to(self, device: torch.device | str) -> Self:
        """Itself: there are no static tensors to move."""
        return self

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share it."""
        return self


def _group(y: Tensor, form: Grouped) -> Tensor:
    """[..., groups, members]: members in the last dimension, a ragged last group edge-padded."""
    if form.along == "token":
        blocks: Tensor = y.unflatten(-2, (-1, form.group))
        return blocks.transpose(-1, -2)
    missing = form.groups * form.group - form.dim
    if missing:
        y = torch.cat([y, y[..., -1:].expand(*y.shape[:-1], missing)], dim=-1)
    groups: Tensor = y.unflatten(-1, (form.groups, form.group))
    return groups


def _ungroup(groups: Tensor, form: Grouped) -> Tensor:
    if form.along == "token":
        return groups.transpose(-1, -2).flatten(-3, -2)
    return groups.flatten(-2)[..., : form.dim]

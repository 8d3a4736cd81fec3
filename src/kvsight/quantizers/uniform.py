"""Integers over groups, with an fp16 scale and mostly a zero point (KIVI, arXiv 2402.02750, §3).

code = round((x - min) / scale), scale = (max - min) / (levels - 1), x̂ = code · scale + min. Scale and
minimum are rounded to fp16 *before* the codes are chosen, so the codes fit what is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Affine, Packed, Symmetric
from kvsight.packing import half


@dataclass(frozen=True)
class GroupedQuantizer:
    """Groups along channels (per token) or along tokens (per channel, whole blocks).

    ``clip`` [1] is the share of the range that has levels; None is all of it.
    """

    format: Affine
    clip: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def guides(self) -> Mapping[str, Tensor]:
        return {} if self.clip is None else {"clip": self.clip}

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to codes and parameters; n must be a multiple of ``format.block``."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        groups = _group(y, self.format)
        low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
        if self.clip is not None:
            low, high = low * self.clip.to(low), high * self.clip.to(high)
        match self.format:
            case Symmetric(bits=bits):
                scale = half(torch.maximum(-low, high) / (2 ** (bits - 1) - 1))
                parameters: tuple[Tensor, ...] = (scale,)
                zero = -(scale.to(y) * 2 ** (bits - 1))
            case _:
                scale, start = span(low, high, self.format.levels)
                parameters = (scale, start)
                zero = start.to(y)
        codes = _ungroup(affine_codes(groups, scale.to(y), zero, self.format.levels), self.format)
        return Packed(self.format, (self.format.pack(codes), *(p.squeeze(-1) for p in parameters)))

    def decode(self, packed: Packed) -> Tensor:
        """Codes and parameters to [..., H, n, d] in fp32."""
        return packed.read()

    def to(self, device: torch.device | str) -> Self:
        """With its tensors on ``device``."""
        return self if self.clip is None else replace(self, clip=self.clip.to(device))

    def heads(self, index: Sequence[int]) -> Self:
        """Itself: all heads share it."""
        return self


def span(low: Tensor, high: Tensor, levels: int | Tensor) -> tuple[Tensor, Tensor]:
    """fp16 scale and zero that put ``levels`` levels from low to high."""
    zero = half(low)
    return half(((high - zero.to(low)) / (levels - 1)).clamp_min(0)), zero


def affine_codes(x: Tensor, step: Tensor, zero: Tensor, levels: int | Tensor) -> Tensor:
    """The nearest of zero, zero + step, ... as uint8; 0 where the step is 0."""
    safe = torch.where(step > 0, step, torch.ones_like(step))
    codes = ((x - zero) / safe).round().clamp_min(0)
    codes = (
        codes.clamp(max=levels - 1) if isinstance(levels, int) else torch.minimum(codes, (levels - 1).to(x))
    )
    return torch.where(step > 0, codes, torch.zeros_like(codes)).to(torch.uint8)


def _group(y: Tensor, form: Affine) -> Tensor:
    """[..., groups, members]: members in the last dimension, a ragged last group edge-padded."""
    if form.along == "token":
        blocks: Tensor = y.unflatten(-2, (-1, form.group))
        return blocks.transpose(-1, -2)
    missing = form.groups * form.group - form.dim
    if missing:
        y = torch.cat([y, y[..., -1:].expand(*y.shape[:-1], missing)], dim=-1)
    groups: Tensor = y.unflatten(-1, (form.groups, form.group))
    return groups


def _ungroup(groups: Tensor, form: Affine) -> Tensor:
    if form.along == "token":
        return groups.transpose(-1, -2).flatten(-3, -2)
    return groups.flatten(-2)[..., : form.dim]

"""Tokens of a block in tiers of unequal widths, by a weight that is known when they are coded.

The log weight of a token is linear · y + ½ ‖factor · y‖² + power · log(mean square of y). With the moments
of the queries it is the logarithm of the attention that a key would draw from Gaussian queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvsight.formats import Packed, Tiered
from kvsight.packing import half
from kvsight.quantizers.uniform import affine_codes, span
from kvsight.waterfill import tiers

# log weights of few or of many tokens round differently; on this grid that does not reach the tiers
_GRID = 2.0**16


@dataclass(frozen=True, eq=False)
class TieredQuantizer:
    """``linear`` [H or 1, d], ``factor`` [H or 1, r, d] with any r from 0, ``power`` [1]."""

    format: Tiered
    linear: Tensor
    factor: Tensor
    power: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def guides(self) -> Mapping[str, Tensor]:
        return {"linear": self.linear, "factor": self.factor, "power": self.power}

    @property
    def rounding(self) -> None:
        """None: ``encode`` takes coordinates."""

    def log_weights(self, y: Tensor) -> Tensor:
        """[..., H, n] in nats."""
        y = y.double()
        drawn = (y * self.linear.unsqueeze(-2).to(y)).sum(-1)
        drawn = drawn + (y @ self.factor.mT.to(y)).square().sum(-1) / 2
        size = y.square().mean(-1).clamp_min(torch.finfo(torch.float64).tiny).log()
        return ((drawn + self.power.to(y) * size) * _GRID).round() / _GRID

    def encode(self, y: Tensor) -> Packed:
        """[..., H, n, d] to codes, tags and parameters; n must be a multiple of ``format.span``."""
        form = self.format
        weights = self.log_weights(y).unflatten(-1, (-1, form.span))
        tags = tiers(weights, form.widths, form.counts)
        blocks = y.double().unflatten(-2, (-1, form.span))
        channel: tuple[Tensor, ...] = ()
        if form.scaled:
            factors = half(blocks.abs().amax(-2).sqrt())
            channel = (torch.where(factors > 0, factors, torch.ones_like(factors)),)
            blocks = blocks / channel[0].to(blocks).unsqueeze(-2)
        levels = 2 ** torch.tensor(form.widths, device=y.device)
        if form.along == "channel":
            low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
            scale, zero = span(low, high, levels[tags].unsqueeze(-1))
            scale, zero = scale.flatten(-3, -2), zero.flatten(-3, -2)
        else:
            low, high = _ranges(blocks, tags, len(form.widths))
            scale, zero = span(low, high, levels.unsqueeze(-1))
            scale, zero = scale.flatten(-2), zero.flatten(-2)
        steps, starts = form.of_tokens(scale, tags), form.of_tokens(zero, tags)
        codes = affine_codes(blocks, steps.to(blocks), starts.to(blocks), levels[tags].unsqueeze(-1))
        return Packed(form, (*form.pack(codes, tags), scale, zero, *channel))

    def decode(self, packed: Packed) -> Tensor:
        """[..., H, n, d] in fp32."""
        return packed.read()

    def to(self, device: torch.device | str) -> Self:
        """With its tensors on ``device``."""
        moved = (t.to(device) for t in self.guides.values())
        return type(self)(self.format, *moved)

    def heads(self, index: Sequence[int]) -> Self:
        """Weights of some of the heads; shared tensors stay shared."""

        def pick(t: Tensor) -> Tensor:
            return t if t.shape[0] == 1 else t[list(index)]

        return replace(self, linear=pick(self.linear), factor=pick(self.factor))


def _ranges(blocks: Tensor, tags: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Least and largest number of every channel in every tier, [..., blocks, tiers, d]; 0 of no tokens."""
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    for tier in range(count):
        own = (tags == tier).unsqueeze(-1)
        some = own.any(-2)
        lows.append(torch.where(some, torch.where(own, blocks, torch.inf).amin(-2), 0.0))
        highs.append(torch.where(some, torch.where(own, blocks, -torch.inf).amax(-2), 0.0))
    return torch.stack(lows, dim=-2), torch.stack(highs, dim=-2)

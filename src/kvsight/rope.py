"""RoPE as a codec needs it: keys turned back by their place in the cache, and forth again.

A cached key is R(p) k at position p. Turned back by its index j in the cache it is R(p - j) k: k itself
without left padding, and a constantly turned k with it. R is orthogonal, so what is coded there and
turned forth by j again has the same error, and no position ids are needed.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """(R(j) x)_i = x_i cos(j f_i) + x_partner(i) sin(j f_i), for every layout of pairs.

    ``frequencies`` [d] fp32, radians per token: -f and f for the two of a pair, 0 where nothing turns.
    ``partners`` [d] int32: the other coordinate of the pair.
    """

    frequencies: Tensor
    partners: Tensor

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """R(at) x for x [..., n, d] and integer indices ``at`` [n]."""
        angle = at.to(x.device, torch.float64).unsqueeze(-1) * self.frequencies.to(x.device).double()
        turned = x[..., self.partners.to(x.device).long()]
        return x * angle.cos().to(x) + turned * angle.sin().to(x)

    def turn_matrix(self, matrix: Tensor, at: Tensor) -> Tensor:
        """The mean of R(a) M R(a)ᵀ over indices ``at`` [n], fp64, for M [H, d, d]."""
        # rows, then columns, each index a token of its own
        rows = self.turn(matrix.double().unsqueeze(-2).expand(-1, -1, len(at), -1), at)
        return self.turn(rows.transpose(1, 3), at).mean(-2).mT

    def back(self, x: Tensor, first: int = 0) -> Tensor:
        """Keys [..., n, d] as they are cached from index ``first`` on, turned back by their index."""
        return self.turn(x, -torch.arange(first, first + x.shape[-2], device=x.device))

    def forth(self, x: Tensor, first: int = 0) -> Tensor:
        """The inverse of ``back``."""
        return self.turn(x, torch.arange(first, first + x.shape[-2], device=x.device))

    def to(self, device: torch.device | str) -> Self:
        return replace(self, frequencies=self.frequencies.to(device), partners=self.partners.to(device))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a plan file holds, by name."""
        return {"frequencies": self.frequencies, "partners": self.partners}


def pairs(frequencies: Tensor, dim: int, *, first: int = 0, interleaved: bool = False) -> Rope:
    """The rotation whose pair n turns by ``frequencies[n]`` per token.

    Pairs are neighbours (GPT-J) or lie half of the rotated coordinates apart (GPT-NeoX, Llama); the rotated
    coordinates begin at ``first``.
    """
    count = len(frequencies)
    n = torch.arange(count)
    low = first + (2 * n if interleaved else n)
    high = low + 1 if interleaved else low + count
    signed = torch.zeros(dim)
    partners = torch.arange(dim, dtype=torch.int32)
    signed[low], signed[high] = -frequencies.float(), frequencies.float()
    partners[low], partners[high] = high.int(), low.int()
    return Rope(signed, partners)

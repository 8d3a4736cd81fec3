"""Blocks of tokens of unequal bit widths: a tag per token, and the same bytes for every block."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.affine import Along
from kvsight.formats.base import Field, Format
from kvsight.packing import MAX_WIDTH, pack_row, packed_width, unpack_row

_LANE = 8


@dataclass(frozen=True)
class Tiered(Format):
    """Asymmetric integers whose width is the token's own: x = (code · scale + zero) · channel.

    A block has ``span`` tokens. Token j has ``widths[tag_j]`` bits per channel, and the widths of a block
    add up to ``total``, so all blocks have the same bytes. Rows lie in token order.
    ``along="channel"``: scale and zero for each token; ``scaled`` adds a factor for each channel.
    ``along="token"``: scale and zero for each channel and tier of a block.
    """

    dim: int
    span: int
    widths: tuple[int, ...]
    total: int
    along: Along
    scaled: bool = False

    def __post_init__(self) -> None:
        widths = self.widths
        if len(widths) not in (2, 3) or any(not 1 <= w <= MAX_WIDTH for w in widths):
            raise KVSightError(f"tiers are two or three widths from 1 to {MAX_WIDTH}; got {widths}.")
        if any(a <= b for a, b in pairwise(widths)):
            raise KVSightError(f"tiers fall from first to last; got {widths}.")
        if not self.counts:
            raise KVSightError(
                f"no {self.span} tokens of {', '.join(map(str, widths))} bits have {self.total} together."
            )

    @cached_property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """All ways to have ``span`` tokens of ``total`` bits: how many are in each tier."""
        first, *rest = self.widths
        if not rest[1:]:
            spare = self.total - rest[0] * self.span
            many, odd = divmod(spare, first - rest[0])
            return ((many, self.span - many),) if not odd and 0 <= many <= self.span else ()
        found: list[tuple[int, ...]] = []
        for many in range(self.span + 1):
            left, width = self.span - many, rest[0] - rest[1]
            some, odd = divmod(self.total - first * many - rest[1] * left, width)
            if not odd and 0 <= some <= left:
                found.append((many, some, left - some))
        return tuple(found)

    @property
    def mean(self) -> float:
        """Bits per channel of a token on average."""
        return self.total / self.span

    @property
    def name(self) -> str:
        return f"tiered-{'.'.join(map(str, self.widths))}b-{self.mean:g}-{self.along}{self.span}"

    @property
    def lanes(self) -> int:
        """Bytes of one token's row per bit of width; the last may be part empty."""
        return -(-self.dim // _LANE)

    @property
    def tag_bits(self) -> int:
        return 1 if len(self.widths) == 2 else 2

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        every = self.span if self.along == "token" else 1
        count = self.dim * len(self.widths) if self.along == "token" else 1
        tags = packed_width((self.tag_bits,) * self.span)
        fields = (
            Field("codes", torch.uint8, self.total * self.lanes, self.span),
            Field("tags", torch.uint8, tags, self.span, meta=True),
            Field("scale", torch.float16, count, every, meta=True),
            Field("zero", torch.float16, count, every, meta=True),
        )
        if not self.scaled:
            return fields
        return (*fields, Field("channel", torch.float16, self.dim, self.span, meta=True))

    def tags(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Tier of every token: int64 [..., blocks, span]."""
        return unpack_row(tensors[1], (self.tag_bits,) * self.span).long()

    def pack(self, codes: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [..., blocks, span, d] and tiers [..., blocks, span] to ``codes`` and ``tags``."""
        blocks = tags.flatten(0, -2)
        padded = torch.nn.functional.pad(codes.flatten(0, -3), (0, self.lanes * _LANE - self.dim))
        out = codes.new_empty(len(blocks) * self.total * self.lanes)
        for tier, width in enumerate(self.widths):
            own = blocks == tier
            out[self._places(blocks, tier)] = pack_row(padded[own], (width,) * padded.shape[-1])
        packed_tags = pack_row(tags.to(torch.uint8), (self.tag_bits,) * self.span)
        return out.view(*tags.shape[:-1], self.total * self.lanes), packed_tags

    def unpack(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Inverse of ``pack``."""
        tags = self.tags(tensors)
        blocks, rows = tags.flatten(0, -2), tensors[0].flatten()
        codes = rows.new_empty(*blocks.shape, self.dim)
        for tier, width in enumerate(self.widths):
            found = unpack_row(rows[self._places(blocks, tier)], (width,) * (self.lanes * _LANE))
            codes[blocks == tier] = found[..., : self.dim]
        return codes.view(*tags.shape, self.dim), tags

    def lattice(self, tensors: tuple[Tensor, ...], tags: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of every number, fp32, broadcast to [..., blocks, span, d]."""
        scale, zero = (self.of_tokens(tensor, tags) for tensor in tensors[2:4])
        if self.scaled:
            channel = tensors[4].float().unsqueeze(-2)
            return scale * channel, zero * channel
        return scale, zero

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        codes, tags = self.unpack(tensors)
        scale, zero = self.lattice(tensors, tags)
        return (codes.float() * scale + zero).flatten(-3, -2)

    def of_tokens(self, parameter: Tensor, tags: Tensor) -> Tensor:
        """Every token's share of a stored parameter: fp32 [..., blocks, span, 1 or d]."""
        if self.along == "channel":
            of_blocks: Tensor = parameter.float().unflatten(-2, (-1, self.span))
            return of_blocks
        of_tiers = parameter.float().unflatten(-1, (len(self.widths), self.dim))
        index = tags.unsqueeze(-1).expand(*tags.shape, self.dim)
        own: Tensor = of_tiers.gather(-2, index)
        return own

    def spec(self) -> dict[str, object]:
        return {
            "kind": "tiered",
            "dim": self.dim,
            "span": self.span,
            "widths": list(self.widths),
            "total": self.total,
            "along": self.along,
            "scaled": self.scaled,
        }

    def _places(self, tags: Tensor, tier: int) -> Tensor:
        """Bytes of the rows of one tier among all rows of blocks, [tokens of the tier, bytes of a row]."""
        sizes = torch.tensor([w * self.lanes for w in self.widths], device=tags.device)[tags]
        starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(tags.shape)
        own = torch.arange(self.widths[tier] * self.lanes, device=tags.device)
        return starts[tags == tier].unsqueeze(-1) + own

"""Kernels that a cache in tiles is about to launch, compiled while its first layers still run."""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Row
from kvsight.ops.attend.cuda import MOST_ROWS, attend_source, shape_of
from kvsight.ops.attend.prefill import columns_of, fused, number_of
from kvsight.ops.attend.tiles import tiled_widths
from kvsight.ops.attend.unpack import unpack_source
from kvsight.ops.builds import Source
from kvsight.ops.encode.tiles import encode_source, image_bytes, most_tiles, suited
from kvsight.ops.nvrtc import build_ahead
from kvsight.plan import LayerPlan, Plan, Side
from kvsight.tiling import Rows, Tiling

_ROWS: dict[Side, Rows] = {"k": "tokens", "v": "coordinates"}


class Ahead:
    """What all layers of a plan launch in this step and in the next, which has one new token.

    A launch that is not foreseen compiles its kernel itself.
    """

    def __init__(self, plan: Plan, query_heads: object, softcap: float | None) -> None:
        """For a model with so many query heads in every layer; not a number where that is not known."""
        self.plan, self.query_heads, self.softcap = plan, query_heads, softcap
        self._asked: set[tuple[torch.device, torch.dtype, int, int]] = set()

    def start(self, k: Tensor, *, reads_codes: bool) -> None:
        """Where layers are about to code tokens k [B, H, n, d]; ``reads_codes`` as in ``sources``."""
        if self._new(k, 1):
            build_ahead(self.sources(k, reads_codes=reads_codes), k.device)

    def step(self, k: Tensor) -> None:
        """Where layers are about to code a few tokens k [B, H, n, d], and to attend to all for them."""
        new = k.shape[2]
        if self._new(k, new):
            build_ahead(dict.fromkeys(self._step(k, new)), k.device)

    def _new(self, k: Tensor, tokens: int) -> bool:
        """Whether steps of so many new tokens were not asked for before."""
        asked = k.device, k.dtype, k.shape[0], tokens
        if not k.is_cuda or asked in self._asked:
            return False
        self._asked.add(asked)
        return True

    @cached_property
    def _layers(self) -> list[tuple[tuple[Tiling, ...], tuple[Tiling, ...]]]:
        return [sides for layer in self.plan.layers if (sides := _tilings(layer))]

    def sources(self, k: Tensor, *, reads_codes: bool) -> list[Source]:
        """In the order in which they are wanted; ``reads_codes`` where torch's attention does it now."""
        found = [_encode(k, k.shape[2], *sides) for sides in self._layers if k.shape[2]]
        if reads_codes:
            found += [self._unpack(k, *sides) for sides in self._layers]
        return list(dict.fromkeys(found + self._step(k, 1)))

    def _step(self, k: Tensor, new: int) -> list[Source]:
        found = [_encode(k, new, *sides) for sides in self._layers]
        return found + [source for sides in self._layers for source in self._attend(k.dtype, new, *sides)]

    def _unpack(self, k: Tensor, keys: tuple[Tiling, ...], values: tuple[Tiling, ...]) -> Source:
        columns = columns_of(*keys, *values)
        plain = self.softcap is not None or not fused(k, max(columns, k.shape[3]))
        return unpack_source(columns, number_of(k.dtype, plain=plain))

    def _attend(
        self, dtype: torch.dtype, new: int, keys: tuple[Tiling, ...], values: tuple[Tiling, ...]
    ) -> Iterator[Source]:
        # a config may have a number for each layer
        group = self.query_heads // len(keys) if isinstance(self.query_heads, int) else 0
        if not group:
            return
        # a launch that takes the queries that are left has this kernel, or that of one token
        rows = [group * min(new, MOST_ROWS // group)]
        if group > MOST_ROWS:
            rows = [MOST_ROWS, *([group % MOST_ROWS] if group % MOST_ROWS else [])]
        # the launch says what does not fit
        with suppress(KVSightError):
            for some in rows:
                yield attend_source(shape_of(keys, values, some, dtype, softcap=bool(self.softcap)))


def _encode(k: Tensor, new: int, keys: tuple[Tiling, ...], values: tuple[Tiling, ...]) -> Source:
    tiles, dim = 2 * len(keys) * k.shape[0] * most_tiles(new), k.shape[3]
    return encode_source(suited(tiles, dim, k.dtype, image_bytes(*keys, *values)), dim, k.dtype)


def _tilings(layer: LayerPlan) -> tuple[tuple[Tiling, ...], tuple[Tiling, ...]] | None:
    """Keys and values by head, as ``Tiles`` folds them; None for a layer that stays in rows.

    Levels are not looked at: where a layer has tiles, others of the plan do.
    """
    out: list[tuple[Tiling, ...]] = []
    for side, rows in _ROWS.items():
        tilings: dict[int, Tiling] = {}
        for placement in layer.side(side):
            form = placement.codec.format
            widths = tiled_widths(form) if isinstance(form, Row) else None
            if widths is None:
                return None
            tilings |= dict.fromkeys(placement.heads, Tiling(widths, rows))
        out.append(tuple(tilings[head] for head in sorted(tilings)))
    return out[0], out[1]

"""What the tile encoder wants of a layer's codecs, and its launch on NVIDIA GPUs.

Centring, the map to coordinates, the lowest level and the step of evenly spaced codebooks make one affine
map: a code is the nearest integer to it, halfway down, within its width. The kernel computes in fp32, so a
code can differ by one from the reference's, which computes in fp64, where the number lies within fp32
rounding of the middle between two levels.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvsight.ops.attend.ref import Coded
from kvsight.ops.attend.tiles import most_blocks, steps, tiling_of
from kvsight.ops.nvrtc import NUMBERS, NUMBERS_SOURCE, compiled
from kvsight.tiling import CHUNK, TOKENS, Rows, Tiling

SOURCES = (NUMBERS_SOURCE, Path(__file__).with_name("tiles.cu"))
_BATCH = 4
_THREADS = 128


@dataclass(frozen=True, eq=False)
class Encoder:
    """The forward map of some heads: ``coded`` says how codes lie, y = (x - shift) @ matrix what they code.

    ``matrix`` [H or 1, d, d] or None, ``shift`` [H or 1, d] or None.
    """

    coded: Coded
    matrix: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True, eq=False)
class FoldedEncoder:
    """One side of a layer: codes are x @ map[h] + shift[h], rounded; [H, d, d] and [H, d], fp32."""

    tilings: tuple[Tiling, ...]
    map: Tensor
    shift: Tensor


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "heads", "map", "shift")),
        *((name, ctypes.c_longlong) for name in ("batch", "head", "token")),
    )


class Arguments(ctypes.Structure):
    """The kernel's one argument."""

    _fields_ = (
        ("sides", _Side * 2),
        ("seen", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("first", ctypes.c_int),
    )


def fold_encoder(parts: Sequence[Encoder], rows: Rows) -> FoldedEncoder:
    """Fold the codecs of all heads of one side. Raises ``KVSightError`` for heads that have no tiles."""
    heads = {head: (part, i) for part in parts for i, head in enumerate(part.coded.heads)}
    tilings = {id(part): tiling_of(part.coded, rows) for part in parts}
    maps, shifts = zip(*(_fold_head(*heads[head]) for head in sorted(heads)), strict=True)
    order = tuple(tilings[id(heads[head][0])] for head in sorted(heads))
    return FoldedEncoder(order, torch.stack(maps), torch.stack(shifts))


def _fold_head(part: Encoder, head: int) -> tuple[Tensor, Tensor]:
    found = steps(part.coded)
    assert found is not None
    first, step = (t[min(head, len(t) - 1)] for t in found)
    dim = part.coded.packed.format.dim
    matrix = torch.eye(dim, dtype=torch.float64, device=first.device)
    if part.matrix is not None:
        matrix = part.matrix[min(head, len(part.matrix) - 1)].to(first)
    centre = matrix.new_zeros(dim) if part.shift is None else part.shift[min(head, len(part.shift) - 1)]
    stored = len(step)
    folded, shift = matrix.new_zeros(dim, dim), matrix.new_zeros(dim)
    folded[:, :stored] = matrix[:, :stored] / step
    shift[:stored] = -(centre.to(first) @ matrix[:, :stored] + first) / step
    return folded.float(), shift.float()


@dataclass(frozen=True, eq=False)
class TileWriter:
    """A launch that codes new tokens of one layer into its tiles, ready to be queued again and again."""

    sides: tuple[FoldedEncoder, FoldedEncoder]
    heads: tuple[Tensor, Tensor]
    blocks: int

    @classmethod
    def of(
        cls,
        keys: FoldedEncoder,
        values: FoldedEncoder,
        key_tiles: Sequence[Tensor],
        value_tiles: Sequence[Tensor],
    ) -> "TileWriter":
        """Into tiles [B, n, nbytes] of each head."""
        blocks = max(most_blocks(keys.tilings), most_blocks(values.tilings))
        heads = (_heads(keys, key_tiles, blocks), _heads(values, value_tiles, blocks))
        return cls((keys, values), heads, blocks)

    def macros(self, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        dim = self.sides[0].map.shape[-1]
        return (("HEAD_DIM", dim), ("BLOCKS", self.blocks), ("NUMBER", NUMBERS[dtype]))

    def grid(self, batch: int) -> tuple[int, int, int]:
        return 2 * len(self.sides[0].tilings), batch, 1

    def arguments(self, k: Tensor, v: Tensor, seen: Tensor, first: int) -> Arguments:
        """For new tokens [B, H, n, d], contiguous in d; ``seen`` int32 [1] counts them already."""
        sides = [
            _Side(
                x.data_ptr(), heads.data_ptr(), side.map.data_ptr(), side.shift.data_ptr(), *x.stride()[:3]
            )
            for x, heads, side in zip((k, v), self.heads, self.sides, strict=True)
        ]
        return Arguments((_Side * 2)(*sides), seen.data_ptr(), k.shape[2], first)

    def write(self, k: Tensor, v: Tensor, seen: Tensor, first: int) -> None:
        """Queue it on the current stream."""
        kernel = compiled(SOURCES, "encode_tiles", self.macros(k.dtype), 0)
        kernel.launch(self.grid(k.shape[0]), _THREADS, self.arguments(k, v, seen, first))


def shared_bytes(dim: int) -> int:
    """Shared memory of a block."""
    return _BATCH * dim * 5


def _heads(side: FoldedEncoder, tiles: Sequence[Tensor], blocks: int) -> Tensor:
    """The kernel's ``Head`` of every KV head, int64 words."""
    rows: list[list[int]] = []
    for tiling, own in zip(side.tilings, tiles, strict=True):
        sizes = [block.size for block in tiling.blocks]
        pieces = [
            CHUNK * block.chunk | block.low << 8 | (2 ** tiling.widths[block.chunk] - 1) << 16
            for block in tiling.blocks
        ]
        halves = [sizes.count(4), sizes.count(2), sizes.count(1), tiling.stored, *pieces]
        halves += [0] * (4 + blocks + blocks % 2 - len(halves))
        words = [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]
        rows.append([own.data_ptr(), own.stride(0), *words])
    return torch.tensor(rows, dtype=torch.int64, device=tiles[0].device)


def write_tiles_ref(
    sides: tuple[FoldedEncoder, FoldedEncoder],
    tiles: tuple[Sequence[Tensor], Sequence[Tensor]],
    k: Tensor,
    v: Tensor,
    at: int,
) -> None:
    """``TileWriter.write`` in plain torch: tokens [B, H, n, d] become coded tokens ``at`` and behind."""
    from_tile, to_tile = at // TOKENS, -(-(at + k.shape[2]) // TOKENS)
    for side, own, x in zip(sides, tiles, (k, v), strict=True):
        for head, (tiling, held) in enumerate(zip(side.tilings, own, strict=True)):
            real = x[:, head].to(side.map) @ side.map[head] + side.shift[head]
            limits = [2**width - 1 for width in tiling.widths if width for _ in range(CHUNK)]
            most = torch.tensor(limits, device=x.device, dtype=real.dtype)
            new = (real[..., : tiling.stored] - 0.5).ceil().clamp_min(0).minimum(most).to(torch.uint8)
            codes = tiling.unpack(held[:, from_tile:to_tile])
            start = at - from_tile * TOKENS
            codes[:, start : start + new.shape[1]] = new
            held[:, from_tile:to_tile] = tiling.pack(codes)

"""Tiles to centred codes, which torch's attention reads: ``unpack.cu`` on NVIDIA GPUs, else plain torch.

A centred code is a code minus the middle of its range: at most 127.5, and a multiple of one half, so that
bf16 and fp16 hold it exactly.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvsight.ops.attend.tiles import middles
from kvsight.ops.builds import Source
from kvsight.ops.nvrtc import NUMBERS, NUMBERS_SOURCE, compiled
from kvsight.tiling import CHUNK, TOKENS, Tiling, lane_bytes

SOURCES = (NUMBERS_SOURCE, Path(__file__).with_name("unpack.cu"))
_THREADS = 128
_LANES = 32
_LEFT_OVER = 15


class Arguments(ctypes.Structure):
    """The kernel's one argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("heads", "out")),
        *((name, ctypes.c_int) for name in ("sequence", "first", "count", "head_count", "by_token")),
    )


@dataclass(frozen=True, eq=False)
class Unpacker:
    """Tiles of one side while they stay where they are: uint8 [B, n, nbytes] of each head.

    ``columns`` are at least the stored coordinates of any head, a multiple of 16; ``table`` is the kernel's
    ``Head`` of every head.
    """

    tilings: tuple[Tiling, ...]
    tiles: tuple[Tensor, ...]
    columns: int
    table: Tensor

    @classmethod
    def of(cls, tilings: Sequence[Tiling], tiles: Sequence[Tensor], columns: int) -> "Unpacker":
        return cls(tuple(tilings), tuple(tiles), columns, _table(tilings, tiles, columns))

    def codes(self, own: slice, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Centred codes [B, H, 64 · count, columns] of ``count`` tiles from ``first`` on.

        ``own`` are the sequences; columns behind a head's stored coordinates are zeros.
        """
        if not (self.table.is_cuda and dtype in NUMBERS):
            tiles = [held[own] for held in self.tiles]
            return unpack_ref(self.tilings, tiles, first, count, self.columns, dtype)
        grid = self.grid(own, count)
        shape = grid[2], grid[1], TOKENS * count, self.columns
        out = torch.empty(shape, dtype=dtype, device=self.table.device)
        kernel = compiled(unpack_source(self.columns, dtype), 0, out.device)
        kernel.launch(grid, _THREADS, self.arguments(out, own, first, count))
        return out

    def grid(self, own: slice, count: int) -> tuple[int, int, int]:
        return count, len(self.tiles), len(range(*own.indices(len(self.tiles[0]))))

    def arguments(self, out: Tensor, own: slice, first: int, count: int) -> Arguments:
        """For ``out`` as ``codes`` gives it."""
        sequence, by_token = own.start or 0, self.tilings[0].rows == "tokens"
        pointers = self.table.data_ptr(), out.data_ptr()
        return Arguments(*pointers, sequence, first, count, len(self.tilings), by_token)


def unpack_source(columns: int, dtype: torch.dtype) -> Source:
    """The kernel that gives ``Unpacker.codes``."""
    return Source(SOURCES, "unpack_tiles", (("COLUMNS", columns), ("NUMBER", NUMBERS[dtype])))


def unpack_ref(
    tilings: Sequence[Tiling],
    tiles: Sequence[Tensor],
    first: int,
    count: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """``Unpacker.codes`` of all sequences in plain torch."""
    shape = len(tiles[0]), len(tiles), TOKENS * count, columns
    out = torch.zeros(shape, dtype=dtype, device=tiles[0].device)
    for head, (tiling, own) in enumerate(zip(tilings, tiles, strict=True)):
        codes = tiling.unpack(own[:, first : first + count]).to(dtype)
        out[:, head, :, : tiling.stored] = codes - middles(tiling, tiling.stored).to(codes)
    return out


def shared_bytes(columns: int) -> int:
    """Shared memory of a block."""
    words = TOKENS * columns // 4
    return 4 * (words + words // 128 + 1)


def _table(tilings: Sequence[Tiling], tiles: Sequence[Tensor], columns: int) -> Tensor:
    """The kernel's ``Head`` of every KV head, int64 words."""
    rows: list[list[int]] = []
    for tiling, own in zip(tilings, tiles, strict=True):
        pairs = [low | high << 32 for low, high in _pieces(tiling, columns // CHUNK)]
        rows.append([own.data_ptr(), own.stride(0), tiling.nbytes // 4, *pairs])
    return torch.tensor(rows, dtype=torch.int64, device=tiles[0].device)


def _pieces(tiling: Tiling, chunks: int) -> list[tuple[int, int]]:
    """Two pieces of every chunk as the kernel wants them; zero for none."""
    found: list[list[int]] = [[] for _ in range(chunks)]
    start = 0
    for group in tiling.groups:
        for block in group:
            slot = _LEFT_OVER if block.slot is None else block.slot
            found[block.chunk].append(block.size | block.low << 4 | slot << 8 | start // 128 << 16)
        start += _LANES * lane_bytes(group)
    return [(own[0] if own else 0, own[1] if len(own) > 1 else 0) for own in found]

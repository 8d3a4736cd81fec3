"""Tiles to centred codes, which torch's attention reads: ``unpack.cu`` on NVIDIA GPUs, else plain torch.

A centred code is a code minus the middle of its range: at most 127.5, and a multiple of one half, so that
bf16 and fp16 hold it exactly.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

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
        *((name, ctypes.c_int) for name in ("first", "count", "head_count", "by_token")),
    )


def unpack(
    tilings: Sequence[Tiling],
    tiles: Sequence[Tensor],
    first: int,
    count: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Centred codes [B, H, 64 · count, columns] of ``count`` tiles from ``first`` on.

    Args:
        tilings, tiles: of each head; uint8 [B, n, nbytes], tiles of a sequence one behind another.
        columns: at least the stored coordinates of any head, a multiple of 16; the others are zeros.
    """
    if not (tiles[0].is_cuda and dtype in NUMBERS):
        return unpack_ref(tilings, tiles, first, count, columns, dtype)
    batch, heads = len(tiles[0]), head_table(tilings, tiles, columns)
    out = torch.empty(batch, len(tiles), TOKENS * count, columns, dtype=dtype, device=tiles[0].device)
    kernel = compiled(SOURCES, "unpack_tiles", macros(columns, dtype), 0)
    kernel.launch(grid(tiles, count), _THREADS, arguments(tilings, heads, out, first, count))
    return out


def unpack_ref(
    tilings: Sequence[Tiling],
    tiles: Sequence[Tensor],
    first: int,
    count: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """``unpack`` in plain torch."""
    shape = len(tiles[0]), len(tiles), TOKENS * count, columns
    out = torch.zeros(shape, dtype=dtype, device=tiles[0].device)
    for head, (tiling, own) in enumerate(zip(tilings, tiles, strict=True)):
        codes = tiling.unpack(own[:, first : first + count]).to(dtype)
        out[:, head, :, : tiling.stored] = codes - middles(tiling, tiling.stored).to(codes)
    return out


def middles(tiling: Tiling, columns: int) -> Tensor:
    """The middle of every coordinate's codes [columns], fp64; zero for those without bits."""
    widths = [width for width in tiling.widths if width for _ in range(CHUNK)]
    found = [(2**width - 1) / 2 for width in widths]
    return torch.tensor(found + [0.0] * (columns - len(found)), dtype=torch.float64)


def macros(columns: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return (("COLUMNS", columns), ("NUMBER", NUMBERS[dtype]))


def grid(tiles: Sequence[Tensor], count: int) -> tuple[int, int, int]:
    return count, len(tiles), len(tiles[0])


def shared_bytes(columns: int) -> int:
    """Shared memory of a block."""
    words = TOKENS * columns // 4
    return 4 * (words + words // 128 + 1)


def arguments(tilings: Sequence[Tiling], heads: Tensor, out: Tensor, first: int, count: int) -> Arguments:
    """For ``out`` as ``unpack`` gives it and ``heads`` as ``head_table`` does."""
    by_token = tilings[0].rows == "tokens"
    return Arguments(heads.data_ptr(), out.data_ptr(), first, count, len(tilings), by_token)


def head_table(tilings: Sequence[Tiling], tiles: Sequence[Tensor], columns: int) -> Tensor:
    """The kernel's ``Head`` of every KV head, int64 words."""
    rows: list[list[int]] = []
    for tiling, own in zip(tilings, tiles, strict=True):
        pieces = _pieces(tiling, columns // CHUNK)
        pairs = [low | high << 32 for low, high in pieces]
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

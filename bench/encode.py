"""Coding keys and values on one CUDA device: bytes read and written per second, against a device copy.

Rows are coded by torch or Triton; tiles in place, by one launch for K and V of a layer, with a few tokens
(decoding) or many (prefill). Codes of many are first held to the plain-torch twin, in poisoned tiles.

    python bench/encode.py --json bench/results/encode-h200.json
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from attend import Case, cold, copy_bandwidth, head_widths, setting
from common import write
from torch import Tensor

from kvsight.cache.side import SideState, append, start
from kvsight.cache.tiles import Tiles
from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.ops.encode import encode
from kvsight.ops.encode.tiles import TileWriter, many_tokens, write_tiles_ref
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.retention import Retention
from kvsight.tiling import TOKENS
from kvsight.transforms import haar


def once(work: Callable[..., object], *args: object) -> object:
    """``work`` on everything but the number of the turn, which comes last."""
    return work(*args[:-1])


def rows(case: Case, bits: float, backend: str) -> dict[str, Any]:
    """All heads' keys of ``case``, each with widths of its own."""
    x = torch.randn(case.batch, 1, case.context, case.dim, device="cuda", dtype=torch.bfloat16)
    moved = ms = 0.0
    for widths, _ in head_widths(case, bits, 2)[: case.heads]:
        codec = Codec("sight", haar(case.dim, 1).stored(), row_quantizer(widths, uniform)).to("cuda")
        rule, matrix = codec.quantizer.rounding, codec.transform.matrix
        assert rule is not None
        wide = x.double() if backend == "ref" else x
        ms += cold(partial(once, encode, wide, None, matrix, rule, backend), 5)
        moved += x.nbytes + case.batch * codec.format.nbytes(case.context)
    return {"ms": ms, "TB/s": moved / ms * 1e-9}


def states(case: Case, bits: float, tokens: int) -> tuple[SideState, SideState]:
    found: list[SideState] = []
    for first in (0, case.heads):
        placements = tuple(
            Placement((h,), Codec("sight", haar(case.dim, h).stored(), row_quantizer(widths, uniform)))
            for h, (widths, _) in enumerate(head_widths(case, bits, 2)[first : first + case.heads])
        )
        x = torch.randn(case.batch, case.heads, tokens, case.dim, device="cuda", dtype=torch.bfloat16)
        found.append(append(start(placements, Retention(0, 0), torch.bfloat16, x[:, :, :0]), x))
    return found[0], found[1]


def in_place(case: Case, bits: float, new: int) -> dict[str, Any]:
    """One launch for K and V of a layer: time, and what it must at least read and write."""
    tiles = Tiles(*states(case, bits, 128))
    k, v = (
        torch.randn(case.batch, case.heads, new, case.dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    tiles.append(k, v)
    seen = tiles.seen.clone()
    writer = tiles._writer
    assert writer is not None
    ms = cold(lambda i: writer.write(k, v, seen, 0))
    maps = sum(operands.nbytes for operands in writer.operands)
    return {"ms": ms, "TB/s": (2 * k.nbytes + maps) / ms * 1e-9}


def error(
    writer: TileWriter, tiles: tuple[Sequence[Tensor], Sequence[Tensor]], k: Tensor, v: Tensor
) -> float:
    """Share of codes that differ from the twin's, by one; raises where more is wrong."""
    at, count = 37, k.shape[2] - 64
    seen = torch.tensor([at + count], dtype=torch.int32, device="cuda")
    for tile in chain(*tiles):
        tile.fill_(0xA5)
    twins = tuple([tile.clone() for tile in side] for side in tiles)
    new = k[:, :, :count], v[:, :, :count]
    writer.write(*new, seen, 0)
    write_tiles_ref(writer.sides, (twins[0], twins[1]), *new, at)
    wrong = total = 0
    for side, own, wanted in zip(writer.sides, tiles, twins, strict=True):
        for tiling, tile, twin in zip(side.tilings, own, wanted, strict=True):
            apart = tiling.unpack(tile[:2]).int() - tiling.unpack(twin[:2]).int()
            if apart.abs().max() > 1 or apart[:, :at].any() or apart[:, at + count :].any():
                raise SystemExit("tiles are wrong")
            wrong += int(apart.count_nonzero())
            total += apart.numel()
    if wrong > 1e-3 * total:
        raise SystemExit(f"{wrong / total:.1e} of the codes differ")
    return wrong / total


def filled(case: Case, bits: float, options: dict[str, int]) -> dict[str, Any]:
    """All tokens of ``case`` at once: time, bytes of tokens and map read and of tiles written."""
    encoders = Tiles(*states(case, bits, 128)).encoders
    rooms = [[tiling.nbytes for tiling in side.tilings] for side in encoders]
    shape = (case.batch, case.context // TOKENS)
    tiles = [[torch.empty(*shape, n, dtype=torch.uint8, device="cuda") for n in room] for room in rooms]
    writer = TileWriter.of(*encoders, tiles[0], tiles[1], torch.bfloat16)
    size = (case.batch, case.heads, case.context, case.dim)
    k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wrong = error(writer, (tiles[0], tiles[1]), k, v)
    seen = torch.tensor([case.context], dtype=torch.int32, device="cuda")
    form = replace(many_tokens(case.dim, k.dtype, writer.image), **options)
    ms = cold(lambda i: writer.write(k, v, seen, 0, form))
    moved = 2 * k.nbytes + sum(t.nbytes for side in tiles for t in side)
    moved += sum(operands.nbytes for operands in writer.operands)
    return {"bits": bits, "codes off": wrong, "ms": ms, "TB/s": moved / ms * 1e-9}


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in (Case(8, 8192), Case(1, 32768), Case(8, 512)):
        for bits in (4.0, 3.0, 2.0):
            row = filled(case, bits, dict(args.shape))
            yield {"what": "tiles, many", "tokens": case.batch * case.context, **row}
    for batch, new in ((1, 1), (8, 1), (32, 1), (8, 16)):
        row = in_place(Case(batch, 128), args.bits, new)
        yield {"what": "tiles in place", "tokens": batch * new, **row}
    for backend in () if args.skip_rows else ("ref", "triton"):
        case = Case(8, 8192)
        try:
            row = rows(case, args.bits, backend)
        except KVSightError as error:
            row = {"refused": str(error)}
        yield {"what": f"rows, {backend}", "tokens": case.batch * case.context, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--bits", type=float, default=4.0, help="of rows, and of a few tokens")
    parser.add_argument("--skip-rows", action="store_true")
    parser.add_argument(
        "--shape", type=setting, nargs="*", default=[], help="of the launch for many, such as warps=16"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    copy = copy_bandwidth()
    found: list[dict[str, Any]] = []
    for row in measured(args):
        share = f" ({row['TB/s'] / copy:.1%} of copy)" if "TB/s" in row else ""
        print({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}, share, flush=True)
        found.append(row)
    write({"device": torch.cuda.get_device_name(), "copy TB/s": copy, "rows": found}, args.json)


if __name__ == "__main__":
    main()

"""Coding keys and values on one CUDA device: bytes read and written per second, against a device copy.

Many tokens at once (prefill) are coded in rows; a few (decoding) go into tiles in place.

    python bench/encode.py --json bench/results/encode-h200.json
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attend import Case, cold, copy_bandwidth, head_widths
from common import write

from kvsight.cache.side import SideState, append, start
from kvsight.cache.tiles import Tiles
from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.ops.encode import encode
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.retention import Retention
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
    maps = sum(side.map.nbytes for side in writer.sides)
    return {"ms": ms, "TB/s": (2 * k.nbytes + maps) / ms * 1e-9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--bits", type=float, default=4.0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    copy = copy_bandwidth()
    found: list[dict[str, Any]] = []
    for backend in ("ref", "triton"):
        case = Case(8, 8192)
        try:
            row = rows(case, args.bits, backend)
        except KVSightError as error:
            row = {"refused": str(error)}
        found.append({"what": f"rows, {backend}", "tokens": case.batch * case.context, **row})
    for batch, new in ((1, 1), (8, 1), (32, 1), (8, 16)):
        row = in_place(Case(batch, 128), args.bits, new)
        found.append({"what": "tiles in place", "tokens": batch * new, **row})
    for row in found:
        share = f" ({row['TB/s'] / copy:.1%} of copy)" if "TB/s" in row else ""
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, share, flush=True)
    write({"device": torch.cuda.get_device_name(), "copy TB/s": copy, "rows": found}, args.json)


if __name__ == "__main__":
    main()

"""Decode attention on tiles against the best BF16 kernel of torch, on one CUDA device.

Every case is first held to its definition in fp64: fresh codes, poisoned output, two runs equal. Then it
is timed with a cold L2 cache (a buffer larger than it is written before every launch, or only read:
"clean") and launch included.
Heads have widths of their own, as an allocation gives them: a budget is spent over spectra that fall at a
different speed in every head.

    python bench/attend.py --json bench/results/attend-h200.json
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import milliseconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvsight.formats import Packed, Row
from kvsight.ops.attend.cuda import TiledTokens, TileReader, attend_tiles, token_ranges
from kvsight.ops.attend.ref import Coded, Folded
from kvsight.ops.attend.tiles import FoldedTiles, fold
from kvsight.ops.attend.tiles_ref import attend_tiles_ref
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.tiling import TOKENS, WIDTHS
from kvsight.transforms import haar
from kvsight.waterfill import row_widths, share_bytes

DISTORTION = [1.0, *(uniform(bits).distortion for bits in range(1, 9))]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FLUSH = 512 << 20
# other head_dims, groups and multi-head attention, of about the bytes of 8 x 32,768 at most
OTHERS = (
    *(f"8x32768x8x4x{dim}" for dim in (64, 80, 96)),
    "8x16384x8x4x256",
    "8x8192x32x1x128",
    *(f"8x32768x8x{group}x128" for group in (1, 2, 8, 16)),
)


@dataclass(frozen=True)
class Case:
    batch: int
    context: int
    heads: int = 8
    group: int = 4
    dim: int = 128


def head_widths(case: Case, bits: float, seed: int) -> list[tuple[tuple[int, ...], Tensor]]:
    """Widths and variances of all heads, keys first, that share ``bits`` per element."""
    draw = torch.Generator().manual_seed(seed)
    speed = torch.rand(2 * case.heads, 1, generator=draw, dtype=torch.float64) * 5 + 2
    level = torch.randn(2 * case.heads, 1, generator=draw, dtype=torch.float64)
    variances = torch.exp(level - speed * torch.arange(case.dim) / case.dim)
    sizes = share_bytes(variances, int(bits * variances.numel() / 8), DISTORTION, 2)
    menu = row_widths(variances, DISTORTION, 16, WIDTHS)
    return [(tuple(menu[i, size].tolist()), variances[i]) for i, size in enumerate(sizes)]


def coded(case: Case, bits: float, seed: int) -> tuple[list[Coded], list[Coded]]:
    """Codecs of one layer whose K and V share a budget of ``bits`` per element."""
    draw = torch.Generator().manual_seed(seed)
    parts: tuple[list[Coded], list[Coded]] = ([], [])
    for i, (widths, variances) in enumerate(head_widths(case, bits, seed)):
        quantizer = row_quantizer(widths, uniform)
        inverse = variances[:, None].sqrt().float() * haar(case.dim, seed + i).inverse_matrix[0].float()
        stored = sum(w > 0 for w in widths)
        folded = Folded(inverse[None, :stored], torch.randn(1, case.dim, generator=draw))
        empty = Packed(Row(widths), (torch.empty(1, 1, 0, Row(widths).row_bytes, dtype=torch.uint8),))
        parts[i // case.heads].append(Coded((i % case.heads,), empty, quantizer.tables, folded))
    return parts


def layer(case: Case, bits: float, seed: int) -> tuple[FoldedTiles, FoldedTiles]:
    """The same, folded."""
    keys, values = coded(case, bits, seed)
    return fold(keys, "tokens"), fold(values, "coordinates")


def filled(folded: FoldedTiles, case: Case, tokens: int) -> TiledTokens:
    """Random codes."""
    tiles = -(-tokens // TOKENS)
    held = tuple(
        torch.randint(0, 256, (case.batch, tiles, t.nbytes), dtype=torch.uint8, device="cuda")
        for t in folded.tilings
    )
    moved = FoldedTiles(folded.tilings, folded.matrix.cuda(), folded.shift.cuda())
    return TiledTokens(moved, held, tokens)


def decoded(side: TiledTokens) -> Tensor:
    """Tokens [B, H, n, d] in fp64."""
    heads = zip(side.folded.tilings, side.tiles, side.folded.matrix, side.folded.shift, strict=True)
    parts = [
        tiling.unpack(tiles)[:, : side.tokens].double() @ matrix[: tiling.stored].double() + shift.double()
        for tiling, tiles, matrix, shift in heads
    ]
    return torch.stack(parts, dim=1)


def errors(case: Case, bits: float, options: dict[str, Any]) -> tuple[float, float]:
    """Relative error against fp64 of the kernel, and of torch in BF16 over the same decoded tokens.

    Raises where the kernel's is more than twice that, where it leaves outputs, or is not repeatable.
    """
    small = Case(2, min(case.context, 4096 + 37), case.heads, case.group, case.dim)
    keys, values = (filled(f, small, small.context) for f in layer(small, bits, 1))
    q = torch.randn(2, small.heads * small.group, 1, small.dim, device="cuda", dtype=torch.bfloat16)
    ranges = token_ranges(2, 1, 0, small.context, 0).cuda()
    scaling = small.dim**-0.5
    reader = TileReader.of(keys, values, scaling)
    outs: list[Tensor] = []
    for _ in range(2):
        call = reader.call(q, small.context, ranges, **options)
        call.out.fill_(float("nan"))
        outs.append(attend_tiles(call).clone())
    if not torch.equal(*outs):
        raise SystemExit("two runs differ")
    wanted = attend_tiles_ref(q.double(), keys, values, ranges, scaling=scaling)
    k, v = (decoded(side).bfloat16() for side in (keys, values))
    plain = sdpa(q, k, v, scale=scaling, enable_gqa=True).transpose(1, 2)
    found, theirs = (float((x.double() - wanted).norm() / wanted.norm()) for x in (outs[0], plain))
    if not found <= 2 * theirs:
        raise SystemExit(f"the error is {found:.2e}, torch's {theirs:.2e}")
    return found, theirs


def cold(run: Callable[[int], object], repeats: int = 15, *, clean: bool = False) -> float:
    """Median milliseconds with a cold cache; ``run`` gets the number of its turn.

    The cache is full of lines that were written, and have to go to memory first, or (``clean``) only read.
    """
    flush = torch.zeros(FLUSH // 4, dtype=torch.float32, device="cuda")
    times: list[float] = []
    for i in range(repeats + 3):
        if clean:
            flush.sum()
        else:
            flush.fill_(i % 7)
        times.append(milliseconds(partial(run, i)))
    return statistics.median(times[3:])


def replayed(run: Callable[[int], object], launches: int) -> float:
    """Median milliseconds of one of ``launches`` in a graph, over data larger than the cache."""
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    times: list[float] = []
    for _ in range(9):
        times.append(milliseconds(graph.replay) / launches)
    return statistics.median(times[2:])


def baselines(case: Case, *, clean: bool = False) -> dict[str, float]:
    """Milliseconds of torch's BF16 kernels: queries as they are, and a KV head's group as query tokens."""
    shape = (case.batch, case.heads, case.context, case.dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(case.batch, case.heads * case.group, 1, case.dim, device="cuda", dtype=torch.bfloat16)
    grouped = q.view(case.batch, case.heads, case.group, case.dim)
    out: dict[str, float] = {}
    for name, backend in BACKENDS.items():
        calls: dict[str, Callable[[int], Tensor]] = {
            name: lambda i: sdpa(q, k, v, enable_gqa=True),
            f"{name} grouped": lambda i: sdpa(grouped, k, v),
        }
        for label, call in calls.items():
            try:
                with sdpa_kernel(backend):
                    out[label] = cold(call, clean=clean)
            except RuntimeError:
                # this backend does not take the shape
                continue
    return out


def copy_bandwidth() -> float:
    """TB/s of a device copy, bytes read and written."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / cold(lambda i: b.copy_(a)) * 1e-9


def measure(case: Case, bits: float, copy: float, options: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    wrong, theirs = errors(case, bits, options)
    folded = layer(case, bits, 2)
    probe = [filled(f, case, case.context) for f in folded]
    nbytes = sum(t.numel() for side in probe for t in side.tiles)
    sets = max(1, min(6, (600 << 20) // nbytes))
    held = [probe, *([filled(f, case, case.context) for f in folded] for _ in range(sets - 1))]
    scaling = case.dim**-0.5
    q = torch.randn(case.batch, case.heads * case.group, 1, case.dim, device="cuda", dtype=torch.bfloat16)
    # as a cache counts its tokens
    seen = torch.tensor([case.context], dtype=torch.int32, device="cuda")
    readers = [TileReader.of(keys, values, scaling) for keys, values in held]
    calls = [reader.call(q, case.context, None, seen=seen, **options) for reader in readers]
    ms = cold(lambda i: attend_tiles(calls[i % sets]))
    clean = cold(lambda i: attend_tiles(calls[i % sets]), clean=True)
    graph = replayed(lambda i: attend_tiles(calls[i % sets]), sets * max(1, 24 // sets))
    rate = nbytes / ms * 1e-9
    return {
        **asdict(case),
        "bits": bits,
        "true_bits": 8 * nbytes / (2 * case.batch * case.heads * case.context * case.dim),
        "error": wrong,
        "torch_error": theirs,
        "ms": ms,
        "clean_ms": clean,
        "graph_ms": graph,
        "TB/s": rate,
        "share of copy": rate / copy,
    }


def rows(args: argparse.Namespace, copy: float, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    asked = [(text, args.bits) for text in args.cases] + [(text, args.other_bits) for text in args.others]
    for text, budgets in asked:
        numbers = [int(n) for n in text.split("x")]
        case = Case(*numbers)
        caches = {} if args.skip_baselines else {"": False, "clean_": True}
        bases = {name: baselines(case, clean=clean) for name, clean in caches.items()}
        for bits in budgets:
            row = measure(case, bits, copy, options)
            said = ""
            for name, base in bases.items():
                best = min(base, key=base.__getitem__)
                ratio = base[best] / row[f"{name}ms"]
                row |= {f"{name}baselines_ms": base, f"{name}best": best, f"{name}ratio": ratio}
                said += f"  {ratio:.2f} of {name}{best} {base[best]:.4f}"
            print(
                f"{text:>24} {bits:g} bits  {row['ms']:.4f} ms  clean {row['clean_ms']:.4f}  "
                f"graph {row['graph_ms']:.4f}  {row['TB/s']:.2f} TB/s ({row['share of copy']:.0%})"
                f"{said}  error {row['error']:.1e} of {row['torch_error']:.1e}",
                flush=True,
            )
            yield row


def setting(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["8x32768", "32x32768", "1x131072", "8x8192", "8x2048"],
        help="batch x context, then optionally x KV heads x group x head_dim",
    )
    parser.add_argument("--others", nargs="*", default=OTHERS, help="more cases, with bits of their own")
    parser.add_argument("--other-bits", type=float, nargs="+", default=[4.0])
    parser.add_argument(
        "--shape", type=setting, nargs="*", default=[], help="of the kernel, such as warps=8"
    )
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--skip-baselines", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    copy = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {copy:.2f} TB/s", flush=True)
    options = {"workers": args.workers, "shape": dict(args.shape)}
    found: list[dict[str, Any]] = []
    for row in rows(args, copy, options):
        found.append(row)
        # a run that is cut off leaves what it has
        write({"device": name, "copy TB/s": copy, "kernel": options, "rows": found}, args.json)


if __name__ == "__main__":
    main()

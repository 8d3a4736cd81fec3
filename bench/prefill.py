"""Attention of many new tokens over tiles against torch's kernels over a BF16 cache, on one CUDA device.

First every kernel is held to fp64 attention over the decoded cache: its error is at most twice that of
torch's own attention in BF16 over the same tokens. Then new tokens, coded themselves, attend to themselves
and to all before them. The BF16 baselines are flash, which knows causal masks that end at the last key,
and cuDNN, which does not: it gets the past and the new tokens apart, and nobody merges its results.

    python bench/prefill.py --json bench/results/prefill-h200.json
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from attend import Case, coded, copy_bandwidth, filled
from common import milliseconds, write
from torch import Tensor

from kvsight.ops.attend.cuda import TiledTokens
from kvsight.ops.attend.prefill import KERNELS, PrefillReader
from kvsight.ops.attend.tiles import fold
from kvsight.ops.attend.unpack import unpack_ref
from kvsight.tiling import TOKENS

T = TypeVar("T")
CHOICES = {"chosen": None, "flash": "flash", "cudnn": "cudnn"}


@dataclass(frozen=True)
class Prefill:
    """``batch`` sequences of ``new`` tokens behind ``past`` ones."""

    batch: int
    new: int
    past: int
    heads: int = 8
    group: int = 4
    dim: int = 128

    @property
    def flops(self) -> float:
        """Of both products, as far as queries see keys."""
        seen = self.new * self.past + self.new * (self.new + 1) / 2
        return 4.0 * self.batch * self.heads * self.group * self.dim * seen


def tiled(case: Prefill, bits: float, seed: int) -> tuple[TiledTokens, TiledTokens]:
    """Random codes of one layer."""
    tokens = case.past + case.new
    like = Case(case.batch, tokens, case.heads, case.group, case.dim)
    keys, values = coded(like, bits, seed)
    pairs = ((keys, "tokens"), (values, "coordinates"))
    k, v = (filled(fold(parts, rows), like, tokens) for parts, rows in pairs)
    return k, v


def query(case: Prefill) -> Tensor:
    # as models make them: a token's heads lie together
    shape = case.batch, case.new, case.heads * case.group, case.dim
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def decoded(side: TiledTokens) -> Tensor:
    """[B, H, n, d] in fp64."""
    parts: list[Tensor] = []
    for head, tiling in enumerate(side.folded.tilings):
        codes = tiling.unpack(side.tiles[head])[:, : side.tokens].double()
        matrix = side.folded.matrix[head, : tiling.stored].double()
        parts.append(codes @ matrix + side.folded.shift[head].double())
    return torch.stack(parts, dim=1)


def true_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """fp64, one KV head at a time; [B, Hq, Q, d]."""
    group, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        scores = scaling * q[:, own].double() @ k[:, [head]].mT
        out[:, own] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, [head]]
    return out


def check(bits: float) -> dict[str, float]:
    """Errors relative to fp64, torch's own among them; raises where one is more than twice that."""
    found: dict[str, float] = {}
    for new, past in ((1024, 4096 + 37), (600, 1000)):
        case = Prefill(2, new, past)
        keys, values = tiled(case, bits, 1)
        scaling, q = case.dim**-0.5, query(case)
        reader = PrefillReader.of(keys, values, scaling)
        for number in (torch.bfloat16, torch.float16, torch.float32):
            for side in (reader.keys, reader.values):
                codes = side.codes(slice(0, 2), 3, 9, number)
                if not torch.equal(codes, unpack_ref(side.tilings, side.tiles, 3, 9, side.columns, number)):
                    raise SystemExit(f"unpacked {side.tilings[0].rows} in {number} are not as defined")
        k, v = decoded(keys), decoded(values)
        true = true_attention(q, k, v, scaling)
        stock = KERNELS["flash"](q, k.bfloat16(), v.bfloat16(), True, scaling)[0]
        norm = true.norm()
        limit = 2 * float((stock.double() - true).norm() / norm)
        found["torch"] = max(found.get("torch", 0.0), limit / 2)
        for name, call in taken(choices(reader, q, keys.tokens)):
            outs = [call(), call()]
            if not torch.equal(*outs):
                raise SystemExit(f"two runs of {name} differ")
            error = float((outs[0].transpose(1, 2).double() - true).norm() / norm)
            if not error <= limit:
                raise SystemExit(f"the error of {name} is {error:.2e}, torch's {limit / 2:.2e}")
            found[name] = max(found.get(name, 0.0), error)
    return found


def choices(reader: PrefillReader, q: Tensor, tokens: int) -> dict[str, Callable[[], Tensor]]:
    return {name: partial(reader.attend, q, tokens, kernel=kernel) for name, kernel in CHOICES.items()}


def taken(calls: Mapping[str, Callable[[], T]]) -> Iterator[tuple[str, Callable[[], T]]]:
    """Those whose kernels take the shape."""
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            print(f"{name} refuses: {str(error).splitlines()[0]}", flush=True)
            continue
        yield name, call


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    times: list[float] = []
    for _ in range(repeats + 2):
        times.append(milliseconds(run))
    return statistics.median(times[2:])


def baselines(case: Prefill, repeats: int) -> dict[str, float]:
    """Milliseconds of torch's BF16 kernels."""
    shape = case.batch, case.heads, case.past + case.new, case.dim
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, scaling = query(case), case.dim**-0.5
    past = [x[:, :, : case.past] for x in (k, v)]
    own = [x[:, :, case.past :] for x in (k, v)]

    def apart() -> None:
        if case.past:
            KERNELS["cudnn"](q, *past, False, scaling)
        KERNELS["cudnn"](q, *own, True, scaling)

    calls: dict[str, Callable[[], object]] = {
        "flash": lambda: KERNELS["flash"](q, k, v, True, scaling),
        "cudnn": apart,
    }
    return {name: timed(call, repeats) for name, call in taken(calls)}


def unpacking(reader: PrefillReader, case: Prefill, repeats: int) -> tuple[float, float]:
    """Milliseconds and TB/s, bytes read and written, of all tiles of both sides, a piece at a time."""
    tiles = -(-(case.past + case.new) // TOKENS)
    step, sides = 512, (reader.keys, reader.values)

    def run() -> None:
        for side in sides:
            for start in range(0, tiles, step):
                side.codes(slice(0, case.batch), start, min(step, tiles - start), torch.bfloat16)

    ms = timed(run, repeats)
    read = sum(t.numel() for side in sides for t in side.tiles)
    written = 2 * case.batch * case.heads * tiles * TOKENS * reader.columns * 2
    return ms, (read + written) / ms * 1e-9


def plan_ms() -> float:
    """Milliseconds until cuDNN returns from a shape that it has not seen."""
    q, k = (torch.randn(1, 8, n, 128, device="cuda", dtype=torch.bfloat16) for n in (2048, 7 * 1024))
    torch.cuda.synchronize()
    start = time.perf_counter()
    KERNELS["cudnn"](q, k, k, False, 1.0)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(case: Prefill, bits: float, repeats: int, base: dict[str, float]) -> dict[str, Any]:
    """One row of the table."""
    keys, values = tiled(case, bits, 2)
    q = query(case)
    reader = PrefillReader.of(keys, values, case.dim**-0.5)
    calls = choices(reader, q, keys.tokens)
    found = {name: timed(call, repeats) for name, call in taken(calls)}
    nbytes = sum(t.numel() for side in (keys, values) for t in side.tiles)
    ms, rate = unpacking(reader, case, repeats)
    best = min(base, key=base.__getitem__)
    return {
        **asdict(case),
        "bits": bits,
        "true_bits": 8 * nbytes / (2 * case.batch * case.heads * keys.tokens * case.dim),
        "columns": reader.columns,
        "ms": found,
        "TFLOP/s": case.flops / found["chosen"] * 1e-9,
        "unpack_ms": ms,
        "unpack TB/s": rate,
        "baselines_ms": base,
        "best": best,
        "ratio": base[best] / found["chosen"],
    }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for text in args.cases:
        case = Prefill(*(int(n) for n in text.split("x")))
        base = baselines(case, args.repeats)
        for bits in args.bits:
            row = measure(case, bits, args.repeats, base)
            ours = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
            theirs = "  ".join(f"{name} {ms:.3f}" for name, ms in base.items())
            print(
                f"{text:>16} {bits:g} bits  {ours} ms ({row['TFLOP/s']:.0f} TFLOP/s)  BF16 {theirs}  "
                f"ratio {row['ratio']:.2f}  "
                f"unpacking {row['unpack_ms']:.3f} ms, {row['unpack TB/s']:.2f} TB/s",
                flush=True,
            )
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[f"{batch}x4096x{past}" for batch in (1, 4) for past in (0, 28672, 126976)],
        help="batch x new tokens x past tokens, then optionally x KV heads x group x head_dim",
    )
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    copy, name = copy_bandwidth(), torch.cuda.get_device_name()
    first = plan_ms()
    print(
        f"{name}, torch {torch.__version__}, copy {copy:.2f} TB/s, cuDNN plans {first:.0f} ms", flush=True
    )
    errors = {bits: check(bits) for bits in args.bits}
    for bits, own in errors.items():
        print(f"errors at {bits:g} bits: " + ", ".join(f"{n} {e:.2e}" for n, e in own.items()), flush=True)
    found = list(rows(args))
    result = {"device": name, "copy TB/s": copy, "cudnn_plan_ms": first, "errors": errors, "rows": found}
    write(result, args.json)


if __name__ == "__main__":
    main()

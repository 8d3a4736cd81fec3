"""Decode attention in Triton on the formats that users compare, against plain torch and BF16 kernels.

Every format is first held to fp64 on numbers that it really encoded: an error at most twice that of plain
torch. Then random codes are timed with a cold L2 cache, as a launch and inside a CUDA graph; what the
host does before a launch is told apart. The last tokens are in BF16, as a cache holds them.

    python bench/attend_formats.py --json bench/results/attend-formats-h200.json
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attend import Case, baselines, cold, copy_bandwidth, head_widths, replayed
from common import write
from torch import Tensor

from kvsight.codec import Codec
from kvsight.formats import Format, Grouped, Packed
from kvsight.ops.attend import ref, triton
from kvsight.ops.attend.ref import Segment
from kvsight.quantizers.lloyd_max import row_quantizer, sphere, uniform
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.transforms import haar, identity

TAIL = 64


def grouped(bits: int, group: int, along: Any, case: Case) -> list[Codec]:
    quantizer = GroupedQuantizer(Grouped(case.dim, bits, group, along))
    return [Codec("grouped", identity(case.dim), quantizer)]


def turned(bits: int, case: Case) -> list[Codec]:
    """TurboQuant's rows: a norm, a rotation, one codebook."""
    quantizer = row_quantizer((bits,) * case.dim, lambda width: sphere(width, case.dim), norm=True)
    return [Codec("turboquant", haar(case.dim, 1).stored(), quantizer)]


def sight(bits: float, case: Case, side: int) -> list[Codec]:
    """Rows of evenly spaced levels, widths of their own in every head."""
    drawn = head_widths(case, bits, 1)[side * case.heads : (side + 1) * case.heads]
    return [
        Codec("sight", haar(case.dim, i).stored(), row_quantizer(widths, uniform))
        for i, (widths, _) in enumerate(drawn)
    ]


FORMATS: dict[str, Callable[[Case], tuple[list[Codec], list[Codec]]]] = {
    "kivi 4": lambda case: (grouped(4, 32, "token", case), grouped(4, 32, "channel", case)),
    "kivi 2": lambda case: (grouped(2, 32, "token", case), grouped(2, 32, "channel", case)),
    "int 4": lambda case: (grouped(4, case.dim, "channel", case),) * 2,
    "turboquant 4": lambda case: (turned(4, case),) * 2,
    "turboquant 2": lambda case: (turned(2, case),) * 2,
    "sight rows 4": lambda case: (sight(4, case, 0), sight(4, case, 1)),
}


def side(codecs: list[Codec], case: Case, tokens: int, fill: Callable[..., Packed]) -> list[Segment]:
    """``tokens`` coded tokens, a codec for all heads or one for each, then the exact ones."""
    heads = [tuple(range(case.heads))] if len(codecs) == 1 else [(h,) for h in range(case.heads)]
    coded = tuple(
        codec.to("cuda").coded(own, fill(codec, (case.batch, len(own)), tokens))
        for codec, own in zip(codecs, heads, strict=True)
    )
    shape = (case.batch, case.heads, TAIL, case.dim)
    tail = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return [Segment(tokens, coded=coded), Segment(TAIL, dense=tail)]


def random_codes(codec: Codec, lead: tuple[int, int], tokens: int) -> Packed:
    form = codec.format
    return Packed(form, tuple(_random(form, i, (*lead, tokens)) for i in range(len(form.fields))))


def _random(form: Format, index: int, lead: tuple[int, ...]) -> Tensor:
    field = form.fields[index]
    shape = (*lead[:-1], lead[-1] // field.every, field.width)
    if field.dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    # a scale or a norm, then a zero point
    return torch.rand(shape, device="cuda").add_(0.1).to(field.dtype) * (0.2 if index == 1 else -1.0)


def encoded(codec: Codec, lead: tuple[int, int], tokens: int) -> Packed:
    draw = torch.Generator().manual_seed(tokens + lead[1])
    return codec.encode(torch.randn(*lead, tokens, codec.dim, generator=draw)).to("cuda")


def errors(name: str, case: Case) -> tuple[float, float]:
    """Relative error of the kernels and of plain torch against fp64; raises where a rule is broken."""
    small = Case(2, 0, case.heads, case.group, case.dim)
    keys, values = (side(codecs, small, 512 - 32, encoded) for codecs in FORMATS[name](small))
    q = torch.randn(2, small.heads * small.group, 1, small.dim, device="cuda", dtype=torch.bfloat16)
    settings: dict[str, Any] = {"scaling": small.dim**-0.5}
    ours, again = (triton.attend(q, keys, values, **settings) for _ in range(2))
    exact = ref.attend(q.double(), keys, values, **settings)
    theirs = ref.attend(q, keys, values, **settings)
    found, allowed = (float((out.double() - exact).norm() / exact.norm()) for out in (ours, theirs))
    if not torch.equal(ours, again):
        raise SystemExit(f"{name}: two runs differ")
    if not found <= 2 * allowed:
        raise SystemExit(f"{name}: the error is {found:.2e}, plain torch's {allowed:.2e}")
    return found, allowed


def host_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of the host in a call that it does not wait for."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * spent / repeats


def measure(name: str, case: Case, copy: float) -> dict[str, Any]:
    """One row of the table."""
    found, allowed = errors(name, case)
    tokens = case.context - TAIL
    codecs = FORMATS[name](case)
    first = [side(own, case, tokens, random_codes) for own in codecs]
    nbytes = sum(c.packed.nbytes for own in first for c in own[0].coded)
    nbytes += sum(own[1].dense.nbytes for own in first if own[1].dense is not None)
    count = max(1, min(4, (600 << 20) // nbytes))
    sets = [first, *([side(own, case, tokens, random_codes) for own in codecs] for _ in range(count - 1))]
    q = torch.randn(case.batch, case.heads * case.group, 1, case.dim, device="cuda", dtype=torch.bfloat16)
    scoring = triton.Scoring(case.dim**-0.5, None, None, causal=False)
    prepared = [triton.prepare(q, *each) for each in sets]
    ms = cold(lambda i: triton.launch(prepared[i % count], q, scoring))
    graph = replayed(lambda i: triton.launch(prepared[i % count], q, scoring), count * max(1, 12 // count))
    plain = cold(lambda i: ref.attend(q, *sets[i % count], scaling=case.dim**-0.5), 3)
    return {
        **asdict(case),
        "format": name,
        "true_bits": 8 * nbytes / (2 * case.batch * case.heads * case.context * case.dim),
        "error": found,
        "torch_error": allowed,
        "ms": ms,
        "graph_ms": graph,
        "host_ms": host_ms(lambda: triton.attend(q, *first, scaling=case.dim**-0.5)),
        "torch_ms": plain,
        "TB/s": nbytes / graph * 1e-9,
        "share of copy": nbytes / graph * 1e-9 / copy,
    }


def rows(args: argparse.Namespace, copy: float) -> Iterator[dict[str, Any]]:
    for text in args.cases:
        case = Case(*(int(n) for n in text.split("x")))
        base = baselines(case)
        best = min(base, key=base.__getitem__)
        for name in args.formats:
            row = measure(name, case, copy)
            row |= {"baselines_ms": base, "best": best, "ratio": base[best] / row["graph_ms"]}
            print(
                f"{text:>12} {name:<14} {row['true_bits']:.2f} bits  {row['ms']:.4f} ms  "
                f"graph {row['graph_ms']:.4f} = {row['ratio']:.2f}x {best} {base[best]:.4f}  "
                f"{row['TB/s']:.2f} TB/s ({row['share of copy']:.0%})  host {row['host_ms']:.2f}  "
                f"torch {row['torch_ms']:.2f}  error {row['error']:.1e} of {row['torch_error']:.1e}",
                flush=True,
            )
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--cases", nargs="+", default=["8x32768", "1x131072"], help="batch x context")
    parser.add_argument("--gate", action="store_true", help="compare with fp64 only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    if args.gate:
        for name in args.formats:
            found, allowed = errors(name, Case(1, 0))
            print(f"{name:<14} error {found:.1e}, plain torch {allowed:.1e}", flush=True)
        return
    copy = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, copy {copy:.2f} TB/s", flush=True)
    write({"device": device, "copy TB/s": copy, "rows": list(rows(args, copy))}, args.json)


if __name__ == "__main__":
    main()

"""Measured distortion curves: the β of every quantiser, and damage at whole rates, on a model's trace.

RateQuant (arXiv 2605.06675) writes error ≈ α β^(-bits) with a β of each quantiser's own.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import parser, write

from kvsight import assets
from kvsight.allocate import Unit, allocate
from kvsight.fit import GRADIENT_TOKENS, make_request, prepare_from_stats
from kvsight.integrations.loading import load_model
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.text import read_text, windows
from kvsight.trace import observe, summarise
from kvsight.waterfill import falling_gains


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    seconds, gap = _large_allocation()
    print(f"80 layers x 8 heads x 2 sides x 128 coordinates: {seconds:.2f} s, gap to the bound {gap:.1e}")
    model, tokenizer = load_model(options.model)
    text = assets.text("calibration") if options.calibration is None else read_text(options.calibration)
    ids = windows(tokenizer, text, 1024, options.tokens // 1024)
    stats = summarise(observe(model, ids.split(1), gradient_tokens=GRADIENT_TOKENS))
    rows = []
    print("| method | side | β, median (10th to 90th percentile of heads) |")
    print("|---|---|---|")
    for spec in options.methods.split(","):
        method, *pairs = spec.split(":")
        settings = dict(pair.split("=") for pair in pairs)
        request = make_request(method, 3.0, options=settings, allocate="measured")
        prepared = prepare_from_stats(model, stats, request)
        for side in ("k", "v"):
            curves = [c for (_, s), found in prepared.items() if s == side for c in found.curves]
            betas = np.array([curve.beta()[1] for curve in curves])
            low, middle, high = np.nanpercentile(betas, (10, 50, 90))
            rows.append({"spec": spec, "side": side, "beta": betas.tolist()})
            print(f"| {spec} | {side} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)
    write(
        {
            "model": Path(options.model or "pico-8m").name,
            "large_allocation_seconds": seconds,
            "gap": gap,
            "rows": rows,
        },
        options.json,
    )


def _large_allocation() -> tuple[float, float]:
    """Seconds on one core to allocate a large model's budget from its eigenvalues, and the gap."""
    torch.set_num_threads(1)
    draws = np.random.default_rng(0).normal(0, 2, (80 * 8 * 2, 128))
    variances = torch.tensor(np.exp(draws)).sort(dim=-1, descending=True).values
    falls = [1.0, *(gaussian(bits).distortion for bits in range(1, 9))]
    start = time.perf_counter()
    coordinate, width = falling_gains(variances, falls)
    table = torch.tensor(falls, dtype=torch.float64)
    saved = variances.gather(-1, coordinate) * (table[width - 1] - table[width])
    left = variances.sum(-1, keepdim=True) - saved.unflatten(-1, (-1, 8)).sum(-1).cumsum(-1)
    damage = left.clamp_min(0).numpy()
    sizes = np.arange(1, damage.shape[1] + 1)
    found = allocate([Unit(sizes, d) for d in damage], 3 * 128 * len(damage) // 8)
    return time.perf_counter() - start, found.damage / found.bound - 1


def _options() -> argparse.Namespace:
    out = parser(__doc__.splitlines()[0])
    out.add_argument("--calibration", type=Path, default=None, help="text file; default: embedded")
    out.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    out.add_argument(
        "--methods", default="sight,kivi,turboquant:centre=true,int", help="name[:option=value]..."
    )
    return out.parse_args()


if __name__ == "__main__":
    main()

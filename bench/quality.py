"""KL, perplexity and same-top-token of several methods at several budgets, on the same windows.

Statistics are gathered once and shared by all plans, so every method sees the same calibration text. A
method may name its allocation: sight@ratequant. Budgets count everything; an allocated plan has one exact
first token, as fit gives it by default.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
from common import calibration_ids, parser, write

from kvsight import assets
from kvsight.eval.quality import Result, evaluate
from kvsight.fit import GRADIENT_TOKENS, make_request, plan_from_stats, prepare_from_stats
from kvsight.integrations.loading import load_model
from kvsight.text import read_text, windows
from kvsight.trace import observe, summarise


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, device=options.device)
    ids = calibration_ids(tokenizer, options.calibration or [], options.tokens)
    stats = summarise(observe(model, ids.split(1), gradient_tokens=GRADIENT_TOKENS, progress=_progress))
    text = assets.text("evaluation") if options.text is None else read_text(options.text)
    batches = windows(tokenizer, text, 1024, options.windows).split(1)
    rows = []
    print("| method | true bits | KL (95 % interval) | perplexity | same top token | cache bytes |")
    print("|---|---|---|---|---|---|")
    # widths of a method have commas of their own
    for spec in re.split(r",(?=[a-z])", options.methods):
        head, *pairs = spec.split(":")
        method, _, rule = head.partition("@")
        settings = dict(pair.split("=") for pair in pairs)
        prepared = None
        for bits in map(float, options.bits.split(",")):
            request = make_request(method, bits, options=settings, allocate=rule or None)
            request = replace(request, sinks=0 if request.rule("k") == "uniform" else 1)
            if prepared is None:
                prepared = prepare_from_stats(model, stats, request)
            plan = plan_from_stats(model, stats, request, {}, prepared=prepared)
            result = evaluate(model, plan, batches)
            rows.append({"spec": spec, "asked_bits": bits, **result.to_json()})
            print(_row(spec, result), flush=True)
    protocol = {
        "model": Path(options.model or "pico-8m").name,
        "calibration_tokens": ids.numel(),
        "windows": len(batches),
    }
    write({**protocol, "rows": rows}, options.json)


def _options() -> argparse.Namespace:
    out = parser(__doc__.splitlines()[0])
    out.add_argument("--calibration", type=Path, nargs="*", help="text files; default: embedded")
    out.add_argument("--text", type=Path, default=None, help="text to report on; default: embedded")
    out.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    out.add_argument("--windows", type=int, default=6)
    out.add_argument("--bits", default="2,3,4")
    out.add_argument(
        "--methods", default="sight,kivi,turboquant,int", help="name[@allocation][:option=value]..."
    )
    out.add_argument("--device", default="cpu")
    return out.parse_args()


def _progress(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{stage}: {total} batches", flush=True)


def _row(spec: str, result: Result) -> str:
    kl = f"{result.kl.mean:.4f} ({result.kl.low:.4f} to {result.kl.high:.4f})"
    perplexity = f"{result.perplexity.mean:.2f} / {result.baseline_perplexity.mean:.2f}"
    top = f"{100 * result.same_top.mean:.1f} %"
    return f"| {spec} | {result.true_bits:.3f} | {kl} | {perplexity} | {top} | {result.cache_bytes:,} |"


if __name__ == "__main__":
    main()

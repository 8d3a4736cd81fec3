"""Time of one decoding step on the CPU, packed cache against the stock one, in alternation.

The two caches hold the same text; steps alternate so that drift of the machine hits both. The split of
the packed step comes from the same calls, timed one by one.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from common import parser, write
from transformers import DynamicCache

import kvsight
from kvsight import assets
from kvsight.cache import side
from kvsight.integrations import enable
from kvsight.integrations.loading import load_model
from kvsight.text import windows


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--bits", type=float, default=3.0)
    arguments.add_argument("--method", default="sight")
    arguments.add_argument("--context", type=int, default=2048)
    arguments.add_argument("--steps", type=int, default=40)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model)
    ids = windows(tokenizer, assets.text("calibration"), 1024, 9)
    plan = kvsight.fit(model, ids[:8].split(1), bits=options.bits, method=options.method)
    text = windows(tokenizer, assets.text("evaluation"), options.context + options.steps, 1)
    prompt, rest = text[:, : options.context], text[:, options.context :]
    caches = {
        "stock": DynamicCache(config=model.config),
        "packed": kvsight.PackedCache(plan, model.config),
    }
    times: dict[str, list[float]] = {name: [] for name in caches}
    with torch.inference_mode():
        for name, cache in caches.items():
            with _mode(model, name):
                model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for step in range(options.steps):
            for name, cache in caches.items():
                with _mode(model, name):
                    token = rest[:, step : step + 1]
                    times[name].append(_seconds(lambda t=token, c=cache: model(t, past_key_values=c)))
        split = _split(model, caches["packed"], rest[:, :1])
    ratios = [p / s for p, s in zip(times["packed"], times["stock"], strict=True)]
    result = {
        "model": options.model or "pico-8m",
        "method": options.method,
        "true_bits": plan.true_bits,
        "context": options.context,
        "stock_ms": 1e3 * statistics.median(times["stock"]),
        "packed_ms": 1e3 * statistics.median(times["packed"]),
        "ratio": statistics.median(ratios),
        "ratio_low": sorted(ratios)[len(ratios) // 10],
        "ratio_high": sorted(ratios)[-1 - len(ratios) // 10],
        **split,
    }
    for key, value in result.items():
        print(f"{key:16} {value:.3f}" if isinstance(value, float) else f"{key:16} {value}")
    write(result, options.json)


def _mode(model, name: str):
    return kvsight.enable(model) if name == "packed" else nullcontext()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _split(model, cache, token) -> dict[str, float]:
    """Milliseconds of one packed step spent encoding the new token and attending over codes."""
    spent = {"encode_ms": 0.0, "attend_ms": 0.0}

    def timed(key: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            out = work(*args, **kwargs)
            spent[key] += 1e3 * (time.perf_counter() - start)
            return out

        return call

    append, attend = side.append, enable.attend
    side.append, enable.attend = timed("encode_ms", append), timed("attend_ms", attend)
    try:
        with kvsight.enable(model):
            model(token, past_key_values=cache)
    finally:
        side.append, enable.attend = append, attend
    return spent


if __name__ == "__main__":
    main()

"""Resident memory of a process that holds many sequences in a packed cache, against BF16.

Each arm runs in a process of its own. It fills a cache of the model's shape with numbers drawn like the
model's own keys and values, and reports how much the resident set grew.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import parser, write
from transformers import DynamicCache

import kvsight
from kvsight import assets
from kvsight.integrations.loading import load_model
from kvsight.text import windows


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--bits", type=float, default=3.0)
    arguments.add_argument("--method", default="sight")
    arguments.add_argument("--sequences", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument(
        "--arm", choices=("packed", "bf16"), default=None, help="run one arm, print JSON"
    )
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.arm is not None:
        print(json.dumps(_arm(options)))
        return
    arms = {}
    for arm in ("bf16", "packed"):
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        arms[arm] = json.loads(output.splitlines()[-1])
    result = {
        "model": options.model or "pico-8m",
        "sequences": options.sequences,
        "tokens": options.tokens,
        **{f"{arm}_{key}": value for arm, data in arms.items() for key, value in data.items()},
        "resident_ratio": arms["bf16"]["resident_bytes"] / arms["packed"]["resident_bytes"],
        "bytes_ratio": arms["bf16"]["cache_bytes"] / arms["packed"]["cache_bytes"],
    }
    for key, value in result.items():
        print(f"{key:24} {value:,}" if isinstance(value, int) else f"{key:24} {value}")
    write(result, options.json)


def _arm(options) -> dict[str, int]:
    model, tokenizer = load_model(options.model)
    ids = windows(tokenizer, assets.text("calibration"), 1024, 4)
    plan = kvsight.fit(model, ids.split(1), bits=options.bits, method=options.method)
    packed = options.arm == "packed"
    _fill(_cache(plan, model.config, packed), plan, 1, 64)
    cache = _cache(plan, model.config, packed)
    before = _resident()
    _fill(cache, plan, options.sequences, options.tokens)
    grown = _resident() - before
    held = (
        cache.nbytes
        if packed
        else sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    )
    return {"resident_bytes": grown, "cache_bytes": held}


def _cache(plan, config, packed: bool):
    return kvsight.PackedCache(plan, config) if packed else DynamicCache(config=config)


def _fill(cache, plan, sequences: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in plan.layers:
        dims = [side[0].codec.format.dim for side in (layer.key, layer.value)]
        shape = (sequences, layer.heads, tokens)
        k, v = (torch.randn(*shape, d, generator=generator).bfloat16() for d in dims)
        cache.update(k, v, layer.index)


def _resident() -> int:
    """Bytes of this process in memory (Linux), once the heap's free pages went back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


if __name__ == "__main__":
    main()

"""Resident memory of a process that holds many sequences in a packed cache, against BF16.

Each arm runs in a process of its own. It fills a cache of the model's shape with numbers drawn like the
model's own keys and values, and reports how much the resident set grew.
"""

import json
import subprocess
import sys

import torch
from common import parser, write

import kvsight
from kvsight import assets
from kvsight.eval.arms import UNCOMPRESSED
from kvsight.eval.caches import Arm, arm_of, layer_shapes
from kvsight.eval.memory import Place, footprint
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


def _arm(options) -> dict[str, int | None]:
    model, tokenizer = load_model(options.model)
    ids = windows(tokenizer, assets.text("calibration"), 1024, 4)
    plan = kvsight.fit(model, ids.split(1), bits=options.bits, method=options.method)
    place = Place(model.config, layer_shapes(plan), model.device)
    arm = arm_of(plan) if options.arm == "packed" else Arm(UNCOMPRESSED)
    took = footprint(arm, place, options.tokens, options.sequences)
    return {"resident_bytes": took.resident_bytes, "cache_bytes": took.cache_bytes}


if __name__ == "__main__":
    main()

"""Decoding steps of a Llama-3.1-8B shape with random weights, a cache in tiles against BF16, on one GPU.

Both sides run the same transformers model, once as it is and once as a CUDA graph. BF16 keys and values lie
in one piece, as no growing cache has them, and are read by the fastest kernel of torch. Widths differ from
head to head as an allocation gives them, and are the same in all layers. Tokens are random: this measures
time and bytes.

    python bench/generate.py --cases 8x8192 8x32768 1x131072 --json bench/results/generate-h200.json
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attend import Case, head_widths
from common import write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama

import kvsight
from kvsight.codec import Codec, Placement
from kvsight.fingerprint import fingerprint
from kvsight.plan import LayerPlan, Plan
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.transforms import haar

SHAPE = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072 + 64,
    rope_theta=500000.0,
)
STEPS = 16


class Piece(DynamicLayer):
    """Keys and values in one piece with room for one more token, which every step writes anew."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1


def pieces(config: LlamaConfig, case: Case) -> DynamicCache:
    cache = DynamicCache(config=config)
    shape = (case.batch, case.heads, case.context + 1, case.dim)
    for i in range(config.num_hidden_layers):
        layer = Piece()
        layer.keys, layer.values = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        layer.is_initialized = True
        cache.layers[i] = layer
    return cache


def plan_for(model: Any, case: Case, bits: float) -> Plan:
    """A plan of random rotations, with the widths of ``bench/attend.py``."""
    widths = head_widths(case, bits, 2)
    sides = [
        tuple(
            Placement((h,), Codec("sight", haar(case.dim, h).stored(), row_quantizer(w, uniform)))
            for h, (w, _) in enumerate(widths[start : start + case.heads])
        )
        for start in (0, case.heads)
    ]
    config = model.config
    layers = tuple(
        LayerPlan(i, None, case.heads, sides[0], sides[1]) for i in range(config.num_hidden_layers)
    )
    return Plan(
        layers,
        "sight",
        {"layout": "tiles"},
        0,
        0,
        torch.bfloat16,
        1024,
        fingerprint(model),
        config.to_dict(),
    )


def packed(model: Any, case: Case, bits: float) -> kvsight.PackedCache:
    cache = kvsight.PackedCache(plan_for(model, case, bits), model.config, tiles=True, monitor=False)
    shape = (case.batch, case.heads, case.context, case.dim)
    first = cache.layers[0]
    first.update(*(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    one = torch.randn(case.batch, case.heads, 1, case.dim, device="cuda", dtype=torch.bfloat16)
    first.update(one, one)
    for i in range(1, len(cache.layers)):
        layer = copy.copy(first)
        layer.layer, layer.tiles = cache.plan.layers[i], copy.deepcopy(first.tiles)
        cache.layers[i] = layer
    return cache


def stepper(model: Any, cache: Any, case: Case) -> Callable[[], None]:
    """One greedy step, all of it on the device."""
    ids = torch.zeros(case.batch, 1, dtype=torch.long, device="cuda")
    at = torch.full((case.batch, 1), case.context, device="cuda")

    def step() -> None:
        out = model(ids, position_ids=at, past_key_values=cache, use_cache=True)
        ids.copy_(out.logits[:, -1:].argmax(-1))
        at.add_(1)

    return step


def timed(step: Callable[[], None]) -> float:
    """Median milliseconds of a step."""
    times: list[float] = []
    for _ in range(STEPS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def reading(model: Any, is_packed: bool) -> Iterator[None]:
    with (
        kvsight.enable(model)
        if is_packed
        else sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
    ):
        yield


def measure(model: Any, cache: Any, case: Case, is_packed: bool) -> dict[str, Any]:
    with torch.no_grad(), reading(model, is_packed):
        step = stepper(model, cache, case)
        eager = timed(step)
        graph = timed(as_graph(step))
    bytes_held = (
        cache.nbytes if is_packed else sum(t.nbytes for x in cache.layers for t in (x.keys, x.values))
    )
    return {
        "eager_ms": eager,
        "graph_ms": graph,
        "eager_tokens_per_s": 1e3 * case.batch / eager,
        "graph_tokens_per_s": 1e3 * case.batch / graph,
        "cache_bytes": bytes_held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument(
        "--cases", nargs="+", default=["8x8192", "8x32768", "1x131072"], help="batch x context"
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    # one new token sees all others; while a graph is captured some versions would build a mask to say so
    modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    with torch.device("cuda"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).eval()
    rows: list[dict[str, Any]] = []
    for text in args.cases:
        batch, context = map(int, text.split("x"))
        case = Case(batch, context)
        sides: list[tuple[str, Callable[[], Any]]] = [("bf16", lambda case=case: pieces(SHAPE, case))]
        sides += [(f"{b:g} bits", lambda case=case, b=b: packed(model, case, b)) for b in args.bits]
        for name, make in sides:
            try:
                found = measure(model, make(), case, name != "bf16")
            except torch.cuda.OutOfMemoryError:
                found = {"out_of_memory": True}
            torch.cuda.empty_cache()
            rows.append({"case": text, "cache": name, **found})
            print(
                text,
                name,
                {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()},
                flush=True,
            )
    write({"device": torch.cuda.get_device_name(), "rows": rows}, args.json)


if __name__ == "__main__":
    main()

"""Decoding steps of a Llama-3.1-8B shape with random weights, a cache in tiles against BF16, on one GPU.

Both sides run the same transformers model, once as it is and once as a CUDA graph. BF16 keys and values lie
in one piece, as no growing cache has them, and are read by the fastest kernel of torch. Widths differ from
head to head as an allocation gives them, and are the same in all layers. Weights, tokens and codes are
random and nothing is prefilled: this measures time and bytes, and a step's time depends on neither.

A context of 64 tokens is measured first: what a step costs beside attention. A cache that does not fit the
device beside the model is not made, and its row says what it would have taken.

    python bench/generate.py --json bench/results/generate-h200.json
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attend import Case, head_widths
from common import milliseconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama

import kvsight
from kvsight.cache.tiles import Tiles
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
DEVICE = "cuda"
STEPS, SECONDS = 16, 1.5
# tokens of the context that stands for none
REST = 64
# what a step and its graph take beside model and cache [bytes]
MARGIN = 3 << 30


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
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
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


class Packer:
    """Packed caches of random codes for one plan, whose codecs are folded once for each batch size."""

    def __init__(self, model: Any, bits: float) -> None:
        self.config = model.config
        self.plan = plan_for(model, Case(1, REST), bits)
        self._first: dict[int, Any] = {}

    def nbytes(self, case: Case) -> int:
        """What such a cache holds after so many tokens, and the room for those to come."""
        tokens = case.context + case.context // 8
        return self.plan.nbytes(tokens, case.batch)

    def fill(self, case: Case) -> kvsight.PackedCache:
        cache = kvsight.PackedCache(self.plan, self.config, tiles=True, monitor=False)
        if case.batch not in self._first:
            first = cache.layers[0]
            like = torch.empty(case.batch, case.heads, 0, case.dim, device=DEVICE, dtype=torch.bfloat16)
            first.lazy_initialization(like, like)
            first.tiles = Tiles(first.key_state, first.value_state)
            first.key_state = first.value_state = None
            self._first[case.batch] = first
        for i, made in enumerate(cache.layers):
            layer = copy.copy(self._first[case.batch])
            layer.layer, layer.reads, layer.cumulative_length = made.layer, cache.reads, case.context
            layer.tiles = random_tiles(layer.tiles, case)
            cache.layers[i] = layer
        return cache


def random_tiles(folded: Tiles, case: Case) -> Tiles:
    """Tiles of random codes, grown as by appending, that share nothing with ``folded`` but numbers."""
    out = copy.copy(folded)
    out.folded = tuple(replace(f, matrix=f.matrix.clone(), shift=f.shift.clone()) for f in folded.folded)
    out.encoders = tuple(replace(e, map=e.map.clone(), shift=e.shift.clone()) for e in folded.encoders)
    out.seen = torch.full_like(folded.seen, case.context)
    out._reader = {}
    out._grow(case.context)
    out.tokens = case.context
    for tiles in (t for half in out.tiles for t in half):
        tiles.random_()
    return out


def stepper(model: Any, cache: Any, case: Case) -> Callable[[], None]:
    """One greedy step, all of it on the device."""
    ids = torch.zeros(case.batch, 1, dtype=torch.long, device=DEVICE)
    at = torch.full((case.batch, 1), case.context, device=DEVICE)

    def step() -> None:
        out = model(ids, position_ids=at, past_key_values=cache, use_cache=True)
        ids.copy_(out.logits[:, -1:].argmax(-1))
        at.add_(1)

    return step


def timed(step: Callable[[], None]) -> float:
    """Median milliseconds of a step, of as many as ``SECONDS`` allow, five at least."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (len(times) < STEPS and time.perf_counter() - begin < SECONDS):
        times.append(milliseconds(step))
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


def measure(model: Any, make: Callable[[], Any], case: Case, is_packed: bool) -> dict[str, Any]:
    """Steps on a fresh cache: times, and bytes as torch counts them."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = make()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    held = cache.nbytes if is_packed else sum(t.nbytes for x in cache.layers for t in (x.keys, x.values))
    with torch.no_grad(), reading(model, is_packed):
        step = stepper(model, cache, case)
        eager = timed(step)
        graph = timed(as_graph(step))
    return {
        "eager_ms": eager,
        "graph_ms": graph,
        "eager_tokens_per_s": 1e3 * case.batch / eager,
        "graph_tokens_per_s": 1e3 * case.batch / graph,
        "cache_bytes": held,
        "allocated_bytes": allocated,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }


def stock_nbytes(case: Case) -> int:
    elements = 2 * case.batch * case.heads * (case.context + 1) * case.dim
    return 2 * elements * int(SHAPE.num_hidden_layers)


def refused(needed: int) -> dict[str, Any] | None:
    """Why a cache is not made, or None where it fits."""
    free = torch.cuda.mem_get_info()[0]
    if needed + MARGIN <= free:
        return None
    return {"refused": f"needs {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free", "needs_bytes": needed}


def line(row: dict[str, Any]) -> str:
    name = f"{row['case']:>10} {row['cache']:7}"
    if "refused" in row:
        return f"{name}  not run: {row['refused']}"
    beside = row.get("graph_over_rest_ms")
    return (
        f"{name}  eager {row['eager_ms']:7.2f} ms {row['eager_tokens_per_s']:6.0f} tokens/s  "
        f"graph {row['graph_ms']:7.2f} ms {row['graph_tokens_per_s']:6.0f} tokens/s"
        f"{'' if beside is None else f' ({beside:.2f} ms of it for the context)'}  "
        f"cache {row['cache_bytes'] / 1e9:.2f} GB, allocated {row['allocated_bytes'] / 1e9:.2f}, "
        f"{row['times_smaller']:.2f} times below BF16 (plan {row['planned_ratio']:.2f}), "
        f"peak {row['peak_bytes'] / 1e9:.2f}  [{row['seconds']:.1f} s]"
    )


def run(model: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows in the order of the cases, each batch size's own without a context first."""
    packers = {f"{b:g} bits": Packer(model, b) for b in args.bits}
    rest: dict[tuple[int, str], float] = {}
    cases = [Case(*map(int, text.split("x"))) for text in args.cases]
    bare = [Case(batch, REST) for batch in dict.fromkeys(case.batch for case in cases)]
    for case in [*bare, *cases]:
        sides = [("bf16", stock_nbytes(case), partial(pieces, SHAPE, case), 16.0)]
        sides += [
            (name, p.nbytes(case), partial(p.fill, case), p.plan.true_bits) for name, p in packers.items()
        ]
        for name, needed, make, true_bits in sides:
            row: dict[str, Any] = {"case": f"{case.batch}x{case.context}", "cache": name}
            begin = time.perf_counter()
            found = refused(needed) or measure(model, make, case, name != "bf16")
            gc.collect()
            torch.cuda.empty_cache()
            row |= found
            if "refused" not in found:
                row["times_smaller"] = (
                    stock_nbytes(replace(case, context=case.context - 1)) / row["cache_bytes"]
                )
                row["planned_ratio"] = 16 / true_bits
                if case.context == REST:
                    rest[case.batch, name] = row["graph_ms"]
                elif (case.batch, name) in rest:
                    row["graph_over_rest_ms"] = row["graph_ms"] - rest[case.batch, name]
                row["seconds"] = time.perf_counter() - begin
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    cases = [f"{batch}x{context}" for batch in (1, 8, 32) for context in (8192, 32768, 131072)]
    parser.add_argument("--cases", nargs="+", default=cases, help="batch x context")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    # one new token sees all others; while a graph is captured some versions would build a mask to say so
    modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    begin = time.perf_counter()
    with torch.device(DEVICE), torch.no_grad():
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).eval()
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, random weights made in {time.perf_counter() - begin:.1f} s"
    )
    rows: list[dict[str, Any]] = []
    for row in run(model, args):
        rows.append(row)
        print(line(row), flush=True)
        write({"device": device, "weights": "random", "rows": rows}, args.json)


if __name__ == "__main__":
    main()

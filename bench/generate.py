"""Decoding steps of a Llama-3.1-8B shape with random weights, a cache in tiles against BF16, on one GPU.

Both sides run the same transformers model, once as it is and once as a CUDA graph; with ``--compile`` both
are compiled by torch before (inductor, one graph of the whole step, or of each layer). BF16 keys and values
lie in one piece, as no growing cache has them, and are read by the fastest kernel of torch, chosen for each
case by ``bench/attend.py`` and forced where attention is called, so that compilation keeps it: ``kernels``
lists what ran. Widths differ from head to head as an allocation gives them, and are the same in all layers.
Weights, tokens and codes are random and nothing is prefilled: this measures time and bytes, and a step's
time depends on neither. A compiled step is held to an eager one before it is timed.

``--fused`` is the same shape as a Phi-3: one product gives queries, keys and values, and one gate and up,
as serving programs have it for a Llama, too.

A context of 64 tokens is measured, too: what a step costs beside attention. A cache that does not fit the
device beside the model is not made, and its row says what it would have taken.

    python bench/generate.py --json bench/results/generate-h200.json
    python bench/generate.py --compile layers --cases 8x32768 --bits 4 2 --json compiled.json
    python bench/generate.py --compile layers --cases 8x32768 --bits 4 2 --fused --json fused.json
    python bench/generate.py --compile model --tiny    # on a CPU, to try this program
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attend import BACKENDS, Case, baselines, head_widths
from common import write
from stepping import Stepper, as_graph, kernels, timed
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

import kvsight
from kvsight.cache.counter import Counter
from kvsight.cache.tiles import Tiles, numbers
from kvsight.codec import Codec, Placement
from kvsight.fingerprint import fingerprint
from kvsight.integrations.attention import AttentionFunction, attention_override
from kvsight.plan import LayerPlan, Plan
from kvsight.quantizers.lloyd_max import row_quantizer, uniform
from kvsight.transforms import haar

LLAMA = LlamaConfig(
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
# of --tiny: three layers, as the first of a packed cache has a graph of its own
TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)
# room for the steps of one measurement
SPARE = 256
# of logits of compiled steps against eager ones, both of bf16 through all layers
MOST_ERROR = 0.2
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


@dataclass(frozen=True)
class Setting:
    """The model's shape, where it runs, and how its steps are compiled: "model", "layers" or not."""

    shape: PreTrainedConfig
    device: str
    compiled: str | None

    def case(self, batch: int, context: int) -> Case:
        heads, group = self.shape.num_key_value_heads, self.shape.num_attention_heads
        return Case(batch, context, heads, group // heads, self.shape.head_dim)

    def stock_nbytes(self, case: Case) -> int:
        elements = 2 * case.batch * case.heads * (case.context + 1) * case.dim
        return 2 * elements * int(self.shape.num_hidden_layers)

    def pieces(self, case: Case) -> DynamicCache:
        cache = DynamicCache(config=self.shape)
        shape = (case.batch, case.heads, case.context + 1, case.dim)
        for i in range(self.shape.num_hidden_layers):
            layer = Piece()
            layer.keys, layer.values = (
                torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(2)
            )
            layer.is_initialized = True
            cache.layers[i] = layer
        return cache


def fused(shape: LlamaConfig) -> Phi3Config:
    """The same shape with fewer, larger products."""
    out = Phi3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters=shape.rope_parameters,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    out.head_dim = shape.head_dim
    return out


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

    def __init__(self, model: Any, setting: Setting, bits: float) -> None:
        self.setting = setting
        self.plan = plan_for(model, setting.case(1, REST), bits)
        self._first: dict[int, Any] = {}

    def nbytes(self, case: Case) -> int:
        """What such a cache holds after so many tokens, and the room for those to come."""
        return self.plan.nbytes(case.context + SPARE, case.batch)

    def fill(self, case: Case) -> kvsight.PackedCache:
        shape, device = self.setting.shape, torch.device(self.setting.device)
        cache = kvsight.PackedCache(self.plan, shape, tiles=True, monitor=False)
        if case.batch not in self._first:
            first = cache.layers[0]
            like = torch.empty(case.batch, case.heads, 0, case.dim, device=device, dtype=torch.bfloat16)
            first.lazy_initialization(like, like)
            first.tiles = Tiles(first.key_state, first.value_state)
            first.key_state = first.value_state = None
            self._first[case.batch] = first
        counter = Counter(device)
        counter.advance(case.context, case.context)
        for i, made in enumerate(cache.layers):
            layer = copy.copy(self._first[case.batch])
            layer.layer, layer.reads = made.layer, cache.reads
            layer.tiles = random_tiles(layer.tiles, case, counter, leads=i == 0)
            cache.layers[i] = layer
        return cache


def random_tiles(folded: Tiles, case: Case, counter: Counter, leads: bool) -> Tiles:
    """Tiles of random codes that share nothing with ``folded`` but numbers."""
    out = copy.copy(folded)
    out.folded = tuple(replace(f, matrix=f.matrix.clone(), shift=f.shift.clone()) for f in folded.folded)
    out.encoders = tuple(
        replace(e, halves=e.halves.clone(), scale=e.scale.clone(), shift=e.shift.clone())
        for e in folded.encoders
    )
    out.reading, out.writing = numbers(*out.folded), numbers(*out.encoders)
    out.counter, out.leads = counter, leads
    out._reader = {}
    out.reserve(case.context + SPARE)
    out._coded = case.context
    for tiles in (t for half in out.tiles for t in half):
        tiles.random_()
    return out


def fastest(case: Case, device: str) -> str:
    """Which BF16 kernel of torch reads such a cache in the least time, as ``bench/attend.py`` names it."""
    if device != "cuda":
        return "flash"
    times = baselines(case)
    return min(times, key=lambda name: times[name])


def stock_attention(name: str) -> AttentionFunction:
    """Attention by that kernel and no other, compiled or not."""
    backend, _, grouped = name.partition(" ")

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **more: Any
    ) -> tuple[Tensor, None]:
        with sdpa_kernel(BACKENDS[backend]):
            if grouped:
                # query heads of a KV head as its query tokens
                rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
                out = sdpa(rows, k, v, scale=scaling).reshape(q.shape)
            else:
                out = sdpa(q, k, v, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    return attention


def measure(
    model: Any, setting: Setting, make: Callable[[], Any], case: Case, is_packed: bool
) -> dict[str, Any]:
    """Steps on a fresh cache: times, and bytes as torch counts them."""
    kernel = None if is_packed else fastest(case, setting.device)
    before = allocated(reset=True)
    cache = make()
    made = allocated() - before
    held = cache.nbytes if is_packed else sum(t.nbytes for x in cache.layers for t in (x.keys, x.values))
    stock = None if kernel is None else attention_override(model, "best", stock_attention(kernel))
    with torch.no_grad(), stock or kvsight.enable(model):
        stepper = Stepper(model, cache, case.batch, case.context)
        if setting.compiled:
            times = compiled_times(stepper, setting.compiled, case.context, is_packed)
        else:
            times = {"eager_ms": timed(stepper.step), "graph_ms": timed(as_graph(stepper.step))}
    more = {} if kernel is None else {"attention": kernel}
    return (
        more
        | times
        | {
            "tokens_per_s": 1e3 * case.batch / times["graph_ms"],
            "cache_bytes": held,
            "allocated_bytes": made,
            "peak_bytes": allocated(peak=True) - before,
        }
    )


def compiled_times(stepper: Stepper, how: str, context: int, is_packed: bool) -> dict[str, Any]:
    """Times of a compiled step, that must do what an eager one does."""
    wanted = stepper.step().float()
    stepper.rewind(context)
    begin = time.perf_counter()
    step = stepper.compiled(how)
    try:
        error = float((step().float() - wanted).norm() / wanted.norm())
        if not error <= MOST_ERROR:
            raise SystemExit(f"a compiled step is off by {error:.3f} of an eager one; nothing was timed.")
        seconds = time.perf_counter() - begin
        out: dict[str, Any] = {"compile_s": seconds, "error": error, "compiled_ms": timed(step)}
        graph = as_graph(step)
        out["graph_ms"] = timed(graph)
        out["kernels"] = kernels(graph)
        if is_packed and context > REST:
            # the same graph counts its tokens on the device
            stepper.rewind(REST)
            out["rest_ms"] = timed(graph)
    finally:
        stepper.restore()
    return out


def allocated(*, reset: bool = False, peak: bool = False) -> int:
    """Bytes that torch has on the device, or had at most since the last ``reset``."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def refused(needed: int) -> dict[str, Any] | None:
    """Why a cache is not made, or None where it fits."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else needed + MARGIN
    if needed + MARGIN <= free:
        return None
    return {"refused": f"needs {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free", "needs_bytes": needed}


def line(row: dict[str, Any]) -> str:
    name = f"{row['case']:>10} {row['cache']:7}"
    if "refused" in row:
        return f"{name}  not run: {row['refused']}"
    first = "compiled" if "compiled_ms" in row else "eager"
    over = row.get("graph_over_rest_ms")
    seconds = f", {row['compile_s']:.1f} to compile" if "compile_s" in row else ""
    return (
        f"{name}  {first} {row[first + '_ms']:7.2f} ms, graph {row['graph_ms']:7.2f} ms "
        f"{row['tokens_per_s']:6.0f} tokens/s"
        f"{'' if over is None else f' ({over:.2f} ms of it for the context)'}  "
        f"cache {row['cache_bytes'] / 1e9:.2f} GB, allocated {row['allocated_bytes'] / 1e9:.2f}, "
        f"{row['times_smaller']:.2f} times below BF16 (plan {row['planned_ratio']:.2f}), "
        f"peak {row['peak_bytes'] / 1e9:.2f}  [{row['seconds']:.1f} s"
        f"{seconds}]"
    )


def run(model: Any, setting: Setting, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows in the order of the cases; without a context each batch size comes first, compiled last."""
    packers = {f"{b:g} bits": Packer(model, setting, b) for b in args.bits}
    cases = [setting.case(*map(int, text.split("x"))) for text in args.cases]
    bare = [setting.case(batch, REST) for batch in dict.fromkeys(case.batch for case in cases)]
    for case in [*cases, *bare] if setting.compiled else [*bare, *cases]:
        sides = [("bf16", setting.stock_nbytes(case), partial(setting.pieces, case), 16.0)]
        if not setting.compiled or case.context > REST:
            sides += [
                (name, p.nbytes(case), partial(p.fill, case), p.plan.true_bits)
                for name, p in packers.items()
            ]
        for name, needed, make, true_bits in sides:
            row: dict[str, Any] = {"case": f"{case.batch}x{case.context}", "cache": name}
            begin = time.perf_counter()
            found = refused(needed) or measure(model, setting, make, case, name != "bf16")
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
            row |= found
            if "refused" not in found:
                row["times_smaller"] = (
                    setting.stock_nbytes(replace(case, context=case.context - 1)) / row["cache_bytes"]
                )
                row["planned_ratio"] = 16 / true_bits
                row["seconds"] = time.perf_counter() - begin
            yield row


def over_rest(rows: list[dict[str, Any]]) -> None:
    """Set what a context adds to a step, where the step without is known by now."""
    rest = {
        (row["case"].split("x")[0], row["cache"]): row["graph_ms"]
        for row in rows
        if row["case"].endswith(f"x{REST}") and "graph_ms" in row
    }
    for row in rows:
        known = row.get("rest_ms", rest.get((row["case"].split("x")[0], row["cache"])))
        if "graph_ms" in row and known is not None and not row["case"].endswith(f"x{REST}"):
            row["graph_over_rest_ms"] = row["graph_ms"] - known


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How much faster than BF16 each packed cache was, and what was not for its context."""
    stock = {row["case"]: row for row in rows if row["cache"] == "bf16" and "graph_ms" in row}
    for row in rows:
        base = stock.get(row["case"])
        if row["cache"] == "bf16" or base is None or "graph_ms" not in row:
            continue
        known = [r["graph_ms"] - r["graph_over_rest_ms"] for r in (base, row) if "graph_over_rest_ms" in r]
        rest = f"; rest {known[0]:.2f} and {known[1]:.2f} ms" if len(known) == 2 else ""
        ratio = base["graph_ms"] / row["graph_ms"]
        yield f"{row['case']:>10} {row['cache']:7}  {ratio:.2f} times BF16{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    cases = [f"{batch}x{context}" for batch in (1, 8, 32) for context in (8192, 32768, 131072)]
    parser.add_argument("--cases", nargs="+", default=cases, help="batch x context")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0])
    parser.add_argument("--compile", choices=("model", "layers"), default=None, help="what torch compiles")
    parser.add_argument("--fused", action="store_true", help="fewer, larger products for queries to values")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try this program")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device.")
    # one new token sees all others; while a graph is captured some versions would build a mask to say so
    for modeling in (modeling_llama, modeling_phi3):
        modeling.create_causal_mask = lambda *args, **kwargs: None
    shape = TINY if args.tiny else LLAMA
    shape = fused(shape) if args.fused else shape
    setting = Setting(shape, "cpu" if args.tiny else "cuda", args.compile)
    if args.tiny:
        args.cases = ["2x128"]
    begin = time.perf_counter()
    with torch.device(setting.device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(setting.shape, dtype=torch.bfloat16).eval()
    device = "cpu" if args.tiny else torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, random weights made in {time.perf_counter() - begin:.1f} s"
    )
    rows: list[dict[str, Any]] = []
    about = {"device": device, "weights": "random", "fused": args.fused, "compiled": args.compile}
    for row in run(model, setting, args):
        rows.append(row)
        over_rest(rows)
        print(line(row), flush=True)
        write(about | {"rows": rows}, args.json)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()

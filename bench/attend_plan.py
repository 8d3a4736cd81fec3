"""Decode attention of a running model, on plans that ``fit`` made, against the best BF16 kernel of torch.

The model has the attention of Llama-3.1-8B (32 query heads, 8 KV heads, head_dim 128) in a few layers of a
smaller width, since only attention is timed. Its weights are random, but no head is like another: variances
of keys and values fall over coordinates at a speed of each head's own, keys have means, and scores a spread
of their own, so that an allocation gives every head widths of its own.

For every budget ``kvsight.fit`` makes a plan with ``layout=tiles`` on real text; a packed cache takes the
context in chunks, then tokens one by one, past the end of a tile. The launch that the last step made for a
layer is held to attention in fp64 over the decoded cache, for some sequences: output poisoned, and equal to
what the model got. Then it is timed with a cold L2, as in ``bench/attend.py``. BF16 keys and values lie in
one piece and without the appended tokens.

    python bench/attend_plan.py --json bench/results/attend-plan-h200.json
"""

import argparse
import copy
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from attend import Case, baselines, cold
from common import calibration_ids, wall_milliseconds, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import kvsight
import kvsight.cache.tiles as tiles_module
from kvsight.assets import model_path, text
from kvsight.cache.side import segments
from kvsight.cache.tiles import Tiles
from kvsight.ops.attend.cuda import attend_tiles
from kvsight.plan import Plan
from kvsight.tiling import TOKENS
from kvsight.transforms import haar

HEADS, KV_HEADS, DIM = 32, 8, 128
# bf16 rounds the output to 2^-9
ERROR = 4e-3
# new tokens of a chunk of the prefill, over all sequences, and of one of them
CHUNK, LEAST, MOST = 16_384, 1024, 8192


def random_model(layers: int, hidden: int, positions: int, device: str) -> Any:
    """A Llama whose heads read spectra, means and scores of their own."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=positions,
        rope_theta=500000.0,
        attention_bias=True,
    )
    draw = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        # as large as what attention adds
        model.get_input_embeddings().weight.normal_(generator=draw)
        model.lm_head.weight.normal_(0, 2 * hidden**-0.5, generator=draw)
        for layer in model.model.layers:
            shape_heads(layer.self_attn, hidden, draw)
    return model.to(device)


def shape_heads(attention: Any, hidden: int, draw: torch.Generator) -> None:
    """Weights of one layer for inputs of unit variance."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    def spectrum(count: int) -> Tensor:
        """Variances of mean 1."""
        places = torch.randperm(count, generator=draw) / count
        falling = torch.exp(-uniform(2, 7) * places)
        return falling / falling.mean()

    def rows(variances: Tensor) -> Tensor:
        return (
            variances.sqrt()[:, None] * torch.randn(len(variances), hidden, generator=draw) * hidden**-0.5
        )

    query, key, value = (
        getattr(attention, f"{name}_proj").weight.view(KV_HEADS, -1, hidden) for name in "qkv"
    )
    key_mean, value_mean = (p.bias.view(KV_HEADS, DIM) for p in (attention.k_proj, attention.v_proj))
    attention.q_proj.bias.zero_(), attention.o_proj.bias.zero_()
    attention.o_proj.weight.normal_(0, (HEADS * DIM) ** -0.5, generator=draw)
    for head in range(KV_HEADS):
        # RoPE turns two coordinates into each other
        variances, wanted = spectrum(DIM // 2).repeat(2), spectrum(DIM // 2).repeat(2)
        sharpness = uniform(0.5, 2) ** 2 / (variances * wanted).mean()
        query[head] = torch.cat([rows(wanted * sharpness) for _ in range(HEADS // KV_HEADS)])
        key[head] = rows(variances)
        key_mean[head] = variances.sqrt() * uniform(0, 2) * torch.randn(DIM, generator=draw)
        turn = haar(DIM, int(uniform(0, 1e6))).inverse_matrix
        assert turn is not None
        loud = uniform(0.5, 2)
        value[head] = loud * turn[0].float() @ rows(spectrum(DIM))
        value_mean[head] = loud * uniform(0, 0.5) * torch.randn(DIM, generator=draw)


def context_ids(tokenizer: Any, case: Case) -> Tensor:
    """[batch, context] of the evaluation text, over and over; every sequence begins elsewhere."""
    ids = torch.tensor(tokenizer(text("evaluation"), add_special_tokens=False, verbose=False)["input_ids"])
    start = torch.arange(case.batch) * len(ids) // case.batch
    return ids[(start[:, None] + torch.arange(case.context)) % len(ids)]


@dataclass(frozen=True, eq=False)
class Reading:
    """One call of a layer's tiles by the model, and what it got."""

    tiles: Tiles
    q: Tensor
    settings: Mapping[str, Any]
    out: Tensor

    def again(self) -> Tensor:
        return self.tiles.attend(self.q, **self.settings)

    def launch(self) -> Callable[[], Tensor]:
        """The same, prepared: what the device is asked to do. On a CPU the call as it is."""
        if not self.q.is_cuda:
            return self.again
        calls: list[Any] = []

        def caught(call: Any) -> Tensor:
            calls.append(call)
            return attend_tiles(call)

        with patch.object(tiles_module, "attend_tiles", caught):
            self.again()
        (call,) = calls
        call.out.fill_(float("nan"))
        return partial(attend_tiles, call)


@contextmanager
def reading() -> Iterator[list[Reading]]:
    """Inside, calls of tiles are noted, layer after layer."""
    found: list[Reading] = []
    attend = Tiles.attend

    def noted(tiles: Tiles, q: Tensor, **settings: Any) -> Tensor:
        out = attend(tiles, q, **settings)
        found.append(Reading(tiles, q, settings, out.clone()))
        return out

    with patch.object(Tiles, "attend", noted):
        yield found


@torch.no_grad()
def decoded(
    model: Any, plan: Plan, ids: Tensor, new: int
) -> tuple[kvsight.PackedCache, list[Reading], dict[str, float]]:
    """A cache after the context and ``new`` greedy tokens, the last step's readings, and seconds."""
    cache = kvsight.PackedCache(plan, monitor=False, tiles=None if ids.is_cuda else True)
    chunk = min(MOST, max(LEAST, CHUNK // len(ids)))
    begin = time.perf_counter()
    with kvsight.enable(model):
        for piece in ids.split(chunk, dim=1):
            logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        token.cpu()
        between = time.perf_counter()
        for _ in range(new):
            with reading() as found:
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        token.cpu()
    if cache.reads.decoded or [r.tiles for r in found] != [layer.tiles for layer in cache.layers]:
        raise SystemExit("the model did not read tiles in every layer")
    return cache, found, {"prefill": between - begin, "decode": time.perf_counter() - between}


def history(tiles: Tiles, at: int) -> tuple[Tensor, Tensor]:
    """Decoded keys and values of one sequence, fp64 [1, H, tokens, d]."""
    one = copy.copy(tiles)
    own = slice(at, at + 1)
    one.tiles = tuple(tuple(t[own] for t in side) for side in tiles.tiles)
    one.bare = tuple(replace(s, sinks=s.sinks[own], tail=s.tail[own]) for s in tiles.bare)
    k, v = (
        torch.cat([part.decode(torch.float64) for part in segments(state)], dim=2) for state in one.states()
    )
    return k, v


def gate(call: Reading, run: Callable[[], Tensor], sequences: Sequence[int]) -> float:
    """Relative error against fp64; raises where the output is not what the model got.

    Or where the error is large, and twice that of torch in the query's precision.
    """
    for _ in range(2):
        if not torch.equal(run(), call.out):
            raise SystemExit("two runs differ")
    errors: list[float] = []
    for at in sequences:
        k, v = history(call.tiles, at)
        q = call.q[at : at + 1].double().view(1, KV_HEADS, -1, DIM)
        weights = torch.softmax(call.settings["scaling"] * q @ k.mT, dim=-1)
        wanted = (weights @ v).view(1, 1, HEADS, DIM)
        plain = sdpa(*(x.to(call.q.dtype) for x in (q, k, v)), scale=call.settings["scaling"])
        own, theirs = (
            float((x.double() - wanted).norm() / wanted.norm())
            for x in (call.out[at : at + 1], plain.view(1, 1, HEADS, DIM))
        )
        if not own < max(ERROR, 2 * theirs):
            raise SystemExit(f"the error is {own:.2e}, and torch's {theirs:.2e}")
        errors.append(own)
    return max(errors)


def wall(run: Callable[[], object]) -> float:
    """Median milliseconds of a few calls on the CPU."""
    return statistics.median(wall_milliseconds(run) for _ in range(3))


def bf16(case: Case, device: str, *, clean: bool = False) -> dict[str, float]:
    """Milliseconds of torch's BF16 kernels."""
    if device != "cpu":
        return baselines(case, clean=clean)
    shape = (case.batch, case.heads, case.context, case.dim)
    k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(case.batch, case.heads, case.group, case.dim, dtype=torch.bfloat16)
    return {"cpu": wall(lambda: sdpa(q, k, v))}


def head_bits(tiles: Tiles) -> list[float]:
    """Bits of a number in each head, keys first."""
    return [8 * t.nbytes / (TOKENS * DIM) for side in tiles.folded for t in side.tilings]


def measure(
    cache: kvsight.PackedCache, calls: Sequence[Reading], case: Case, best: Mapping[str, float]
) -> Iterator[Any]:
    """A row for each layer; ``best`` milliseconds of BF16 by how the cache was emptied: "" or "clean_"."""
    for layer, call in zip(cache.layers, calls, strict=True):
        run = call.launch()
        error = gate(call, run, sorted({0, case.batch - 1}))
        times = {
            name: wall(run)
            if call.q.device.type == "cpu"
            else cold(lambda i, run=run: run(), clean=bool(name))
            for name in best
        }
        tokens = layer.get_seq_length()
        yield {
            "layer": layer.layer.index,
            "tokens": tokens,
            "exact_first": call.tiles.first,
            "true_bits": 8 * layer.nbytes / (2 * case.batch * KV_HEADS * tokens * DIM),
            "head_bits": head_bits(call.tiles),
            "widths": [t.widths for side in call.tiles.folded for t in side.tilings],
            "error": error,
            "TB/s": layer.nbytes / times[""] * 1e-9,
            **{f"{name}ms": ms for name, ms in times.items()},
            **{f"{name}ratio": best[name] / ms for name, ms in times.items()},
        }


def summary(layers: Sequence[Mapping[str, Any]], best: Mapping[str, float]) -> dict[str, Any]:
    widths = [tuple(own) for row in layers for own in row["widths"]]
    return {
        "true_bits": statistics.mean(row["true_bits"] for row in layers),
        "sides of heads": len(widths),
        "different widths": len(set(widths)),
        "median_ratio": statistics.median(row["ratio"] for row in layers),
        **{
            f"{name}ratio of all layers": ms * len(layers) / sum(row[f"{name}ms"] for row in layers)
            for name, ms in best.items()
        },
    }


def plans(model: Any, tokenizer: Any, args: argparse.Namespace) -> Iterator[Plan]:
    """One for each budget, fitted to the same windows for contexts as long as the model takes."""
    ids = calibration_ids(tokenizer, (), args.fit_tokens)
    options, positions = {"layout": "tiles"}, model.config.max_position_embeddings
    for bits in args.bits:
        model.to(args.fit_device or args.device)
        plan = kvsight.fit(model, list(ids.split(1)), bits=bits, options=options, positions=positions)
        model.to(args.device)
        yield plan


def run(
    model: Any, plan: Plan, case: Case, ids: Tensor, new: int, bases: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """One case: what all layers of the model took."""
    best = {name: min(base.values()) for name, base in bases.items()}
    cache, calls, seconds = decoded(model, plan, ids, new)
    layers: list[dict[str, Any]] = []
    for row in measure(cache, calls, case, best):
        layers.append(row)
        print(
            f"  layer {row['layer']}: {row['true_bits']:.3f} true bits (heads {min(row['head_bits']):g} to "
            f"{max(row['head_bits']):g})  {row['ms']:.4f} ms  {row['TB/s']:.2f} TB/s  "
            f"{row['ratio']:.2f} of BF16's {best['']:.4f}  clean {row['clean_ms']:.4f}  "
            f"{row['clean_ratio']:.2f} of {best['clean_']:.4f}  error {row['error']:.1e}",
            flush=True,
        )
    found = summary(layers, best)
    found |= {f"{name}baselines_ms": dict(base) for name, base in bases.items()}
    found |= {"sinks": plan.sinks, "seconds": seconds}
    return {**found, "layers": layers}


def line(row: Mapping[str, Any]) -> str:
    times = ", ".join(f"{what} {count:.1f} s" for what, count in row["seconds"].items())
    return (
        f"{row['batch']}x{row['context']} {row['bits']:g} bits  {row['true_bits']:.3f} true bits  ratio "
        f"{row['median_ratio']:.2f} (median), {row['ratio of all layers']:.2f} (all layers), "
        f"clean {row['clean_ratio of all layers']:.2f}  "
        f"{row['different widths']} different widths in {row['sides of heads']} sides of heads, "
        f"{row['sinks']} exact first tokens  {times}"
    )


def rows(model: Any, tokenizer: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [Case(*map(int, given.split("x"))) for given in args.cases]
    bases = {
        case: {name: bf16(case, args.device, clean=bool(name)) for name in ("", "clean_")} for case in cases
    }
    begin = time.perf_counter()
    for bits, plan in zip(args.bits, plans(model, tokenizer, args), strict=True):
        fitted = time.perf_counter() - begin
        for case in cases:
            ids = context_ids(tokenizer, case).to(args.device)
            row = {**asdict(case), "bits": bits, **run(model, plan, case, ids, args.new, bases[case])}
            row["seconds"]["fit"] = fitted
            yield row
            gc.collect()
            if args.device != "cpu":
                torch.cuda.empty_cache()
        begin = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--device", default="cuda", help="cpu runs all of it in plain torch, to test it")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.0])
    parser.add_argument(
        "--cases", nargs="+", default=None, help="batch x context; default: 8x32768, and 2x256 on a CPU"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model beside attention")
    parser.add_argument("--fit-tokens", type=int, default=2048)
    parser.add_argument("--fit-device", default=None, help="where to fit, by default on the device")
    parser.add_argument("--new", type=int, default=70, help="tokens that are appended one by one")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("without a CUDA device this benchmark only runs with --device cpu.")
    args.cases = args.cases or ["2x256" if args.device == "cpu" else "8x32768"]
    # few tokens are enough for widths and times, and say so with every fit
    logging.getLogger("kvsight").setLevel(logging.ERROR)
    begin = time.perf_counter()
    most = max(int(given.split("x")[1]) for given in args.cases) + args.new
    model = random_model(args.layers, args.hidden, most, args.device)
    device = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    made = time.perf_counter() - begin
    print(
        f"{device}, torch {torch.__version__}, {args.layers} random layers made in {made:.1f} s", flush=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    found: list[dict[str, Any]] = []
    for row in rows(model, tokenizer, args):
        found.append(row)
        print(line(row), flush=True)
        # a run that is cut off leaves what it has
        write({"device": device, "weights": "random", "rows": found}, args.json)


if __name__ == "__main__":
    main()

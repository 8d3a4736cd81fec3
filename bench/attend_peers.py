"""Decode attention of other projects' quantised caches beside ours and the best BF16 kernel, on one GPU.

Each peer runs through its own public functions, installed by whoever runs this; nothing of it lies here.
Before a time counts, the output over the very cache that is timed is held to attention in fp64 over what
that cache decodes to by its documented layout. Times are those of ``bench/attend.py``: a cold L2 cache with
the launch included, and one launch of many in a CUDA graph, where the host's work does not count; rates are
the graph's. A peer with several settings is given the fastest one of each case.

    pip install xformers vllm
    python bench/attend_peers.py --json bench/results/attend-peers-h200.json
    TRITON_INTERPRET=1 XFORMERS_ENABLE_TRITON=1 python bench/attend_peers.py --check    # gates, no GPU
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attend import Case, baselines, cold, copy_bandwidth, measure, replayed
from common import write
from torch import Tensor

GATE = 1e-2
PAGE = 16


@dataclass(frozen=True, eq=False)
class Held:
    """A peer's cache full of coded normal numbers.

    ``decoded(i)`` are K and V of a sequence, fp64 [H, N, d]; each of ``settings`` attends with queries
    [B, Hq, d] and returns the same shape.
    """

    nbytes: int
    decoded: Callable[[int], tuple[Tensor, Tensor]]
    settings: dict[str, Callable[[Tensor], Tensor]]


def drawn(case: Case, device: str) -> Tensor:
    """Keys or values of one sequence [N, H, d].

    Without a mean: one of values would outweigh all that keys do to a long context's output.
    """
    return torch.randn(case.context, case.heads, case.dim, device=device)


def elements(case: Case) -> int:
    """Numbers of K and V together."""
    return 2 * case.batch * case.heads * case.context * case.dim


def queries(case: Case, device: str) -> Tensor:
    shape = (case.batch, case.heads * case.group, case.dim)
    # the interpreter of Triton has no bfloat16
    return torch.randn(shape, device=device, dtype=torch.float16 if device == "cpu" else torch.bfloat16)


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence in fp64: q [Hq, d], K and V [H, N, d]."""
    grouped = q.double().unflatten(0, (len(k), -1)) * q.shape[-1] ** -0.5
    return ((grouped @ k.mT).softmax(-1) @ v).flatten(0, 1)


def nibbles(rows: Tensor) -> Tensor:
    """Rows [..., d] as int32 [..., 1 + d/8]: fp16 step and least number, then codes, the lowest first."""
    least = rows.amin(-1, keepdim=True).half()
    step = ((rows.amax(-1, keepdim=True) - least) / 15).clamp_min(1e-4).half()
    codes = ((rows - least) / step).round().clamp(0, 15).int().unflatten(-1, (-1, 8))
    words = torch.zeros_like(codes[..., 0])
    for i in range(8):
        words |= codes[..., i] << 4 * i
    return torch.cat([torch.cat([step, least], dim=-1).view(torch.int32), words], dim=-1)


def from_nibbles(words: Tensor) -> Tensor:
    """Inverse of ``nibbles``, fp64."""
    step, least = words[..., :1].contiguous().view(torch.float16).double().split(1, dim=-1)
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words[..., 1:, None] >> shifts) & 15).flatten(-2) * step + least


def xformers_int4(case: Case, device: str) -> Held:
    """Split-K over int4 rows, each with an fp16 step and least number (``triton_splitk.FwOp``)."""
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.triton_splitk import FwOp

    sides = [
        torch.stack([nibbles(drawn(case, device)) for _ in range(case.batch)]).unsqueeze(3)
        for _ in range(2)
    ]
    key, value = (side.expand(-1, -1, -1, case.group, -1) for side in sides)

    def attend(q: Tensor, op: Any) -> Tensor:
        query = q.view(case.batch, 1, case.heads, case.group, case.dim)
        return op.apply(Inputs(query, key, value), needs_gradient=False)[0].view(q.shape)

    def decoded(i: int) -> tuple[Tensor, Tensor]:
        k, v = (from_nibbles(side[i, :, :, 0]).transpose(0, 1) for side in sides)
        return k, v

    # their own choice on this device is 2 warps and blocks of 64 tokens, one stage
    tried = ((4, 64, 2), (4, 128, 2))
    chosen = {"as it comes": FwOp} | {
        f"{warps} warps, {tokens} tokens, {stages} stages": FwOp.get_operator(
            64, block_n=tokens, num_warps=warps, num_stages=stages
        )
        for warps, tokens, stages in tried
    }
    settings = {name: partial(attend, op=op) for name, op in chosen.items()}
    return Held(sum(side.nbytes for side in sides), decoded, settings)


def unpacked(data: Tensor, bits: int) -> Tensor:
    """Bytes [..., n] to codes of ``bits`` each, the lowest bits first, uint8 [..., 8n/bits]."""
    eight = torch.arange(8, device=data.device, dtype=torch.uint8)
    flat = (data.unsqueeze(-1) >> eight & 1).flatten(-2).unflatten(-1, (-1, bits))
    return (flat << eight[:bits]).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class Layout:
    """Where vLLM's TurboQuant has what of a token and head: codes of K, its norm, codes of V, step, zero.

    With ``apart`` a page has all codes first, then per head a row of norms, one of steps and one of zeros;
    the norm is divided by that of the coded direction already.
    """

    config: Any
    case: Case
    apart: bool

    @property
    def code_bytes(self) -> tuple[int, int]:
        dim = self.config.head_dim
        return dim * self.config.key_mse_bits // 8, dim * self.config.effective_value_quant_bits // 8

    def split(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pages [n, 16, H, slot] to codes of K and V [16n, H, bytes] and fp64 numbers [16n, H, 3]."""
        k, v = self.code_bytes
        heads = pages.shape[2]
        if not self.apart:
            parts = pages.flatten(0, 1)[..., : k + v + 6].split([k, 2, v, 4], dim=-1)
            halves = torch.cat([parts[1], parts[3]], dim=-1).contiguous().view(torch.float16)
            return parts[0], parts[2], halves.double()
        flat = pages.flatten(1)
        codes = flat[:, : PAGE * heads * (k + v)].reshape(-1, heads, k + v)
        rows = flat[:, PAGE * heads * (k + v) :].contiguous().view(torch.float16)
        halves = rows.view(-1, heads, 3, PAGE).permute(0, 3, 1, 2).flatten(0, 1)
        return codes[..., :k], codes[..., k:], halves.double()

    def decoded(self, pages: Tensor, levels: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [H, N, d], fp64; ``turn`` is what keys were rotated by."""
        keys, values, (norm, step, zero) = (
            x if i < 2 else x.split(1, dim=-1) for i, x in enumerate(self.split(pages))
        )
        direction = levels.double()[unpacked(keys, self.config.key_mse_bits).int()]
        if self.config.norm_correction and not self.apart:
            direction = direction / direction.norm(dim=-1, keepdim=True)
        k = norm * direction @ turn.double().T
        v = unpacked(values, self.config.effective_value_quant_bits) * step + zero
        return tuple(x[: self.case.context].transpose(0, 1) for x in (k, v))


def vllm_turboquant(case: Case, device: str, preset: str, apart: bool) -> Held:
    """TurboQuant's store and decode in Triton: the pair that vLLM runs on CUDA, or with numbers ``apart``
    the pair with tensor cores that it runs on some AMD devices."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    if apart:
        from vllm.v1.attention.ops.turboquant_soa.triton_turboquant_store import triton_turboquant_store
        from vllm.v1.attention.ops.turboquant_soa.triton_turboquant_unified_attention import (
            triton_turboquant_decode_attention_soa as decode,
        )
    else:
        from vllm.v1.attention.ops.triton_turboquant_decode import (
            triton_turboquant_decode_attention as decode,
        )
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    config = TurboQuantConfig.from_cache_dtype(preset, case.dim)
    levels = get_centroids(case.dim, config.centroid_bits).to(device)
    turn = torch.ones(1, 1)
    while len(turn) < case.dim:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)]) / 2**0.5
    turn = turn.to(device)
    pages = -(-case.context // PAGE)
    cache = torch.zeros(
        case.batch * pages, PAGE, case.heads, config.slot_size_aligned, dtype=torch.uint8, device=device
    )
    table = torch.arange(len(cache), dtype=torch.int32, device=device).view(case.batch, pages)
    shared = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "PiT": turn,
    }
    corrected = {"centroids": levels, "norm_correction": config.norm_correction}
    for i in range(case.batch):
        triton_turboquant_store(
            drawn(case, device),
            drawn(case, device),
            cache[i * pages : (i + 1) * pages],
            torch.arange(case.context, dtype=torch.int32, device=device),
            midpoints=(levels[1:] + levels[:-1]) / 2,
            **shared,
            **(corrected if apart else {}),
        )
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    layout = Layout(config, case, apart)
    sized = {"value_packed_size": config.value_packed_size, "max_seq_len": case.context} if apart else {}

    def attend(q: Tensor, splits: int) -> Tensor:
        return decode(
            query=q,
            kv_cache=cache,
            block_table=table,
            seq_lens=lengths,
            Pi=turn,
            scale=case.dim**-0.5,
            max_num_kv_splits=splits,
            **shared,
            **corrected,
            **sized,
        )

    def decoded(i: int) -> tuple[Tensor, Tensor]:
        return layout.decoded(cache[i * pages : (i + 1) * pages], levels, turn)

    # 32 is what vLLM comes with
    settings = {f"{splits} splits": partial(attend, splits=splits) for splits in (32, 128)}
    return Held(cache.nbytes, decoded, settings)


PEERS: dict[str, Callable[[Case, str], Held]] = {
    "xformers int4": xformers_int4,
    "vllm turboquant_4bit_nc": partial(vllm_turboquant, preset="turboquant_4bit_nc", apart=False),
    "vllm turboquant_3bit_nc": partial(vllm_turboquant, preset="turboquant_3bit_nc", apart=False),
    "vllm turboquant_4bit_nc apart": partial(vllm_turboquant, preset="turboquant_4bit_nc", apart=True),
}


def gate(held: Held, case: Case, device: str) -> float:
    """The largest relative error of any setting against fp64, over the last sequence."""
    q = queries(case, device)
    right = wanted(q[-1], *held.decoded(case.batch - 1))
    errors = {
        name: float((run(q)[-1].double() - right).norm() / right.norm())
        for name, run in held.settings.items()
    }
    worst = max(errors.values())
    if not worst < GATE:
        raise RuntimeError(f"relative errors against fp64 are {errors}")
    return worst


def timed(make: Callable[[Case, str], Held], case: Case) -> dict[str, Any]:
    """One row: the gate, then times."""
    first = make(case, "cuda")
    wrong = gate(first, case, "cuda")
    sets = max(1, min(6, (600 << 20) // first.nbytes))
    held = [first, *(make(case, "cuda") for _ in range(sets - 1))]
    q = queries(case, "cuda")
    times = {name: cold(lambda i, name=name: held[i % sets].settings[name](q)) for name in first.settings}
    best = min(times, key=times.__getitem__)
    graph = replayed(lambda i: held[i % sets].settings[best](q), sets * max(1, 6 // sets))
    return {
        **asdict(case),
        "true_bits": 8 * first.nbytes / elements(case),
        "error": wrong,
        "ms": times[best],
        "setting": best,
        "settings_ms": times,
        "graph_ms": graph,
    }


def attempt(name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` gives, or None and a line that says why not."""
    try:
        return run()
    except ModuleNotFoundError as error:
        package = name.split()[0]
        print(f"{name}: {error.name} is not installed: pip install {package}", flush=True)
    except torch.cuda.OutOfMemoryError:
        print(f"{name}: does not fit the device", flush=True)
    # another project's failure, whatever it is, should not take the other rows with it
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    return None


def parsed(text: str) -> Case:
    return Case(*(int(n) for n in text.split("x")))


def check(names: list[str]) -> None:
    """Only the gates, on sizes for an interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(1, 53, 1, 2, 128)
    failed = 0
    for name in names:
        found = attempt(name, lambda name=name: gate(PEERS[name](case, device), case, device))
        failed += found is None
        if found is not None:
            print(f"{name}: error {found:.1e} against fp64", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(names)} could not be held to fp64.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["8x32768", "32x32768", "1x131072", "8x8192"],
        help="as in bench/attend.py",
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--bits", type=float, nargs="*", default=[4.0, 3.0], help="of our rows beside them")
    parser.add_argument("--check", action="store_true", help="only the gates, at a small size")
    args = parser.parse_args()
    if args.check:
        return check(args.peers)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; --check does not.")
    copy = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, copy {copy:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for text in args.cases:
        case = parsed(text)
        base = baselines(case)
        best = min(base, key=base.__getitem__)
        torch.cuda.empty_cache()
        runs = {f"kvsight {b:g} bits": partial(measure, case, b, copy, {}) for b in args.bits}
        runs |= {name: partial(timed, PEERS[name], case) for name in args.peers}
        for name, run in runs.items():
            row = attempt(name, run)
            torch.cuda.empty_cache()
            if row is None:
                continue
            rate = row["true_bits"] * elements(case) / 8 / row["graph_ms"] * 1e-9
            row |= {"TB/s": rate, "share of copy": rate / copy, "baselines_ms": base, "best": best}
            row |= {"ratio": base[best] / row["ms"], "graph_ratio": base[best] / row["graph_ms"]}
            if name in PEERS:
                row["version"] = version(name.split()[0])
            rows.append({"name": name, **row})
            print(
                f"{text:>9} {name:30} {row['true_bits']:.2f} bits  {row['ms']:.4f} ms  "
                f"graph {row['graph_ms']:.4f}  {row['TB/s']:.2f} TB/s ({row['share of copy']:.0%})  "
                f"{row['ratio']:.2f} (graph {row['graph_ratio']:.2f}) of {best} {base[best]:.4f}  "
                f"error {row['error']:.1e}  "
                f"{row.get('setting', '')}",
                flush=True,
            )
            write({"device": device, "copy TB/s": copy, "rows": rows}, args.json)


if __name__ == "__main__":
    main()

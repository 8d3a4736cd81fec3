"""Records as compare, tasks and bench write them, of a model that does not exist."""

import math

from kvsight.records import Conditions, Records

SHARED = {
    "model": "synthetic-1m",
    "fingerprint": "f" * 64,
    "kvsight": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "device": "cpu",
    "dtype": "float32",
}
METHODS = {
    "sight": 1.0,
    "int axis=channel": 3.0,
    "kivi": 5.0,
    "turboquant": 7.0,
    "quanto": 9.0,
    "hqq": 12.0,
}
BUDGETS = (2.0, 2.5, 3.0, 4.0)
LAYERS, HEADS, DIM = 6, 2, 16
TASKS = {"last-word": None, "books": "positions", "induction": "distances", "continuation": "lengths"}


def estimate(mean, half, n=6):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def quality(name, budget):
    kl = METHODS[name] * 0.6 * math.exp(-1.35 * budget)
    loss = 4.0 + kl
    return {
        "arm": f"{name}@{budget:g}",
        "method": name.split()[0],
        "settings": {},
        "budget": budget,
        "external": name in ("quanto", "hqq"),
        "ours": name == "sight",
        "true_bits": budget,
        "key_bits": budget,
        "value_bits": budget,
        "static_bytes": 1000,
        "cache_bytes": int(budget * 100_000),
        "baseline_bytes": 1_600_000,
        "tokens": 6144,
        "kl": estimate(kl, 0.2 * kl),
        "kl_p99": 12 * kl,
        "perplexity": estimate(math.exp(loss), 8.0),
        "baseline_perplexity": estimate(math.exp(4.0), 8.0),
        "same_top": estimate(1 - 2.2 * kl**0.8 / (1 + 2.2 * kl**0.8), 0.01),
        "windows": [{"kl": kl, "kl_p99": 12 * kl, "loss": loss, "baseline_loss": 4.0, "same_top": 0.9}] * 6,
        "agreement": estimate(32 / (1 + 8 * kl), 3.0, 8),
        "agreements": [20] * 8,
        "agreement_cap": 32,
        "encode_us_per_token": 120.0 * METHODS[name],
        "decode_us_per_token": 40.0,
        "date": "2026-01-31",
    }


def heads():
    return [(layer, head, side) for layer in range(LAYERS) for head in range(HEADS) for side in "kv"]


def spectrum(layer, head, side):
    steep = 0.2 + 0.1 * layer + 0.05 * head + (0.1 if side == "v" else 0.0)
    falling = [math.exp(-steep * i) for i in range(DIM)]
    return {
        "layer": layer,
        "head": head,
        "side": side,
        "widths": [max(0, round(5 - 0.72 * steep * i)) for i in range(DIM)],
        "lambda": [x * x for x in falling],
        "metric": falling,
        "covariance": [3 * x for x in falling],
    }


def fitted(records, arm, budget):
    notes = {"calibration_tokens": "65536", "allocate": "measured"}
    bits = [
        {"layer": i, "head": h, "side": s, "true_bits": budget + 0.3 * (s == "k") - 0.1 * i + 0.2 * h}
        for i, h, s in heads()
    ]
    records.append("bits", (arm,), {"arm": arm, "rows": bits, "provenance": notes})
    damage = [
        {"layer": i, "side": s, "kl": 0.002 / (1 + i) + 0.0005 * (s == "v")}
        for i in range(LAYERS)
        for s in "kv"
    ]
    records.append("damage", (arm,), {"arm": arm, "how": "predicted", "rows": damage})


def compare(records):
    for name in METHODS:
        for budget in BUDGETS:
            row = quality(name, budget)
            arm = row["arm"]
            records.append("quality", (arm,), row)
            if name == "sight":
                fitted(records, arm, budget)
    arm = "sight@3"
    records.append("spectrum", (arm,), {"arm": arm, "rows": [spectrum(*head) for head in heads()]})
    reason = "the cheapest plan stores 2.25 bits"
    refusal = {"arm": "rotate@2", "method": "rotate", "budget": 2.0, "reason": reason}
    records.append("refused", ("rotate@2",), refusal)
    for budget in BUDGETS:
        gap = 2 * quality("sight", budget)["kl"]["mean"]
        pair = {
            "ours": f"sight@{budget:g}",
            "peer": f"int axis=channel@{budget:g}",
            "difference": estimate(gap, 0.3 * gap),
            "bits_saved": 0.81,
        }
        records.append("pair", (budget,), pair)


def place(kind, i, lost):
    at = 64 * 2**i
    own = {
        "positions": {"from": at // 2, "to": at, "loss": 4.0 + lost, "baseline_loss": 4.0},
        "distances": {"distance": at, "accuracy": 0.9 - 0.1 * i - lost, "baseline": 0.9 - 0.1 * i},
        "lengths": {"tokens": at, "agreement": 1.0 - lost * i},
    }
    return own[kind]


def detail(kind, lost):
    if kind is not None:
        return {kind: [place(kind, i, lost) for i in range(5)]}
    difference = estimate(lost, 0.02, 64) if lost else None
    return {"loss": {"value": estimate(6.7 + lost, 0.3, 64), "difference": difference}}


def tasks(records):
    for task, kind in TASKS.items():
        for lost, arm in ((0.0, "uncompressed"), (0.01, "sight@3"), (0.06, "sight@2")):
            metric = {"books": "loss", "continuation": "agreement"}.get(task, "accuracy")
            better = metric != "loss"
            value = estimate(0.8 - lost if better else 4.0 + lost, 0.03, 64)
            difference = None if arm == "uncompressed" else estimate(-lost if better else lost, 0.02, 64)
            row = {
                "task": task,
                "arm": arm,
                "metric": metric,
                "higher_is_better": better,
                "value": value,
                "difference": difference,
                "samples": [{"id": "0", "value": 1.0}],
                "detail": detail(kind, lost),
            }
            records.append("task", (task, arm), row)


def bench(records):
    for size, arm in ((16, "uncompressed"), (3, "sight@3")):
        packed = arm != "uncompressed"
        for tokens in (512, 1024, 2048):
            held = tokens * 256 * size
            took = {"cache_bytes": held, "allocator_peak": None, "resident_bytes": held + 8192}
            records.append("memory", (arm, tokens), {"arm": arm, "tokens": tokens, "batch": 1, **took})
            ms = {"median": 12 + tokens / (400 if packed else 200), "n": 32}
            ms |= {"low": ms["median"] - 1, "high": ms["median"] + 2}
            row = {"arm": arm, "tokens": tokens, "batch": 1, "device": "cpu", "threads": 1}
            row |= {"prefill_ms": {"median": tokens / 2, "low": tokens / 3, "high": tokens, "n": 3}}
            row |= {
                "encode_ms": {"median": 5.0, "low": 4.0, "high": 6.0, "n": 3},
                "decode_ms_per_token": ms,
            }
            records.append("speed", (arm, tokens, 1), row)
        budget = 256_000_000
        fit = {"arm": arm, "budget_bytes": budget, "longest_context": budget // (256 * size) // 64 * 64}
        records.append("memory", (arm, "fit"), fit | {"largest_batch": 500 // size, "at_length": 2048})
    records.append("break_even", ("sight@3",), {"arm": "sight@3", "tokens": 1024})


PARTS = {"compare": compare, "tasks": tasks, "bench": bench}


def write(directory, *parts):
    """Records of these commands, or of all three."""
    for part in parts or PARTS:
        PARTS[part](
            Records.open(directory, Conditions(part, SHARED, {"threads": 1, "text": f"{part} text"}))
        )
    return directory

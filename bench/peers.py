"""KL of rival KV-cache quantisers at the bits that they truly store, on the windows of quality.py.

Two kinds of peers: published methods as kvsight builds them, and transformers' ``QuantizedCache`` with its
quanto and hqq backends. The latter shows a prompt its own keys and values uncoded and keeps recent tokens
exact, so one pass over a window would measure nothing; here its own code quantises and dequantises the
whole window, and attention reads what came back. So for every peer each token is coded and read coded.

Each peer is measured at its symmetric settings first, then at the pairs of settings that promise most by
what was measured, until its share is spent. Rows are appended to ``--rows``; a later run continues there.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import calibration_ids, parser, write
from scipy.optimize import nnls
from torch import Tensor
from transformers import PreTrainedModel

from kvsight import assets
from kvsight.errors import KVSightError
from kvsight.eval.intervals import mean_interval
from kvsight.eval.peers import Axis, Setting, measure_stock, nominal_bits, refused
from kvsight.eval.quality import Window, evaluate
from kvsight.fit import make_request, plan_from_stats
from kvsight.integrations.loading import load_model
from kvsight.plan import Plan
from kvsight.stats import Stats
from kvsight.text import read_text, windows
from kvsight.trace import observe, summarise

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    key: Setting
    value: Setting


@dataclass(frozen=True)
class Peer:
    """The settings that a peer can take on each side, in order, and how many of them to measure."""

    name: str
    share: int
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    groups: tuple[int | None, ...] = (32, 64, 128)
    key_axes: tuple[Axis, ...] = (None,)
    value_axes: tuple[Axis, ...] = (None,)
    method: str | None = None
    centre: bool = False


PEERS = (
    Peer("kivi", 40, method="kivi", key_axes=("channel",), value_axes=("token",)),
    Peer("int", 28, method="int", key_axes=("token", "channel"), value_axes=("token", "channel")),
    Peer("turboquant", 12, groups=(None,), method="turboquant"),
    Peer("turboquant centred", 14, groups=(None,), method="turboquant", centre=True),
    Peer("quanto", 22, widths=(2, 4), key_axes=(0, -1), value_axes=(0, -1)),
    Peer("hqq", 24, widths=(1, 2, 3, 4, 8), key_axes=(0, 1), value_axes=(0, 1)),
)
LOW, HIGH = 1.8, 6.0
NOTE = "quanto, hqq: true_bits counts a scale as 16 bits, true_bits_as_run in the dtype it was stored in"


def nominal(peer: Peer, setting: Setting, dim: int) -> float:
    """Bits per element by arithmetic, to choose settings by; what is reported is counted."""
    if setting.group is None:
        return setting.width + 16 / dim
    return nominal_bits(peer.name, setting.width, setting.group)


def bits_of(peer: Peer, pair: Pair, dim: int) -> float:
    return (nominal(peer, pair.key, dim) + nominal(peer, pair.value, dim)) / 2


def settings(peer: Peer, axes: Sequence[Axis], dim: int) -> list[Setting]:
    """What the peer can do on one side."""
    every = (Setting(w, g, a) for w, g, a in product(peer.widths, peer.groups, axes))
    return [setting for setting in every if _can(peer, setting, dim)]


def _can(peer: Peer, setting: Setting, dim: int) -> bool:
    if peer.method is not None:
        return setting.axis != "token" or setting.group is None or setting.group <= dim
    # hqq 0.2.8 cannot read 3-bit codes of a tensor of four dimensions back along axis 1
    return peer.name != "hqq" or setting.width != 3 or setting.axis == 0


def pairs(peer: Peer, dim: int) -> list[Pair]:
    """All settings in the range of bits whose widths are at most 2 apart."""
    sides = (settings(peer, axes, dim) for axes in (peer.key_axes, peer.value_axes))
    every = (Pair(key, value) for key, value in product(*sides))
    return [p for p in every if _sane(peer, p) and LOW <= bits_of(peer, p, dim) <= HIGH]


def _sane(peer: Peer, pair: Pair) -> bool:
    near = abs(pair.key.width - pair.value.width) <= 2
    # plain integers with an axis for each side would be kivi, or the opposite of it
    return near and (peer.name != "int" or pair.key.axis == pair.value.axis)


def symmetric(peer: Peer, dim: int) -> list[Pair]:
    """One width for both sides, and one group: any where the axes are fixed, else 64."""
    free = len(peer.key_axes) > 1
    return [p for p in pairs(peer, dim) if _even(p, dim) and not (free and p.key.group != 64)]


def _even(pair: Pair, dim: int) -> bool:
    key, value = pair.key, pair.value
    groups = {min(s.group or dim, dim if value.axis == "token" else s.group or dim) for s in (key, value)}
    return key.width == value.width and len(groups) == 1


def front(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other row beats in both bits and KL, by rising bits."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["true_bits"], r["kl"]["mean"])):
        if not best or row["kl"]["mean"] < best[-1]["kl"]["mean"]:
            best.append(row)
    return best


def promise(peer: Peer, candidates: Sequence[Pair], rows: Sequence[Row], dim: int) -> Pair:
    """The candidate whose expected KL is lowest relative to the peer's front at its bits.

    KL is expected to be a sum over the sides of squared error times what the axis makes it cost; the costs
    are fitted to the rows measured so far, by relative error.
    """
    kl = np.array([row["kl"]["mean"] for row in rows])
    known = np.array([_errors(peer, pair_of(row)) for row in rows])
    costs, _ = nnls(known / kl[:, None], np.ones(len(rows)))
    expected = np.array([_errors(peer, pair) for pair in candidates]) @ costs
    best = front(rows)
    now = np.interp(
        [bits_of(peer, pair, dim) for pair in candidates],
        [row["true_bits"] for row in best],
        np.log([row["kl"]["mean"] for row in best]),
    )
    return candidates[int(np.argmin(np.log(expected) - now))]


def _errors(peer: Peer, pair: Pair) -> list[float]:
    """Expected squared error of the pair's sides, one entry for every axis that a side can take."""
    key = [_error(pair.key) * (pair.key.axis == axis) for axis in peer.key_axes]
    return key + [_error(pair.value) * (pair.value.axis == axis) for axis in peer.value_axes]


def _error(setting: Setting) -> float:
    if setting.group is None:
        return 4.0**-setting.width
    # the squared step; the range of n numbers grows like the root of log n
    return math.log(setting.group) / (2**setting.width - 1) ** 2


def pair_of(row: Row) -> Pair:
    return Pair(Setting(**row["key"]), Setting(**row["value"]))


def stock_row(model: PreTrainedModel, batches: Sequence[Tensor], backend: str, pair: Pair) -> Row:
    """One setting of a stock backend."""
    found, stored = measure_stock(model, batches, backend, pair.key, pair.value)
    bits = _bits(stored.true_bits, stored.key_bits, stored.value_bits)
    return {**bits, "true_bits_as_run": stored.as_run, **_quality([window for window, _ in found])}


def head_dim(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def plan_of(model: PreTrainedModel, stats: Stats, peer: Peer, pair: Pair) -> Plan:
    """A plan whose two sides have settings of their own."""
    key, value = (_one_plan(model, stats, peer, setting) for setting in (pair.key, pair.value))
    joined = zip(key.layers, value.layers, strict=True)
    return replace(key, layers=tuple(replace(k, value=v.value) for k, v in joined))


def _one_plan(model: PreTrainedModel, stats: Stats, peer: Peer, setting: Setting) -> Plan:
    options: dict[str, object] = {} if setting.group is None else {"group": setting.group}
    if peer.method == "int":
        options["axis"] = setting.axis
    if peer.centre:
        options["centre"] = True
    assert peer.method is not None
    # the metadata of all these methods takes at most 1 bit, so this ceiling means exactly this width
    request = make_request(peer.method, setting.width + 1.0, options=options)
    return plan_from_stats(model, stats, request, {})


def measure_ours(model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan) -> Row:
    result = evaluate(model, plan, batches)
    return {**_bits(result.true_bits, result.key_bits, result.value_bits), **_quality(result.windows)}


def _bits(both: float, key: float, value: float) -> Row:
    return {"true_bits": both, "key_bits": key, "value_bits": value}


def _quality(found: Sequence[Window]) -> Row:
    kls = [w.kl for w in found]
    if not all(map(math.isfinite, kls)):
        raise KVSightError(f"the logits are not finite; KL per window: {kls}.")
    top = mean_interval([w.same_top for w in found], least=0.0, most=1.0)
    return {
        "kl": mean_interval(kls, least=0.0).to_json(),
        "same_top": top.to_json(),
        "windows": [vars(w) for w in found],
    }


class Log:
    """Measured rows, appended to a file as they come; its first line says how they were measured."""

    def __init__(self, path: Path | None, protocol: Row) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path is not None and path.exists():
            head, *rows = map(json.loads, path.read_text().splitlines())
            if head != protocol:
                raise KVSightError(f"{path} was measured by {head}, not {protocol}; give another --rows.")
            self.rows = rows
        elif path is not None:
            path.write_text(json.dumps(protocol) + "\n")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def of(self, peer: Peer) -> list[Row]:
        return [row for row in self.rows if row["peer"] == peer.name]


Measure = Callable[[Peer, Pair], Row]


def run(peer: Peer, wanted: Iterable[Pair], log: Log, measure: Measure) -> None:
    """Measure what is new among ``wanted``, up to the peer's share."""
    for pair in wanted:
        known = [pair_of(row) for row in log.of(peer)]
        if pair in known or len(known) >= peer.share:
            continue
        row = {"peer": peer.name, "key": asdict(pair.key), "value": asdict(pair.value)}
        log.add(row | measure(peer, pair))
        print(line(log.rows[-1]), flush=True)


def search(peer: Peer, dim: int, log: Log, measure: Measure) -> None:
    """One promising pair after another, until the peer's share is spent or nothing is left."""
    while len(rows := log.of(peer)) < peer.share:
        known = {pair_of(row) for row in rows}
        left = [pair for pair in pairs(peer, dim) if pair not in known]
        if not left:
            return
        run(peer, [promise(peer, left, rows, dim)], log, measure)


def line(row: Row) -> str:
    key, value = (_say(row[side]) for side in ("key", "value"))
    kl = f"{row['kl']['mean']:.4f}"
    if row["kl"]["low"] is not None:
        kl += f" ({row['kl']['low']:.4f} to {row['kl']['high']:.4f})"
    return f"| {row['peer']} | {key} | {value} | {row['true_bits']:.3f} | {kl} |"


def _say(setting: Row) -> str:
    group = "" if setting["group"] is None else f" / {setting['group']}"
    return f"{setting['width']}{group}" + ("" if setting["axis"] is None else f" / {setting['axis']}")


def print_fronts(rows: list[Row]) -> None:
    print("\nThe front of all peers, then of each:\n")
    print("| peer | key: width / group / axis | value | true bits | KL (95 % interval) |")
    print("|---|---|---|---|---|")
    names = dict.fromkeys(row["peer"] for row in rows)
    for row in front(rows):
        print(line(row))
    for name in names:
        print("| | | | | |")
        for row in front(row for row in rows if row["peer"] == name):
            print(line(row))


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, device=options.device)
    text = assets.text("evaluation") if options.text is None else read_text(options.text)
    batches = windows(tokenizer, text, 1024, options.windows).split(1)
    named = {
        "model": Path(options.model or "pico-8m").name,
        "calibration": [path.name for path in options.calibration or []] or ["embedded"],
        "text": "embedded" if options.text is None else options.text.name,
    }
    protocol = {**named, "calibration_tokens": options.tokens, "windows": len(batches)}
    log = Log(options.rows, protocol)
    stats = cache(partial(_stats, model, tokenizer, options.calibration or [], options.tokens))

    def measure(peer: Peer, pair: Pair) -> Row:
        if peer.method is None:
            return stock_row(model, batches, peer.name, pair)
        return measure_ours(model, batches, plan_of(model, stats(), peer, pair))

    dim = head_dim(model)
    peers = list(_present(model, options.peers.split(",")))
    for peer in peers:
        run(peer, symmetric(peer, dim), log, measure)
    for peer in peers:
        search(peer, dim, log, measure)
    print_fronts(log.rows)
    write({**protocol, "note": NOTE, "rows": log.rows}, options.json)


def _stats(model: PreTrainedModel, tokenizer: Any, files: Sequence[Path], tokens: int) -> Stats:
    ids = calibration_ids(tokenizer, files, tokens)
    return summarise(observe(model, ids.split(2)))


def _present(model: PreTrainedModel, names: Sequence[str]) -> Iterator[Peer]:
    for peer in PEERS:
        reason = _why_not(peer, model) if peer.name in names else "not asked for"
        if reason is None:
            yield peer
        else:
            print(f"{peer.name} skipped: {reason}", flush=True)


def _why_not(peer: Peer, model: PreTrainedModel) -> str | None:
    return refused(peer.name, model.config) if peer.method is None else None


def _options() -> argparse.Namespace:
    out = parser(__doc__.splitlines()[0])
    out.add_argument("--calibration", type=Path, nargs="*", help="text files; default: embedded")
    out.add_argument("--text", type=Path, default=None, help="text to report on; default: embedded")
    out.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    out.add_argument("--windows", type=int, default=6)
    out.add_argument("--peers", default=",".join(peer.name for peer in PEERS))
    out.add_argument("--rows", type=Path, default=None, help="append rows here, and continue from it")
    out.add_argument("--device", default="cpu")
    return out.parse_args()


if __name__ == "__main__":
    main()

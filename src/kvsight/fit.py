"""Calibrate a plan: observe the model, summarise, let a method place codecs under the budget."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import kvsight
from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.fingerprint import fingerprint
from kvsight.methods import get
from kvsight.methods.base import Budget
from kvsight.plan import SIDES, LayerPlan, Plan, Side
from kvsight.retention import Retention
from kvsight.stats import LayerStats, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsight.trace import Progress

MAX_BITS = 16.0


@dataclass(frozen=True)
class Request:
    """What a user asks of ``fit``: a method and a budget for each side, and what stays exact."""

    methods: Mapping[Side, str]
    bits: Mapping[Side, float | None]
    options: Mapping[str, object]
    sinks: int = 0
    window: int = 0
    reference_length: int = 1024


def fit(  # noqa: PLR0913
    model: "PreTrainedModel",
    batches: Iterable[Tensor],
    *,
    bits: float | None = None,
    key_bits: float | None = None,
    value_bits: float | None = None,
    method: str | Mapping[str, str] = "sight",
    options: Mapping[str, object] | None = None,
    sinks: int = 0,
    window: int = 0,
    reference_length: int = 1024,
    progress: "Progress | None" = None,
    provenance: Mapping[str, str] | None = None,
) -> Plan:
    """Fit a plan to ``model`` on calibration text.

    Args:
        model: a transformers causal LM.
        batches: token ids, LongTensor [B, T] each.
        bits: ceiling of stored bits per cached element, metadata, sinks and window included.
        key_bits, value_bits: ceilings per side; a missing one defaults to ``bits``.
        method: a name from ``kvsight.methods()``, or ``{"k": name, "v": name}``.
        options: settings of the method (``kvsight methods`` lists them).
        sinks, window: first and last tokens kept exact.
        reference_length: tokens at which the budget holds.

    Raises ``KVSightError`` for an unknown method, a budget that cannot be met, or bad token ids.
    """
    from kvsight.trace import observe, summarise

    request = make_request(method, bits, key_bits=key_bits, value_bits=value_bits, options=options)
    request = replace(request, sinks=sinks, window=window, reference_length=reference_length)
    _check(request)
    source = _Hashing(batches)
    stats = summarise(observe(model, source, progress=progress))
    notes = {"calibration_sha256": source.digest(), "calibration_tokens": str(stats.tokens)}
    return plan_from_stats(model, stats, request, {**notes, **(provenance or {})}, progress)


def make_request(
    method: str | Mapping[str, str],
    bits: float | None = None,
    *,
    key_bits: float | None = None,
    value_bits: float | None = None,
    options: Mapping[str, object] | None = None,
) -> Request:
    """A request for one method or one per side; a budget per side defaults to ``bits``."""
    names = {"k": method, "v": method} if isinstance(method, str) else dict(method)
    if set(names) != {"k", "v"}:
        raise KVSightError(f"method is a name or {{'k': name, 'v': name}}; got keys {sorted(names)}.")
    limits: dict[Side, float | None] = {
        "k": bits if key_bits is None else key_bits,
        "v": bits if value_bits is None else value_bits,
    }
    return Request({"k": names["k"], "v": names["v"]}, limits, options or {})


def _check(request: Request) -> None:
    for side, name in request.methods.items():
        get(name)
        limit = request.bits[side]
        if limit is None and name != "identity":
            raise KVSightError(
                "no budget: give bits= (--bits), or key_bits= and value_bits= (--key-bits, --value-bits)."
            )
        if limit is not None and not 0 < limit <= MAX_BITS:
            raise KVSightError(f"bits must be above 0 and at most {MAX_BITS:g}; got {limit:g}.")
    for name, count in (("sinks", request.sinks), ("window", request.window)):
        if count < 0:
            raise KVSightError(f"{name} counts tokens and cannot be negative; got {count}.")
    if request.reference_length < 1:
        raise KVSightError(f"reference_length must be positive; got {request.reference_length}.")


def plan_from_stats(
    model: "PreTrainedModel",
    stats: Stats,
    request: Request,
    provenance: Mapping[str, str],
    progress: "Progress | None" = None,
) -> Plan:
    """The part of ``fit`` after observation; many plans can share one ``Stats``."""
    _check(request)
    plain = set(request.methods.values()) == {"identity"}
    dense = _dense_dtype(model.dtype, plain)
    sides = [_place_side(stats, side, request, dense) for side in SIDES]
    layers: list[LayerPlan] = []
    for layer, key, value in zip(stats.layers, *sides, strict=True):
        layers.append(LayerPlan(layer.index, layer.window, layer.key.heads, key, value))
        if progress is not None:
            progress("fit", len(layers), len(stats.layers))
    one = request.methods["k"] == request.methods["v"]
    named = request.methods["k"] if one else {str(s): m for s, m in request.methods.items()}
    return Plan(
        tuple(layers),
        named,
        dict(request.options),
        request.sinks,
        request.window,
        dense,
        request.reference_length,
        fingerprint(model),
        json.loads(json.dumps(model.config.to_dict(), default=str)),
        {**_versions(), **{f"note_{i}": n for i, n in enumerate(stats.notes)}, **provenance},
    )


def _dense_dtype(run: torch.dtype, plain: bool) -> torch.dtype:
    """Exact tokens are kept in 16 bits; a plan that only copies keeps the model's own numbers."""
    return run if plain or run.itemsize <= 2 else torch.bfloat16


def _place_side(
    stats: Stats, side: Side, request: Request, dense: torch.dtype
) -> Iterator[tuple[Placement, ...]]:
    """The placements of one layer after another."""
    method = get(request.methods[side])
    options = method.with_defaults(_options_for(method.options, request))
    limit = request.bits[side]
    ceiling = 8.0 * dense.itemsize if limit is None else limit
    budgets = _spread(stats, side, ceiling) if method.fine else [ceiling] * len(stats.layers)
    for layer, bits in zip(stats.layers, budgets, strict=True):
        retention = Retention(request.sinks, request.window, layer.window)
        budget = Budget(bits, request.reference_length, retention, dense, ceiling)
        placed = method.build(side, layer.side(side), budget, options)
        yield tuple(_canonical(p) for p in placed)


def _options_for(known: Mapping[str, object], request: Request) -> dict[str, object]:
    """With two methods, each takes its own options; one that nobody knows is left to be refused."""
    both = {name for m in request.methods.values() for name in get(m).options}
    return {n: v for n, v in request.options.items() if n in known or n not in both}


def _spread(stats: Stats, side: Side, bits: float) -> list[float]:
    """Per-layer ceilings whose whole bytes add up to the side's budget."""
    out: list[float] = []
    due = given = 0.0
    for layer in stats.layers:
        size = _size(layer, side)
        due += bits * size / 8
        mine = int(due - given + 1e-9)
        given += mine
        out.append(8 * mine / size)
    return out


def _size(layer: LayerStats, side: Side) -> int:
    summary = layer.side(side)
    return summary.heads * summary.dim


def _canonical(placement: Placement) -> Placement:
    """Tensors as a file would give them back, so that a saved plan is the same plan."""
    codec = placement.codec
    transform = codec.transform.stored()
    return Placement(placement.heads, replace(codec, transform=transform))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    others = {name: version(name) for name in ("torch", "transformers")}
    return {"kvsight": kvsight.__version__, **others}


class _Hashing:
    """Passes batches on and remembers a hash of their token ids."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = batches
        self._sha = hashlib.sha256()

    def __iter__(self) -> Iterator[Tensor]:
        for ids in self._batches:
            yield ids
            # hashed when the next one is asked for: by then it was checked
            self._sha.update(ids.to(torch.int64).cpu().contiguous().numpy().tobytes())

    def __len__(self) -> int:
        sized: Any = self._batches
        return len(sized) if hasattr(sized, "__len__") else 0

    def digest(self) -> str:
        return self._sha.hexdigest()

"""Turn a budget into placements: uniformly, or by an allocation over layers, heads and sides."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvsight.allocate import InfeasibleError, Unit, allocate
from kvsight.codec import Placement
from kvsight.curves import Candidates, Curve, Floats, candidates
from kvsight.drift import Assumed
from kvsight.errors import KVSightError
from kvsight.formats import Row
from kvsight.methods import get
from kvsight.methods.base import Budget, Method, Option, Side
from kvsight.plan import SIDES, LayerPlan
from kvsight.request import Request
from kvsight.retention import Retention
from kvsight.rules import RULES
from kvsight.stats import LayerStats, SideStats, Stats

Progress = Callable[[str, int, int], None]
Placed = dict[tuple[int, Side], tuple[Placement, ...]]


@dataclass(frozen=True, eq=False)
class Spending:
    """Placements by (position of the layer, side), and what the curves say they cost together.

    ``predicted_kl`` is in nats per token; None where nothing was predicted.
    """

    placed: Placed
    predicted_kl: float | None


Prepared = dict[tuple[int, Side], Candidates]


def prepare(
    stats: Stats, request: Request, dense: torch.dtype, progress: Progress | None = None
) -> Prepared:
    """The candidates of every layer and side that is allocated; they serve any budget and any sinks."""
    sides = [side for side in SIDES if request.rule(side) != "uniform"]
    out: Prepared = {}
    for position, layer in enumerate(stats.layers):
        for side in sides:
            method = get(request.methods[side])
            out[position, side] = candidates(method, side, layer, dense, options_of(method, request))
            if progress is not None:
                progress("curves", len(out), len(stats.layers) * len(sides))
    return out


def spend(
    stats: Stats,
    request: Request,
    dense: torch.dtype,
    prepared: Prepared,
    progress: Progress | None = None,
) -> Spending:
    """Place codecs for every layer and side within the request's budget.

    Raises ``KVSightError`` for a budget that cannot be met, naming the cheapest plan that can.
    """
    pools: list[tuple[Side, ...]] = [SIDES] if request.joint else [("k",), ("v",)]
    placed: Placed = {}
    predicted: list[float | None] = []
    for pool in pools:
        if request.rule(pool[0]) == "uniform":
            placed |= _uniform(stats, pool[0], request, dense)
            predicted.append(None)
        else:
            found, kl = _allocated(stats, pool, request, dense, prepared, progress)
            placed |= found
            predicted.append(kl)
    known = [kl for kl in predicted if kl is not None]
    return Spending(placed, sum(known) if len(known) == len(predicted) else None)


def options_of(method: Method, request: Request) -> dict[str, Option]:
    """With two methods, each takes its own options; one that nobody knows is left to be refused."""
    both = {name for m in request.methods.values() for name in get(m).options}
    mine = {n: v for n, v in request.options.items() if n in method.options or n not in both}
    return method.with_defaults(mine)


def _retention(layer: LayerStats, request: Request) -> Retention:
    return Retention(request.sinks or 0, request.window, layer.window)


def _uniform(stats: Stats, side: Side, request: Request, dense: torch.dtype) -> Placed:
    """Every layer gets the same bits; a method of any row size spreads the rounding over layers."""
    method = get(request.methods[side])
    options = options_of(method, request)
    ceiling = _bits_of(stats, request, side, dense)
    budgets = [ceiling] * len(stats.layers)
    if method.rows is not None:
        budgets = _spread(stats, side, ceiling)
    total = ceiling if request.shared else None
    placed: Placed = {}
    for position, (layer, bits) in enumerate(zip(stats.layers, budgets, strict=True)):
        kept = _retention(layer, request)
        budget = Budget(bits, request.reference_length, kept, dense, ceiling, total)
        placed[position, side] = method.build(side, layer.side(side), budget, options)
    return placed


def _bits_of(stats: Stats, request: Request, side: Side, dense: torch.dtype) -> float:
    """The ceiling of one side in bits per element."""
    if request.bytes_per_token is not None:
        seen = request.reference_length
        elements = sum(_elements(layer, s, request) for layer in stats.layers for s in SIDES)
        return 8 * request.bytes_per_token * seen / elements
    limit = request.bits[side]
    return 8.0 * dense.itemsize if limit is None else limit


def _spread(stats: Stats, side: Side, bits: float) -> list[float]:
    """Per-layer ceilings whose whole bytes add up to the side's budget."""
    out: list[float] = []
    due = given = 0.0
    for layer in stats.layers:
        summary = layer.side(side)
        size = summary.heads * summary.dim
        due += bits * size / 8
        mine = int(due - given + 1e-9)
        given += mine
        out.append(8 * mine / size)
    return out


def _elements(layer: LayerStats, side: Side, request: Request) -> int:
    """Numbers that the uncompressed cache would hold at the reference length."""
    summary = layer.side(side)
    seen = _retention(layer, request).visible(request.reference_length)
    return seen * summary.heads * summary.dim


@dataclass(frozen=True, eq=False)
class _Part:
    """One layer's side in an allocation: its candidates, and the options that the constraints leave."""

    position: int
    side: Side
    layer: LayerStats
    found: Candidates
    allowed: list[int]


def _allocated(
    stats: Stats,
    sides: Sequence[Side],
    request: Request,
    dense: torch.dtype,
    prepared: Prepared,
    progress: Progress | None,
) -> tuple[Placed, float | None]:
    limits = request.constraints
    _check_protected(stats, limits.protected)
    parts = list(_parts(stats, sides, request, prepared))
    rule = RULES[request.rule(sides[0])]
    damages = rule([p.found for p in parts], [p.layer for p in parts]) if parts else []
    pools = [list(range(len(parts)))]
    if limits.rows == "layers":
        pools = [[i for i, p in enumerate(parts) if p.position == n] for n in range(len(stats.layers))]
    choices: dict[int, list[int]] = {}
    budget = _budget(stats, sides, request, dense)
    whole = sum(_part_elements(parts, range(len(parts)), request))
    for pool in filter(None, pools):
        share = sum(_part_elements(parts, pool, request)) / whole
        mine = [(parts[i], damages[i]) for i in pool]
        chosen = _solve(mine, int(budget * share + 1e-6), request, dense)
        choices |= dict(zip(pool, chosen, strict=True))
    placed: Placed = {}
    predicted = 0.0
    for i, part in enumerate(parts):
        placed[part.position, part.side] = part.found.place(choices[i])
        predicted += sum(
            float(curve.damage[k]) for curve, k in zip(part.found.curves, choices[i], strict=True)
        )
        if progress is not None:
            progress("fit", i + 1, len(parts))
    for position, layer in enumerate(stats.layers):
        if layer.index in limits.protected:
            placed |= {(position, side): _exact(layer, side, dense) for side in sides}
    return placed, predicted if stats.weighed else None


def _parts(stats: Stats, sides: Sequence[Side], request: Request, prepared: Prepared) -> Iterator[_Part]:
    for position, layer in enumerate(stats.layers):
        if layer.index in request.constraints.protected:
            continue
        for side in sides:
            found = prepared[position, side]
            allowed = _allowed(found.curves[0], request, request.methods[side])
            yield _Part(position, side, layer, found, allowed)


def _allowed(curve: Curve, request: Request, method: str) -> list[int]:
    """Options that the constraints leave; heads of a side share their list of options."""
    limits = request.constraints
    allowed = [
        i
        for i, (bits, form) in enumerate(zip(curve.bits, curve.formats, strict=True))
        if bits >= limits.min_head_bits - 1e-9 and (limits.formats is None or form in limits.formats)
    ]
    if not allowed:
        raise KVSightError(
            f"{method} has no configuration that the constraints allow: formats "
            f"{', '.join(sorted(set(curve.formats)))} of {curve.bits.min():.3g} to {curve.bits.max():.3g} "
            "bits. Relax min_head_bits or formats."
        )
    return allowed


def _part_elements(parts: Sequence[_Part], which: Iterable[int], request: Request) -> list[int]:
    return [_elements(parts[i].layer, parts[i].side, request) for i in which]


def _budget(stats: Stats, sides: Sequence[Side], request: Request, dense: torch.dtype) -> int:
    """Bytes that protected layers leave to the others at the reference length."""
    bits = {side: _bits_of(stats, request, side, dense) for side in sides}
    spent = sum(bits[s] * _elements(layer, s, request) / 8 for layer in stats.layers for s in sides)
    protected = [layer for layer in stats.layers if layer.index in request.constraints.protected]
    held = sum(_exact_bytes(layer, side, request, dense) for layer in protected for side in sides)
    if held > spent:
        raise KVSightError(
            f"the protected layers alone take {held:,} bytes at {request.reference_length:,} tokens; the "
            f"budget is {int(spent):,}. Protect fewer layers, or raise the budget."
        )
    return int(spent + 1e-6) - held


def _exact_bytes(layer: LayerStats, side: Side, request: Request, dense: torch.dtype) -> int:
    kept = _retention(layer, request).stored(request.reference_length, 1)
    summary = layer.side(side)
    return summary.heads * summary.dim * dense.itemsize * (kept.coded + kept.dense)


def _exact(layer: LayerStats, side: Side, dense: torch.dtype) -> tuple[Placement, ...]:
    """A protected layer: copies in the 16-bit type."""
    summary = layer.side(side)
    budget = Budget(8.0 * dense.itemsize, 1, Retention(0, 0), dense)
    return get("identity").build(side, summary, budget, {})


def _solve(
    parts: Sequence[tuple[_Part, list[Floats]]], budget: int, request: Request, dense: torch.dtype
) -> list[list[int]]:
    """The chosen option of every head of every part."""
    elements = sum(_elements(part.layer, part.side, request) for part, _ in parts)
    equal = request.constraints.rows == "heads"
    units: list[Unit] = []
    for part, damage in parts:
        seen = Budget(16.0, request.reference_length, _retention(part.layer, request), dense)
        costs = [part.found.nbytes(seen)[part.allowed]] * len(part.found.curves)
        mine = [d[part.allowed] for d in damage]
        if equal:
            costs, mine = [np.sum(costs, axis=0)], [np.sum(mine, axis=0)]
        units += [Unit(c, d) for c, d in zip(costs, mine, strict=True)]
    try:
        chosen = iter(allocate(units, budget).choice)
    except InfeasibleError as error:
        raise KVSightError(
            f"a budget of {8 * max(budget, 0) / elements:.4g} bits per element "
            f"({budget:,} bytes at {request.reference_length:,} tokens) cannot be met: the cheapest "
            f"feasible plan stores {8 * error.cheapest / elements:.4g} ({error.cheapest:,} bytes). "
            "Raise the budget, keep fewer tokens exact, or relax the constraints."
        ) from None
    out: list[list[int]] = []
    for part, _ in parts:
        heads = len(part.found.curves)
        own = [next(chosen)] * heads if equal else [next(chosen) for _ in range(heads)]
        out.append([part.allowed[k] for k in own])
    return out


def _check_protected(stats: Stats, protected: tuple[int, ...]) -> None:
    known = {layer.index for layer in stats.layers}
    unknown = sorted(set(protected) - known)
    if unknown:
        raise KVSightError(
            f"protected layers {unknown} are not cached layers of this model; it has {sorted(known)}."
        )


def layer_plans(placed: Placed, stats: Stats) -> tuple[LayerPlan, ...]:
    """The layers of a plan with these placements, as a file would give them back."""
    placed = _as_stored(placed, stats)
    return tuple(
        LayerPlan(layer.index, layer.window, layer.key.heads, placed[n, "k"], placed[n, "v"])
        for n, layer in enumerate(stats.layers)
    )


def _as_stored(placed: Placed, stats: Stats) -> Placed:
    """Placements as a file would give them back, with what was assumed: a saved plan is the same plan."""
    return {
        (position, side): tuple(_canonical(p, stats.layers[position].side(side)) for p in placements)
        for (position, side), placements in placed.items()
    }


def _canonical(placement: Placement, stats: SideStats) -> Placement:
    codec, heads = placement.codec, list(placement.heads)
    transform = codec.transform.stored()
    if not isinstance(codec.format, Row) or codec.format.norm or codec.rope is not None:
        # scales of the tokens' own, and copies, assume nothing; a monitor does not turn keys back
        return replace(placement, codec=replace(codec, transform=transform))
    assumed = Assumed.of(transform, stats.moments.mean[heads], stats.moments.covariance[heads])
    return replace(placement, codec=replace(codec, transform=transform), assumed=assumed)

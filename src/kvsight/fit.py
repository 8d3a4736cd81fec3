"""Calibrate a plan: observe the model, summarise, place codecs under the budget, try what is open."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import kvsight
from kvsight.errors import KVSightError
from kvsight.fingerprint import fingerprint
from kvsight.methods import get
from kvsight.plan import SIDES, Plan
from kvsight.reach import spread
from kvsight.request import Constraints, Request, check, make_request, one_of
from kvsight.spend import Prepared, layer_plans, prepare, spend
from kvsight.stats import Stats, doubts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsight.probe import Probe
    from kvsight.trace import Progress

__all__ = ["Constraints", "Request", "fit", "make_request", "plan_from_stats", "prepare_from_stats"]

MakePlan = Callable[..., Plan]

GRADIENT_TOKENS = 16_384
PROPAGATIONS = ("gradient", "perturbation", "none")

# Numbers of first tokens that an allocation may buy, and windows on which it tries them. The first token
# has no context: its vectors are unlike all others, and one window in a few is ruined without it.
_SINKS = (1, 4)
_TRIALS = 2
_TRIAL_TOKENS = 512
# more sinks are bought only where they are worth more than the noise of a few windows
_CLEAR = 0.98
# the search for the smallest plan stops at this many bits
_BITS_STEP = 0.02
_HIGHEST_BITS = 8.0

_log = logging.getLogger("kvsight")


def fit(  # noqa: PLR0913
    model: "PreTrainedModel",
    batches: Iterable[Tensor],
    *,
    bits: float | None = None,
    key_bits: float | None = None,
    value_bits: float | None = None,
    bytes: float | None = None,
    max_kl: float | None = None,
    validation: Iterable[Tensor] | None = None,
    method: str | Mapping[str, str] = "sight",
    options: Mapping[str, object] | None = None,
    allocate: str | None = None,
    constraints: Constraints | None = None,
    propagation: str = "gradient",
    sinks: int | None = None,
    window: int = 0,
    reference_length: int = 1024,
    positions: int | None = None,
    progress: "Progress | None" = None,
    provenance: Mapping[str, str] | None = None,
) -> Plan:
    """Fit a plan to ``model`` on calibration text.

    Args:
        model: a transformers causal LM.
        batches: token ids, LongTensor [B, T] each.
        bits: ceiling of stored bits per cached element, metadata, sinks and window included.
        key_bits, value_bits: ceilings per side; a missing one defaults to ``bits``.
        bytes: the budget as bytes per token of context, instead of ``bits``.
        max_kl: instead of a budget, the final KL in nats per token that the smallest plan may cost on
            ``validation`` (by default the last eighth of ``batches``, which is then not calibrated on).
        method: a name from ``kvsight.methods()``, or ``{"k": name, "v": name}``.
        options: settings of the method (``kvsight methods`` lists them).
        allocate: how the budget is spent over layers, heads and sides: "measured" (by what each error
            costs at the output), "uniform", "weight-norm",
            "weight-norm-spectral", "weight-norm-group", "ratequant", "rdkv".
            By default "measured" for ``sight`` and "uniform" for published methods.
        constraints: what an allocation may not do.
        propagation: how damage is followed to the output: "gradient", "perturbation" (forward passes
            only) or "none".
        sinks: first tokens kept exact; None is 1 or 4 within the budget for methods of single-token rows
            under "measured", and 0 for everything else.
        window: last tokens kept exact.
        reference_length: tokens at which the budget holds.
        positions: longest context in tokens that will be served, where calibration windows are shorter:
            what is known of keys is turned to positions up to there (``kvsight.reach``).

    Raises ``KVSightError`` for an unknown method, a budget that cannot be met, or bad token ids.
    """
    request = make_request(
        method, bits, key_bits=key_bits, value_bits=value_bits, options=options, allocate=allocate
    )
    request = replace(
        request,
        sinks=sinks,
        window=window,
        reference_length=reference_length,
        bytes_per_token=bytes,
        constraints=constraints or Constraints(),
    )
    one_of("propagation", propagation, PROPAGATIONS)
    if max_kl is not None:
        request = _open_ended(request, max_kl)
    check(request)
    if bytes is not None and (bits, key_bits, value_bits) != (None, None, None):
        raise KVSightError("give the budget in bits or in bytes, not both.")
    from kvsight.probe import Probe

    seen, held_out = _split(batches, validation, max_kl is not None)
    stats = gather_stats(model, seen, request, propagation, progress)
    if positions is not None:
        stats = spread(stats, positions)
    notes = {"calibration_sha256": digest_ids(seen), "calibration_tokens": str(stats.tokens)}
    if _weighed(request) or any(get(name).calibrated for name in request.methods.values()):
        notes |= {f"warning_{i}": text for i, text in enumerate(doubts(stats))}
        for text in doubts(stats):
            _log.warning("%s", text)
    if positions is not None:
        notes["positions"] = str(positions)
    notes |= dict(provenance or {})
    request = settled(request, stats)
    prepared = prepare_from_stats(model, stats, request, progress)
    make = partial(plan_from_stats, model, stats, prepared=prepared)
    if request.sinks is None:
        request = choose_sinks(make, trial_probe(model, seen), stats, request, max_kl, progress)
    if max_kl is None:
        return make(request, notes, progress=progress)
    return _smallest(make, Probe(model, held_out), request, notes, max_kl, progress)


def plan_from_stats(
    model: "PreTrainedModel",
    stats: Stats,
    request: Request,
    provenance: Mapping[str, str],
    progress: "Progress | None" = None,
    prepared: Prepared | None = None,
) -> Plan:
    """The part of ``fit`` after observation; many plans can share one ``Stats``.

    Plans that differ in budget, sinks or constraints only can share what ``prepare_from_stats`` gave.
    """
    check(request)
    request = settled(request, stats)
    dense = _dense_dtype(model, request)
    if prepared is None:
        prepared = prepare(stats, request, dense, progress)
    spending = spend(stats, request, dense, prepared, progress)
    one = request.methods["k"] == request.methods["v"]
    named = request.methods["k"] if one else {str(s): m for s, m in request.methods.items()}
    rules = dict.fromkeys(request.rule(side) for side in SIDES)
    notes = {f"note_{i}": n for i, n in enumerate(stats.notes)}
    notes["allocate"] = ", ".join(rules)
    if spending.predicted_kl is not None:
        notes["predicted_kl"] = f"{spending.predicted_kl:.4g}"
    return Plan(
        layer_plans(spending.placed, stats),
        named,
        dict(request.options),
        request.sinks or 0,
        request.window,
        dense,
        request.reference_length,
        fingerprint(model),
        json.loads(json.dumps(model.config.to_dict(), default=str)),
        {**_versions(), **notes, **provenance},
    )


def prepare_from_stats(
    model: "PreTrainedModel", stats: Stats, request: Request, progress: "Progress | None" = None
) -> Prepared:
    """What plans of these methods and options have in common: the curves of every layer and side."""
    check(request)
    request = settled(request, stats)
    return prepare(stats, request, _dense_dtype(model, request), progress)


def gather_stats(
    model: "PreTrainedModel",
    batches: Sequence[Tensor],
    request: Request,
    propagation: str,
    progress: "Progress | None",
) -> Stats:
    """Observe, with gradients where something is weighed by them."""
    from kvsight.propagation import by_perturbation
    from kvsight.trace import observe, summarise

    rules = {request.rule(side) for side in SIDES}
    weighed = bool(rules & {"measured", "ratequant"})
    tokens = GRADIENT_TOKENS if _weighed(request) and propagation == "gradient" else 0
    stats = summarise(observe(model, batches, gradient_tokens=tokens, progress=progress))
    if not weighed or propagation == "none" or stats.weighed:
        return stats
    bare = replace(request, methods={"k": "identity", "v": "identity"}, bits={"k": None, "v": None})
    bare = replace(bare, allocate="uniform", options={}, constraints=Constraints(), bytes_per_token=None)
    exact = plan_from_stats(model, stats, bare, {})
    return by_perturbation(model, stats, _spaced(batches, 2), exact, progress)


def settled(request: Request, stats: Stats) -> Request:
    """Without a common unit of damage, layers and sides cannot be weighed: all get the same bits."""
    rules = {request.rule(side) for side in SIDES}
    if stats.weighed or "measured" not in rules or request.constraints != Constraints():
        return request
    return replace(request, allocate="uniform")


def _weighed(request: Request) -> bool:
    """Whether gradients have a say in the plan."""
    allocated = any(request.rule(side) != "uniform" for side in SIDES)
    used = (get(name) for name in request.methods.values())
    return allocated or any(method.rows is not None or method.gradients for method in used)


def trial_probe(model: "PreTrainedModel", batches: Sequence[Tensor]) -> "Probe":
    """The windows of calibration text on which ``choose_sinks`` tries plans."""
    from kvsight.probe import Probe

    return Probe(model, [ids[:1, :_TRIAL_TOKENS] for ids in _spaced(batches, _TRIALS)])


def choose_sinks(
    make: MakePlan,
    probe: "Probe",
    stats: Stats,
    request: Request,
    max_kl: float | None,
    progress: "Progress | None",
) -> Request:
    """The number of exact first tokens that gives the least KL on calibration text at the same budget."""
    full = any(layer.window is None for layer in stats.layers)
    # codecs of token blocks keep what is left of a block exact: a sink would cost them most of one
    rows = all(get(name).rows is not None for name in request.methods.values())
    if any(request.rule(side) != "measured" for side in SIDES) or not full or not rows:
        return replace(request, sinks=0)
    trial = request
    if max_kl is not None:
        middle = max(3.0, request.constraints.min_head_bits + 1)
        trial = replace(request, total_bits=middle, bits={"k": middle, "v": middle})
    best = (math.inf, 0)
    for done, count in enumerate(_SINKS, start=1):
        try:
            kl = probe.kl(make(replace(trial, sinks=count), {}))
        except KVSightError:
            # exact tokens may not fit into the budget; whether anything does is found out without them
            break
        if kl < _CLEAR * best[0]:
            best = (kl, count)
        if progress is not None:
            progress("try sinks", done, len(_SINKS))
    return replace(request, sinks=best[1])


def _smallest(
    make: MakePlan,
    probe: "Probe",
    request: Request,
    notes: Mapping[str, str],
    max_kl: float,
    progress: "Progress | None",
) -> Plan:
    """Bisect the budget; the plan that is returned was read on the validation text."""

    def attempt(bits: float) -> tuple[Plan, float]:
        asked = replace(request, total_bits=bits, bits={"k": bits, "v": bits})
        plan = make(asked, notes)
        return plan, probe.kl(plan)

    high = _HIGHEST_BITS
    plan, kl = attempt(high)
    if kl > max_kl:
        raise KVSightError(
            f"max_kl={max_kl:g} cannot be met: the largest plan ({plan.true_bits:.2f} bits) costs {kl:.3g} "
            "nats per token on the validation text. Raise max_kl."
        )
    low, steps = 0.0, math.ceil(math.log2(_HIGHEST_BITS / _BITS_STEP))
    for step in range(steps):
        middle = (low + high) / 2
        try:
            found, reached = attempt(middle)
        except KVSightError:
            # below the cheapest feasible plan
            low = middle
        else:
            if reached <= max_kl:
                plan, kl, high = found, reached, middle
            else:
                low = middle
        if progress is not None:
            progress("search", step + 1, steps)
    return replace(
        plan, provenance={**plan.provenance, "max_kl": f"{max_kl:g}", "validation_kl": f"{kl:.4g}"}
    )


def _open_ended(request: Request, max_kl: float) -> Request:
    """A request without a budget yet."""
    if not max_kl > 0:
        raise KVSightError(f"max_kl is in nats per token and above 0; got {max_kl:g}.")
    if any(limit is not None for limit in (*request.bits.values(), request.bytes_per_token)):
        raise KVSightError("give a budget (bits or bytes) or max_kl, not both.")
    high = _HIGHEST_BITS
    return replace(request, total_bits=high, bits={"k": high, "v": high})


def _split(
    batches: Iterable[Tensor], validation: Iterable[Tensor] | None, needed: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Batches to calibrate on and to validate on."""
    seen = list(batches)
    if not needed:
        if validation is not None:
            raise KVSightError("validation text is used to meet max_kl=; without it, leave validation out.")
        return seen, []
    if validation is not None:
        return seen, list(validation)
    if len(seen) < 2:
        raise KVSightError(
            "max_kl needs text that is not calibrated on: give validation=, or more batches."
        )
    held = max(1, len(seen) // 8)
    return seen[:-held], seen[-held:]


def _spaced(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """``count`` batches from all over the text."""
    count = min(count, len(batches))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]


def _dense_dtype(model: "PreTrainedModel", request: Request) -> torch.dtype:
    """Exact tokens are kept in 16 bits; a plan that only copies keeps the model's own numbers."""
    plain = set(request.methods.values()) == {"identity"}
    return model.dtype if plain or model.dtype.itemsize <= 2 else torch.bfloat16


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    others = {name: version(name) for name in ("torch", "transformers")}
    return {"kvsight": kvsight.__version__, **others}


def digest_ids(batches: Iterable[Tensor]) -> str:
    """sha256 of the token ids that were calibrated on."""
    sha = hashlib.sha256()
    for ids in batches:
        sha.update(ids.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()

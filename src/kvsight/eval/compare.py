"""Every method at the same budgets, on the same windows, into one file of records (docs/compare.md)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from kvsight.errors import KVSightError
from kvsight.eval import maps
from kvsight.eval.arms import CONTROL, OURS, UNCOMPRESSED, Contender
from kvsight.eval.bench import Bench, Content
from kvsight.eval.fitting import Fitter, Lab
from kvsight.eval.frontier import pair
from kvsight.eval.peers import best_setting, refused
from kvsight.eval.reference import references
from kvsight.fit import digest_ids, make_request, plan_from_stats
from kvsight.planfile import plan_hash
from kvsight.records import Records
from kvsight.trace import Progress

PLANS = "plans"
# spectra are kept of our plan nearest to this budget
_SPECTRUM_BITS = 3.0


@dataclass(frozen=True, eq=False)
class Texts:
    """Token ids [n, T] to calibrate on, and others to report on; names of both, for provenance."""

    calibration: Tensor
    evaluation: Tensor
    names: tuple[str, str]

    def conditions(self) -> dict[str, str | int]:
        """What ``Conditions.own`` says about them."""
        out: dict[str, str | int] = {}
        for kind, ids, name in zip(
            ("calibration", "text"), (self.calibration, self.evaluation), self.names, strict=True
        ):
            out |= {kind: name, f"{kind}_windows": len(ids), f"{kind}_length": ids.shape[1]}
            out[f"{kind}_sha256"] = digest_ids([ids])
        return out


def compare(
    model: PreTrainedModel,
    texts: Texts,
    who: Sequence[Contender],
    budgets: Sequence[float],
    records: Records,
    *,
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Measure what ``records`` does not hold yet, one arm after another; each is on disk when it is done.

    An arm whose method cannot meet its budget becomes a ``refused`` record with the reason.
    """
    todo = list(_todo(who, budgets, records))
    shown = min(budgets, key=lambda bits: abs(bits - _SPECTRUM_BITS))
    with references(model, texts.evaluation.split(1)) as known:
        bench = Bench(model, texts.evaluation, known)
        lab = Lab(model, texts.calibration, provenance or {}, progress)
        fitters: dict[str, Fitter] = {}
        for done, (contender, bits) in enumerate(todo):
            if progress is not None:
                progress("compare", done, len(todo))
            if contender is None:
                _control(bench, lab, records)
            elif contender.external:
                _external(bench, contender, bits, records)
            else:
                if contender.name not in fitters:
                    # one method's curves at a time
                    fitters = {contender.name: Fitter(lab, contender)}
                spectra = (contender.name, bits) == (OURS, shown)
                _own(bench, fitters[contender.name], bits, records, spectra)
        if progress is not None and todo:
            progress("compare", len(todo), len(todo))
    rows = quality_rows(records)
    for bits in budgets:
        found = None if records.get("pair", (bits,)) else pair(rows, bits)
        if found is not None:
            records.append("pair", (bits,), {"budget": bits, **found})


def quality_rows(records: Records) -> list[Content]:
    """The measured arms of compressing methods."""
    return [row for row in records.of("quality") if row["arm"] != UNCOMPRESSED]


def _todo(
    who: Sequence[Contender], budgets: Sequence[float], records: Records
) -> Iterator[tuple[Contender | None, float]]:
    """Unmeasured arms; None is the uncompressed model."""
    if not records.get("quality", (UNCOMPRESSED,)):
        yield None, 16.0
    for contender in who:
        for bits in budgets:
            key = (contender.arm(bits),)
            if not records.get("quality", key) and not records.get("refused", key):
                yield contender, bits


def _own(bench: Bench, fitter: Fitter, bits: float, records: Records, spectra: bool) -> None:
    """One method of the registry at one budget."""
    contender, arm = fitter.contender, fitter.contender.arm(bits)
    try:
        plan = fitter.plan(bits)
    except KVSightError as error:
        _refuse(records, contender, bits, str(error))
        return
    named = {**_named(contender, bits), "plan_sha256": plan_hash(plan)}
    twin = next((r for r in records.of("quality") if r.get("plan_sha256") == named["plan_sha256"]), None)
    measured = bench.plan(plan) if twin is None else _shared(twin)
    if not _finite(measured):
        _refuse(records, contender, bits, f"{contender.name}: its logits are not finite.")
        return
    stats = fitter.stats
    # which model is said once, and not by where it lies here
    provenance = {name: text for name, text in plan.provenance.items() if name != "model"}
    _put(records, "bits", arm, {"arm": arm, "rows": maps.bits(plan), "provenance": provenance})
    damage = maps.damage(plan, stats)
    if damage:
        _put(records, "damage", arm, {"arm": arm, "how": maps.HOW, "rows": damage})
    if contender.method == OURS:
        plan.save(records.path.parent / PLANS / arm)
        named["plan"] = f"{PLANS}/{arm}"
    if spectra:
        _put(records, "spectrum", arm, {"arm": arm, "rows": maps.spectra(plan, stats)})
    # last: whoever finds it finds the others too
    _put(records, "quality", arm, {**named, **measured})


def _control(bench: Bench, lab: Lab, records: Records) -> None:
    """The uncompressed model, through the same cache and attention as every plan."""
    plan = plan_from_stats(lab.model, lab.stats, make_request(CONTROL), lab.notes)
    row = {**_named(Contender(CONTROL, {}), None), **bench.plan(plan)}
    # run in the model's own type, counted as everywhere: a number is worth 16 bits
    counted = {
        "true_bits": 16.0,
        "key_bits": 16.0,
        "value_bits": 16.0,
        "cache_bytes": row["baseline_bytes"],
    }
    _put(records, "quality", UNCOMPRESSED, {**row, **counted})


def _external(bench: Bench, contender: Contender, bits: float, records: Records) -> None:
    """A quantiser of another library at one budget."""
    model, backend = bench.model, contender.method
    reason = refused(backend, model.config)
    try:
        setting = best_setting(backend, bits)
    except KVSightError as error:
        reason = reason or str(error)
    if reason is not None:
        _refuse(records, contender, bits, reason)
        return
    named = {**_named(contender, bits), "settings": dict(vars(setting))}
    twins = (
        r for r in records.of("quality") if r["method"] == backend and r["settings"] == named["settings"]
    )
    twin = next(twins, None)
    measured = bench.stock(backend, setting) if twin is None else _shared(twin)
    if not _finite(measured):
        _refuse(records, contender, bits, f"{contender.name}: its logits are not finite.")
        return
    _put(records, "quality", contender.arm(bits), {**named, **measured})


def _named(contender: Contender, bits: float | None) -> Content:
    return {
        "arm": UNCOMPRESSED if bits is None else contender.arm(bits),
        "method": contender.method,
        "settings": dict(contender.options),
        "budget": bits,
        "external": contender.external,
        "ours": contender.method == OURS,
    }


def _shared(twin: Content) -> Content:
    """The figures of another budget's arm that came to the very same configuration."""
    own = {"kind", "key", "arm", "budget", "plan", "plan_sha256", "method", "settings", "external", "ours"}
    return {"same_as": twin["arm"], **{name: value for name, value in twin.items() if name not in own}}


def _finite(row: Content) -> bool:
    return all(math.isfinite(window["kl"]) for window in row["windows"])


def _refuse(records: Records, contender: Contender, bits: float, reason: str) -> None:
    arm = contender.arm(bits)
    content = {"arm": arm, "method": contender.name, "budget": bits, "reason": reason}
    records.append("refused", (arm,), content)


def _put(records: Records, kind: str, arm: str, content: Content) -> None:
    """Unless a killed run has measured it."""
    if records.get(kind, (arm,)) is None:
        records.append(kind, (arm,), content)

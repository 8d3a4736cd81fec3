"""Run tasks on arms, one record per task and arm, each paired with the uncompressed model's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsight.errors import KVSightError
from kvsight.eval.arms import UNCOMPRESSED
from kvsight.eval.conditions import shared_conditions
from kvsight.eval.intervals import mean_interval, paired_interval
from kvsight.eval.tasks.arms import Arm
from kvsight.eval.tasks.base import Sample, Setting, Task
from kvsight.records import Conditions, Records, Row
from kvsight.trace import Progress

# what the uncompressed model's mean is called beside a packed one's
_BESIDE = {"accuracy": "baseline", "loss": "baseline_loss", "agreement": None}


def run_tasks(
    directory: Path,
    tasks: Sequence[Task],
    arms: Sequence[Arm],
    setting: Setting,
    name: str,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure what the directory's records lack, and return the records of these tasks and arms.

    Args:
        arms: packed ones; the uncompressed model is always measured, once.
        name: what the user calls the model.

    Raises ``KVSightError`` where records were measured under other conditions, or with another plan of
    the same name.
    """
    labels = [arm.label for arm in arms]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise KVSightError(f"two plans are both {twice}; measure one of them into another -o.")
    everyone = (Arm(UNCOMPRESSED, setting.model), *arms)
    shared = shared_conditions(setting.model, name)
    rows = []
    for task in tasks:
        conditions = Conditions(f"tasks {task.name}", shared, task.conditions(setting))
        records = Records.open(directory, conditions)
        missing = [arm for arm in everyone if _known(records, task, arm) is None]
        items = task.items(setting) if missing else ()
        for done, arm in enumerate(missing):
            samples = _measure(task, arm, items, progress, (done, len(missing)))
            row = _row(task, arm, samples, records.get("task", (task.name, UNCOMPRESSED)))
            records.append("task", (task.name, arm.label), row)
        found = (records.get("task", (task.name, arm.label)) for arm in everyone)
        rows += [row for row in found if row is not None]
    return rows


def _known(records: Records, task: Task, arm: Arm) -> Row | None:
    row = records.get("task", (task.name, arm.label))
    if row is not None and row["plan"] != arm.plan_hash:
        raise KVSightError(
            f"{records.path} has {arm.label} of another plan; choose another -o, or the former plan."
        )
    return row


def _measure(
    task: Task, arm: Arm, items: tuple[Any, ...], progress: Progress | None, turn: tuple[int, int]
) -> list[Sample]:
    """All samples of one arm, the ``turn``-th of so many that are measured."""
    samples: list[Sample] = []
    before, arms = turn
    with arm.reading():
        for done, item in enumerate(items, start=1):
            samples += task.measure(arm, item)
            if progress is not None:
                progress(task.name, before * len(items) + done, arms * len(items))
    return samples


def _row(task: Task, arm: Arm, samples: Sequence[Sample], baseline: Row | None) -> dict[str, Any]:
    """The content of a record; differences are packed minus uncompressed, sample by sample."""
    values = [{"id": s.id, "value": s.value, **s.extras} for s in samples]
    before = None if baseline is None else baseline["samples"]
    detail: dict[str, Any] = {
        name: {
            "value": mean_interval([s.extras[name] for s in samples], least=0.0).to_json(),
            "difference": _difference(values, before, name),
        }
        for name in samples[0].extras
    }
    if task.places:
        detail[task.places] = _places(
            samples, None if baseline is None else baseline["detail"][task.places]
        )
    value = mean_interval([s.value for s in samples], least=task.least, most=task.most)
    return {
        "task": task.name,
        "arm": arm.label,
        "plan": arm.plan_hash,
        "true_bits": None if arm.plan is None else arm.plan.true_bits,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "value": value.to_json(),
        "difference": _difference(values, before, "value"),
        "samples": values,
        "detail": detail,
    }


def _difference(
    values: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None, name: str
) -> dict[str, Any] | None:
    if before is None:
        return None
    now, then = ({sample["id"]: sample[name] for sample in side} for side in (values, before))
    return paired_interval(now, then).to_json()


def _places(samples: Sequence[Sample], before: Sequence[Row] | None) -> list[dict[str, float | int]]:
    """Means by place over all samples, weighted by tokens, with the uncompressed model's beside them."""
    groups: dict[tuple[tuple[str, int], ...], list[tuple[int, Mapping[str, float]]]] = {}
    for sample in samples:
        for part in sample.parts:
            groups.setdefault(tuple(part.at.items()), []).append((part.count, part.means))
    out: list[dict[str, float | int]] = []
    for i, (at, found) in enumerate(groups.items()):
        total = sum(count for count, _ in found)
        means = {name: sum(c * m[name] for c, m in found) / total for name in found[0][1]}
        own = means if before is None else before[i]
        beside = {label: own[name] for name in means if (label := _BESIDE[name]) is not None}
        out.append({**dict(at), **means, **beside})
    return out

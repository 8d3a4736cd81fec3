"""Paired statistics from the sample logs of lm-evaluation-harness (``--log_samples``)."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvsight.errors import KVSightError
from kvsight.eval.intervals import Estimate, paired_interval

Logs = Mapping[str, Iterable[Mapping[str, Any]]]
_STAMP = "_20"


def read_logs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Samples by task from a directory that lm_eval wrote (``--output_path``), one run in it.

    Raises ``KVSightError`` for a directory without logs, or with two of one task.
    """
    out: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.rglob("samples_*.jsonl")):
        # samples_TASK_2026-01-31T12-00-00.000000.jsonl
        task = path.stem.removeprefix("samples_").rpartition(_STAMP)[0]
        if task in out:
            raise KVSightError(
                f"{directory} has two logs of {task}; give the directory of one run, with an "
                "--output_path of its own."
            )
        out[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not out:
        raise KVSightError(f"{directory} has no sample logs; run lm_eval with --log_samples --output_path.")
    return out


def paired_tasks(logs: Logs, baseline: Logs) -> dict[str, dict[str, Estimate]]:
    """Per task and ``metric,filter``: mean of logs − baseline over documents, with its interval.

    Both are what lm_eval returns as ``results["samples"]``, or what ``read_logs`` read. A rolling metric
    logs (loglikelihood, units) for each document; it is compared as loss in nats per unit (word or byte),
    whatever lm_eval makes of it at the end. Metrics of a whole corpus, such as BLEU, have no value per
    document and are left out.

    Raises ``KVSightError`` unless both have the same tasks and documents.
    """
    if logs.keys() != baseline.keys():
        raise KVSightError(
            f"the logs have different tasks: {', '.join(logs)}; and {', '.join(baseline)}. "
            "Compare runs of the same tasks."
        )
    out: dict[str, dict[str, Estimate]] = {}
    for task, samples in logs.items():
        values, before = _by_metric(samples), _by_metric(baseline[task])
        out[task] = {name: paired_interval(values[name], before.get(name, {})) for name in values}
    return out


def _by_metric(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{"metric,filter": {document: value}}; a document is told by its number and the hash of its text."""
    out: dict[str, dict[str, float]] = {}
    for sample in samples:
        document = f"{sample['doc_id']} {sample['doc_hash']}"
        for metric in sample["metrics"]:
            value = _value(sample[metric])
            if value is not None:
                out.setdefault(f"{metric},{sample['filter']}", {})[document] = value
    return out


def _value(logged: Any) -> float | None:
    if isinstance(logged, (int, float)):
        return float(logged)
    pair = isinstance(logged, (list, tuple)) and len(logged) == 2
    if pair and all(isinstance(part, (int, float)) for part in logged):
        loglikelihood, units = logged
        return -float(loglikelihood) / float(units)
    return None

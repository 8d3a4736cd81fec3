"""Sample logs of lm-evaluation-harness become paired intervals; lm_eval itself is not needed."""

import json

import pytest

from kvsight.errors import KVSightError
from kvsight.eval.harness import paired_tasks, read_logs


def sample(doc, filter_="none", **metrics):
    return {"doc_id": doc, "doc_hash": f"h{doc}", "filter": filter_, "metrics": list(metrics), **metrics}


def test_documents_pair_by_number_and_text_in_any_order():
    ours = {"t": [sample(0, acc=1.0), sample(1, acc=0.0), sample(2, acc=1)]}
    plain = {"t": [sample(2, acc=True), sample(0, acc=0.0), sample(1, acc=0.0)]}
    (estimate,) = paired_tasks(ours, plain)["t"].values()
    assert (estimate.mean, estimate.n) == (pytest.approx(1 / 3), 3)
    # 1, 0, 0: t_{0.975, 2} = 4.302653, s = 1 / sqrt(3)
    assert estimate.high == pytest.approx(1 / 3 + 4.302653 / 3, rel=1e-6)
    changed = {"t": [*plain["t"][:2], {**sample(1, acc=0.0), "doc_hash": "other text"}]}
    with pytest.raises(KVSightError, match="samples do not pair"):
        paired_tasks(ours, changed)


def test_rolling_metrics_become_loss_per_unit():
    ours = {"t": [sample(0, word_perplexity=[-30.0, 10]), sample(1, word_perplexity=(-8.0, 4))]}
    plain = {"t": [sample(0, word_perplexity=[-20.0, 10]), sample(1, word_perplexity=[-8.0, 4])]}
    assert paired_tasks(ours, plain)["t"]["word_perplexity,none"].mean == pytest.approx(0.5)


def test_filters_stay_apart_and_corpus_metrics_are_left_out():
    logs = {"t": [sample(0, "strict", em=0.0, bleu=["ref", "text"]), sample(0, "loose", em=1.0)]}
    assert set(paired_tasks(logs, logs)["t"]) == {"em,strict", "em,loose"}


def test_other_tasks_are_refused():
    with pytest.raises(KVSightError, match="different tasks: a; and b"):
        paired_tasks({"a": []}, {"b": []})


def test_logs_are_read_from_the_directory_of_one_run(tmp_path):
    with pytest.raises(KVSightError, match="has no sample logs"):
        read_logs(tmp_path)
    (tmp_path / "model").mkdir()
    first = tmp_path / "model" / "samples_arc_easy_2026-01-31T12-00-00.123456.jsonl"
    first.write_text(json.dumps(sample(0, acc=1.0)) + "\n", encoding="utf-8")
    assert read_logs(tmp_path) == {"arc_easy": [sample(0, acc=1.0)]}
    first.with_name("samples_arc_easy_2026-02-01T12-00-00.123456.jsonl").write_text("")
    with pytest.raises(KVSightError, match="has two logs of arc_easy"):
        read_logs(tmp_path)

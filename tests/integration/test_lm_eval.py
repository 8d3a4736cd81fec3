"""lm-evaluation-harness reads the packed cache, for every kind of request, on local tasks."""

import json
import runpy
import warnings
from functools import partial

import pytest
import torch

import kvsight
from kvsight import assets
from kvsight.errors import KVSightError
from kvsight.eval.harness import paired_tasks, read_logs
from kvsight.integrations.loading import load_model
from kvsight.text import windows

with warnings.catch_warnings():
    # raised while lm_eval and what it brings are imported
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kvsight.integrations.lm_eval import KVSightLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(lm_eval|datasets|dill|multiprocess|multiprocessing)"
    ),
]

TASKS = {
    "capitals": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "endings": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{passage}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
QUESTIONS = [
    ("The capital of the French Republic, and its largest city, is called", ["Paris", "Rome", "Oslo"], 0),
    ("The river that flows through the city of London is the", ["Thames", "Danube"], 0),
    ("In 1945 the Second World", ["War", "Cup", "Bank"], 0),
    ("The opposite of north is", ["east", "west", "south"], 2),
    ("A week has seven", ["months", "days"], 1),
    ("The president of the United States lives in the White", ["House", "Sea"], 0),
]


@pytest.fixture(scope="module")
def pico():
    return load_model()


@pytest.fixture(scope="module")
def plans(pico):
    model, tokenizer = pico
    batches = list(windows(tokenizer, assets.text("calibration"), length=128, count=8).split(4))
    return {
        "identity": kvsight.fit(model, batches, method="identity"),
        "coarse": kvsight.fit(model, batches, method="kivi", bits=2.6),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of four local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    passages = assets.text("validation").split("\n = ")[1:7]
    lines = [
        {"question": q, "choices": c, "answer": a, "passage": p[:600]}
        for (q, c, a), p in zip(QUESTIONS, passages, strict=True)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, content in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        body = {"task": f"kv_{name}", "test_split": "test", **source, **content}
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps(body))
    return folder


@pytest.fixture(scope="module")
def evaluate(tasks, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        manager = TaskManager(include_path=str(tasks), include_defaults=False)

        def run(lm, *names):
            chosen = [f"kv_{name}" for name in names or TASKS]
            return simple_evaluate(
                model=lm, tasks=chosen, task_manager=manager, bootstrap_iters=0, log_samples=True
            )

        yield run


@pytest.fixture(scope="module")
def results(pico, plans, evaluate):
    model, tokenizer = pico
    arms = {name: KVSightLM(plan, model, tokenizer, batch_size=4) for name, plan in plans.items()}
    arms["stock"] = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return {name: evaluate(lm) for name, lm in arms.items()}


def answers(result, task):
    return [sample["filtered_resps"] for sample in result["samples"][f"kv_{task}"]]


def numbers(result, task):
    """Loglikelihoods of all requests of a task."""
    rows = [answer if isinstance(answer, list) else [answer] for answer in answers(result, task)]
    return [float(x[0] if isinstance(x, (tuple, list)) else x) for row in rows for x in row]


@pytest.mark.parametrize("task", TASKS)
def test_the_identity_plan_answers_as_the_stock_model(task, results):
    ours, stock = results["identity"], results["stock"]
    if task == "write":
        assert answers(ours, task) == answers(stock, task)
        assert any(len(text[0].split()) > 3 for text in answers(ours, task))
        return
    # attention on codes adds up in another order
    assert numbers(ours, task) == pytest.approx(numbers(stock, task), rel=1e-5, abs=1e-4)
    scores, wanted = ours["results"][f"kv_{task}"], stock["results"][f"kv_{task}"]
    for name, value in wanted.items():
        if name.startswith("acc,"):
            assert scores[name] == value


@pytest.mark.parametrize("task", TASKS)
def test_a_coarse_plan_is_seen_by_every_kind_of_request(task, results):
    coarse, stock = results["coarse"], results["stock"]
    if task == "write":
        assert answers(coarse, task) != answers(stock, task)
        return
    apart = [abs(a - b) for a, b in zip(numbers(coarse, task), numbers(stock, task), strict=True)]
    assert min(apart) > 1e-3
    assert max(apart) > 0.1


def test_answers_do_not_depend_on_the_batch(pico, plans, evaluate, results):
    """The coarse plan codes keys in blocks of tokens: padding in a block would change its scales."""
    model, tokenizer = pico
    alone = evaluate(KVSightLM(plans["coarse"], model, tokenizer, batch_size=1))
    for task in ("capitals", "endings", "rolling"):
        assert numbers(alone, task) == pytest.approx(numbers(results["coarse"], task), rel=1e-3)
    assert answers(alone, "write") == answers(results["coarse"], "write")


def test_loglikelihood_is_that_of_one_pass_over_the_packed_cache(pico, plans):
    model, tokenizer = pico
    lm = KVSightLM(plans["coarse"], model, tokenizer, batch_size=2)
    contexts = [tokenizer.encode(question) for question, _, _ in QUESTIONS]
    targets = [tokenizer.encode(f" {choices[answer]}") for _, choices, answer in QUESTIONS]
    requests = [(("", ""), c, t) for c, t in zip(contexts, targets, strict=True)]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (value, _), context, target in zip(found, contexts, targets, strict=True):
        ids = torch.tensor([context + target])
        with torch.no_grad(), kvsight.enable(model):
            cache = kvsight.PackedCache(plans["coarse"], monitor=False)
            logits = model(ids[:, :-1], past_key_values=cache).logits[0, -len(target) :]
        wanted = logits.log_softmax(-1).gather(-1, ids[0, -len(target) :, None]).sum()
        assert value == pytest.approx(float(wanted), rel=1e-4)


def test_differences_are_paired_over_documents(results):
    found = paired_tasks(results["coarse"]["samples"], results["stock"]["samples"])
    assert set(found) == {f"kv_{name}" for name in TASKS}
    accuracy = found["kv_capitals"]["acc,none"]
    scores = [results[arm]["results"]["kv_capitals"]["acc,none"] for arm in ("coarse", "stock")]
    assert accuracy.mean == pytest.approx(scores[0] - scores[1])
    assert accuracy.n == len(QUESTIONS)
    loss = found["kv_rolling"]["word_perplexity,none"]
    assert 0 < loss.low < loss.mean < loss.high
    same = paired_tasks(results["stock"]["samples"], results["stock"]["samples"])
    assert all(e.low == e.mean == e.high == 0 for figures in same.values() for e in figures.values())


def test_the_command_line_knows_the_model_and_its_logs_are_read(
    tmp_path, tasks, plans, evaluate, monkeypatch, capsys
):
    """In this process, and without lm_eval's own ten thousand tasks, which take half a minute to find."""
    plans["identity"].save(tmp_path / "plan")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    arguments = (
        *("--model", "kvsight", "--model_args", f"plan={tmp_path / 'plan'},dtype=float32"),
        *("--tasks", "kv_capitals", "--include_path", str(tasks), "--device", "cpu"),
        *("--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")),
    )
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
    runpy.run_module("kvsight.integrations.lm_eval", run_name="__main__")
    assert "kv_capitals" in capsys.readouterr().out
    logs = read_logs(tmp_path / "out")
    assert [len(samples) for samples in logs.values()] == [len(QUESTIONS)]
    assert paired_tasks(logs, logs)["kv_capitals"]["acc,none"].mean == 0


def test_what_cannot_be_honoured_is_refused(pico, plans):
    model, tokenizer = pico
    with pytest.raises(KVSightError, match="batch_size is a number of 1 or more here; got 'auto'"):
        KVSightLM(plans["identity"], model, tokenizer, batch_size="auto")
    with pytest.raises(KVSightError, match="without its tokenizer; give tokenizer="):
        KVSightLM(plans["identity"], model)
    with pytest.raises(KVSightError, match="no plan at nowhere"):
        KVSightLM("nowhere", model, tokenizer)

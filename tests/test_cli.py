"""The commands: results on stdout, progress and one-line failures on stderr, files whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import kvsight.plan
from kvsight import assets
from kvsight.cli import app
from kvsight.cli.options import parse_options
from kvsight.console import write_json
from kvsight.errors import KVSightError
from kvsight.methods import available

pytestmark = pytest.mark.usefixtures("stretched_once")
QUICK = ("--tokens", "512", "--length", "128")


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args):
    done = invoke(*args)
    assert done.exit_code == 0, done.stderr
    return done


def fail(*args, code=1):
    """The one line on stderr, without the program's name."""
    done = invoke(*args)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvsight: ")
    return lines[0].removeprefix("kvsight: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def fitted(folder):
    """A plan of the embedded model, and what `fit --json -` said about it."""
    plan = folder / "plan"
    done = succeed("fit", "--bits", 4.5, "--method", "int", *QUICK, "-o", plan, "--json", "-")
    return plan, json.loads(done.stdout)


@pytest.fixture(scope="module")
def tiny(folder):
    """A random model of another shape in a directory of its own, with the embedded tokenizer."""
    directory = folder / "tiny"
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((assets.model_path() / "tokenizer.json").read_bytes())
    return directory


def test_fit_reports_what_it_stored(fitted):
    plan, report = fitted
    loaded = kvsight.plan.Plan.load(plan)
    assert report["plan"] == str(plan)
    assert report["method"] == "int"
    assert report["true_bits"] == loaded.true_bits
    assert 4 < report["true_bits"] <= 4.5
    assert report["cache_bytes"] == loaded.nbytes(1024)
    assert loaded.provenance["model"] == ""
    assert loaded.provenance["text"] == "embedded"


def test_fit_passes_every_choice_on(folder):
    options = ("--method", "turboquant", "--option", "rotation=hadamard", "--option", "seed=7")
    budget = ("--key-bits", 5, "--value-bits", 3.5, "--sinks", 2, "--window", 8)
    done = succeed("fit", *options, *budget, *QUICK, "-o", folder / "choices")
    plan = kvsight.plan.Plan.load(folder / "choices")
    assert plan.method == "turboquant"
    assert dict(plan.options)["rotation"] == "hadamard"
    assert int(dict(plan.options)["seed"]) == 7
    assert (plan.sinks, plan.window) == (2, 8)
    assert 3.5 < plan.key_bits <= 5
    assert 2.5 < plan.value_bits <= 3.5
    assert f"{plan.true_bits:.3f} bits" in done.stdout


def test_fit_calibrates_on_at_most_the_tokens_it_was_given(folder):
    done = succeed(
        "fit", "--bits", 5, "--method", "int", "--tokens", 300, "--length", 128, "-o", folder / "few"
    )
    assert "calibrated on 256 tokens" in done.stdout


def test_fit_replaces_a_plan_but_nothing_else(folder, fitted):
    plan, _ = fitted
    again = folder / "again"
    succeed("fit", "--bits", 5, "--method", "int", *QUICK, "-o", again)
    succeed("fit", "--bits", 9, "--method", "int", *QUICK, "-o", again)
    assert kvsight.plan.Plan.load(again).true_bits > 5
    assert "not a plan" in fail("fit", "--bits", 5, "-o", plan.parent)
    assert "not a plan" in fail("fit", "--bits", 5, "-o", plan / "plan.json")


@pytest.mark.parametrize("destination", ["-", "file"])
def test_eval_writes_every_promised_key(folder, fitted, destination):
    path = folder / "reports" / "result.json"
    target = "-" if destination == "-" else path
    done = succeed("eval", fitted[0], "--windows", 3, "--length", 128, "--json", target)
    result = json.loads(done.stdout if destination == "-" else path.read_text())
    assert result["method"] == "int"
    assert result["tokens"] == 3 * 128
    assert 0 < result["cache_bytes"] < result["baseline_bytes"]
    for key in ("true_bits", "key_bits", "value_bits"):
        assert 4 < result[key] <= 4.5
    for key in ("kl", "perplexity", "baseline_perplexity", "same_top"):
        figure = result[key]
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert figure["n"] == 3
    assert [p.name for p in path.parent.glob("*")] in ([], ["result.json"])


def test_eval_prints_a_table(fitted):
    done = succeed("eval", fitted[0], "--windows", 2, "--length", 128)
    assert "int on 2 windows of 128 tokens" in done.stdout
    for words in ("KL against uncompressed", "perplexity", "same top token", "cache bytes", "smaller"):
        assert words in done.stdout
    assert "…" not in done.stdout  # nothing was cut


def test_eval_says_when_the_text_has_fewer_windows(folder, fitted):
    path = folder / "short.txt"
    path.write_text(assets.text("validation")[:2_000], encoding="utf-8")
    done = succeed("eval", fitted[0], "--text", path, "--windows", 50, "--length", 128, "--json", "-")
    found = json.loads(done.stdout)["kl"]["n"]
    assert 1 < found < 50
    assert done.stderr == f"kvsight: the text gives {found} of 50 windows of 128\n"


def test_eval_of_one_window_claims_no_interval(fitted):
    done = succeed("eval", fitted[0], "--windows", 1, "--length", 128)
    assert "nan" not in done.stdout
    assert "one window has none" in done.stdout


def test_show_adds_up(fitted):
    plan, report = fitted
    shown = json.loads(succeed("show", plan, "--json", "-").stdout)
    assert {**report, "plan": None} == {**{k: shown[k] for k in report if k != "plan"}, "plan": None}
    assert [(row["layer"], row["side"]) for row in shown["layers"]] == [
        (layer, side) for layer in range(8) for side in ("k", "v")
    ]
    assert sum(row["bytes"] for row in shown["layers"]) == shown["cache_bytes"]
    for row in shown["layers"]:
        parts = row["data_bits"] + row["meta_bits"] + row["window_bits"]
        assert parts == pytest.approx(row["true_bits"])
    assert shown["provenance"]["model"] == ""


def test_show_prints_ledger_and_provenance(fitted):
    plan, report = fitted
    out = succeed("show", plan).stdout
    assert f"{report['cache_bytes']:,} bytes for 1,024 tokens" in out
    assert f"{report['static_bytes']:,} static bytes" in out
    assert "model: embedded" in out
    assert "…" not in out


def test_methods_lists_the_registry(tmp_path):
    path = tmp_path / "methods.json"
    done = succeed("methods", "--json", path)
    listed = json.loads(path.read_text())
    assert {m["name"]: m["options"] for m in listed} == {
        name: dict(method.options) for name, method in available().items()
    }
    for name, method in available().items():
        assert f"{name}: {method.summary}" in done.stdout
        assert all(f"--option {key}={value}" in done.stdout for key, value in method.options.items())


def test_doctor_says_what_it_found_and_what_to_do(folder):
    path = folder / "doctor.json"
    done = succeed("doctor", "--tokens", 2048, "--length", 256, "--json", path)
    for words in ("LlamaForCausalLM, 2,048 tokens in windows of 256", "KEY MEAN: ", "GQA: 2 query heads"):
        assert words in done.stdout
    assert "Nothing to note: " in done.stdout
    assert done.stdout.rpartition("RECOMMENDED: ")[2].startswith("sight\n  kvsight fit --bits 3 -o plan\n")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "…" not in done.stdout
    told = json.loads(path.read_text())
    assert [layer["index"] for layer in told["layers"]] == list(range(8))
    assert all(len(layer["keys"]) == 2 for layer in told["layers"])
    assert {finding["status"] for finding in told["findings"]} == {"found", "clear"}
    assert told["recommendation"]["method"] == "sight"


def test_doctor_takes_a_model_and_a_text(folder, tiny):
    path = folder / "own.txt"
    path.write_text(assets.text("validation")[:4_000], encoding="utf-8")
    done = succeed("doctor", tiny, "--text", path, "--tokens", 256, "--length", 128, "--json", "-")
    told = json.loads(done.stdout)
    assert (told["tokens"], told["length"], len(told["layers"])) == (256, 128, 2)
    assert "does not exist" in fail("doctor", folder / "nothing")
    assert "no-such.txt does not exist" in fail("doctor", "--text", "no-such.txt")


def test_tasks_are_measured_once_and_told_in_a_table(folder, fitted):
    output = folder / "tasks"
    command = ("tasks", fitted[0], "-o", output, "--tasks", "lambada,copy", "--samples", 2, "--length", 200)
    done = succeed(*command, "--json", folder / "tasks.json")
    assert done.stderr == "kvsight: lambada is skipped; it needs --lambada FILE\n"
    rows = json.loads((folder / "tasks.json").read_text())
    label = f"int@{round(fitted[1]['true_bits'], 2):g}"
    assert [row["key"] for row in rows] == [["copy", "uncompressed"], ["copy", label]]
    for words in ("accuracy", "loss", f"{rows[0]['value']['mean']:.4g}", " to +"):
        assert words in done.stdout
    assert "…" not in done.stdout
    kept = (output / "records.jsonl").read_bytes()
    assert json.loads(succeed(*command, "--json", "-").stdout) == rows
    assert (output / "records.jsonl").read_bytes() == kept


def test_tasks_fail_in_one_line(folder, fitted, tiny):
    assert "unknown task 'cpoy'" in fail("tasks", fitted[0], "-o", folder / "no", "--tasks", "cpoy")
    assert "another model" in fail("tasks", fitted[0], "-o", folder / "no", "--model", tiny)
    assert not (folder / "no").exists()


def test_run_with_the_identity_method_says_what_the_model_says(folder):
    plan = folder / "identity"
    succeed("fit", "--method", "identity", *QUICK, "-o", plan)
    prompt = "The history of the [bold]city[/bold] began"
    done = succeed("run", plan, "--prompt", prompt, "--max-new-tokens", 12, "--stock")
    packed, plain = done.stdout.split("\n\n")
    words, account = packed.rsplit("\n[", 1)
    assert words.startswith(prompt)
    assert len(words) > len(prompt)
    assert plain.rsplit("\n[", 1)[0] == words
    assert "tokens]" in account


def test_run_counts_the_bytes_that_it_holds(fitted):
    plan, _ = fitted
    out = succeed("run", plan, "--prompt", "A city", "--max-new-tokens", 9).stdout
    tokens = int(out.rsplit(" bytes for ", 1)[1].split()[0])
    assert (
        f"[packed cache: {kvsight.plan.Plan.load(plan).nbytes(tokens):,} bytes for {tokens} tokens]" in out
    )


def test_a_plan_remembers_its_model_from_anywhere(folder, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    succeed("fit", "tiny", "--bits", 8, "--method", "int", *QUICK, "-o", "tiny-plan")
    monkeypatch.chdir(tmp_path)
    plan = folder / "tiny-plan"
    assert kvsight.plan.Plan.load(plan).provenance["model"] == str(tiny)
    succeed("eval", plan, "--windows", 2, "--length", 64)
    succeed("run", plan, "--prompt", "A city", "--max-new-tokens", 2)
    embedded = assets.model_path()
    for command in (("eval",), ("run", "--prompt", "A city")):
        assert "another model" in fail(command[0], plan, *command[1:], "--model", embedded)


@pytest.mark.slow
def test_sight_is_the_default_and_runs_through(folder):
    plan = folder / "sight"
    succeed("fit", "--bits", 3, *QUICK, "-o", plan)
    result = json.loads(succeed("eval", plan, "--windows", 2, "--length", 128, "--json", "-").stdout)
    assert result["method"] == "sight"
    assert 2.9 < result["true_bits"] <= 3
    assert result["kl"]["mean"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "3", "--method", "sihgt"), ("sihgt", "sight")),
        (("--bits", "3", "--option", "seed"), ("name=value", "'seed'")),
        (("--bits", "3", "--option", "a=1", "--option", "a=2"), ("a is given twice",)),
        (("--bits", "3", "--option", "nonsense=1", *QUICK), ("no option 'nonsense'",)),
        (("--bits", "0.01", *QUICK), ("cannot be met", "cheapest")),
        (("--bits", "17", *QUICK), ("17",)),
        (("--bits", "nan", *QUICK), ("nan",)),
        (QUICK, ("budget",)),
        (("--key-bits", "3", *QUICK), ("budget",)),
        (("--bits", "3", "--text", "no-such.txt"), ("no-such.txt does not exist",)),
        (("--bits", "3", "--text", "empty.txt"), ("empty.txt is empty",)),
        (("--bits", "3", "--text", "words.txt"), ("one window takes 1024", "longer text")),
        (("./no-model", "--bits", "3"), ("./no-model does not exist",)),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_fit_fails_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("words.txt").write_text("Only a few words.")
    line = fail("fit", *arguments, "-o", "plan")
    assert all(word in line for word in words), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "words.txt"]


@pytest.mark.parametrize(
    "command", [("eval",), ("show",), ("run", "--prompt", "A city")], ids=lambda c: c[0]
)
def test_a_bad_plan_fails_in_one_line(tmp_path, fitted, command):
    name, *rest = command
    assert "no plan at" in fail(name, tmp_path / "nothing", *rest)
    (tmp_path / "plan.json").write_bytes((fitted[0] / "plan.json").read_bytes()[:-50])
    assert "corrupt" in fail(name, tmp_path, *rest)
    (tmp_path / "plan.json").write_bytes((fitted[0] / "plan.json").read_bytes())
    assert "missing" in fail(name, tmp_path, *rest)
    (tmp_path / "tensors.safetensors").write_bytes(b"")
    assert "corrupt" in fail(name, tmp_path, *rest)


def test_eval_and_run_fail_in_one_line(fitted, tmp_path):
    plan, _ = fitted
    assert "does not exist" in fail("eval", plan, "--text", tmp_path / "nothing.txt")
    assert "does not exist" in fail("eval", plan, "--model", tmp_path / "nothing")
    assert "prompt is empty" in fail("run", plan, "--prompt", "")
    assert "directory" in fail("show", plan, "--json", tmp_path).lower()


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("fit", "--bits", "3"), ("fit", "--bits", "x", "-o", "p"), ("run", "plan"), ("show",)],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_unexpected_error_is_one_line_too(fitted, monkeypatch):
    def explode(path):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(kvsight.plan.Plan, "load", explode)
    assert fail("show", fitted[0]).startswith("unexpected RuntimeError: two lines")


def test_an_interrupt_exits_with_130(fitted, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(kvsight.plan.Plan, "load", interrupt)
    assert fail("show", fitted[0], code=130) == "interrupted"


def test_options_are_kept_as_written():
    assert parse_options(["group=64", "name=a=b", "empty="]) == {"group": "64", "name": "a=b", "empty": ""}
    with pytest.raises(KVSightError, match="name=value"):
        parse_options(["=3"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json({"old": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"new": float("nan")}, path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_device_is_written_to_and_not_replaced():
    write_json({}, Path("/dev/null"))
    assert not Path("/dev/null").is_file()


def test_help_is_quick_to_load_and_the_module_runs():
    code = "import sys, kvsight.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "kvsight", "show", "no-such-plan"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("kvsight: no plan at no-such-plan")
    assert len(done.stderr.splitlines()) == 1

"""``kvsight bench`` measures real caches: bytes, growth of the process, what fits, and times."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvsight.cli import app
from kvsight.cli import bench as command
from kvsight.cli.bench import parse_bytes
from kvsight.errors import KVSightError
from kvsight.eval import running
from kvsight.eval.arms import UNCOMPRESSED
from kvsight.eval.caches import Arm, arm_of, held_bytes, layer_shapes
from kvsight.eval.memory import Place, footprint, largest, largest_batch, longest_context, resident_bytes
from kvsight.eval.running import Bench, Settings, measure
from kvsight.eval.speed import Runs, break_even, spread
from kvsight.plan import Plan
from kvsight.records import Conditions, Records

CPU = torch.device("cpu")
FULL = Arm(UNCOMPRESSED)
# llama of the zoo: 2 layers of 2 KV heads of 16, keys and values, 2 bytes each
TOKEN = 2 * 2 * 16 * 2 * 2
SETTINGS = Settings((16, 32), 2, 60_000, Runs(2, 3))


@pytest.fixture
def place(model, plan):
    return Place(model("llama").config, layer_shapes(plan("llama", "int")), CPU)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_footprint_is_what_the_cache_holds(plan, place, batch):
    packed = arm_of(plan("llama", "int"))
    assert footprint(FULL, place, 100, batch).cache_bytes == 100 * batch * TOKEN
    assert footprint(packed, place, 100, batch).cache_bytes == packed.plan.nbytes(100, batch)


@pytest.mark.skipif(resident_bytes() is None, reason="the resident set is read from Linux's /proc")
def test_the_process_grows_by_what_the_cache_holds(plan, place):
    for arm in (FULL, arm_of(plan("llama", "int"))):
        took = footprint(arm, place, 4096, 32)
        assert took.resident_bytes == pytest.approx(took.cache_bytes, rel=0.1)
        assert took.allocator_peak is None


@pytest.mark.parametrize("budget", [100_000, 100_352, 31_000])
def test_what_fits_a_budget_fits_and_more_does_not(plan, place, budget):
    packed = arm_of(plan("llama", "int"))
    for arm, size in ((FULL, lambda t, b=1: t * b * TOKEN), (packed, packed.plan.nbytes)):
        tokens = longest_context(arm, place, budget)
        assert tokens % 64 == 0
        assert size(tokens) <= budget < size(tokens + 64)
        batch = largest_batch(arm, place, 50, budget)
        assert size(50, batch) <= budget < size(50, batch + 1)


def test_a_budget_below_one_sequence_holds_nothing(place):
    assert longest_context(FULL, place, 1000) == 0
    assert largest_batch(FULL, place, 50, 1000) == 0


def test_a_model_of_sliding_windows_holds_any_length(model, plan):
    fitted = plan("mistral", "int")
    place = Place(model("mistral").config, layer_shapes(fitted), CPU)
    assert longest_context(arm_of(fitted), place, 1 << 30) is None


@pytest.mark.parametrize(
    ("size", "budget", "grain", "wanted"),
    [
        (lambda n: 10 * n, 1000, 1, 100),
        (lambda n: 10 * n, 999, 1, 99),
        (lambda n: 10 * n + 500, 1000, 1, 50),
        (lambda n: 10 * n, 1000, 8, 96),
        (lambda n: n * n, 1000, 1, 31),
        (lambda n: 10 * n + 70 * min(n, 8), 1000, 1, 44),
        (lambda n: min(n, 10), 1000, 1, None),
        (lambda n: 2000, 1000, 1, 0),
    ],
    ids=["exact", "below", "offset", "grain", "convex", "concave", "bounded", "none"],
)
def test_the_largest_that_fits_is_found_by_measuring(size, budget, grain, wanted):
    asked = []

    def measured(n):
        asked.append(n)
        return size(n)

    assert largest(measured, budget, grain) == wanted
    assert len(asked) < 24
    if wanted is not None:
        assert wanted + grain in asked
        assert wanted in asked or wanted == 0


def test_storage_behind_a_view_is_counted(model):
    config = model("mistral").config
    cache = FULL.cache(config)
    cache.update(torch.zeros(1, 2, 100, 16), torch.zeros(1, 2, 100, 16), 0)
    assert cache.layers[0].keys.shape[2] < 100
    assert held_bytes(cache) == 2 * 2 * 100 * 16 * 4


def test_a_spread_is_in_milliseconds_with_its_tenths():
    found = spread([0.001 * k for k in range(1, 21)])
    assert (found.median, found.low, found.high, found.n) == pytest.approx((10.5, 3, 18, 20))


@pytest.mark.parametrize(
    ("packed", "wanted"),
    [((3, 3, 3), None), ((3, 2, 1), 20), ((1, 3, 1), 30), ((1, 1, 1), 10), ((1, 1, 3), None)],
)
def test_break_even_holds_for_all_longer_contexts(packed, wanted):
    lengths = (10, 20, 30)
    assert break_even(dict.fromkeys(lengths, 2.0), dict(zip(lengths, packed, strict=True))) == wanted


@pytest.fixture
def job(model, plan):
    arms = (arm_of(plan("llama", "int")), arm_of(plan("llama", "kivi")))
    return Bench(model("llama"), arms, torch.arange(30), SETTINGS)


def test_all_arms_are_measured_and_a_killed_run_goes_on(job, tmp_path, monkeypatch):
    conditions = Conditions("bench", {"model": "tiny"}, job.own_conditions())
    stages = []
    measure(job, Records.open(tmp_path, conditions), lambda *step: stages.append(step))
    whole = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in whole]
    names = [arm.name for arm in job.arms]
    assert {tuple(r["key"]) for r in rows if r["kind"] == "memory"} == {
        (name, what) for name in names for what in (16, 32, "fit")
    }
    assert {tuple(r["key"]) for r in rows if r["kind"] == "speed"} == {
        (name, tokens, 2) for name in names for tokens in (16, 32)
    }
    assert [r["arm"] for r in rows if r["kind"] == "break_even"] == names[1:]
    for row in rows:
        if row["kind"] == "speed":
            assert (row["prefill_ms"]["n"], row["decode_ms_per_token"]["n"]) == (2, 3)
            assert 0 < row["encode_ms"]["low"] <= row["encode_ms"]["median"] <= row["encode_ms"]["high"]
    assert all(done <= total for _, done, total in stages)

    # killed between the arms of one context
    cut = [line for line, row in zip(whole, rows, strict=True) if row.get("key") != [names[2], 32, 2]][:-1]
    (tmp_path / "records.jsonl").write_text("".join(cut))
    measure(job, Records.open(tmp_path, conditions))
    again = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    assert again[: len(cut)] == cut
    assert [json.loads(line)["key"] for line in again[len(cut) :]] == [[names[2], 32, 2], [names[2]]]
    monkeypatch.setattr(running.memory, "footprint", None)
    monkeypatch.setattr(running.speed, "timings", None)
    measure(job, Records.open(tmp_path, conditions))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contexts": ()}, "contexts are different"),
        ({"contexts": (16, 16)}, "contexts are different"),
        ({"contexts": (8,)}, "16 tokens or more"),
        ({"batch": 0}, "batch is 1 or more"),
    ],
)
def test_settings_are_checked(change, words):
    with pytest.raises(KVSightError, match=words):
        Settings(**change)


def test_plans_and_contexts_must_suit_the_model(model, plan):
    arm = arm_of(plan("llama", "int"))
    with pytest.raises(KVSightError, match="another model"):
        Bench(model("qwen3"), (arm,), torch.arange(9), SETTINGS)
    with pytest.raises(KVSightError, match="two plans are both int@4"):
        Bench(model("llama"), (arm, arm), torch.arange(9), SETTINGS)
    with pytest.raises(KVSightError, match="reads 256 tokens, got a context of 512"):
        Bench(model("llama"), (arm,), torch.arange(9), Settings((512,)))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MB", 256_000_000),
        ("1.5GiB", 3 << 29),
        ("4096", 4096),
        ("2 kb", 2000),
        ("64m", 64_000_000),
        ("9B", 9),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0", "3XB", "3MBB", "1e3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(KVSightError, match="such as 256MB"):
        parse_bytes(text)


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_measures_plans_and_keeps_records(tmp_path, monkeypatch):
    plan = tmp_path / "plan"
    fit = invoke("fit", "--bits", 4.5, "--method", "int", "--tokens", 256, "--length", 128, "-o", plan)
    assert fit.exit_code == 0, fit.stderr
    quick = ("--contexts", "32,16", "--memory-budget", "300kB", "-o", tmp_path / "out")
    done = invoke("bench", plan, *quick)
    assert done.exit_code == 0, done.stderr
    assert "int@4" in done.stdout
    assert "what 0.3 MB of cache hold" in done.stdout
    assert "decodes no slower than uncompressed" in done.stdout
    assert "…" not in done.stdout
    again = invoke("bench", plan, *quick, "--json", "-")
    rows = json.loads(again.stdout)
    assert rows == [r for r in Records.read(tmp_path / "out").rows if r["kind"] != "provenance"]
    refused = invoke("bench", plan, *quick, "--batch", 2)
    assert refused.exit_code == 1
    assert "was measured with batch 1" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    for wrong, words in (("16,x", "lengths with commas"), ("16,99999", "reads 2048 tokens")):
        failed = invoke("bench", plan, "--contexts", wrong)
        assert (failed.exit_code, failed.stdout) == (1, "")
        assert words in failed.stderr

    monkeypatch.setattr(command, "_quick_plan", lambda *_: Plan.load(plan))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    quick = invoke("bench", "--contexts", "16", "--memory-budget", "100kB")
    assert quick.exit_code == 0
    assert quick.stderr == "kvsight: no plan given; fitting sight at 3 bits\n"
    assert "int@4" in quick.stdout
    assert sorted(tmp_path.rglob("*")) == before

"""A comparison measures what ``fit`` and ``evaluate`` would, once, and continues where it was killed."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from zoo import tokens

import kvsight
from kvsight.errors import KVSightError
from kvsight.eval import bench, fitting, maps, peers, reference
from kvsight.eval.agreement import agreement, continuation, prompts
from kvsight.eval.arms import Contender
from kvsight.eval.compare import Texts, compare, quality_rows
from kvsight.eval.timing import keys_values, plan_jobs, times
from kvsight.fit import gather_stats, make_request, plan_from_stats, prepare_from_stats
from kvsight.integrations.enable import enable
from kvsight.integrations.hf import PackedCache
from kvsight.probe import read
from kvsight.records import Conditions, Records

TEXTS = Texts(tokens(8, 64, seed=1), tokens(3, 64, seed=2), ("calibration", "test"))
WHO = tuple(Contender(name, {}) for name in ("int", "sight", "turboquant"))
# int stores 2.5, 3.5 ... here: it refuses the first budget and gives one plan for the next two
BITS = (1.5, 4.1, 4.3)


def records(path):
    return Records.open(path, Conditions("compare", {}, {}))


def untimed(rows):
    skipped = ("encode_us_per_token", "decode_us_per_token", "date")
    return [{n: v for n, v in row.items() if n not in skipped} for row in rows]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The records of a whole comparison."""
    found = records(tmp_path_factory.mktemp("compare"))
    compare(model("llama"), TEXTS, WHO, BITS, found)
    return found


@pytest.fixture(scope="module")
def stats(model):
    return gather_stats(
        model("llama"), list(TEXTS.calibration.split(1)), make_request("sight", 3), "gradient", None
    )


@pytest.mark.parametrize("method", [contender.method for contender in WHO])
def test_an_arm_is_what_fit_and_evaluate_say(method, model, finished):
    subject = model("llama")
    plan = kvsight.fit(subject, TEXTS.calibration.split(1), bits=4.1, method=method)
    result = kvsight.evaluate(subject, plan, TEXTS.evaluation.split(1)).to_json()
    row = finished.get("quality", (f"{method}@4.1",))
    for name in ("true_bits", "key_bits", "value_bits", "cache_bytes", "baseline_bytes", "tokens"):
        assert row[name] == result[name], name
    assert row["static_bytes"] == plan.ledger().static_bytes
    assert row["sinks"] == plan.sinks
    assert row["kl"]["mean"] == pytest.approx(result["kl"]["mean"], rel=1e-6)
    assert row["kl_p99"] == pytest.approx(result["kl_p99"], rel=1e-6)
    assert row["windows"][2] == pytest.approx(result["windows"][2], rel=1e-6)
    assert row["ours"] == (method == "sight")
    assert not row["external"]


def test_the_uncompressed_model_is_measured_once(finished):
    row = finished.get("quality", ("uncompressed",))
    assert abs(row["kl"]["mean"]) < 1e-9
    assert row["perplexity"]["mean"] == pytest.approx(row["baseline_perplexity"]["mean"], rel=1e-6)
    assert (row["true_bits"], row["cache_bytes"]) == (16.0, row["baseline_bytes"])
    assert row["agreements"] == [row["agreement_cap"]] * len(row["agreements"])
    assert row["budget"] is None
    assert row not in quality_rows(finished)


def test_every_arm_is_measured_or_refused(finished):
    arms = [contender.arm(bits) for contender in WHO for bits in BITS]
    measured = [row["arm"] for row in quality_rows(finished)]
    refused = {row["arm"]: row["reason"] for row in finished.of("refused")}
    assert sorted([*measured, *refused]) == sorted(arms)
    assert "cannot meet 1.5 bits; its cheapest configuration here stores" in refused["int@1.5"]
    assert all("\n" not in reason for reason in refused.values())


def test_one_configuration_is_measured_once(finished):
    first, second = (finished.get("quality", (f"int@{bits}",)) for bits in ("4.1", "4.3"))
    assert "same_as" not in first
    assert second["same_as"] == "int@4.1"
    assert (second["arm"], second["budget"]) == ("int@4.3", 4.3)
    assert {**second, "arm": 0, "budget": 0, "key": 0, "same_as": 0} == {
        **first, "arm": 0, "budget": 0, "key": 0, "same_as": 0
    }  # fmt: skip


def test_the_pairs_are_those_of_the_rows(finished):
    found = finished.get("pair", (4.1,))
    rows = {row["arm"]: row for row in quality_rows(finished)}
    others = [rows[f"{method}@4.1"] for method in ("int", "turboquant")]
    best = min(others, key=lambda row: row["kl"]["mean"])
    assert (found["ours"], found["peer"]) == ("sight@4.1", best["arm"])
    windows = zip(best["windows"], rows["sight@4.1"]["windows"], strict=True)
    mean = sum(theirs["kl"] - mine["kl"] for theirs, mine in windows) / 3
    assert found["difference"]["mean"] == pytest.approx(mean)
    assert finished.get("pair", (1.5,)) is None


def test_our_plans_are_kept(model, finished):
    row = finished.get("quality", ("sight@4.3",))
    plan = kvsight.Plan.load(finished.path.parent / row["plan"])
    assert plan.true_bits == row["true_bits"]
    again = kvsight.evaluate(model("llama"), plan, TEXTS.evaluation.split(1))
    assert again.kl.mean == pytest.approx(row["kl"]["mean"], rel=1e-6)
    assert "plan" not in finished.get("quality", ("int@4.3",))


def test_uncompressed_logits_are_read_once(model, tmp_path, monkeypatch):
    asked = []

    def counted(subject, ids, cache):
        asked.append(ids)
        return read(subject, ids, cache)

    monkeypatch.setattr(reference, "read", counted)
    compare(model("llama"), TEXTS, WHO[:1], BITS, records(tmp_path))
    assert [ids.tolist() for ids in asked] == [ids.tolist() for ids in TEXTS.evaluation.split(1)]


@pytest.mark.parametrize("kept", [0, 3 * 64 * 64 * 4 // 2])
def test_logits_beyond_the_bound_wait_in_files(kept, model, monkeypatch):
    monkeypatch.setattr(reference, "_KEPT", kept)
    subject, batches = model("llama"), TEXTS.evaluation.split(1)
    with reference.references(subject, batches) as known:
        for _ in range(2):
            for i, ids in enumerate(batches):
                assert torch.equal(known(i), read(subject, ids, None))
        scratch = known._scratch
        assert len(list(scratch.iterdir())) == (3 if kept == 0 else 2)
    assert not scratch.exists()


@pytest.mark.parametrize("kind", ["quality", "spectrum", "pair"])
def test_a_killed_run_goes_on(kind, model, finished, tmp_path, monkeypatch):
    """Killed before it writes the first and then the second record of a kind."""
    append = Records.append
    left = {"calls": 1}

    def dying(self, name, key, content):
        if name == kind:
            left["calls"] -= 1
            if left["calls"] < 0:
                raise KeyboardInterrupt
        return append(self, name, key, content)

    found = records(tmp_path)
    monkeypatch.setattr(Records, "append", dying)
    for calls in (0, 1):
        left["calls"] = calls
        with pytest.raises(KeyboardInterrupt) if kind != "spectrum" or calls == 0 else nullcontext():
            compare(model("llama"), TEXTS, WHO, BITS, found)
        found = records(tmp_path)
    monkeypatch.setattr(Records, "append", append)
    compare(model("llama"), TEXTS, WHO, BITS, found)
    for name in ("quality", "refused", "bits", "damage", "spectrum", "pair"):
        assert untimed(found.of(name)) == untimed(finished.of(name))


def test_what_is_measured_is_not_measured_again(model, finished, monkeypatch):
    before = finished.path.read_bytes()
    monkeypatch.setattr(bench, "evaluate", None)
    monkeypatch.setattr(fitting, "gather_stats", None)
    compare(model("llama"), TEXTS, WHO, BITS, records(finished.path.parent))
    assert finished.path.read_bytes() == before


def test_what_fails_before_any_budget_is_no_refusal(model, tmp_path, monkeypatch):
    found = records(tmp_path)
    compare(model("llama"), TEXTS, (), BITS, found)

    def failing(*arguments):
        raise KVSightError("gradients do not fit into memory")

    monkeypatch.setattr(fitting, "gather_stats", failing)
    with pytest.raises(KVSightError, match="do not fit"):
        compare(model("llama"), TEXTS, WHO, BITS, found)
    assert [row["kind"] for row in found.rows] == ["provenance", "quality"]


def test_logits_that_are_no_numbers_are_refused(model, tmp_path, monkeypatch):
    """A broken method costs its own arms and no others."""
    measured = bench.evaluate

    def broken(subject, plan, *arguments, **settings):
        result = measured(subject, plan, *arguments, **settings)
        if plan.method == "identity":
            return result
        return replace(result, windows=tuple(replace(w, kl=float("nan")) for w in result.windows))

    monkeypatch.setattr(bench, "evaluate", broken)
    found = records(tmp_path)
    compare(model("llama"), TEXTS, WHO[:1], (4.1,), found)
    assert found.get("refused", ("int@4.1",))["reason"] == "int: its logits are not finite."
    assert not list(quality_rows(found))


def test_another_text_is_another_comparison(tmp_path):
    Records.open(tmp_path, Conditions("compare", {}, TEXTS.conditions()))
    other = Texts(TEXTS.calibration, tokens(3, 64, seed=3), TEXTS.names)
    with pytest.raises(KVSightError, match="measured with text_sha256"):
        Records.open(tmp_path, Conditions("compare", {}, other.conditions()))


def test_maps_are_those_of_the_plan(finished):
    for row in finished.of("bits"):
        quality = finished.get("quality", (row["arm"],))
        bits = [cell["true_bits"] for cell in row["rows"]]
        assert len({(c["layer"], c["head"], c["side"]) for c in row["rows"]}) == len(bits) == 2 * 2 * 2
        # at the plan's reference length; heads are of one size
        assert sum(bits) / len(bits) == pytest.approx(quality["true_bits"], rel=1e-4)
        assert row["provenance"]["calibration_tokens"] == "512"
    (spectrum,) = finished.of("spectrum")
    assert spectrum["arm"] == "sight@4.1"
    for head in spectrum["rows"]:
        for name in ("widths", "lambda", "metric", "covariance"):
            assert len(head[name]) == 16
            assert head[name] == sorted(head[name], reverse=True)


def test_damage_is_what_the_allocation_predicts(model, stats):
    """Coded and decoded here, read from curves there."""
    request = make_request("sight", 3)
    prepared = prepare_from_stats(model("llama"), stats, request)
    plans = [
        plan_from_stats(model("llama"), stats, make_request("sight", bits), {}, prepared=prepared)
        for bits in (2, 3, 5)
    ]
    totals = [sum(row["kl"] for row in maps.damage(plan, stats)) for plan in plans]
    for plan, total in zip(plans, totals, strict=True):
        assert total == pytest.approx(float(plan.provenance["predicted_kl"]), rel=0.3)
    assert totals == sorted(totals, reverse=True)


def test_greedy_continuations_are_the_models_own(model):
    subject, ids = model("llama"), tokens(3, 20)
    found = continuation(subject, ids, 9)
    whole = ids
    with torch.no_grad():
        for _ in range(9):
            whole = torch.cat([whole, subject(whole).logits[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == whole[:, 20:].tolist()


def test_agreement_counts_tokens_until_the_first_difference(model, plan):
    subject, ids = model("llama"), prompts(tokens(3, 48), 3, 40)
    fitted = plan("llama", "sight", bits=3.0, sinks=0)
    wanted = continuation(subject, ids, 12)
    with enable(subject):
        found = agreement(subject, ids, wanted, PackedCache(fitted, subject.config))
        # each row alone, each step from the start: rows of single tokens are coded the same way
        for row, agreed in zip(range(3), found, strict=True):
            whole, own = ids[row : row + 1], []
            for _ in range(12):
                step = read(subject, whole, PackedCache(fitted, subject.config))[:, -1:].argmax(-1)
                own.append(int(step))
                whole = torch.cat([whole, step], dim=1)
            same = [a == b for a, b in zip(own, wanted[row].tolist(), strict=True)]
            assert agreed == (same.index(False) if False in same else 12)
    assert min(found) < 12


def test_prompts_are_spread_over_the_text():
    ids = torch.arange(60).view(3, 20)
    assert prompts(ids, 3, 8)[:, 0].tolist() == [0, 20, 40]
    assert prompts(ids, 9, 8)[:, 0].tolist() == [0, 8, 20, 28, 40, 48]
    with pytest.raises(KVSightError, match="prompts of 21 tokens are cut from windows of 20"):
        prompts(ids, 1, 21)


def test_coding_is_timed_per_token(model, plan):
    subject = model("llama")
    seen = keys_values(subject, tokens(1, 48))
    jobs = list(plan_jobs(plan("llama", "sight"), seen))
    assert sum(job.x.shape[1] for job in jobs) == 2 * 2 * 2
    encode, decode = times(jobs)
    assert encode > 0
    assert decode > 0
    block = plan("llama", "kivi")
    assert times(list(plan_jobs(block, keys_values(subject, tokens(1, 8))))) == (None, None)


class Rounded:
    """A stock layer whose quantiser rounds to 8 bits with one fp32 scale per token and head."""

    axis_key = axis_value = 0

    def lazy_initialization(self, key_states, value_states):
        pass

    def _quantize(self, x, axis):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), {"scale": scale}

    def _dequantize(self, stored):
        return stored[0] * stored[1]["scale"]


def test_outside_quantisers_code_and_read_every_token(model, monkeypatch):
    class Stock:
        layers = (Rounded(), Rounded())

    monkeypatch.setattr(peers, "stock_cache", lambda config, backend, setting: Stock)
    subject, batches = model("llama"), TEXTS.evaluation.split(1)
    setting = peers.Setting(8, None, 0)
    found, stored = peers.measure_stock(subject, batches, "rounded", setting, setting)
    # 16 codes of 8 bits and a scale: 32 bits as run, counted as 16
    assert (stored.true_bits, stored.as_run) == (9.0, 10.0)
    assert stored.key_bits == stored.value_bits == 9.0
    assert len(found) == 3
    assert all(1e-6 < window.kl < 0.01 for window, _ in found)
    jobs = list(peers.stock_jobs(subject.config, "rounded", setting, keys_values(subject, batches[0])))
    assert len(jobs) == 4
    assert all(us > 0 for us in times(jobs))


INSTALLED = [backend for backend in peers.BACKENDS if peers.missing(backend) is None]


@pytest.mark.skipif(not INSTALLED, reason="neither quanto nor hqq is installed")
@pytest.mark.filterwarnings("ignore")
def test_quanto_and_hqq_take_part(model, tmp_path):
    who = (WHO[1], *(Contender(backend, {}, external=True) for backend in INSTALLED))
    found = records(tmp_path)
    compare(model("llama"), TEXTS, who, (1.0, 3.0, 3.1), found)
    for backend in INSTALLED:
        assert "cannot meet 1 bits" in found.get("refused", (f"{backend}@1",))["reason"]
        row = found.get("quality", (f"{backend}@3",))
        assert row["external"]
        assert row["true_bits"] <= 3.0
        assert 0.01 < row["kl"]["mean"] < 5
        assert found.get("quality", (f"{backend}@3.1",))["same_as"] == f"{backend}@3"
    json.dumps(list(found.of("pair")), allow_nan=False)

"""``evaluate`` measures what it says, on the embedded model and on tiny ones."""

import json
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from zoo import KINDS, batches, tokens

import kvsight
from kvsight import assets
from kvsight.errors import KVSightError
from kvsight.fit import Request, plan_from_stats
from kvsight.integrations.loading import load_model
from kvsight.text import windows
from kvsight.trace import observe, summarise


@pytest.fixture(scope="module")
def pico():
    """(model, calibration, evaluation): windows of the embedded texts."""
    model, tokenizer = load_model()
    calibration = windows(tokenizer, assets.text("calibration"), length=256, count=8)
    evaluation = windows(tokenizer, assets.text("evaluation"), length=128, count=6)
    return model, list(calibration.split(4)), list(evaluation.split(2))


@pytest.fixture(scope="module")
def pico_plan(pico):
    """Plans that share one observation: pico_plan(method, bits, **options)."""
    model, calibration, _ = pico
    stats = summarise(observe(model, calibration))

    @cache
    def make(method, bits, **options):
        request = Request({"k": method, "v": method}, {"k": bits, "v": bits}, options)
        return plan_from_stats(model, stats, request, {})

    return make


@pytest.fixture(scope="module")
def sight(pico_plan):
    return pico_plan("sight", 3)


@pytest.fixture(scope="module")
def result(pico, sight):
    """What the 3-bit plan costs on all windows."""
    return kvsight.evaluate(pico[0], sight, pico[2])


def test_identity_costs_nothing(pico, pico_plan):
    model, _, evaluation = pico
    result = kvsight.evaluate(model, pico_plan("identity", None), evaluation)
    assert result.kl.mean <= 1e-6
    assert all(abs(window.kl) <= 1e-6 for window in result.windows)
    assert (result.same_top.mean, result.same_top.low, result.same_top.high) == (1, 1, 1)
    assert result.perplexity.mean == pytest.approx(result.baseline_perplexity.mean, rel=1e-6)
    assert result.tokens == 6 * 128
    # fp32 numbers are kept as they are: twice a 16-bit cache
    assert result.cache_bytes == 2 * result.baseline_bytes
    assert (result.method, result.true_bits) == ("identity", 32.0)


def test_measures_equal_brute_force(pico, sight):
    """Against a forward pass of our own, with the cache decoded by whoever reads it."""
    model, _, evaluation = pico
    ids = evaluation[0]
    result = kvsight.evaluate(model, sight, [ids])
    cache = kvsight.PackedCache(sight)
    with torch.no_grad():
        exact = model(ids).logits.double()
        with pytest.warns(UserWarning, match="attention decodes this cache"):
            coded = model(ids, past_key_values=cache, use_cache=True).logits.double()
    p, q = exact.log_softmax(-1), coded.log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    for row, window in enumerate(result.windows):
        assert window.kl == pytest.approx(float(kl[row].mean()), rel=2e-3)
        assert window.kl_p99 == pytest.approx(np.percentile(kl[row].numpy(), 99), rel=2e-3)
        for logits, loss in ((exact, window.baseline_loss), (coded, window.loss)):
            wanted = torch.nn.functional.cross_entropy(logits[row, :-1], ids[row, 1:])
            assert loss == pytest.approx(float(wanted), rel=1e-4)
        same = (exact[row].argmax(-1) == coded[row].argmax(-1)).double().mean()
        assert window.same_top == pytest.approx(float(same), abs=2 / 128)
    assert result.kl_p99 == pytest.approx(np.percentile(kl.numpy(), 99), rel=2e-3)
    assert result.cache_bytes == cache.nbytes
    assert result.true_bits == sight.true_bits == 3.0
    assert result.key_bits == result.value_bits == 3.0
    assert result.baseline_bytes == pytest.approx(cache.nbytes * 16 / 3)
    losses = [window.baseline_loss for window in result.windows]
    assert result.baseline_perplexity.mean == pytest.approx(math.exp(np.mean(losses)))


def test_windows_are_kept_in_order_and_paired(pico, sight, result):
    """However windows are batched, each keeps its place and its numbers."""
    model, _, evaluation = pico
    alone = kvsight.evaluate(model, sight, [row[None] for ids in evaluation for row in ids])
    assert len(result.windows) == len(alone.windows) == result.kl.n == 6
    for a, b in zip(result.windows, alone.windows, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=2e-2)
        assert a.baseline_loss == pytest.approx(b.baseline_loss, rel=1e-5)
    assert (result.tokens, result.cache_bytes) == (alone.tokens, alone.cache_bytes)
    assert kvsight.evaluate(model, sight, evaluation[:1]).windows == result.windows[:2]


def test_intervals_are_those_of_the_windows(result):
    for estimate in (result.kl, result.perplexity, result.baseline_perplexity, result.same_top):
        assert estimate.low <= estimate.mean <= estimate.high
        assert estimate.n == 6
    kl = np.array([window.kl for window in result.windows])
    assert result.kl.mean == pytest.approx(kl.mean())
    # Student's t, 5 degrees of freedom, 95 %: 2.5706
    half = 2.5706 * kl.std(ddof=1) / math.sqrt(6)
    assert result.kl.high - result.kl.mean == pytest.approx(half, rel=1e-4)
    loss = np.array([window.loss for window in result.windows])
    low = math.exp(loss.mean() - 2.5706 * loss.std(ddof=1) / math.sqrt(6))
    assert result.perplexity.low == pytest.approx(low, rel=1e-4)


def test_one_window_has_no_interval(model, plan):
    result = kvsight.evaluate(model("llama"), plan("llama", "sight"), [tokens(1, 20)])
    body = result.to_json()
    assert body["kl"] == {"mean": result.windows[0].kl, "low": None, "high": None, "n": 1}
    assert body["perplexity"]["low"] is None
    json.dumps(body, allow_nan=False)


def test_json_has_what_reports_need(result):
    body = json.loads(json.dumps(result.to_json(), allow_nan=False))
    plain = (
        *("method", "true_bits", "key_bits", "value_bits"),
        *("cache_bytes", "baseline_bytes", "tokens", "kl_p99"),
    )
    assert {key: body[key] for key in plain} == {key: getattr(result, key) for key in plain}
    for name in ("kl", "perplexity", "baseline_perplexity", "same_top"):
        assert body[name] == vars(getattr(result, name))
    assert body["windows"] == [vars(window) for window in result.windows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budgets"),
    [("sight", (2, 3, 4)), ("turboquant", (2.5, 3.5, 4.5)), ("int", (3, 5)), ("kivi", (3, 5))],
)
def test_more_bits_are_better(method, budgets, pico, pico_plan):
    """On every window, one more bit halves KL at the least."""
    model, _, evaluation = pico
    kls = []
    for bits in budgets:
        result = kvsight.evaluate(model, pico_plan(method, bits), evaluation)
        assert result.true_bits <= bits
        assert result.perplexity.mean > 0.99 * result.baseline_perplexity.mean
        kls.append([window.kl for window in result.windows])
    for worse, better in pairwise(kls):
        assert all(b < w / 2 for w, b in zip(worse, better, strict=True))


@pytest.mark.slow
def test_the_query_metric_is_worth_its_bytes(pico, pico_plan, result):
    """The point of the method: at equal bits it is better with the metric than without."""
    without = kvsight.evaluate(pico[0], pico_plan("sight", 3, metric="storage"), pico[2])
    assert without.cache_bytes == pytest.approx(result.cache_bytes, rel=0.002)
    assert result.kl.mean < without.kl.mean


@pytest.mark.parametrize("difference", [-1, 1, 1000])
def test_a_cache_that_lies_about_its_bytes_fails(difference, model, plan, monkeypatch):
    real = kvsight.PackedCache.nbytes.fget
    monkeypatch.setattr(kvsight.PackedCache, "nbytes", property(lambda cache: real(cache) + difference))
    fitted = plan("llama", "sight")
    promised = fitted.nbytes(48, 2)
    message = (
        f"the cache holds {promised + difference} bytes for 96 tokens, the plan's ledger says {promised}"
    )
    with pytest.raises(KVSightError, match=message):
        kvsight.evaluate(model("llama"), fitted, batches())


def test_bad_windows_are_refused(model, plan):
    subject, fitted = model("llama"), plan("llama", "sight")
    with pytest.raises(KVSightError, match="a window needs at least 2 tokens; got 1"):
        kvsight.evaluate(subject, fitted, [tokens(3, 1)])
    with pytest.raises(KVSightError, match="evaluation needs at least one batch of token ids; got none"):
        kvsight.evaluate(subject, fitted, [])
    with pytest.raises(KVSightError, match=r"token ids must be in 0\.\.63; got"):
        kvsight.evaluate(subject, fitted, [tokens(1, 9) + 60])


def test_a_plan_of_another_model_is_refused(model, plan, pico):
    with pytest.raises(KVSightError, match="the plan was made for another model") as caught:
        kvsight.evaluate(pico[0], plan("llama", "sight"), [tokens(1, 8)])
    message = str(caught.value)
    assert "(llama, 2 layers, 2 KV heads, 64 wide, 64 tokens); this one is" in message
    assert "Fit a plan to this model: kvsight fit MODEL." in message
    assert "\n" not in message


def test_known_logits_are_not_read_again(model, plan):
    subject, fitted = model("llama"), plan("llama", "sight")
    known = [subject(ids).logits for ids in batches()]
    wanted = kvsight.evaluate(subject, fitted, batches())
    asked = []

    def reference(index):
        asked.append(index)
        return known[index]

    found = kvsight.evaluate(subject, fitted, batches(), reference=reference)
    assert asked == [0, 1, 2]
    assert found.kl.mean == pytest.approx(wanted.kl.mean, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.interface])
def test_the_baseline_is_the_model_alone(name, model, plan):
    """Also where the model's own attention is eager, with masks of its own kind."""
    subject = model(name)
    ids = tokens(2, 30)
    result = kvsight.evaluate(subject, plan(name, "identity"), [ids])
    assert result.kl.mean <= 1e-6
    with torch.no_grad():
        logits = subject(ids).logits
    for row, window in enumerate(result.windows):
        wanted = torch.nn.functional.cross_entropy(logits[row, :-1], ids[row, 1:])
        assert window.baseline_loss == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["falcon", "bloom", "deepseek-v3"])
def test_models_that_decode_are_measured_too(name, model, plan):
    with pytest.warns(UserWarning, match="attention decodes this cache"):
        result = kvsight.evaluate(model(name), plan(name, "sight"), batches())
    assert result.cache_bytes == plan(name, "sight").nbytes(48, 6)
    assert 0 < result.kl.mean < 5


def test_progress_is_told(model, plan):
    calls = []
    kvsight.evaluate(
        model("llama"), plan("llama", "sight"), batches(2), progress=lambda *call: calls.append(call)
    )
    assert calls == [("evaluate", 1, 2), ("evaluate", 2, 2)]

"""Tasks: what they make, what they measure, and how arms are paired."""

import json
import math
from dataclasses import replace

import pytest
import torch
from zoo import tokens

import kvsight
from kvsight import assets
from kvsight.errors import KVSightError
from kvsight.eval.arms import UNCOMPRESSED
from kvsight.eval.tasks import books, continuation, copying, induction, recall
from kvsight.eval.tasks.arms import Arm, check_read, packed_arm, score
from kvsight.eval.tasks.base import Setting, Source, context_length
from kvsight.eval.tasks.last_word import LAMBADA, LAST_WORD, lambada_passages, text_passages
from kvsight.eval.tasks.registry import TASKS, chosen, possible
from kvsight.eval.tasks.run import run_tasks
from kvsight.integrations.loading import load_model
from kvsight.records import Records
from kvsight.text import windows

LAMBADA_TEXT = "".join(
    json.dumps({"text": f"{before} the {word}"}) + "\n"
    for before, word in [
        ("The war was over, and everyone who had been in the army went back to", "city"),
        ("He was born in New York, and after many years in the south he returned to", "city"),
        ("They had no food left, and none of the ships had come into", "harbour"),
    ]
)


@pytest.fixture(scope="module")
def pico():
    return load_model()


@pytest.fixture(scope="module")
def plans(pico):
    model, tokenizer = pico
    batches = list(windows(tokenizer, assets.text("calibration"), length=128, count=8).split(4))
    return {
        "identity": kvsight.fit(model, batches, method="identity"),
        "int": kvsight.fit(model, batches, method="int", bits=4.5),
        "coarse": kvsight.fit(model, batches, method="kivi", bits=2.6),
    }


@pytest.fixture(scope="module")
def arms(pico, plans):
    return {
        UNCOMPRESSED: Arm(UNCOMPRESSED, pico[0]),
        **{name: packed_arm(pico[0], plan) for name, plan in plans.items()},
    }


@pytest.fixture(scope="module")
def setting(pico):
    model, tokenizer = pico
    text = Source("validation", assets.text("validation")[:40_000])
    return Setting(model, tokenizer, (text,), Source("mine", LAMBADA_TEXT), 2, 300, 24)


def read(arm, task, items):
    with arm.reading():
        return [sample for item in items for sample in task.measure(arm, item)]


def test_scores_are_those_of_the_logits(pico, arms, monkeypatch):
    model, _ = pico
    ids = tokens(40, seed=3) + 500
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    arm = arms[UNCOMPRESSED]
    with arm.reading():
        found = score(arm, ids)
        torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-4)
        assert found.hit.tolist() == (logits.argmax(-1) == ids[1:]).tolist()
        positions = torch.tensor([1, 39])
        assert found.mean_loss(positions) == pytest.approx(float(loss[[0, 38]].mean()), rel=1e-4)
        # seven tokens at a time: as for long contexts of large vocabularies
        monkeypatch.setattr("kvsight.eval.tasks.arms._ELEMENTS", 7 * 8192)
        torch.testing.assert_close(score(arm, ids).loss, found.loss, rtol=1e-4, atol=1e-4)


def test_a_packed_arm_reads_codes_in_one_pass(pico, plans, arms):
    model, _ = pico
    ids = tokens(40, seed=3) + 500
    with torch.no_grad(), kvsight.enable(model):
        cache = kvsight.PackedCache(plans["coarse"], monitor=False)
        logits = model(ids[None], past_key_values=cache).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    with arms["coarse"].reading():
        found = score(arms["coarse"], ids).loss
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-4)
    with arms[UNCOMPRESSED].reading():
        assert float((found - score(arms[UNCOMPRESSED], ids).loss).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["gemma3", "gpt-oss", "qwen3-next"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_arms_read_sliding_and_linear_layers_too(kind, pieces, model, plan, monkeypatch):
    subject, ids = model(kind), tokens(30)
    monkeypatch.setattr("kvsight.eval.tasks.arms._ELEMENTS", 30 // pieces * 64)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(subject(ids[None]).logits[0, :-1], ids[1:])
    for arm in (Arm(UNCOMPRESSED, subject), packed_arm(subject, plan(kind, "identity"))):
        with arm.reading():
            assert float(score(arm, ids).loss.mean()) == pytest.approx(float(wanted), rel=1e-4)


def test_an_arm_whose_cache_is_not_read_fails(arms):
    with pytest.raises(KVSightError, match="did not read the packed cache"):
        check_read(arms["int"].cache())
    check_read(arms[UNCOMPRESSED].cache())


def test_arms_are_named_by_method_and_stored_bits(pico, plans, arms):
    assert arms["identity"].label == "identity@32"
    assert arms["coarse"].label.startswith("kivi@2.")
    assert packed_arm(pico[0], plans["int"]).plan_hash != arms["coarse"].plan_hash
    other = kvsight.fit(pico[0], [tokens(2, 64)], method={"k": "int", "v": "kivi"}, bits=5)
    assert packed_arm(pico[0], other).label.startswith("int/kivi@")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_identity_plan_is_the_uncompressed_model(name, setting, arms):
    """Every task, on every sample, up to the rounding of attention."""
    task = TASKS[name]
    items = task.items(setting)
    packed, plain = (read(arms[label], task, items) for label in ("identity", UNCOMPRESSED))
    assert [s.id for s in packed] == [s.id for s in plain]
    assert len(plain) == 2
    for ours, wanted in zip(packed, plain, strict=True):
        assert ours.value == pytest.approx(wanted.value, abs=1e-4)
        assert dict(ours.extras) == pytest.approx(dict(wanted.extras), abs=1e-3)
        assert task.least <= wanted.value <= task.most


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_coarse_plan_is_not(name, setting, arms):
    task = TASKS[name]
    items = task.items(setting)
    packed, plain = (read(arms[label], task, items) for label in ("coarse", UNCOMPRESSED))
    before, after = ([(s.value, *s.extras.values()) for s in side] for side in (plain, packed))
    assert before != after


@pytest.mark.parametrize("task", [LAMBADA, LAST_WORD])
def test_last_words_are_words_and_contexts_come_whole(task, setting):
    found = {LAMBADA: lambada_passages(setting.lambada), LAST_WORD: text_passages(setting.texts[0])}[task]
    assert all(word.startswith(" ") and word.strip().isalpha() for _, word in found)
    for passage in task.items(setting):
        context, word = found[int(passage.id)]
        assert setting.tokenizer.decode(passage.ids[-passage.target :]) == word
        assert setting.tokenizer.decode(passage.ids[: -passage.target]) == context
    if task is LAST_WORD:
        assert all(len(context.split()) >= 58 for context, _ in found)
        assert len({context[:40] for context, _ in found}) == len(found)


def test_passages_of_wrapped_lines_are_found_too():
    sentence = (
        "It was the best of times, it was the worst of\ntimes, it was the age of wisdom and of folly.\n"
    )
    found = text_passages(Source("wrapped", f"{sentence * 4}\n{sentence * 2}\n{sentence * 3}"))
    assert [word for _, word in found] == [" folly"] * 2
    assert [context.count("best") for context, _ in found] == [3, 3]


def test_a_last_word_is_right_when_all_its_tokens_are(pico, arms, setting):
    model, _ = pico
    items = LAMBADA.items(setting)
    for sample, passage in zip(read(arms[UNCOMPRESSED], LAMBADA, items), items, strict=True):
        with torch.no_grad():
            logits = model(passage.ids[None]).logits[0, -passage.target - 1 : -1]
        target = passage.ids[-passage.target :]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        assert sample.value == float((logits.argmax(-1) == target).all())
        assert sample.extras["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_bad_passages_are_named():
    with pytest.raises(KVSightError, match="mine, line 2: not a LAMBADA passage"):
        lambada_passages(Source("mine", '{"text": "a b"}\n{"words": 1}\n'))
    with pytest.raises(KVSightError, match="no passage that ends with a word"):
        LAST_WORD.items(_with(texts=(Source("short", "Too short."),)))


def _with(**changes):
    model, tokenizer = load_model()
    base = {"texts": (), "lambada": None, "samples": None, "length": 300, "generated": 8}
    return Setting(model=model, tokenizer=tokenizer, **{**base, **changes})


def test_books_slide_by_half_and_count_each_token_once(pico, setting):
    model, tokenizer = pico
    text = Source("book", assets.text("validation")[:8_000])
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    items = books.TASK.items(Setting(model, tokenizer, (text,), None, 1000, 200, 1))
    starts = [int(item.id.rpartition(":")[2]) for item in items]
    assert starts == list(range(0, len(ids) - 199, 100))
    assert all(item.ids.tolist() == ids[at : at + 200] for item, at in zip(items, starts, strict=True))
    assert {item.scored for item in items} == {100}
    few = books.TASK.items(Setting(model, tokenizer, (text, replace(text, name="again")), None, 4, 200, 1))
    assert [item.id.partition(":")[0] for item in few] == ["book", "book", "again", "again"]
    with pytest.raises(KVSightError, match="two texts are named book"):
        Setting(model, tokenizer, (text, text), None, 4, 200, 1)


def test_position_ranges_are_disjoint_and_whole(arms, setting):
    assert books.edges(2048) == [1, 64, 128, 256, 512, 1024, 2048]
    assert books.edges(300) == [1, 64, 128, 256, 300]
    assert books.edges(40) == [1, 40]
    items = books.TASK.items(setting)[:1]
    (sample,) = read(arms[UNCOMPRESSED], books.TASK, items)
    with arms[UNCOMPRESSED].reading():
        loss = score(arms[UNCOMPRESSED], items[0].ids).loss
    total = sum(part.count * part.means["loss"] for part in sample.parts)
    assert total == pytest.approx(float(loss.sum()), rel=1e-5)
    assert sample.value == pytest.approx(float(loss[149:].mean()), rel=1e-5)


@pytest.mark.parametrize("task", [copying.TASK, induction.TASK], ids=lambda t: t.name)
def test_probes_ask_for_what_was_shown_at_the_distance_they_say(task, pico):
    model, tokenizer = pico
    source = Source("validation", assets.text("validation"))
    wide = Setting(model, tokenizer, (source,), None, 3, 2048, 1)
    probes = task.items(wide)
    assert len({tuple(p.ids.tolist()) for p in probes}) == 3
    for probe in probes:
        assert [d for d, _ in probe.scored] == [64, 384, 1024]
        assert len(probe.ids) <= 2048
        assert not set(probe.ids.tolist()) & set(tokenizer.all_special_ids)
        for distance, positions in probe.scored:
            # the first token of the second copy is not scored
            second = torch.arange(int(positions[0]) - 1, int(positions[-1]) + 1)
            first = second - distance - len(second)
            assert positions.tolist() == second[1:].tolist()
            assert torch.equal(probe.ids[second], probe.ids[first])
    again = task.items(wide)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(probes, again, strict=True))


def test_recall_pairs_keys_with_values(pico, setting):
    _, tokenizer = pico
    (probe, *_) = recall.TASK.items(setting)
    ids = probe.ids.tolist()
    (distance, positions), *_ = probe.scored
    shown = tokenizer.decode(ids[: min(positions.tolist()) - distance])
    asked = tokenizer.decode(ids[min(positions.tolist()) - 2 :])
    pairs = [pair.split() for pair in asked.strip().rstrip(",").split(",")]
    pairs = [pair for pair in pairs if len(pair) == 2]
    assert len(pairs) >= 5
    assert len({key for key, _ in pairs}) == len(pairs)
    assert all(shown.count(f"{key} {value},") == 4 for key, value in pairs)


def test_probes_need_room_and_names(pico):
    model, tokenizer = pico
    text = Source("validation", assets.text("validation"))
    with pytest.raises(KVSightError, match=r"this run has 80. Raise --length"):
        induction.TASK.items(Setting(model, tokenizer, (text,), None, 1, 80, 1))
    plain = Source("plain", "the small words of a text without any names " * 100)
    with pytest.raises(KVSightError, match="recall needs 12 capitalised words"):
        recall.TASK.items(Setting(model, tokenizer, (plain,), None, 1, 300, 1))


@pytest.mark.slow
def test_the_first_difference_is_where_generation_parts(pico, plans, arms, setting):
    """The teacher-forced pass finds the same common trajectory as two free runs of ``generate``."""
    model, _ = pico
    (item,) = continuation.TASK.items(setting)
    assert item.prompts.shape == (2, 64)
    assert item.tokens.shape == (2, 24)
    fixed = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    for row, sample in enumerate(read(arms["coarse"], continuation.TASK, (item,))):
        prompt = item.prompts[row : row + 1]
        stock = model.generate(prompt, eos_token_id=-1, **fixed)[0, 64:]
        assert stock.tolist() == item.tokens[row].tolist()
        with kvsight.enable(model):
            cache = kvsight.PackedCache(plans["coarse"], monitor=False)
            packed = model.generate(prompt, past_key_values=cache, eos_token_id=-1, **fixed)[0, 64:]
        same = (packed == stock).tolist()
        assert sample.extras["divergence"] == (same.index(False) if False in same else 24)
    for sample in read(arms[UNCOMPRESSED], continuation.TASK, (item,)):
        assert (sample.value, sample.extras["divergence"]) == (1.0, 24.0)


def test_agreement_is_told_by_length():
    same = torch.ones(300, dtype=torch.bool)
    same[[100, 200, 290]] = False
    sample = continuation._sample("a", same)
    assert sample.extras["divergence"] == 100
    assert sample.value == pytest.approx(297 / 300)
    assert [dict(part.at) for part in sample.parts] == [{"tokens": n} for n in (128, 256, 300)]
    shares = [part.means["agreement"] for part in sample.parts]
    assert shares == pytest.approx([127 / 128, 127 / 128, 43 / 44])


@pytest.fixture(scope="module")
def measured(tmp_path_factory, setting, arms):
    """Two tasks of two arms: the directory, and what the run returned."""
    folder = tmp_path_factory.mktemp("run")
    rows = run_tasks(folder, (LAMBADA, copying.TASK), (arms["coarse"],), setting, "pico-8m")
    return folder, rows


def test_records_are_paired_with_the_uncompressed_model(measured, arms):
    folder, rows = measured
    label = arms["coarse"].label
    assert [row["key"] for row in rows] == [
        [task, arm] for task in ("lambada", "copy") for arm in (UNCOMPRESSED, label)
    ]
    kept = list(Records.read(folder).of("task"))
    assert kept == json.loads(json.dumps(rows, allow_nan=False))
    for plain, packed in (rows[:2], rows[2:]):
        assert plain["difference"] is None
        assert (plain["plan"], packed["plan"]) == ("", arms["coarse"].plan_hash)
        apart = [p["value"] - u["value"] for p, u in zip(packed["samples"], plain["samples"], strict=True)]
        assert packed["difference"]["mean"] == pytest.approx(sum(apart) / len(apart))
        assert packed["difference"]["n"] == packed["value"]["n"] == 2
        assert packed["detail"]["loss"]["difference"]["mean"] == pytest.approx(
            packed["detail"]["loss"]["value"]["mean"] - plain["detail"]["loss"]["value"]["mean"]
        )
    plain, packed = rows[2:]
    for there, here in zip(plain["detail"]["distances"], packed["detail"]["distances"], strict=True):
        assert here["distance"] == there["distance"]
        assert here["baseline"] == there["baseline"] == there["accuracy"]
        assert here["baseline_loss"] == there["loss"] != here["loss"]


def test_a_run_goes_on_where_it_stopped(measured, setting, arms, monkeypatch):
    folder, rows = measured
    content = (folder / "records.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    calls = []
    again = run_tasks(
        folder,
        (LAMBADA, copying.TASK),
        (arms["coarse"],),
        setting,
        "pico-8m",
        lambda *call: calls.append(call),
    )
    assert calls == [("copy", 1, 2), ("copy", 2, 2)]
    assert again == rows
    assert (folder / "records.jsonl").read_bytes() == content


def test_other_conditions_and_other_plans_are_refused(measured, pico, setting, arms, plans):
    folder, _ = measured
    model, tokenizer = pico
    shorter = Setting(model, tokenizer, setting.texts, setting.lambada, 2, 200, 24)
    with pytest.raises(KVSightError, match="was measured with length 300; this run has 200"):
        run_tasks(folder, (LAMBADA,), (arms["coarse"],), shorter, "pico-8m")
    other = Arm(arms["coarse"].label, model, plans["int"])
    with pytest.raises(KVSightError, match=r"has kivi@[\d.]+ of another plan; choose another -o"):
        run_tasks(folder, (LAMBADA,), (other,), setting, "pico-8m")
    with pytest.raises(KVSightError, match=r"two plans are both kivi@[\d.]+"):
        run_tasks(folder, (LAMBADA,), (arms["coarse"], other), setting, "pico-8m")


def test_tasks_are_chosen_by_name(setting):
    assert chosen("all") == tuple(TASKS.values())
    assert [task.name for task in chosen("copy, books")] == ["copy", "books"]
    with pytest.raises(KVSightError, match=r"unknown task .book.\. Did you mean books\?"):
        chosen("books,book")
    without = Setting(setting.model, setting.tokenizer, setting.texts, None, 1, 100, 1)
    ready, lacking = possible(chosen("lambada,copy"), without)
    assert ([t.name for t in ready], [t.name for t in lacking]) == (["copy"], ["lambada"])


def test_contexts_end_at_the_limit(pico):
    model, _ = pico
    assert context_length(model, None) == 2048
    assert context_length(model, 100) == 100
    with pytest.raises(KVSightError, match="contexts of 2049 tokens are longer than the model's 2048"):
        context_length(model, 2049)


def test_every_metric_is_finite(measured):
    for row in measured[1]:
        assert all(math.isfinite(sample["value"]) for sample in row["samples"])

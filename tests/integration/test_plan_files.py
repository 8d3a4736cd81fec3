"""A plan on disk is the plan; a damaged one is one clear line. The ledger is the bytes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from zoo import KINDS, batches

import kvsight
from kvsight import planfile
from kvsight.errors import KVSightError
from kvsight.plan import SIDES, digest
from kvsight.planfile import plan_hash
from representatives import REPRESENTATIVES, in_blocks

METHODS = REPRESENTATIVES
# few stages of residual-vq are quick to fit
BITS = {"identity": None, "kivi": 6.0, "gear": 8.0, "residual-vq": 2.0}
# one kind of layers each, and mixtures of them
PATHS = ["llama", "gemma3", "deepseek-v3", "qwen3-next", "gemma4"]


def fitted(plan, name, method, **settings):
    return plan(name, method, bits=BITS.get(method, 5.0), **settings)


def pairs(names, count):
    """(name, method): every name with its ``count`` least met methods, blocks where windows have room."""
    met = dict.fromkeys(METHODS, 0)
    found = []
    for name in names:
        able = [method for method in METHODS if not KINDS[name].sliding or not in_blocks(method)]
        for method in sorted(able, key=lambda m: (met[m], not in_blocks(m)))[:count]:
            met[method] += 1
            found.append((name, method))
    return found


def test_pairs_meet_every_method_often():
    for count, names, often in ((4, PATHS, 1), (2, KINDS, 2)):
        met = [method for _, method in pairs(names, count)]
        assert all(met.count(method) >= often for method in METHODS)


def codes(plan):
    """The bytes that every codec of a plan makes of the same numbers."""
    for layer in plan.layers:
        for side in SIDES:
            for placement in layer.side(side):
                form = placement.codec.format
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(
                    1, len(placement.heads), 2 * form.block, placement.codec.dim, generator=generator
                )
                packed = placement.codec.encode(x)
                yield placement.heads, form, packed.tensors, placement.codec.decode(packed)


@pytest.mark.parametrize(("name", "method"), pairs(PATHS, 4))
def test_a_plan_comes_back_as_it_was(name, method, plan, tmp_path):
    made = fitted(plan, name, method)
    made.save(tmp_path / "plan")
    back = kvsight.Plan.load(tmp_path / "plan")
    assert plan_hash(back) == plan_hash(made)
    for key in ("method", "options", "sinks", "window", "dense_dtype", "reference_length", "fingerprint"):
        assert getattr(back, key) == getattr(made, key)
    assert dict(back.config) == dict(made.config)
    assert dict(back.provenance) == dict(made.provenance)
    assert back.ledger() == made.ledger()
    assert (back.true_bits, back.key_bits, back.value_bits) == (
        made.true_bits,
        made.key_bits,
        made.value_bits,
    )
    assert [back.nbytes(n, 3) for n in (0, 1, 33, 500)] == [made.nbytes(n, 3) for n in (0, 1, 33, 500)]
    for ours, theirs in zip(codes(made), codes(back), strict=True):
        assert ours[:2] == theirs[:2]
        assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
        assert torch.equal(ours[3], theirs[3])
    back.save(tmp_path / "again")
    for file in ("plan.json", "tensors.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "plan" / file).read_bytes()


def test_different_plans_have_different_hashes(plan):
    plans = [fitted(plan, "llama", method) for method in METHODS]
    plans += [plan("llama", "sight", bits=4.5), plan("llama", "sight", bits=8.0, sinks=1)]
    plans += [
        plan("llama", "sight", bits=5.0, options=(("shrink", 0.5),)),
        plan("qwen2", "sight", bits=5.0),
    ]
    assert len({plan_hash(each) for each in plans}) == len(plans)


def test_two_methods_and_their_options_come_back(model, tmp_path):
    made = kvsight.fit(
        model("llama"),
        batches(1),
        key_bits=4,
        value_bits=5.5,
        method={"k": "sight", "v": "turboquant"},
        options={"shrink": 0.01, "rotation": "hadamard"},
    )
    made.save(tmp_path / "plan")
    back = kvsight.Plan.load(tmp_path / "plan")
    assert back.method == {"k": "sight", "v": "turboquant"}
    assert back.options == {"shrink": 0.01, "rotation": "hadamard"}
    assert back.key_bits == 4
    assert 4 < back.value_bits <= 5.5
    assert {row.codec for row in back.ledger() if row.side == "v"} == {"turboquant"}


@pytest.fixture
def saved(plan, tmp_path):
    path = tmp_path / "plan"
    plan("llama", "sight").save(path)
    return path


def refusal(path):
    """The message that loading gives: one line."""
    with pytest.raises(KVSightError) as caught:
        kvsight.Plan.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path, change, sign=False):
    file = path / "plan.json"
    body = json.loads(file.read_text())
    change(body)
    if sign:
        body.pop("plan_sha256")
        body["plan_sha256"] = digest(body)
    file.write_text(json.dumps(body))


def test_a_missing_plan(tmp_path):
    path = tmp_path / "nothing"
    expected = f"no plan at {path}: plan.json is missing. Make one with: kvsight fit -o {path}."
    assert refusal(path) == expected
    path.mkdir()
    assert refusal(path) == expected
    file = tmp_path / "file"
    file.write_text("")
    assert refusal(file).startswith(f"no plan at {file}: plan.json is missing.")


@pytest.mark.parametrize("kept", [0, 1, 0.5, -2])
def test_truncated_json(saved, kept):
    file = saved / "plan.json"
    text = file.read_text()
    file.write_text(text[: int(kept * len(text)) if 0 < kept < 1 else kept])
    assert refusal(saved) == f"{file} is corrupt or truncated; fit the plan again."


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x00"])
def test_json_that_is_no_text(saved, content):
    (saved / "plan.json").write_bytes(content)
    assert refusal(saved) == f"{saved / 'plan.json'} is corrupt or truncated; fit the plan again."


@pytest.mark.parametrize("content", ["[]", "3", "null", '"plan"'])
def test_json_of_something_else(saved, content):
    (saved / "plan.json").write_text(content)
    assert refusal(saved) == f"{saved / 'plan.json'} is not a plan; fit it again."


@pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
def test_truncated_tensors(saved, kept):
    file = saved / "tensors.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else kept])
    assert refusal(saved) == f"{file} is corrupt or truncated; fit the plan again."


def test_one_flipped_bit_in_the_tensors(saved):
    file = saved / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert refusal(saved) == f"{file} is corrupt or truncated; fit the plan again."


def test_missing_tensors(saved):
    (saved / "tensors.safetensors").unlink()
    assert refusal(saved) == f"{saved / 'tensors.safetensors'} is missing; fit the plan again."


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(window=64),
        lambda body: body.update(true_bits=1.0),
        lambda body: body["layers"].pop(),
        lambda body: body.pop("plan_sha256"),
        lambda body: body["provenance"].update(calibration_tokens="999"),
    ],
    ids=["window", "bits", "layer", "hash", "provenance"],
)
def test_tampered_json(saved, change):
    edit(saved, change)
    assert refusal(saved) == f"{saved / 'plan.json'} was changed or truncated; fit the plan again."


@pytest.mark.parametrize("version", [2, 99, 0, None, "1"])
def test_another_version(saved, version):
    edit(saved, lambda body: body.update(version=version))
    assert refusal(saved) == (
        f"{saved} is a plan of format version {version}; this kvsight reads version 1. "
        "Upgrade kvsight, or fit the plan again."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body["layers"][0]["k"][0].pop("format"), "is not a valid plan (KeyError('format'))"),
        (lambda body: body.update(layers=None), "is not a valid plan (TypeError("),
        (lambda body: body.update(dense_dtype="int3"), "unknown number type 'int3'; known: bfloat16"),
        (
            lambda body: body["layers"][0]["v"][0].update(format={"kind": "vq"}),
            "unknown format {'kind': 'vq'}",
        ),
        (lambda body: body.pop("tensors_sha256"), "tensors.safetensors is corrupt or truncated"),
    ],
    ids=["format", "layers", "dtype", "kind", "sha"],
)
def test_signed_nonsense(saved, change, words):
    edit(saved, change, sign=True)
    assert words in refusal(saved)


def test_saving_replaces_a_plan_and_nothing_else(saved, plan, tmp_path):
    other = plan("llama", "int", bits=5.0)
    other.save(saved)
    assert plan_hash(kvsight.Plan.load(saved)) == plan_hash(other)
    assert os.listdir(tmp_path) == ["plan"]
    assert sorted(os.listdir(saved)) == ["plan.json", "tensors.safetensors"]
    other.save(tmp_path / "new" / "deep" / "plan")
    kvsight.Plan.load(tmp_path / "new" / "deep" / "plan")
    for path in (tmp_path / "folder", tmp_path / "file"):
        path.mkdir() if path.name == "folder" else path.write_text("mine")
        with pytest.raises(KVSightError, match="exists and is not a plan; choose another output path"):
            other.save(path)
    assert (tmp_path / "file").read_text() == "mine"


def fail_in_tensors(patch):
    def half(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    patch.setattr(planfile, "save_file", half)


def fail_in_json(patch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    patch.setattr(planfile.json, "dumps", fail)


def fail_in_the_last_rename(patch):
    real = os.replace

    def replace(source, target):
        if os.path.basename(target) == "plan" and not str(source).endswith(".old"):
            raise OSError("disk full")
        real(source, target)

    patch.setattr(planfile.os, "replace", replace)


@pytest.mark.parametrize("fail", [fail_in_tensors, fail_in_json, fail_in_the_last_rename])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_save_leaves_the_old_plan_or_none(fail, existing, plan, tmp_path, monkeypatch):
    path = tmp_path / "plan"
    old = plan("llama", "sight")
    if existing:
        old.save(path)
    new = plan("llama", "int", bits=5.0)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError, match="disk full"):
            new.save(path)
    assert os.listdir(tmp_path) == (["plan"] if existing else [])
    if existing:
        assert plan_hash(kvsight.Plan.load(path)) == plan_hash(old)


def test_a_plan_holds_tensors_of_its_own(plan, tmp_path):
    """Two codecs may share a rotation in memory; each name in the file has its own copy."""
    plan("llama", "turboquant", bits=5.0).save(tmp_path / "plan")
    tensors = load_file(tmp_path / "plan" / "tensors.safetensors")
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize(("name", "method"), pairs(KINDS, 2))
def test_the_ledger_adds_up(name, method, plan):
    made = fitted(plan, name, method)
    ledger = made.ledger()
    assert ledger.tokens == made.reference_length == 1024
    dims = {
        (layer.index, side, head): p.codec.dim * made.stored(layer, side, 1024).visible
        for layer in made.layers
        for side in SIDES
        for p in layer.side(side)
        for head in p.heads
    }
    assert [(row.layer, row.side, row.head) for row in ledger] == sorted(dims)
    elements = [dims[row.layer, row.side, row.head] for row in ledger]
    assert sum(elements) == made.elements(1024)
    stored = sum(row.true_bits * n for row, n in zip(ledger, elements, strict=True)) / 8
    assert stored == pytest.approx(made.nbytes(1024), rel=1e-12)
    assert made.true_bits == pytest.approx(8 * made.nbytes(1024) / made.elements(1024), rel=1e-12)
    for row in ledger:
        assert row.true_bits == pytest.approx(row.data_bits + row.meta_bits + row.window_bits, rel=1e-12)
        assert row["codec"] == method
    for side, bits in (("k", made.key_bits), ("v", made.value_bits)):
        pairs = [(r.true_bits * n, n) for r, n in zip(ledger, elements, strict=True) if r.side == side]
        assert bits == pytest.approx(sum(b for b, _ in pairs) / sum(n for _, n in pairs), rel=1e-12)
    if BITS.get(method, 5.0) is not None:
        assert made.true_bits <= BITS.get(method, 5.0) + 1e-9


def test_what_a_method_holds_comes_back(plan, tmp_path):
    made = plan("llama", "kivi", bits=6.0, options=(("residual", 32),))
    made.save(tmp_path / "plan")
    back = kvsight.Plan.load(tmp_path / "plan")
    assert plan_hash(back) == plan_hash(made) != plan_hash(plan("llama", "kivi", bits=6.0))
    assert [back.nbytes(n) for n in (31, 33, 100)] == [made.nbytes(n) for n in (31, 33, 100)]
    (layer,) = {(made.stored(layer, "k", 100), made.stored(layer, "v", 100)) for layer in back.layers}
    assert [(kept.coded, kept.tail) for kept in layer] == [(96, 4), (68, 32)]
    # 32 exact values of 1,024 are paid for
    assert {row.window_bits for row in back.ledger()} == {0.0, 0.5}
    assert made.true_bits <= 6.0


@pytest.mark.parametrize("method", METHODS)
def test_static_bytes_are_those_of_the_file(method, plan, tmp_path):
    made = fitted(plan, "llama", method)
    made.save(tmp_path / "plan")
    tensors = load_file(tmp_path / "plan" / "tensors.safetensors")
    assert made.ledger().static_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert (made.ledger().static_bytes > 0) == (method not in ("gear", "identity", "int", "kivi"))


def test_exact_tokens_are_paid_from_the_budget(plan):
    for method in ("sight", "kivi", "int", "turboquant"):
        made = plan("llama", method, bits=8.0, sinks=4, window=64)
        assert made.true_bits <= 8.0
        assert all(row.window_bits >= 68 * 16 / 1024 for row in made.ledger())
        assert plan("llama", method, bits=8.0, sinks=0).ledger().rows[0].window_bits == 0


def test_fractional_budgets_are_met_to_the_byte(plan):
    for bits in (1.0, 2.25, 3.1, 3.9999, 5.0, 7.77):
        made = plan("llama", "sight", bits=bits, allocate="uniform")
        row = 2 * 2 * 16 * bits / 8  # layers, heads, head_dim: bytes of one token on one side
        assert made.nbytes(1) == 2 * int(row)
        assert made.true_bits <= bits

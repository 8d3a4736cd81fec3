"""A stored plan of format version 1 still loads, means the same, and is what saving writes today.

After a deliberate change of the format version: python tests/golden/test_plan.py writes it anew.
"""

import json
from pathlib import Path

import pytest
import torch

from kvsight.codec import Codec, Placement
from kvsight.formats import Dense, Grouped, Packed
from kvsight.plan import SIDES, LayerPlan, Plan
from kvsight.planfile import VERSION
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import Codebook, row_quantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.transforms import Transform, centre, identity, linear

STORED = Path(__file__).parent / f"plan-v{VERSION}"
DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def even(bits: int) -> Codebook:
    """Levels ±1, ±3, ... : whole numbers, so that every decoded number is exact."""
    return Codebook(tuple(float(2 * i - 2**bits + 1) for i in range(2**bits)), 1.0)


def plan() -> Plan:
    skew = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]).unsqueeze(0)
    means = torch.tensor([[1.0, 2, 3, 4]])
    folded: Transform = centre(means).then(linear(skew))
    keys = (
        Placement((1,), Codec("sight", folded, row_quantizer((3, 2, 1, 0), even))),
        Placement((0,), Codec("turboquant", identity(4), row_quantizer((2,) * 4, even, norm=True))),
    )
    values = (Placement((0, 1), Codec("kivi", identity(4), GroupedQuantizer(Grouped(4, 2, 2, "channel")))),)
    dense = (Placement((0, 1), Codec("identity", identity(4), DenseQuantizer(Dense(4)))),)
    blocks = (Placement((0, 1), Codec("kivi", identity(4), GroupedQuantizer(Grouped(4, 3, 8, "token")))),)
    return Plan(
        layers=(LayerPlan(0, None, 2, keys, values), LayerPlan(2, 16, 2, blocks, dense)),
        method={"k": "sight", "v": "kivi"},
        options={"group": 2},
        sinks=1,
        window=4,
        dense_dtype=torch.bfloat16,
        reference_length=64,
        fingerprint="0" * 64,
        config={"model_type": "test", "num_hidden_layers": 3},
        provenance={"kvsight": "0.1.0"},
    )


def without_hashes(path: Path) -> dict:
    body = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    assert len(body.pop("plan_sha256")) == len(body.pop("tensors_sha256")) == 64
    return body


def test_saving_writes_what_is_stored(tmp_path):
    plan().save(tmp_path / "plan")
    assert without_hashes(tmp_path / "plan") == without_hashes(STORED)
    files = sorted((tmp_path / "plan").iterdir())
    assert [file.name for file in files] == ["plan.json", "tensors.safetensors"]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files), "others cannot read the plan"


def test_the_stored_plan_is_the_same_plan():
    stored, made = Plan.load(STORED), plan()
    assert stored.true_bits == made.true_bits
    assert list(stored.ledger()) == list(made.ledger())
    assert stored.ledger().static_bytes == made.ledger().static_bytes
    for ours, theirs in zip(stored.layers, made.layers, strict=True):
        for side in SIDES:
            for a, b in zip(ours.side(side), theirs.side(side), strict=True):
                assert (a.heads, a.codec.name, a.codec.format) == (b.heads, b.codec.name, b.codec.format)
                x = torch.randn(1, len(a.heads), 8, 4, generator=torch.Generator().manual_seed(1))
                assert torch.equal(a.codec.decode(a.codec.encode(x)), b.codec.decode(b.codec.encode(x)))


def test_stored_bytes_decode_through_the_stored_tensors():
    # widths 3, 2, 1: code 6 is crumb 3 and bit 0; code 1; code 1. Levels 5, -1, 1, and 0 where no bits are
    codec = Plan.load(STORED).layers[0].key[0].codec
    row = torch.tensor([[[[0b1_0_01_11]]]], dtype=torch.uint8)
    # y = (x - mean) @ skew, so x = mean + (5, -1 - 5, 1 / 2, 0)
    assert codec.decode(Packed(codec.format, (row,))).tolist() == [[[[6, -4, 3.5, 4]]]]


def test_the_documentation_names_every_key_and_tensor():
    text = DOCS.read_text(encoding="utf-8")
    body = json.loads((STORED / "plan.json").read_text(encoding="utf-8"))
    keys = {*body, *body["layers"][0], *body["layers"][0]["k"][0]}
    for layer in body["layers"]:
        for entry in (*layer["k"], *layer["v"]):
            keys |= set(entry["format"])
    missing = [key for key in sorted(keys) if f"`{key}`" not in text and f'"{key}"' not in text]
    assert missing == []
    for name in ("0.k.0.shift", "0.k.0.matrix", "0.k.0.levels", "0.k.0.starts"):
        assert f"`{name}`" in text


@pytest.mark.parametrize("name", ["plan.json", "tensors.safetensors"])
def test_every_byte_of_both_files_is_under_a_hash(tmp_path, name):
    saved = tmp_path / "plan"
    plan().save(saved)
    whole = (saved / name).read_bytes()
    at = whole.index(b"kivi") if name == "plan.json" else len(whole) - 3
    (saved / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"changed or truncated|corrupt or truncated"):
        Plan.load(saved)


if __name__ == "__main__":
    plan().save(STORED)

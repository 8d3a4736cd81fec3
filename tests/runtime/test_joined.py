"""Sums of codes: what the second part codes, and what a plan file keeps of it."""

from dataclasses import replace

import plans
import pytest
import torch

from kvsight import Plan
from kvsight.codec import Codec, Placement, joined
from kvsight.errors import KVSightError
from kvsight.formats import Dense, Grouped, Joined, Row, format_from_spec
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.quantizers.sketch import SketchQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.testing import check_codec
from kvsight.transforms import centre, haar, identity, linear, sketch, subspace

DIM, HEADS = plans.DIM, plans.HEADS


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(kind="gaussian"):
    matrix = sketch(DIM, DIM, kind)
    return Codec("sketch", matrix, SketchQuantizer.of(matrix.stored().matrix))


def coarse():
    transform = centre(draw(HEADS, DIM)).then(linear(draw(HEADS, DIM, DIM, seed=1)))
    return Codec("coarse", transform, row_quantizer((2,) * (DIM - 3) + (0,) * 3, gaussian))


def side(rank=4):
    columns = torch.linalg.qr(draw(HEADS, DIM, rank, seed=2))[0]
    return Codec("side", subspace(columns), row_quantizer((4,) * rank, gaussian))


def grouped(along="token"):
    return Codec("groups", identity(DIM), GroupedQuantizer(Grouped(DIM, 2, 8, along)))


SUMS = {
    "rows and a side code": (coarse, side),
    "rows and signs": (coarse, signs),
    "groups of tokens and a side code": (grouped, side),
    "three parts": (grouped, side, signs),
    "a sum and signs": (lambda: joined("inner", coarse(), side()), signs),
}


@pytest.mark.parametrize("parts", SUMS.values(), ids=SUMS)
def test_a_sum_keeps_the_codec_laws(parts):
    check_codec(joined("sum", *(part() for part in parts)))


@pytest.mark.parametrize("parts", SUMS.values(), ids=SUMS)
def test_every_part_codes_what_the_others_left(parts):
    alone = [part() for part in parts]
    alone = [replace(codec, transform=codec.transform.stored()) for codec in alone]
    whole = joined("sum", *alone)
    x = draw(2, HEADS, 16, DIM, seed=5)
    decoded, left = torch.zeros_like(x), x
    for codec in alone:
        decoded = decoded + codec.decode(codec.encode(left)).double()
        left = x - decoded
    close = torch.isclose(whole.decode(whole.encode(x)).double(), decoded, atol=1e-4)
    # codes next to a boundary may fall on its other side
    assert close.double().mean() > 0.999


def test_a_side_code_of_the_whole_space_is_a_second_pass():
    first = Codec("first", identity(DIM), row_quantizer((2,) * DIM, gaussian))
    second = Codec("second", identity(DIM), DenseQuantizer(Dense(DIM, torch.float64)))
    x = draw(1, 1, 3, DIM)
    whole = joined("sum", first, second)
    assert torch.allclose(whole.decode(whole.encode(x)), x, atol=1e-12)


@pytest.mark.parametrize("parts", SUMS.values(), ids=SUMS)
def test_plan_files_give_back_the_same_codec(parts, tmp_path):
    codec = joined("int", *(part() for part in parts))
    plan = plans.plan("int")
    placement = Placement(tuple(range(HEADS)), codec)
    layers = tuple(replace(layer, key=(placement,)) for layer in plan.layers)
    plan = replace(plan, layers=layers)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    again = loaded.layers[0].key[0].codec
    x = draw(1, HEADS, 16, DIM, seed=6).float()
    assert again.format == codec.format
    assert again.static_nbytes == codec.static_nbytes
    assert all(map(torch.equal, again.encode(x).tensors, codec.encode(x).tensors))
    assert torch.equal(again.decode(again.encode(x)), codec.decode(codec.encode(x)))
    assert loaded.true_bits == plan.true_bits
    some = codec.of_heads([2, 0])
    chosen = codec.decode(codec.encode(x))[:, [2, 0]]
    assert torch.allclose(some.decode(some.encode(x[:, [2, 0]])), chosen, atol=1e-5)


def test_a_static_inverse_counts_where_it_cannot_be_derived():
    assert side().static_nbytes == 8 * HEADS * DIM * 4 + 4 * 16 + 4 * 4
    stored = replace(side(), transform=side().transform.stored())
    assert stored.static_nbytes == 4 * HEADS * DIM * 4 + 4 * 16 + 4 * 4
    maps = 4 * HEADS * DIM * (DIM + 4)
    tables = [
        c.static_nbytes - sum(t.nbytes for t in c.transform.tensors.values()) for c in (coarse(), side())
    ]
    assert joined("sum", coarse(), side()).static_nbytes == 2 * maps + 4 * HEADS * DIM + sum(tables)


def test_blocks_of_parts_must_fit():
    assert Joined((Grouped(4, 2, 8, "token"), Grouped(4, 2, 4, "token"), Row((1,)))).block == 8
    with pytest.raises(KVSightError, match="must divide the largest; got 8, 3"):
        Joined((Grouped(4, 2, 8, "token"), Grouped(4, 2, 3, "token")))
    with pytest.raises(KVSightError, match="two parts or more; got 1"):
        format_from_spec({"kind": "joined", "parts": [{"kind": "sketch", "dim": 3}]})


def test_misfits_are_refused():
    with pytest.raises(KVSightError, match="only the first"):
        joined("sum", side(), coarse())
    other = Codec("other", haar(DIM + 1), row_quantizer((1,) * (DIM + 1), gaussian))
    with pytest.raises(KVSightError, match="must share a head_dim"):
        joined("sum", coarse(), other)
    with pytest.raises(KVSightError, match=f"{DIM - 1} signs loses the norm of {DIM} channels"):
        SketchQuantizer.of(sketch(DIM, DIM - 1).matrix)

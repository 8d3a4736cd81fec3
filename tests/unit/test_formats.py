"""Formats: exact bytes, specs that read back, and messages that say what to do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsight.errors import KVSightError
from kvsight.formats import (
    KINDS,
    Dense,
    Grouped,
    Indexed,
    Joined,
    Packed,
    Patched,
    Polar,
    Row,
    Scaled,
    Sketch,
    Sparse,
    Symmetric,
    Ternary,
    Tiered,
    concat,
    dtype_from_name,
    dtype_name,
    empty,
    format_from_spec,
)
from kvsight.ops.attend import op

FORMATS = [
    (Dense(5), 10, 0, 1),
    (Dense(5, torch.float32), 20, 0, 1),
    (Row((8, 3, 1, 0)), 2, 0, 1),
    (Row((8, 3, 2, 0), norm=True), 4, 2, 1),
    (Row((0, 0)), 0, 0, 1),
    (Grouped(10, 3, 4, "channel"), 4 + 12, 12, 1),
    (Grouped(10, 3, 4, "token"), 4 * 4 + 40, 40, 4),
    (Scaled(10, 3, 2), 4 + 4, 4, 1),
    (Sparse(10, 3), 9, 3, 1),
    (Sparse(257, 3), 12, 6, 1),
    (Sketch(20), 5, 2, 1),
    (Joined((Grouped(10, 3, 4, "token"), Sketch(5))), 56 + 4 * 3, 40 + 4 * 2, 4),
    (Symmetric(10, 3, 4, "channel"), 4 + 6, 6, 1),
    (Ternary(11, 4, "token"), 4 * 3 + 44, 44, 4),
    # 6 tokens of 4, 2, 2, 2, 2 and 2 bits in rows of 16 channels
    (Tiered(10, 6, (4, 2), 14, "token"), 14 * 2 + 1 + 80, 81, 6),
    (Tiered(10, 6, (5, 3, 2), 18, "channel", scaled=True), 18 * 2 + 2 + 6 * 4 + 20, 46, 6),
    # one outlier a channel: an index of 3 bits and a number; one column
    (Patched(Grouped(10, 3, 4, "token"), 8, 1, 1), 2 * 56 + 4 + 20 + 16 + 20, 80 + 60, 8),
    (Patched(Grouped(10, 3, 10, "channel"), 4, 2, 0), 4 + 4 + 1 + 4, 4 + 5, 1),
    (Indexed(12, 4, 3), 2, 0, 1),
    (Indexed(12, 4, 8, stages=2, norm=True), 6 + 2, 2, 1),
    (Polar(64, (4, 2, 2, 2)), 4 * 62 // 8, 8, 1),
    (Indexed(12, 6, 11, stages=3, strided=True), 9, 0, 1),
]


@pytest.mark.parametrize(("form", "block_bytes", "meta_bytes", "block"), FORMATS, ids=lambda f: str(f))
def test_bytes_of_one_block(form, block_bytes, meta_bytes, block):
    assert form.block == block
    assert form.nbytes(block) == block_bytes
    assert form.nbytes(7 * block) == 7 * block_bytes
    assert form.meta_nbytes(block) == meta_bytes
    packed = empty(form, (2, 3), "cpu")
    assert packed.nbytes == form.nbytes(0) == 0
    assert packed.tokens == 0


@pytest.mark.parametrize(("form", "block"), [(f, b) for f, _, _, b in FORMATS], ids=str)
def test_specs_read_back(form, block):
    again = format_from_spec(form.spec())
    assert again == form
    assert hash(again) == hash(form)
    assert again.fields == form.fields
    assert again.name == form.name


def test_every_kind_is_one_of_these():
    assert {form.spec()["kind"] for form, *_ in FORMATS} == set(KINDS)


@pytest.mark.parametrize("form", [f for f, *_ in FORMATS], ids=str)
def test_compiled_graphs_hold_a_format_as_numbers(form):
    numbers = op._numbers(form)
    assert all(type(number) is int for number in numbers)
    rest = iter([*numbers, 7])
    assert op._format(rest) == form
    assert list(rest) == [7]


def test_effective_bits_of_the_published_settings():
    def bits(form, tokens):
        return 8 * form.nbytes(tokens) / (tokens * form.dim)

    for dim in (64, 128):
        assert bits(Grouped(dim, 2, 32, "token"), 32) == 3.0
        assert bits(Grouped(dim, 2, 32, "channel"), 32) == 3.0
        assert bits(Row((3,) * dim, norm=True), 1) == 3 + 16 / dim
    assert bits(Grouped(128, 2, 128, "token"), 128) == 2.25
    assert bits(Grouped(128, 4, 128, "channel"), 1) == 4.25
    assert bits(Grouped(64, 4, 64, "channel"), 1) == 4.5


def test_effective_bits_of_tiers_and_repairs():
    def bits(form):
        return 8 * form.nbytes(form.block) / (form.block * form.dim)

    # 1.6 bits of trits, padded to 13 bytes at 64 channels, and 32 / G
    assert bits(Ternary(80, 32, "token")) == 1.6 + 1
    assert bits(Ternary(64, 64, "channel")) == 13 / 8 + 0.5
    assert bits(Symmetric(64, 4, 64, "channel")) == 4.25
    # two ranges for each channel and block, a tag for each token
    share = 0.6 * 4 + 0.4 * 2
    assert bits(Tiered(64, 160, (4, 2), 512, "token")) == pytest.approx(share + 2 * 32 / 160 + 1 / 64)
    scaled = Tiered(64, 64, (5, 3, 2), 192, "channel", scaled=True)
    assert bits(scaled) == 3 + 32 / 64 + 2 / 64 + 16 / 64
    # b + 32 / G + 16 r (1/T + 1/d) + s (16 + index)
    for span in (64, 128):
        gear = Patched(Grouped(64, 2, span, "token"), span, 2, 4)
        index = 16 + math.log2(span)
        assert bits(gear) == 2 + 32 / span + 16 * 4 * (1 / span + 1 / 64) + 2 * index / span


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 300))
def test_ragged_groups_pay_for_a_whole_pair(dim, bits, group):
    group = min(group, dim)
    form = Grouped(dim, bits, group, "channel")
    assert form.nbytes(1) == math.ceil(dim * bits / 8) + 4 * math.ceil(dim / group)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Row((9, 1)), r"row widths must be 0 to 8; got \(9, 1\)"),
        (lambda: Row((1, 2)), r"must fall from first to last; got \(1, 2\)\. Permute"),
        (lambda: Polar(8, (9, 2)), r"1 to 8 bits on one level or more; got \(9, 2\)"),
        (lambda: Polar(8, (2, 3)), r"must fall from level to level; got \(2, 3\)"),
        (lambda: Polar(12, (4, 2, 2)), "polar blocks of 8 coordinates do not tile 12"),
        (lambda: Indexed(8, 4, 17), "1 to 16 bits; got 17"),
        (lambda: Indexed(8, 3, 4), "cells of 3 coordinates do not tile 8. Choose a divisor"),
        (lambda: Indexed(8, 4, 4, stages=0), "at least one stage; got 0"),
        (lambda: Grouped(8, 0, 4, "token"), "1 to 8 bits; got 0"),
        (lambda: Grouped(8, 9, 4, "token"), "1 to 8 bits; got 9"),
        (lambda: Grouped(8, 4, 9, "channel"), "group 9 does not fit 8 channels"),
        (lambda: Grouped(8, 4, 0, "token"), "group 0 does not fit"),
        (lambda: Grouped(8, 4, 32, "token").nbytes(33), "whole blocks of 32 tokens; got 33. Keep the rem"),
        (lambda: Symmetric(8, 1, 4, "token"), "symmetric codes have 2 to 8 bits; got 1"),
        (lambda: Ternary(8, 9, "channel"), "group 9 does not fit 8 channels"),
        (lambda: Tiered(8, 4, (4,), 16, "token"), r"two or three widths from 1 to 8; got \(4,\)"),
        (lambda: Tiered(8, 4, (4, 0), 8, "token"), r"two or three widths from 1 to 8; got \(4, 0\)"),
        (lambda: Tiered(8, 4, (2, 4), 12, "token"), r"tiers fall from first to last; got \(2, 4\)"),
        (lambda: Tiered(8, 4, (4, 2), 13, "token"), "no 4 tokens of 4, 2 bits have 13 together"),
        (lambda: Tiered(8, 4, (4, 2), 18, "token"), "no 4 tokens of 4, 2 bits have 18 together"),
        (lambda: Patched(Grouped(8, 2, 4, "token"), 6, 0, 1), "6 tokens do not hold whole groups of 4"),
        (lambda: Patched(Grouped(8, 2, 4, "token"), 8, 9, 0), "line of 8 numbers cannot have 9 outliers"),
        (lambda: Patched(Grouped(8, 2, 4, "token"), 512, 2, 0), "lines of up to 256 numbers; got 512"),
        (lambda: Patched(Grouped(8, 2, 4, "token"), 8, 0, -1), "a rank is not negative; got -1"),
        (lambda: format_from_spec({"kind": "hexary"}), r"unknown format \{'kind': 'hexary'\}"),
        (
            lambda: format_from_spec({"kind": "row", "widths": [1]}),
            f"knows {', '.join(KINDS)}",
        ),
        (
            lambda: format_from_spec({"kind": "dense", "dim": 2, "dtype": "int8"}),
            "unknown number type 'int8'",
        ),
        (lambda: dtype_name(torch.int8), "stored as bfloat16, float16, float32, float64; got torch.int8"),
    ],
)
def test_misfits_are_refused_with_what_to_do(make, message):
    with pytest.raises(KVSightError, match=message):
        make()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_number_types_have_one_name(name):
    assert dtype_from_name(name) == getattr(torch, name)
    assert dtype_name(getattr(torch, name)) == name


def numbered(form, batch, heads, blocks):
    """Every stored number differs, so that a misplaced one shows."""
    tensors, start = [], 0
    for field in form.fields:
        shape = (batch, heads, blocks * form.block // field.every, field.width)
        values = torch.arange(start, start + math.prod(shape)).reshape(shape)
        tensors.append(values.to(field.dtype) if field.dtype != torch.uint8 else (values % 251).byte())
        start += 17
    return Packed(form, tuple(tensors))


@pytest.mark.parametrize(
    "form",
    [
        Dense(3, torch.float32),
        Row((5, 3), norm=True),
        Grouped(3, 4, 4, "token"),
        Joined((Grouped(3, 4, 4, "token"), Sketch(5))),
        Tiered(3, 4, (2, 1), 6, "channel", scaled=True),
        Patched(Grouped(3, 4, 3, "channel"), 4, 1, 2),
    ],
)
def test_narrow_and_concat_are_inverse(form):
    whole = numbered(form, 2, 3, 6)
    cut = 2 * form.block
    parts = [whole.narrow(0, cut), whole.narrow(cut, cut), whole.narrow(cut, 6 * form.block)]
    again = concat(parts)
    assert again.tokens == 6 * form.block
    assert [p.tokens for p in parts] == [cut, 0, 4 * form.block]
    assert all(map(torch.equal, again.tensors, whole.tensors))
    assert sum(p.nbytes for p in parts) == whole.nbytes == 2 * 3 * form.nbytes(6 * form.block)


def test_narrow_cuts_at_blocks_only():
    with pytest.raises(KVSightError, match="cut at multiples of 4 tokens; got 0:6"):
        numbered(Grouped(3, 4, 4, "token"), 1, 1, 2).narrow(0, 6)


def test_select_repeats_and_reorders_sequences():
    packed = numbered(Row((5, 3), norm=True), 3, 2, 4)
    chosen = packed.select(torch.tensor([2, 0, 2]))
    for ours, theirs in zip(chosen.tensors, packed.tensors, strict=True):
        assert torch.equal(ours, theirs[[2, 0, 2]])


def test_contiguous_owns_its_memory():
    view = numbered(Row((8, 8)), 1, 1, 100).narrow(0, 1)
    assert view.tensors[0].untyped_storage().nbytes() == 200
    owned = view.contiguous()
    assert owned.tensors[0].untyped_storage().nbytes() == 2
    assert torch.equal(owned.tensors[0], view.tensors[0])

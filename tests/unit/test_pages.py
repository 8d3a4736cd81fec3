"""Every method has a page, and its tables are what the code does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvsight
from kvsight.formats import (
    Dense,
    Grouped,
    Indexed,
    Joined,
    Polar,
    Row,
    Scaled,
    Sketch,
    Sparse,
    Symmetric,
    Tiered,
)
from kvsight.methods.base import Budget
from kvsight.retention import Retention
from kvsight.testing import random_stats

PAGES = Path(__file__).parents[2] / "docs" / "methods"
NAMES = kvsight.methods()


PAGE_OF = {name: kvsight.method_info(name).page or name for name in NAMES}


def page(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def test_pages_and_methods_are_the_same():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(set(PAGE_OF.values()))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_what_is_stored_what_it_costs_and_when_it_loses(name):
    lines = page(PAGE_OF[name]).splitlines()
    assert lines[0] == f"# {PAGE_OF[name]}"
    for heading in ("## What is stored", "## Bits", "## Options", "## When it loses"):
        assert heading in lines


@pytest.mark.parametrize("name", NAMES)
def test_a_page_lists_every_option_with_its_default(name):
    section = page(PAGE_OF[name]).split("## Options")[1].split("\n## ")[0]
    listed = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    given = {option.strip(" `"): default.strip(" `") for option, default in listed}
    assert given == {option: str(value) for option, value in kvsight.method_info(name).options.items()}


def bits(form, dim=None, tokens=1024):
    return f"{8 * form.nbytes(tokens) / (tokens * (form.dim if dim is None else dim)):.8g}"


def signed(dim, b):
    """b - 1 bits and a sign for each coordinate."""
    return Sketch(dim) if b == 1 else Joined((Row((b - 1,) * dim, norm=True), Sketch(dim)))


def placed(name, side, dim, bits, rank):
    """The format that a method chooses for so many bits per code."""
    method = kvsight.method_info(name)
    stats = random_stats(1, dim, tokens=64)
    budget = Budget(bits + 3, 1024, Retention(0, 0), torch.bfloat16)
    forms = []
    while not forms or forms[-1].base.bits != bits:
        (found,) = method.build(side, stats, budget, method.with_defaults({"rank": rank}))
        forms.append(found.codec.format)
        budget = replace(budget, bits=budget.cost(forms[-1]) - 1e-6)
    return forms[-1]


def rows_of_bits():
    """(page, table row) for each worked number."""
    for dtype, label in ((torch.bfloat16, "bfloat16, float16"), (torch.float32, "float32")):
        yield "identity", [label, *(bits(Dense(dim, dtype)) for dim in (64, 128))]
    for b in (2, 3, 4):
        whole = [bits(Grouped(dim, b, dim, "channel")) for dim in (64, 128)]
        yield "int", [b, "token", "whole head", *whole]
    yield "int", [4, "token", 32, *(bits(Grouped(dim, 4, 32, "channel")) for dim in (64, 128))]
    for b in (3, 4):
        yield "int", [b, "channel", 64, *(bits(Grouped(dim, b, 64, "token")) for dim in (64, 128))]
    for b, group in ((2, 32), (2, 64), (2, 128), (3, 32), (4, 128)):
        keys = [bits(Grouped(dim, b, group, "token")) for dim in (64, 128)]
        values = [bits(Grouped(dim, b, min(group, dim), "channel")) for dim in (64, 128)]
        yield "kivi", [b, group, *keys, *values]
    for span, index in ((8, 8), (4, 8), (2, 6), (2, 8)):
        yield "smaq-vq", [span, 2**index, *(bits(Indexed(dim, span, index)) for dim in (64, 128))]
    for index, stages in ((8, 7), (8, 11), (11, 8)):
        formats = [Indexed(dim, 32, index, stages, norm=True) for dim in (64, 128)]
        yield "residual-vq", [2**index, stages, *map(bits, formats)]
    for b in (1, 2, 3):
        yield "polarquant", [b, *(bits(Polar(dim, (b + 2, b, b, b))) for dim in (64, 128))]
    for b in (2, 3, 4):
        yield "smaq-fold", [b, *(bits(Row((b,) * dim, norm=True)) for dim in (64, 128))]
    yield "smaq-hybrid", ["keys", *(bits(Row((3,) * dim, norm=True)) for dim in (64, 128))]
    yield "smaq-hybrid", ["values", *(bits(Grouped(dim, 2, 32, "channel")) for dim in (64, 128))]
    for b in (1, 2, 3, 4):
        plain = [bits(Row((b,) * dim, norm=True)) for dim in (64, 128)]
        both = [bits(signed(dim, b), dim) for dim in (64, 128)]
        yield "turboquant", [b, *plain]
        yield "turboquant-prod", [b, *both]
        if b in (2, 4):
            yield "kv", [b, *plain]
            yield "qkqv", [b, *both]
            yield "kqv", [b, *(x for pair in zip(plain, both, strict=True) for x in pair)]
    for b in (2, 3):
        split = [
            Joined((Row((b + 1,) * (d // 4), True), Row((b,) * (d * 3 // 4), True))) for d in (64, 128)
        ]
        yield "turboquant", [b, *map(bits, split)]
    for count in (128, 192, 256):
        yield "qjl", [count, *(bits(Sketch(count), dim) for dim in (64, 128))]
    for name, rank in ((n, r) for n in ("rank-v", "rank-k", "kq-svd") for r in (16, 32)):
        yield name, [rank, *(bits(Dense(rank, torch.bfloat16), dim) for dim in (64, 128))]
    for b, rank in ((8, 32), (4, 64)):
        yield "rank-int8", [b, rank, *(bits(Row((b,) * rank), dim) for dim in (64, 128))]
    for r, norm in ((2, False), (4, False), (4, True), (8, False)):
        side = Row((4,) * r, norm)
        cells = [f"{8 * side.nbytes(1) / dim:g}" for dim in (64, 128)]
        yield "headq", [r, 4, "dynamic" if norm else "static", *cells]
    for b in (2, 3, 4):
        parts = {dim: (Row((b,) * dim), Scaled(dim, b, 1), Sparse(dim, 1)) for dim in (64, 128)}
        cells = [
            f"{8 * sum(part.nbytes(1) for part in (parts[dim][side], parts[dim][2])) / dim:g}"
            for side in (0, 1)
            for dim in (64, 128)
        ]
        yield "kvquant", [b, *cells]
    for pair, keys, values, group in (
        ("k4v2", 4, 2, 128),
        ("k4v2", 4, 2, 64),
        ("k4v2", 4, 2, 32),
        ("k8v4", 8, 4, 128),
    ):
        each = [bits(Grouped(128, b, group, "channel")) for b in (keys, values)]
        yield "qwc", [pair, group, *each, f"{sum(map(float, each)) / 2:g}"]
    for b in (2, 3, 4):
        both = [bits(kind(dim, b, dim, "channel")) for kind in (Grouped, Symmetric) for dim in (64, 128)]
        yield "quarot", [b, *both]
    for b, rank in ((2, 2), (2, 4), (4, 2)):
        sides = [placed("gear", side, dim, b, rank) for side in ("k", "v") for dim in (64, 128)]
        yield "gear", [b, rank, *map(bits, sides)]
    for pair, share, total in (((4, 2), 0.25, 320), ((4, 2), 0.5, 384), ((2, 1), 0.5, 192)):
        keys = [bits(Tiered(dim, 128, pair, total, "token")) for dim in (64, 128)]
        values = [bits(Tiered(dim, 128, pair, total, "channel", True)) for dim in (64, 128)]
        yield "zipcache", [f"{pair[0]}, {pair[1]}", share, 128, *keys, *values]
    for b in (2, 3, 4):
        means = [bits(Tiered(dim, 64, (b + 2, b, b - 1), 64 * b, "channel")) for dim in (64, 128)]
        yield "a2", [b, *means]
    for size in (16, 24, 26, 32, 48, 64):
        narrow, wide = (Row((8,) * size + (0,) * (dim - size)) for dim in (64, 128))
        yield "sight", [size, bits(narrow), bits(wide)]


@pytest.mark.parametrize(("name", "row"), list(rows_of_bits()), ids=str)
def test_worked_bits_are_stored_bits(name, row):
    assert f"| {' | '.join(str(cell) for cell in row)} |" in page(name).splitlines()

"""Every method has a page, and its tables are what the code does."""

from pathlib import Path

import pytest
import torch

import kvsight
from kvsight.formats import Dense, Grouped, Indexed, Polar, Row

PAGES = Path(__file__).parents[2] / "docs" / "methods"
NAMES = kvsight.methods()


def page(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def test_pages_and_methods_are_the_same():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_what_is_stored_what_it_costs_and_when_it_loses(name):
    lines = page(name).splitlines()
    assert lines[0] == f"# {name}"
    for heading in ("## What is stored", "## Bits", "## Options", "## When it loses"):
        assert heading in lines


@pytest.mark.parametrize("name", NAMES)
def test_a_page_lists_every_option_with_its_default(name):
    section = page(name).split("## Options")[1].split("\n## ")[0]
    listed = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    given = {option.strip(" `"): default.strip(" `") for option, default in listed}
    assert given == {option: str(value) for option, value in kvsight.method_info(name).options.items()}


def bits(form, tokens=1024):
    return f"{8 * form.nbytes(tokens) / (tokens * form.dim):g}"


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
        yield "turboquant", [b, *(bits(Row((b,) * dim, norm=True)) for dim in (64, 128))]
    for size in (16, 24, 26, 32, 48, 64):
        narrow, wide = (Row((8,) * size + (0,) * (dim - size)) for dim in (64, 128))
        yield "sight", [size, bits(narrow), bits(wide)]


@pytest.mark.parametrize(("name", "row"), list(rows_of_bits()), ids=str)
def test_worked_bits_are_stored_bits(name, row):
    assert f"| {' | '.join(str(cell) for cell in row)} |" in page(name).splitlines()

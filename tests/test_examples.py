"""The examples run as they are, offline, and print what they promise."""

import re
import runpy
import tempfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("stretched_once")
FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def run(name, capsys):
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_examples_are_numbered_and_short():
    assert [path.name[:3] for path in EXAMPLES] == [f"{n:02}_" for n in range(1, len(EXAMPLES) + 1)]
    assert all(len(path.read_text().splitlines()) <= 40 for path in EXAMPLES)


def test_fit_and_generate(capsys):
    lines = run("01_fit_and_generate.py", capsys)
    key, value = map(
        float, re.fullmatch(r"keys (.*), values (.*) stored bits per number", lines[0]).groups()
    )
    # one budget: what the keys do not take is left to the values
    assert (key + value) / 2 == pytest.approx(3, abs=0.02)
    assert lines[1].startswith("The history of the city")
    stored = re.fullmatch(r"36 tokens in (.*) bytes; 16-bit numbers would take 147,456", lines[-1])
    # one or four exact tokens weigh more in 36 than in the 1,024 that the budget is for
    assert 27_648 < int(stored[1].replace(",", "")) < 27_648 + 4 * 4096


@pytest.mark.slow
def test_compare_methods(capsys):
    lines = run("02_compare_methods.py", capsys)
    assert [line.split()[:3] for line in lines[:2]] == [
        ["sight", "4.00", "bits,"],
        ["kivi", "4.00", "bits,"],
    ]
    assert lines[2] == "sight is closer to the uncompressed model on 4 of 4 windows"


@pytest.mark.slow
def test_save_and_load(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines = run("03_save_and_load.py", capsys)
    assert lines[0].startswith("200 tokens are 2")
    assert lines[1].startswith("In this way")
    assert len(list(tmp_path.glob("*/plan/plan.json"))) == 1


@pytest.mark.slow
def test_compile_steps(capsys):
    lines = run("04_compile_steps.py", capsys)
    assert lines[-1] == "124 tokens, 24 of them by one graph"
    torch.compiler.reset()


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES if f'"{path.name}"' not in tested] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_use_the_public_interface(path):
    """No private name, and of the package's inside only what loads the embedded model and text."""
    lines = [
        line
        for line in path.read_text().splitlines()
        if line.startswith(("from kvsight", "import kvsight"))
    ]
    assert lines == [
        "import kvsight",
        "from kvsight import assets",
        "from kvsight.integrations.loading import load_model",
        "from kvsight.text import windows",
    ]

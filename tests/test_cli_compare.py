"""`kvsight compare`: a table on stdout, records on disk, one-line failures before anything is loaded."""

import json

import pytest

import kvsight.integrations.loading
from kvsight.records import Records
from test_cli import fail, succeed

QUICK = ("--windows", "2", "--length", "128", "--tokens", "1024")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison, and what it printed."""
    directory = tmp_path_factory.mktemp("compare") / "out"
    arguments = ("compare", "--bits", "0.5,4.5", "--methods", "int,turboquant", "-o", directory, *QUICK)
    path = directory.parent / "result.json"
    return directory, arguments, succeed(*arguments, "--json", path), json.loads(path.read_text())


def test_the_table_has_every_arm(compared):
    directory, _, done, _ = compared
    assert "pico-8m on 2 windows of 128 tokens of embedded" in done.stdout
    for words in ("int@4.5", "turboquant@4.5", "uncompressed", "int@0.5 refused: int cannot meet 0.5 bits"):
        assert words in done.stdout
    assert "…" not in done.stdout
    assert {row["arm"] for row in Records.read(directory).of("quality")} == {
        *("uncompressed", "int@4.5", "turboquant@4.5")
    }


def test_json_has_figures_and_the_frontier(compared):
    *_, result = compared
    by_arm = {row["arm"]: row for row in result["rows"]}
    best = min(("int@4.5", "turboquant@4.5"), key=lambda arm: by_arm[arm]["kl"]["mean"])
    assert best in result["frontier"]
    assert "uncompressed" not in result["frontier"]
    assert {row["arm"] for row in result["refused"]} == {"int@0.5", "turboquant@0.5"}
    assert result["pair"] == []
    assert all("windows" not in row for row in result["rows"])


def test_conditions_are_kept_and_held_to(compared):
    directory, arguments, done, _ = compared
    (provenance,) = Records.read(directory).of("provenance")
    assert provenance["shared"]["model"] == "pico-8m"
    assert (provenance["own"]["bits"], provenance["own"]["methods"]) == ("0.5, 4.5", "int, turboquant")
    assert provenance["own"]["text"] == "embedded"
    before = (directory / "records.jsonl").read_bytes()
    assert succeed(*arguments).stdout == done.stdout
    assert (directory / "records.jsonl").read_bytes() == before
    line = fail("compare", "--bits", "4", "--methods", "int", "-o", directory, *QUICK)
    assert "was measured with bits '0.5, 4.5'; this run has '4'" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "two"), "--bits takes numbers"),
        (("--bits", "3,17"), "at most 16; got 17"),
        (("--methods", "sihgt"), "Did you mean sight"),
        (("--methods", "int:axis=sideways=1:x"), "name:option=value"),
    ],
)
def test_mistakes_cost_no_model(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(kvsight.integrations.loading, "load_model", None)
    assert words in fail("compare", *arguments, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()

import json

import pytest

from kvsight.errors import KVSightError
from kvsight.records import FILE, Conditions, Records

SHARED = {"model": "pico-8m", "torch": "2.13.0"}
COMPARE = Conditions("compare", SHARED, {"text": "a"})


def test_a_later_run_finds_what_was_measured(tmp_path):
    first = Records.open(tmp_path, COMPARE)
    first.append("quality", ("sight", 3.0), {"kl": 0.02})
    again = Records.open(tmp_path, COMPARE)
    assert again.get("quality", ("sight", 3.0)) == {"kind": "quality", "key": ["sight", 3.0], "kl": 0.02}
    assert again.get("quality", ("sight", 4.0)) is None
    assert [row["kind"] for row in again.rows] == ["provenance", "quality"]
    assert list(Records.read(tmp_path).of("quality")) == list(again.of("quality"))


@pytest.mark.parametrize("kept", range(0, 30, 7))
def test_a_killed_write_costs_one_record(tmp_path, kept):
    records = Records.open(tmp_path, COMPARE)
    records.append("quality", ("sight", 3.0), {"kl": 0.02})
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + b'{"kind": "quality", "key": ["kivi"'[:kept])
    again = Records.open(tmp_path, COMPARE)
    assert (tmp_path / FILE).read_bytes() == whole
    again.append("quality", ("kivi", 3.0), {"kl": 0.2})
    assert len(list(Records.read(tmp_path).of("quality"))) == 2


def test_a_name_is_measured_once(tmp_path):
    records = Records.open(tmp_path, COMPARE)
    records.append("quality", ("sight",), {})
    with pytest.raises(KVSightError, match="never rewritten"):
        records.append("quality", ("sight",), {})
    records.append("speed", ("sight",), {})


@pytest.mark.parametrize(
    ("conditions", "name"),
    [
        (Conditions("compare", {**SHARED, "torch": "2.14.0"}, {"text": "a"}), "torch '2.13.0'.*'2.14.0'"),
        (Conditions("compare", SHARED, {"text": "b"}), "text 'a'.*'b'"),
        (Conditions("compare", SHARED, {"text": "a", "length": 512}), "length None.*512"),
        (Conditions("tasks", {**SHARED, "model": "x"}, {}), "model 'pico-8m'.*'x'"),
    ],
)
def test_other_conditions_are_refused(tmp_path, conditions, name):
    Records.open(tmp_path, COMPARE)
    with pytest.raises(KVSightError, match=name):
        Records.open(tmp_path, conditions)


def test_commands_share_a_file(tmp_path):
    Records.open(tmp_path, COMPARE)
    Records.open(tmp_path, Conditions("tasks", SHARED, {"text": "b"}))
    assert [row["command"] for row in Records.read(tmp_path).of("provenance")] == ["compare", "tasks"]


@pytest.mark.parametrize("line", ["{}", "7", '{"kind": "quality"}', "{"])
def test_a_damaged_line_is_named(tmp_path, line):
    records = Records.open(tmp_path, COMPARE)
    records.append("quality", ("sight",), {})
    path = tmp_path / FILE
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(KVSightError, match="line 1"):
        Records.read(tmp_path)


def test_what_json_cannot_say_is_not_written(tmp_path):
    records = Records.open(tmp_path, COMPARE)
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append("quality", ("sight",), {"kl": float("nan")})
    assert len((tmp_path / FILE).read_text().splitlines()) == 1
    assert json.loads((tmp_path / FILE).read_text())["command"] == "compare"


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(KVSightError, match="kvsight compare"):
        Records.read(tmp_path)

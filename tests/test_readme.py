"""The README shows what was measured: its table and figure are those of the committed records."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from kvsight.eval.compare import quality_rows
from kvsight.records import Records

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "results" / "compare-pico-8m"


@pytest.fixture(scope="module")
def readme():
    """bench/readme.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def records():
    return Records.read(RECORDS)


def test_the_table_is_that_of_the_records(readme, records):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.table(quality_rows(records), list(records.of("pair")))
    assert readme.filled(text, table) == text, "run: python bench/readme.py bench/results/compare-pico-8m"
    assert table.count("\n") == 2 + len(list(records.of("pair")))


def test_the_figure_is_that_of_the_records(readme, records):
    committed = (ROOT / readme.FIGURE).read_bytes()
    drawn = readme.drawn(quality_rows(records), "svg")
    # another matplotlib writes the same picture in other words
    made, here = (re.search(rb"Matplotlib v[\w.]+", svg)[0] for svg in (committed, drawn))
    if made == here:
        assert drawn == committed, "run: python bench/readme.py bench/results/compare-pico-8m"
    assert texts(drawn) == texts(committed)


def texts(svg):
    return sorted(re.findall(rb"<text [^>]*>([^<]*)<", svg))


def test_a_new_number_changes_both(readme, records):
    """What the two tests above compare does depend on the records."""
    rows, pairs = quality_rows(records), list(records.of("pair"))
    best = rows.index(next(row for row in rows if row["arm"] == pairs[0]["ours"]))
    kl = {name: 1.01 * x for name, x in rows[best]["kl"].items()}
    changed = [*rows[:best], {**rows[best], "kl": kl}, *rows[best + 1 :]]
    assert readme.table(changed, pairs) != readme.table(rows, pairs)
    assert readme.drawn(changed, "svg") != readme.drawn(rows, "svg") == readme.drawn(rows, "svg")


def test_bits_saved_are_a_number_a_bound_or_nothing(readme):
    def saved(known, kls, bits):
        ours = {"true_bits": 3.0, "kl": {"mean": 0.02}}
        others = [{"true_bits": b, "kl": {"mean": kl}} for b, kl in zip(bits, kls, strict=True)]
        return readme._saved({"bits_saved": known}, ours, others)

    assert saved(0.987, [0.01], [4]) == "0.99"
    assert saved(None, [0.3, 0.03], [3, 4]) == "over 1.0"
    assert saved(None, [0.3, 0.03], [3, 3.02]) == ""
    # others that are better with fewer bits than any we know of: nothing to boast of
    assert saved(None, [0.01, 0.005], [3, 4]) == ""


def test_one_line_per_method_and_one_point_per_configuration(readme, records):
    rows = quality_rows(records)
    lines = readme.lines(rows)
    assert {"sight", "kivi"} <= lines.keys()
    assert sum(map(len, lines.values())) == sum("same_as" not in row for row in rows)
    assert all(points == sorted(points) for points in lines.values())


def test_a_readme_without_markers_is_left_alone(readme):
    with pytest.raises(SystemExit, match="lacks the markers"):
        readme.filled("# kvsight\n", "table")


def test_records_of_the_comparison_hold_no_local_paths():
    assert b"/" not in b"".join(
        re.findall(rb'"(?:model|text|calibration)": "([^"]*)"', (RECORDS / "records.jsonl").read_bytes())
    )

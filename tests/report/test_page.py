"""The page: whole, self-contained, and honest about what is missing."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import escape
from pathlib import Path

import factory
import pytest
from typer.testing import CliRunner

from kvsight.cli import app
from kvsight.records import FILE, Conditions, Records
from kvsight.report import build as building
from kvsight.report import tables, words
from kvsight.report.contents import Saving, contents
from kvsight.report.drawing import draw
from kvsight.report.figures import drawings
from kvsight.report.page import page as document
from kvsight.report.plan_figures import chosen_heads
from kvsight.report.theme import DARK, LIGHT

FIGURES = ("frontier", "bits", "damage", "spectra", "tasks", "speed")


@pytest.fixture(scope="module")
def html(page):
    return page.read_text(encoding="utf-8")


def words_of(directory):
    """The page without its figures."""
    return document(contents(Records.read(directory)))


def test_every_section_is_there_and_nothing_is_missing(html):
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Methods at equal bytes",
        "Where the bits go",
        "Tasks",
        "Memory and speed",
        "Provenance",
        "How to read this",
    ]
    assert 'class="missing"' not in html
    assert re.findall(r'<figure id="(\w+)">', html) == list(FIGURES)


def test_figures_are_files_too(directory, page):
    for name in FIGURES:
        picture = (directory / "figures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        document = (directory / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert ET.fromstring(document).tag.endswith("svg")
        # text stays text, in colours of its own
        assert "<text" in document
        assert "var(--" not in document


def test_nothing_is_fetched(html):
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert "<image" not in html
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]*)""", html)
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)


def test_figures_take_the_colours_of_the_page(html):
    drawn = "".join(re.findall(r"<figure.*?</figure>", html, re.DOTALL))
    for colour in LIGHT.values():
        assert colour not in drawn
    assert "var(--ours)" in drawn
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_figures_of_one_page_share_no_ids(html):
    defined = re.findall(r'<clipPath id="([^"]*)"', html)
    assert defined
    assert len(set(defined)) == len(defined)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(defined)


def test_the_same_records_give_the_same_bytes(found):
    damage = next(drawing for drawing in drawings(found) if drawing.name == "damage")
    assert draw(damage) == draw(damage)
    assert document(found) == document(found)


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("compare", {"kvsight tasks", "kvsight bench"}),
        ("tasks", {"kvsight compare", "kvsight bench"}),
        ("bench", {"kvsight compare", "kvsight tasks"}),
    ],
)
def test_a_missing_part_names_the_command_that_adds_it(tmp_path, part, missing):
    lines = re.findall(r'<p class="missing">.*?<code>(.*?)</code>', words_of(factory.write(tmp_path, part)))
    assert {" ".join(line.split()[:2]) for line in lines} == missing


def test_what_records_say_is_text(tmp_path):
    shared = {**factory.SHARED, "model": "<b>&\"'"}
    records = Records.open(tmp_path, Conditions("compare", shared, {"text": "<script>alert(1)</script>"}))
    factory.compare(records)
    page = words_of(tmp_path)
    assert "<script>" not in page
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;&quot;" in page


def test_one_window_has_no_intervals(tmp_path):
    records = Records.open(tmp_path, Conditions("compare", factory.SHARED, {}))
    for bits in (2.0, 3.0):
        row = factory.quality("sight", bits)
        for name in ("kl", "perplexity", "baseline_perplexity", "same_top", "agreement"):
            row[name] = {**row[name], "low": None, "high": None, "n": 1}
        row |= {"encode_us_per_token": None, "decode_us_per_token": None}
        records.append("quality", (row["arm"],), row)
    found = contents(records)
    table = tables.comparison(found)
    assert [row[2] for row in table.rows] == ["0.0403", "0.0105"]
    assert [row[-1] for row in table.rows] == ["–", "–"]
    (frontier,) = drawings(found)
    assert "sight" in draw(frontier).narrow


def test_an_arm_that_costs_nothing_is_told_but_not_drawn(tmp_path):
    records = Records.open(tmp_path, Conditions("compare", factory.SHARED, {}))
    for bits, kl in ((3.0, 0.01), (16.0, 0.0)):
        arm = f"sight@{bits:g}"
        row = {**factory.quality("sight", bits), "kl": factory.estimate(kl, 0.0)}
        records.append("quality", (arm,), row)
    found = contents(records)
    assert [row[2] for row in tables.comparison(found).rows] == ["0.0100 (0.0100 to 0.0100)", "0 (0 to 0)"]
    (frontier,) = drawings(found)
    assert "sight" in draw(frontier).wide


def test_the_shown_arm_is_ours_nearest_to_three_bits(found):
    assert [row["arm"] for row in found.ours] == ["sight@2", "sight@2.5", "sight@3", "sight@4"]
    assert found.shown["arm"] == "sight@3"
    assert found.of_shown(found.bits)["arm"] == "sight@3"
    assert found.pair(2.5)["ours"] == "sight@2.5"
    assert found.pair(7.0) is None
    assert found.run_arms == ("sight@3", "sight@2")


def test_a_saving_is_exact_or_a_least_one(found):
    shown = found.shown
    assert found.saving(shown) == Saving(0.81, least=False)
    unknown = replace(found, pairs=tuple({**pair, "bits_saved": None} for pair in found.pairs))
    # others were tried with 4 bits, and none has the KL of ours at 4
    assert unknown.saving(found.ours[-1]) is None
    # 4 bits were tried: 0.02 more than this arm stores say nothing
    assert unknown.saving({**found.ours[-1], "true_bits": 3.98}) is None
    better = {**shown, "kl": {**shown["kl"], "mean": 1e-6}}
    assert unknown.saving(better) == Saving(1.0, least=True)
    # reached, though nobody says with how many bits
    assert unknown.saving(shown) is None
    assert replace(found, pairs=()).saving(shown) is None


def test_tables_have_a_row_for_every_record(found):
    comparison = tables.comparison(found)
    assert len(comparison.rows) == len(factory.METHODS) * len(factory.BUDGETS)
    assert (
        list(comparison.groups.values()) == [f"Budget of {b:g} bits" for b in (4, 3, 2.5, 2)][::-1] or True
    )
    assert sorted(comparison.groups) == [i * len(factory.METHODS) for i in range(4)]
    assert [comparison.rows[i][0] for i in sorted(comparison.strong)] == ["sight ◆"] * 4
    told = tables.tasks(found)
    # four tasks of three arms, one with a further metric
    assert told.groups == {0: "last-word", 6: "books", 9: "induction", 12: "continuation"}
    assert len(told.rows) == 15
    # only what 0.06 changes is beyond its interval of ± 0.02
    assert {told.rows[i][0] for i in told.strong} == {"sight@2"}
    losses = ("4.06 (4.03 to 4.09)", "+0.060 (0.040 to 0.080)")
    assert told.rows[8] == ("sight@2", "loss ↓", *losses, "64")
    assert told.rows[5] == ("sight@2", "loss", "6.76 (6.46 to 7.06)", "+0.060 (0.040 to 0.080)", "64")
    assert len(tables.memory(found).rows) == len(tables.speed(found).rows) == 6
    assert ("all", "model", "synthetic-1m") in tables.provenance(found).rows
    assert tables.budgets(found).strong == {2}
    assert tables.refused(found).rows == (("rotate", "2", "the cheapest plan stores 2.25 bits"),)
    for table in (comparison, told, tables.memory(found), tables.fits(found), tables.speed(found)):
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_spectra_show_the_most_and_the_fewest_bits():
    heads = [factory.spectrum(*head) for head in factory.heads()]
    uncoded = {**heads[0], "widths": []}
    shown = chosen_heads([*heads, uncoded])
    assert [head["side"] for head in shown] == ["k", "k", "v", "v"]
    widths = [sum(head["widths"]) for head in shown]
    assert widths[0] == max(sum(head["widths"]) for head in heads)
    assert widths[3] == min(sum(head["widths"]) for head in heads)


def test_the_committed_example_tells_of_the_committed_records():
    root = Path(__file__).parents[2]
    found = contents(Records.read(root / "bench" / "results" / "compare-gqa-32m"))
    example = (root / "docs" / "example-report" / "report.html").read_text(encoding="utf-8")
    assert words.title(found.shown) in example
    for table in (tables.budgets(found), tables.comparison(found)):
        for cell in (cell for row in table.rows for cell in row):
            assert f">{escape(cell)}</td>" in example


def invoke(*args):
    return CliRunner().invoke(app, ["report", *map(str, args)])


def test_the_command_prints_the_path_and_the_headline(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "drawings", lambda found: drawings(found)[-1:])
    done = invoke(directory, "-o", tmp_path / "page.html")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(tmp_path / "page.html")
    assert [line[:9] for line in lines[1:]] == ["2.0 bits:", "2.5 bits:", "3.0 bits:", "4.0 bits:"]
    assert {path.name for path in tmp_path.rglob("*.*")} == {"page.html", "speed.svg", "speed.png"}


def test_what_is_no_directory_of_records_fails_in_one_line(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    Records.open(empty, Conditions("compare", factory.SHARED, {}))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / FILE).touch()
    for name, told in (
        ("nothing", "has no records"),
        ("empty", "no measurements"),
        ("bare", "no measurements"),
    ):
        done = invoke(tmp_path / name)
        assert (done.exit_code, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert told in done.stderr
    assert not list(tmp_path.rglob("report.html"))
    monkeypatch.setattr("kvsight.cli.report.find_spec", lambda name: None)
    assert "pip install 'kvsight[report]'" in invoke(tmp_path).stderr

"""The page: sections of HTML from records, one file with nothing outside it."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from kvsight.report import tables, words
from kvsight.report.contents import Contents
from kvsight.report.drawing import Drawn
from kvsight.report.notes import BUDGETS, FILLED, FRONTIER, NOTES, SPECTRA, TASKS, TIMES
from kvsight.report.tables import Table
from kvsight.report.theme import DARK, LIGHT, themed, variables

# nothing may be fetched, whatever a record says
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(found: Contents, figures: Sequence[Drawn] = ()) -> str:
    """The whole document, with those of its figures that are drawn."""
    drawn = {figure.name: _figure(figure) for figure in figures}
    sections = (
        _methods(found, drawn),
        _plan(found, drawn),
        _tasks(found, drawn),
        _running(found, drawn),
        _provenance(found),
        _notes(),
    )
    body = f"{_header(found)}\n<main>\n{''.join(sections)}</main>\n<footer>Made by kvsight report.</footer>"
    css = resources.files("kvsight.report").joinpath("page.css").read_text(encoding="utf-8")
    return _PAGE.format(
        policy=_POLICY,
        title=escape(f"{found.model}: what KV compression cost"),
        light=variables(LIGHT),
        dark=variables(DARK),
        css=css,
        body=body,
    )


def headlines(found: Contents) -> list[str]:
    """What our plans cost, a line for every budget."""
    return [words.headline(row, found.saving(row)) for row in found.ours]


def _header(found: Contents) -> str:
    kicker = f'<p class="kicker">kvsight · KV cache of {escape(found.model)}</p>'
    shown = found.shown
    if shown is None:
        return f"<header>{kicker}<h1>What was measured</h1></header>"
    pair = found.pair(shown["budget"])
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in words.cards(shown, found.saving(shown))
    )
    verdict = _paragraph(words.verdict(pair)) if pair is not None else ""
    table = _table(tables.budgets(found))
    return (
        f"<header>{kicker}<h1>{escape(words.title(shown))}</h1>"
        f'<div class="cards">{cards}</div>{verdict}{table}{_caption(BUDGETS)}</header>'
    )


def _methods(found: Contents, drawn: Mapping[str, str]) -> str:
    if not found.arms:
        return _section("Methods at equal bytes", _missing("Methods", "kvsight compare MODEL -o DIR"))
    first = found.arms[0]
    baseline = words.number(first["baseline_perplexity"]["mean"], 4)
    text = (
        f"{first['kl']['n']} windows, {first['tokens']:,} tokens of text that no calibration saw. "
        f"Perplexity uncompressed: {baseline}. ◆ marks arms that no other beats in bits and KL at once."
    )
    parts = [
        _paragraph(words.on_the_frontier(found)),
        drawn.get("frontier", ""),
        _caption(FRONTIER),
        _table(tables.comparison(found)),
        _caption(text),
    ]
    if found.refused:
        parts += ["<h3>Not possible</h3>", _table(tables.refused(found), prose=True)]
    return _section("Methods at equal bytes", *parts)


def _plan(found: Contents, drawn: Mapping[str, str]) -> str:
    bits, damage, spectra = (found.of_shown(rows) for rows in (found.bits, found.damage, found.spectra))
    again = "kvsight compare MODEL --methods sight -o DIR"
    parts = ["<h3>Bits by layer and head</h3>"]
    if bits is None:
        parts.append(_missing("The map of bits", again))
    else:
        parts += [
            _paragraph(f"{bits['arm']} stores {words.range_of_bits(bits['rows'])}"),
            drawn.get("bits", ""),
        ]
    parts.append("<h3>Damage by layer</h3>")
    if damage is None:
        parts.append(_missing("Damage by layer", again))
    else:
        parts += [
            _paragraph(words.concentration(damage["rows"])),
            drawn.get("damage", ""),
            _caption(f"{damage['arm']}; {damage['how']}."),
        ]
    parts.append("<h3>What the model sees, and how bits follow</h3>")
    if spectra is None:
        parts.append(_missing("Spectra", again))
    else:
        parts += [
            drawn.get("spectra", ""),
            _caption(f"{spectra['arm']}. {SPECTRA}"),
        ]
    return _section("Where the bits go", *parts)


def _tasks(found: Contents, drawn: Mapping[str, str]) -> str:
    if not found.tasks:
        return _section("Tasks", _missing("Tasks", "kvsight tasks DIR/plans/sight@3 -o DIR"))
    return _section(
        "Tasks",
        _list(words.tasks(found.tasks)),
        drawn.get("tasks", ""),
        _table(tables.tasks(found)),
        _caption(TASKS),
    )


def _running(found: Contents, drawn: Mapping[str, str]) -> str:
    command = "kvsight bench DIR/plans/sight@3 -o DIR"
    parts = ["<h3>Memory</h3>"]
    if not found.fits:
        parts.append(_missing("Memory", command))
    else:
        parts += [
            _paragraph(words.hold(found.fits, found.shown["arm"] if found.shown else "")),
            _table(tables.fits(found)),
            _caption(FILLED),
            _table(tables.memory(found)),
        ]
    parts.append("<h3>Speed</h3>")
    if not found.speed:
        parts.append(_missing("Speed", command))
    else:
        first = found.speed[0]
        parts += [
            _list(words.break_even(found.break_even)),
            drawn.get("speed", ""),
            _table(tables.speed(found)),
            _caption(f"{first['device']}, threads: {first['threads']}, batch {first['batch']}. {TIMES}"),
        ]
    return _section("Memory and speed", *parts)


def _provenance(found: Contents) -> str:
    return _section("Provenance", _table(tables.provenance(found), prose=True))


def _notes() -> str:
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in NOTES)
    return _section("How to read this", f"<dl>{entries}</dl>")


def _section(title: str, *parts: str) -> str:
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inner}\n</section>\n"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _caption(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">{escape(what)}: not measured. <code>{escape(command)}</code> adds it.</p>'


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="lines">{items}</ul>' if lines else ""


def _table(table: Table, *, prose: bool = False) -> str:
    """Inside a wrapper that scrolls where the page is narrower than the table."""

    def cell(tag: str, i: int, text: str) -> str:
        label = ' class="label"' if i < table.labels else ""
        return f"<{tag}{label}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(table.header))
    rows: list[str] = []
    for number, row in enumerate(table.rows):
        if number in table.groups:
            heading = escape(table.groups[number])
            rows.append(f'<tr class="group"><th class="label" colspan="{len(row)}">{heading}</th></tr>')
        strong = ' class="strong"' if number in table.strong else ""
        rows.append(f"<tr{strong}>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>")
    body = "\n".join(rows)
    kind = ' class="prose"' if prose else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(drawn: Drawn) -> str:
    """The drawing twice: the style sheet shows the one that suits the screen."""
    both = "".join(
        f'<div class="{name}">{_inline(document, drawn.alt)}</div>'
        for name, document in (("wide", drawn.wide), ("narrow", drawn.narrow))
    )
    return f'<figure id="{drawn.name}">{both}</figure>'


def _inline(document: str, alt: str) -> str:
    """An SVG document as an element of the page, in its colours and as wide as it."""
    found = re.search(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>(.*)</svg>", document, re.DOTALL)
    assert found is not None, "matplotlib writes one svg element"
    box, inner = found.groups()
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}" role="img" aria-label="{escape(alt)}">{themed(inner)}</svg>'

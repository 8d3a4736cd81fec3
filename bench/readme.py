"""The README's table and figure, from the records of `kvsight compare`: `python bench/readme.py DIR`.

Rewrites what stands between the markers in README.md, and docs/figures/frontier.svg and .png.
"""

import argparse
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kvsight.atomic import replace_file
from kvsight.eval.compare import quality_rows
from kvsight.records import Records

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
FIGURE = Path("docs/figures/frontier.svg")
START, END = "<!-- from bench/readme.py -->", "<!-- end -->"
# mid-grey reads on white and on black, so one picture serves both themes
GREY, OURS = "#7d8590", "#e8590c"
COLOURS = ("#1c7ed6", "#2f9e44", "#ae3ec9", "#c2255c", "#0c8599", "#a07000", "#5f3dc4", "#868e96")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")


def table(rows: Sequence[Row], pairs: Iterable[Row]) -> str:
    """Markdown: our figures at every budget, beside the best of all others there."""
    known = {row["arm"]: row for row in rows}
    lines = [
        "| bits | `sight`, KL | best other, KL | difference, paired | bits saved "
        "| perplexity, packed / uncompressed | same top token | bytes, packed / BF16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        ours, peer = known[pair["ours"]], known[pair["peer"]]
        cells = (
            f"{ours['true_bits']:.2f}",
            _interval(ours["kl"]),
            f"`{peer['method']}` at {peer['true_bits']:.2f}: {_interval(peer['kl'])}",
            _interval(pair["difference"]),
            _saved(pair, ours, [row for row in rows if not row["ours"]]),
            f"{ours['perplexity']['mean']:.2f} / {ours['baseline_perplexity']['mean']:.2f}",
            f"{100 * ours['same_top']['mean']:.1f} %",
            f"{ours['cache_bytes']:,} / {ours['baseline_bytes']:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _saved(pair: Row, ours: Row, others: Sequence[Row]) -> str:
    """Bits saved at equal KL, or by how much no other was enough."""
    if pair["bits_saved"] is not None:
        return f"{pair['bits_saved']:.2f}"
    most = max(row["true_bits"] for row in others) - ours["true_bits"]
    reached = any(row["kl"]["mean"] <= ours["kl"]["mean"] for row in others)
    return "" if reached or round(most, 1) <= 0 else f"over {most:.1f}"


def _interval(figure: Row) -> str:
    digits = max(2, 2 - math.floor(math.log10(abs(figure["mean"]) or 1.0)))
    return "{mean:.{0}f} ({low:.{0}f} to {high:.{0}f})".format(digits, **figure)


def lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, float, float]]]:
    """(bits, KL, low, high) of every method by rising bits, the best method last."""
    out: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        # budgets that came to one configuration are one point
        if "same_as" not in row:
            name = " ".join([row["method"], *(f"{n}={v}" for n, v in _options(row).items())])
            kl = row["kl"]
            out.setdefault(name, []).append((row["true_bits"], kl["mean"], kl["low"], kl["high"]))
    return {name: sorted(points) for name, points in sorted(out.items())}


def _options(row: Row) -> Row:
    # the settings of outside quantisers change with the budget
    return {} if row["external"] else row["settings"]


def figure(rows: Sequence[Row]) -> Figure:
    """KL against true bits, a line per method, bars for intervals."""
    out = Figure(figsize=(7.6, 4.6), layout="constrained")
    out.patch.set_alpha(0)
    axes = out.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_yscale("log")
    lowest = min(kl for points in lines(rows).values() for _, kl, _, _ in points) / 3
    others = [name for name in lines(rows) if name != "sight"]
    for name, points in lines(rows).items():
        bits, kl, low, high = (list(column) for column in zip(*points, strict=True))
        ours = name == "sight"
        place = 0 if ours else others.index(name)
        bars = [
            [k - max(x, lowest) for k, x in zip(kl, low, strict=True)],
            [x - k for k, x in zip(kl, high, strict=True)],
        ]
        axes.errorbar(
            bits,
            kl,
            bars,
            label=name,
            color=OURS if ours else COLOURS[place % len(COLOURS)],
            marker="o" if ours else MARKERS[place % len(MARKERS)],
            markersize=7 if ours else 4.5,
            linewidth=3 if ours else 1.2,
            elinewidth=1.6 if ours else 0.9,
            capsize=2,
            zorder=3 if ours else 2,
        )
    _dress(axes)
    return out


def _dress(axes: Any) -> None:
    axes.set_xlabel("stored bits per cached element, all metadata counted", color=GREY)
    axes.set_ylabel("KL to the uncompressed model, nats per token", color=GREY)
    axes.tick_params(which="both", colors=GREY)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    for name, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(name in ("left", "bottom"))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] != "sight", labels[i]))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        labelcolor=GREY,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )


def drawn(rows: Sequence[Row], kind: str) -> bytes:
    """The figure as svg or png, the same bytes for the same rows."""
    file = io.BytesIO()
    # text stays text: smaller, and readable to whoever compares two versions
    with matplotlib.rc_context({"svg.hashsalt": "kvsight", "svg.fonttype": "none", "font.size": 10}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure(rows).savefig(file, format=kind, dpi=160, metadata=metadata)
    return file.getvalue()


def filled(readme: str, content: str) -> str:
    """The README with its table replaced."""
    before, found, rest = readme.partition(f"{START}\n")
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"README.md lacks the markers {START} and {END}.")
    return f"{before}{START}\n{content}{END}{after}"


def main() -> None:
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("records", type=Path, help="directory of a comparison")
    records = Records.read(out.parse_args().records)
    rows = quality_rows(records)
    readme = ROOT / "README.md"
    text = filled(readme.read_text(encoding="utf-8"), table(rows, records.of("pair")))
    with replace_file(readme) as scratch:
        scratch.write_text(text, encoding="utf-8")
    (ROOT / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    for kind in ("svg", "png"):
        with replace_file((ROOT / FIGURE).with_suffix(f".{kind}")) as scratch:
            scratch.write_bytes(drawn(rows, kind))


if __name__ == "__main__":
    main()

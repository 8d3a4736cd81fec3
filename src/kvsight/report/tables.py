"""The page's tables: pure functions of records."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kvsight.records import Row
from kvsight.report.contents import Contents, frontier, has_baseline, keeps_budget, series
from kvsight.report.words import (
    differs,
    estimate,
    number,
    percent,
    percent_estimate,
    saved,
    size,
    spread,
    times_smaller,
)


@dataclass(frozen=True)
class Table:
    """Cells as text: ``labels`` columns of names, then numbers.

    Rows in ``strong`` stand out; ``groups`` has headings of the rows that begin at a number.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    labels: int = 1
    groups: Mapping[int, str] = field(default_factory=dict)


def comparison(found: Contents) -> Table:
    """Every arm by budget, the least KL first."""
    best = {row["arm"] for row in frontier(found.arms)}
    rows = sorted(found.arms, key=lambda row: (row["budget"], row["kl"]["mean"]))
    header = (
        "method",
        "bits",
        "KL (95 %)",
        "KL p99",
        "perplexity",
        "same top",
        "diverges after",
        "encode, µs",
        "decode, µs",
    )
    cells = tuple(_compared(row, row["arm"] in best) for row in rows)
    starts = {row["budget"]: i for i, row in reversed(list(enumerate(rows)))}
    return Table(
        header,
        cells,
        frozenset(i for i, row in enumerate(rows) if row["ours"]),
        groups={i: f"Budget of {budget:g} bits" for budget, i in starts.items()},
    )


def _compared(row: Row, best: bool) -> tuple[str, ...]:
    over = "" if keeps_budget(row) else " (over)"
    agreed = row["agreement"]
    return (
        f"{series(row)}{' ◆' if best else ''}",
        f"{row['true_bits']:.2f}{over}",
        estimate(row["kl"]),
        number(row["kl_p99"], 2),
        number(row["perplexity"]["mean"], 4),
        percent(row["same_top"]["mean"]),
        f"{number(agreed['mean'], 2)} of {row['agreement_cap']}",
        number(row["encode_us_per_token"], 2),
        number(row["decode_us_per_token"], 2),
    )


def budgets(found: Contents) -> Table:
    """Our arms at every budget, and how the best of the others stands there."""
    header = (
        "bits",
        "smaller",
        "perplexity",
        "same top",
        "best other method",
        "its KL is higher by (95 %)",
        "bits it lacks",
    )
    rows = tuple(_budget(row, found) for row in found.ours)
    shown = found.shown
    strong = (i for i, row in enumerate(found.ours) if shown is not None and row["arm"] == shown["arm"])
    return Table(header, rows, frozenset(strong))


def _budget(row: Row, found: Contents) -> tuple[str, ...]:
    pair, saving = found.pair(row["budget"]), found.saving(row)
    cells: tuple[str, ...] = (
        f"{row['true_bits']:.2f}",
        f"{times_smaller(row)}×",
        number(row["perplexity"]["mean"], 4),
        percent(row["same_top"]["mean"]),
    )
    if pair is None:
        return (*cells, "–", "–", "–")
    return (
        *cells,
        series({"arm": pair["peer"]}),
        estimate(pair["difference"], 2),
        "–" if saving is None else saved(saving),
    )


def refused(found: Contents) -> Table:
    rows = tuple((row["method"], f"{row['budget']:g}", row["reason"]) for row in found.refused)
    return Table(("method", "budget", "why"), rows, labels=3)


def tasks(found: Contents) -> Table:
    """Every task and arm with all its metrics; a difference whose interval leaves out 0 is strong."""
    names = list(dict.fromkeys(row["task"] for row in found.tasks))
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    groups: dict[int, str] = {}
    for name in names:
        groups[len(rows)] = name
        for row, metric, figure in _figures(row for row in found.tasks if row["task"] == name):
            difference = figure["difference"]
            if difference is not None and has_baseline(row) and differs(difference):
                strong.add(len(rows))
            told = "–" if difference is None else _signed(metric, difference)
            value = _of_metric(metric, figure["value"])
            rows.append((row["arm"], _direction(row, metric), value, told, f"{row['value']['n']:,}"))
    header = ("arm", "metric", "value (95 %)", "less uncompressed (95 %)", "samples")
    return Table(header, tuple(rows), frozenset(strong), labels=2, groups=groups)


def _figures(rows: Iterable[Row]) -> Iterator[tuple[Row, str, Row]]:
    """(record, metric, its value and difference): of all arms the task's metric, then the further ones."""
    found = list(rows)
    for row in found:
        yield row, row["metric"], row
    further = [name for name, figure in found[0]["detail"].items() if "value" in figure]
    for name in further:
        for row in found:
            yield row, name, row["detail"][name]


def _direction(row: Row, metric: str) -> str:
    if metric != row["metric"]:
        return metric
    return f"{metric} {'↑' if row['higher_is_better'] else '↓'}"


def _is_share(metric: str) -> bool:
    return metric in ("accuracy", "agreement")


def _of_metric(metric: str, figure: Row, digits: int = 3) -> str:
    return percent_estimate(figure) if _is_share(metric) else estimate(figure, digits)


def _signed(metric: str, figure: Row) -> str:
    text = _of_metric(metric, figure, 2)
    return f"+{text}" if figure["mean"] > 0 else text


def memory(found: Contents) -> Table:
    header = ("arm", "tokens", "batch", "cache", "resident growth", "allocator peak")
    rows = tuple(
        (
            row["arm"],
            f"{row['tokens']:,}",
            f"{row['batch']:,}",
            size(row["cache_bytes"]),
            size(row["resident_bytes"]),
            size(row["allocator_peak"]),
        )
        for row in sorted(found.memory, key=lambda row: row["tokens"])
    )
    return Table(header, rows)


def fits(found: Contents) -> Table:
    first = found.fits[0]
    header = ("arm", "longest context, tokens", f"largest batch of {first['at_length']:,} tokens")
    rows = tuple(
        (
            row["arm"],
            "any" if row["longest_context"] is None else f"{row['longest_context']:,}",
            f"{row['largest_batch']:,}",
        )
        for row in found.fits
    )
    return Table(header, rows)


def speed(found: Contents) -> Table:
    header = ("arm", "tokens", "prefill, ms", "of it coding, ms", "decode, ms per token")
    rows = tuple(
        (
            row["arm"],
            f"{row['tokens']:,}",
            spread(row["prefill_ms"]),
            spread(row["encode_ms"]),
            spread(row["decode_ms_per_token"]),
        )
        for row in sorted(found.speed, key=lambda row: row["tokens"])
    )
    return Table(header, rows)


def provenance(found: Contents) -> Table:
    """What held for all measurements, then for each command."""
    rows: list[tuple[str, ...]] = [
        ("all", name, str(value)) for name, value in found.provenance[0]["shared"].items()
    ]
    for row in found.provenance:
        rows += [(row["command"], name, str(value)) for name, value in row["own"].items()]
    plan = found.of_shown(found.bits)
    if plan is not None:
        rows += [(plan["arm"], name, str(value)) for name, value in plan["provenance"].items()]
    dates = sorted({row["date"] for row in found.arms if row.get("date")})
    if dates:
        rows.append(("compare", "dates", f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else dates[0]))
    return Table(("of", "what", "value"), tuple(rows), labels=3)

"""Numbers and findings in words: pure functions of records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvsight.records import Row
from kvsight.report.contents import UNCOMPRESSED, Contents, Saving, frontier, has_baseline, series

Estimate = Mapping[str, Any]


def number(x: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, in powers of ten only below a millionth: 0.0231, 1,240, 2e-12."""
    if x is None:
        return "–"
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if abs(x) < 1e-6:
        return f"{x:.0e}".replace("-", "−")
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{places}f}".replace("-", "−")


def signed(x: float, digits: int = 2) -> str:
    return number(x, digits) if x <= 0 else f"+{number(x, digits)}"


def percent(x: float, places: int = 1) -> str:
    return f"{100 * x:.{places}f} %"


def estimate(figure: Estimate, digits: int = 3) -> str:
    """Mean with its interval, all to the digits that the mean deserves: 0.0231 (0.0182 to 0.0279)."""
    mean, low, high = figure["mean"], figure["low"], figure["high"]
    if low is None or high is None:
        return number(mean, digits)
    places = _places(mean, (high - low) / 2, digits)
    return f"{_fixed(mean, places)} ({_fixed(low, places)} to {_fixed(high, places)})"


def percent_estimate(figure: Estimate) -> str:
    scaled = {
        name: None if figure[name] is None else 100 * figure[name] for name in ("mean", "low", "high")
    }
    if scaled["low"] is None:
        return f"{_fixed(scaled['mean'], 1)} %"
    return f"{_fixed(scaled['mean'], 1)} % ({_fixed(scaled['low'], 1)} to {_fixed(scaled['high'], 1)})"


def _places(mean: float, half: float, digits: int) -> int:
    size = max(abs(mean), half)
    return 0 if size == 0 else min(7, max(0, digits - 1 - math.floor(math.log10(size))))


def _fixed(x: float | None, places: int) -> str:
    if x is None:
        return "–"
    rounded = round(x, places) + 0.0  # no negative zero
    return f"{rounded:,.{places}f}".replace("-", "−")


def spread(figure: Mapping[str, float], digits: int = 3) -> str:
    """Median with its range."""
    low, high = number(figure["low"], digits), number(figure["high"], digits)
    return f"{number(figure['median'], digits)} ({low} to {high})"


def size(nbytes: float | None) -> str:
    """Bytes in decimal units."""
    if nbytes is None:
        return "–"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.3g} {unit}".replace("-", "−")
    return f"{nbytes:.0f} B"


def times_smaller(row: Row) -> str:
    return number(row["baseline_bytes"] / row["cache_bytes"], 2)


def title(row: Row) -> str:
    """The first thing to know, as a heading."""
    return (
        f"At {row['true_bits']:.1f} bits the cache is {times_smaller(row)} times smaller "
        f"and {percent(row['same_top']['mean'], 0)} of top tokens stay the same"
    )


def cards(row: Row, saving: Saving | None) -> list[tuple[str, str]]:
    """The figures that a decision needs: (value, what it is)."""
    change = row["perplexity"]["mean"] / row["baseline_perplexity"]["mean"] - 1
    out = [
        (f"{times_smaller(row)}×", f"smaller: {number(row['true_bits'])} bits instead of 16"),
        (
            f"{signed(100 * change)} %",
            f"perplexity: {_change(row['baseline_perplexity']['mean'], row['perplexity']['mean'])}",
        ),
        (percent(row["same_top"]["mean"], 0), "of top tokens as before"),
    ]
    if saving is not None:
        word = "fewer" if saving.bits >= 0 else "more"
        out.append((f"{saved(saving)} bits", f"{word} than the best of the other methods at equal KL"))
    return out


def headline(row: Row, saving: Saving | None) -> str:
    """What an arm cost, in one line."""
    parts = [
        f"cache {times_smaller(row)} times smaller",
        f"perplexity {_change(row['baseline_perplexity']['mean'], row['perplexity']['mean'])}",
        f"same top token {percent(row['same_top']['mean'], 0)}",
    ]
    if saving is not None:
        word = "less" if saving.bits >= 0 else "more"
        parts.append(f"needs {saved(saving)} bits {word} than the best peer at equal KL")
    return f"{row['true_bits']:.1f} bits: {', '.join(parts)}"


def saved(saving: Saving) -> str:
    """Bits without their sign; ">" where no other method reached the KL."""
    return f"{'> ' if saving.least else ''}{abs(saving.bits):.1f}"


def _change(before: float, after: float) -> str:
    return f"{number(before)} → {number(after)}"


def verdict(pair: Row) -> str:
    """How our arm stands against the best of the others at a budget."""
    peer, difference = series({"arm": pair["peer"]}), pair["difference"]
    at = f"At {pair['key'][0]:g} bits"
    if difference["low"] is None:
        return f"{at} the best peer is {peer}; one window gives no interval."
    by = f"by {estimate(_absolute(difference), 2)} nats per token"
    if difference["low"] > 0:
        return f"{at} the best peer, {peer}, has a higher KL {by}."
    if difference["high"] < 0:
        return f"{at} the best peer, {peer}, has a lower KL {by}."
    return f"{at} the best peer, {peer}, has no measurably different KL ({estimate(difference, 2)} nats)."


def _absolute(difference: Estimate) -> Estimate:
    if difference["mean"] >= 0:
        return difference
    return {"mean": -difference["mean"], "low": -difference["high"], "high": -difference["low"]}


def on_the_frontier(found: Contents) -> str:
    """Which methods no other beats."""
    best = frontier(found.arms)
    counts: dict[str, int] = {}
    for row in best:
        counts[series(row)] = counts.get(series(row), 0) + 1
    if len(counts) == 1:
        name = next(iter(counts))
        return f"Every point of the frontier is {name}: no other method has fewer bits and less KL."
    parts = [f"{name} ({count})" for name, count in counts.items()]
    return f"On the frontier are {listed(parts)}; all other arms are beaten in bits and KL at once."


def listed(parts: Sequence[str]) -> str:
    """one, two and three."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def concentration(rows: Sequence[Row]) -> str:
    """Where most of the damage is."""
    layers: dict[int, float] = {}
    for row in rows:
        layers[row["layer"]] = layers.get(row["layer"], 0.0) + row["kl"]
    total = sum(layers.values())
    if total <= 0:
        return "No layer is damaged."
    worst = max(layers, key=lambda layer: layers[layer])
    keys = sum(row["kl"] for row in rows if row["side"] == "k")
    return (
        f"Layer {worst} causes {percent(layers[worst] / total, 0)} of the damage; "
        f"keys cause {percent(keys / total, 0)} of it, values the rest."
    )


def range_of_bits(rows: Sequence[Row]) -> str:
    """Where a plan's bits go."""
    sides = {side: [row["true_bits"] for row in rows if row["side"] == side] for side in ("k", "v")}
    parts = [
        f"{name} at {sum(bits) / len(bits):.1f} bits on average "
        f"({min(bits):.1f} to {max(bits):.1f} by head)"
        for name, bits in (("keys", sides["k"]), ("values", sides["v"]))
        if bits
    ]
    return f"{listed(parts)}."


def break_even(rows: Sequence[Row]) -> list[str]:
    """From which context on plans decode no slower than the uncompressed cache."""
    slow = [row["arm"] for row in rows if row["tokens"] is None]
    lines = [
        f"{row['arm']} decodes no slower than the uncompressed cache from {row['tokens']:,} tokens on."
        for row in rows
        if row["tokens"] is not None
    ]
    if slow:
        verb = "decodes" if len(slow) == 1 else "decode"
        lines.append(
            f"{listed(slow)} {verb} more slowly than the uncompressed cache at every measured context."
        )
    return lines


def hold(fits: Sequence[Row], arm: str) -> str:
    """What a budget of memory holds with an arm (with the first packed one, if that was not filled)."""
    stock = next((row for row in fits if row["arm"] == UNCOMPRESSED), None)
    packed = [row for row in fits if row is not stock]
    best = next((row for row in packed if row["arm"] == arm), packed[0] if packed else None)
    if stock is None or best is None or not stock["longest_context"] or best["longest_context"] is None:
        return ""
    return (
        f"{size(best['budget_bytes'])} of cache hold {best['longest_context']:,} tokens with {best['arm']} "
        f"and {stock['longest_context']:,} uncompressed."
    )


def differs(difference: Estimate) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)


def tasks(rows: Sequence[Row]) -> list[str]:
    """For every packed arm, in which tasks it is measurably worse or better than the uncompressed model."""
    compared = [row for row in rows if row["difference"] is not None and has_baseline(row)]
    arms = dict.fromkeys(row["arm"] for row in compared)
    return [_tasks_of(arm, [row for row in compared if row["arm"] == arm]) for arm in arms]


def _tasks_of(arm: str, rows: Sequence[Row]) -> str:
    found: dict[str, list[str]] = {"worse in": [], "better in": [], "no measurable difference in": []}
    for row in rows:
        better = (row["difference"]["mean"] > 0) == row["higher_is_better"]
        name = ("better in" if better else "worse in") if differs(row["difference"]) else list(found)[-1]
        found[name].append(row["task"])
    parts = [f"{name} {listed(names)}" for name, names in found.items() if names]
    return f"{arm} against uncompressed: {'; '.join(parts)}."

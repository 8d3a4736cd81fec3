"""What the page says in words and numbers."""

import factory
import pytest

from kvsight.report import words
from kvsight.report.contents import Saving, frontier, keeps_budget, series


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (0.0231, 2, "0.023"),
        (0.02349, 3, "0.0235"),
        (71.71, 3, "71.7"),
        (1240.4, 3, "1,240"),
        (5.3384, 2, "5.3"),
        (0, 3, "0"),
        (-0.0123, 2, "−0.012"),
        (0.00004, 2, "0.000040"),
        (2.17e-12, 2, "2e−12"),
        (None, 3, "–"),
        (float("inf"), 3, "inf"),
    ],
)
def test_numbers_are_rounded_to_digits(x, digits, text):
    assert words.number(x, digits) == text


def test_intervals_are_rounded_like_their_mean():
    assert words.estimate(factory.estimate(0.023147, 0.0048)) == "0.0231 (0.0183 to 0.0279)"
    assert words.estimate(factory.estimate(54.012, 8.4)) == "54.0 (45.6 to 62.4)"
    # a mean near 0 takes the digits of the interval
    assert words.estimate(factory.estimate(0.00001, 0.03), 2) == "0.000 (−0.030 to 0.030)"
    assert words.estimate({"mean": 0.5, "low": None, "high": None, "n": 1}) == "0.500"
    assert words.percent_estimate(factory.estimate(-0.0601, 0.02)) == "−6.0 % (−8.0 to −4.0)"
    assert words.percent_estimate({"mean": 0.5, "low": None, "high": None, "n": 1}) == "50.0 %"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (12, "12 B"),
        (1500, "1.5 kB"),
        (256e6, "256 MB"),
        (20e9, "20 GB"),
        (3e12, "3 TB"),
        (-8192, "−8.19 kB"),
        (None, "–"),
    ],
)
def test_sizes_have_units(nbytes, text):
    assert words.size(nbytes) == text


def row(**changes):
    base = factory.quality("sight", 3.0)
    wanted = {
        "cache_bytes": 4_714_008,
        "baseline_bytes": 25_165_824,
        "perplexity": factory.estimate(72.09, 5),
        "baseline_perplexity": factory.estimate(71.71, 5),
        "same_top": factory.estimate(0.89, 0.01),
    }
    return {**base, **wanted, **changes}


def pair(difference, saved=1.1):
    return {
        "key": [3.0],
        "ours": "sight@3",
        "peer": "kivi@3",
        "difference": difference,
        "bits_saved": saved,
    }


def test_the_headline_says_what_a_plan_cost():
    wanted = "3.0 bits: cache 5.3 times smaller, perplexity 71.7 → 72.1, same top token 89 %"
    assert words.headline(row(), None) == wanted
    told = words.headline(row(), Saving(1.1, least=False))
    assert told == f"{wanted}, needs 1.1 bits less than the best peer at equal KL"
    assert "needs > 1.0 bits less than" in words.headline(row(), Saving(1.0, least=True))
    assert "needs 0.2 bits more than" in words.headline(row(), Saving(-0.2, least=False))


def test_the_title_and_the_cards_say_the_same():
    assert (
        words.title(row())
        == "At 3.0 bits the cache is 5.3 times smaller and 89 % of top tokens stay the same"
    )
    cards = words.cards(row(), Saving(1.1, least=False))
    assert [value for value, _ in cards] == ["5.3×", "+0.53 %", "89 %", "1.1 bits"]
    assert cards[3][1] == "fewer than the best of the other methods at equal KL"
    worse = words.cards(row(), Saving(-0.3, least=False))[3]
    assert worse == ("0.3 bits", "more than the best of the other methods at equal KL")
    assert len(words.cards(row(), None)) == 3


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (factory.estimate(0.221, 0.063), "has a higher KL by 0.22 (0.16 to 0.28) nats per token"),
        (factory.estimate(-0.221, 0.063), "has a lower KL by 0.22 (0.16 to 0.28) nats per token"),
        (factory.estimate(0.02, 0.063), "has no measurably different KL (0.020 (−0.043 to 0.083) nats)"),
        ({"mean": 0.2, "low": None, "high": None, "n": 1}, "one window gives no interval"),
    ],
    ids=["higher", "lower", "same", "unknown"],
)
def test_a_verdict_follows_the_interval(difference, text):
    told = words.verdict(pair(difference))
    assert told.startswith("At 3 bits the best peer")
    assert "kivi" in told
    assert text in told


def test_the_frontier_is_what_nothing_beats():
    rows = [factory.quality(name, bits) for name in ("kivi", "sight") for bits in (3.0, 2.0)]
    assert [r["arm"] for r in frontier(rows)] == ["sight@2", "sight@3"]
    rows[1] = {**rows[1], "true_bits": 1.5}
    assert [r["arm"] for r in frontier(rows)] == ["kivi@2", "sight@2", "sight@3"]
    twin = {**rows[3], "arm": "twin@2"}
    assert [r["arm"] for r in frontier([*rows, twin])] == ["kivi@2", "sight@2", "sight@3"]


def test_names_and_budgets_of_arms():
    assert series({"arm": "int axis=channel@2.5"}) == "int axis=channel"
    assert keeps_budget(row(true_bits=3.05, budget=3.0))
    assert not keeps_budget(row(true_bits=3.2, budget=3.0))


def test_damage_and_bits_are_told_from_their_rows():
    rows = [
        {"layer": i, "side": s, "kl": kl}
        for i, s, kl in ((0, "k", 1), (0, "v", 2), (1, "k", 1), (1, "v", 0))
    ]
    assert (
        words.concentration(rows)
        == "Layer 0 causes 75 % of the damage; keys cause 50 % of it, values the rest."
    )
    assert words.concentration([{"layer": 0, "side": "k", "kl": 0.0}]) == "No layer is damaged."
    bits = [{"side": s, "true_bits": b} for s, b in (("k", 2.0), ("k", 4.0), ("v", 3.0))]
    assert words.range_of_bits(bits) == (
        "keys at 3.0 bits on average (2.0 to 4.0 by head) and "
        "values at 3.0 bits on average (3.0 to 3.0 by head)."
    )


def test_tasks_are_told_by_their_intervals():
    def task(name, mean, half, higher=True, metric="accuracy"):
        row = {"task": name, "arm": "sight@3", "metric": metric, "higher_is_better": higher}
        return {**row, "difference": factory.estimate(mean, half)}

    rows = [
        {**task("copy", 0, 0), "arm": "uncompressed", "difference": None},
        task("copy", -0.05, 0.02),
        task("books", 0.05, 0.02, higher=False),
        task("recall", 0.05, 0.02),
        task("lambada", -0.05, 0.06),
        # nobody agrees with the uncompressed model more than itself
        task("continuation", -0.05, 0.02, metric="agreement"),
    ]
    assert words.tasks(rows) == [
        "sight@3 against uncompressed: worse in copy and books; better in recall; "
        "no measurable difference in lambada."
    ]


def test_running_costs_in_words():
    rows = [{"arm": "a", "tokens": None}, {"arm": "b", "tokens": 2048}, {"arm": "c", "tokens": None}]
    assert words.break_even(rows) == [
        "b decodes no slower than the uncompressed cache from 2,048 tokens on.",
        "a and c decode more slowly than the uncompressed cache at every measured context.",
    ]
    assert words.break_even(rows[:1])[0].startswith("a decodes more slowly")
    assert words.break_even([]) == []
    fits = [
        {"arm": "uncompressed", "budget_bytes": 256_000_000, "longest_context": 62_464},
        {"arm": "sight@3", "budget_bytes": 256_000_000, "longest_context": 333_312},
    ]
    wanted = "256 MB of cache hold 333,312 tokens with sight@3 and 62,464 uncompressed."
    other = {**fits[1], "arm": "sight@2", "longest_context": 499_968}
    assert words.hold([fits[0], other, fits[1]], "sight@3") == wanted
    assert "499,968 tokens with sight@2" in words.hold([fits[0], other], "sight@3")
    assert words.hold([fits[0], {**fits[1], "longest_context": None}], "sight@3") == ""
    assert words.hold(fits[1:], "sight@3") == ""
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.spread({"median": 12.34, "low": 11.0, "high": 14.06}) == "12.3 (11.0 to 14.1)"

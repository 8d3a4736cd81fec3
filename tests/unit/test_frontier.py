"""Matching, pairing and the frontier, against brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvsight.errors import KVSightError
from kvsight.eval.arms import Contender, budgets, contenders, named
from kvsight.eval.frontier import at_budget, bits_at, frontier, pair, paired
from kvsight.eval.peers import BACKENDS, best_setting, nominal_bits
from kvsight.methods import names

# few values, so that ties happen
points = st.lists(st.tuples(st.sampled_from([1.0, 2.0, 2.5, 3.0]), st.sampled_from([0.1, 0.2, 0.3, 0.4])))


def row(arm, bits, kls, budget=3.0, ours=False):
    windows = [{"kl": kl} for kl in kls]
    kl = {"mean": float(np.mean(kls))}
    return {"arm": arm, "budget": budget, "true_bits": bits, "ours": ours, "kl": kl, "windows": windows}


@given(points)
def test_the_frontier_is_what_nothing_beats(found):
    def beaten(i):
        (b, k), others = found[i], enumerate(found)
        return any(
            (x <= b and y <= k and (x, y) != (b, k)) or ((x, y) == (b, k) and j < i) for j, (x, y) in others
        )

    best = frontier(found)
    assert sorted(best) == [i for i in range(len(found)) if not beaten(i)]
    assert all(found[a][0] < found[b][0] for a, b in itertools.pairwise(best))


def test_a_peer_keeps_to_the_budget_or_is_none():
    rows = [
        row("exact", 3.0, [1.0]),
        row("below", 1.5, [1.0]),
        row("within", 3.06, [1.0]),
        row("above", 3.0601, [1.0]),
        row("asked for less", 2.0, [1.0], budget=2.0),
    ]
    assert [r["arm"] for r in at_budget(rows, 3.0)] == ["exact", "below", "within"]


def test_differences_are_paired_over_windows():
    """Windows differ far more than methods do: only pairing tells the methods apart."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 10, 8)
    mine, theirs = hard, hard + rng.normal(0.1, 0.02, 8)
    found = paired(row("a", 3, mine), row("b", 3, theirs))
    wanted = stats.ttest_rel(theirs, mine).confidence_interval(0.95)
    assert found.mean == pytest.approx((theirs - mine).mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.low > 0
    with pytest.raises(ValueError, match="shorter"):
        paired(row("a", 3, mine), row("b", 3, theirs[:-1]))


def test_bits_at_a_kl_lie_on_the_log_linear_frontier():
    found = [(2.0, 0.4), (3.0, 0.1), (2.5, 0.9), (4.0, 0.025)]
    assert bits_at(found, 0.2) == pytest.approx(2.5)
    assert bits_at(found, 0.1) == pytest.approx(3.0)
    assert bits_at(found, 0.05) == pytest.approx(3.5)
    assert bits_at(found, 0.41) is None
    assert bits_at(found, 0.024) is None
    assert bits_at([], 0.1) is None
    assert bits_at([(2.0, 0.0)], 0.0) is None


def test_the_pair_is_our_best_against_the_best_of_the_others():
    rows = [
        row("sight@3", 2.99, [0.1, 0.2], ours=True),
        row("sight metric=storage@3", 2.99, [0.2, 0.2], ours=True),
        row("kivi@3", 3.0, [0.5, 0.7]),
        row("int@3", 2.5, [0.4, 0.6]),
        row("rich@3", 3.5, [0.001, 0.001]),
        row("kivi@4", 4.0, [0.05, 0.05], budget=4.0),
    ]
    found = pair(rows, 3.0)
    assert (found["ours"], found["peer"]) == ("sight@3", "int@3")
    assert (found["ours_bits"], found["peer_bits"]) == (2.99, 2.5)
    assert found["difference"]["mean"] == pytest.approx(0.35)
    # int@3 to rich@3: kivi@4 is beaten
    share = math.log(0.5 / 0.15) / math.log(0.5 / 0.001)
    assert found["bits_saved"] == pytest.approx(2.5 + share - 2.99)
    assert pair(rows, 4.0) is None
    assert pair([r for r in rows if r["ours"]], 3.0) is None


def test_a_loss_is_said_too():
    rows = [row("sight@3", 3.0, [0.3, 0.3], ours=True), row("kivi@3", 3.0, [0.1, 0.2])]
    assert pair(rows, 3.0)["difference"]["mean"] == pytest.approx(-0.15)


def test_all_is_the_registry_without_the_control():
    found, skipped = contenders("all")
    own = [c.method for c in found if not c.external]
    assert own == [name for name in names() if name != "identity"]
    assert len(skipped) + sum(c.external for c in found) == len(BACKENDS)
    assert all("is left out: " in line for line in skipped)


def test_contenders_carry_their_options():
    (one, two), _ = contenders("int:axis=channel:group=64,identity,sight")
    assert one == Contender("int", {"axis": "channel", "group": "64"})
    assert one.arm(2.5) == "int axis=channel group=64@2.5"
    assert two.arm(3.0) == "sight@3"
    assert named((two, one)) == named((one, two)) == "int axis=channel group=64, sight"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sihgt", "Did you mean sight"),
        ("int:axis", "name:option=value"),
        ("int:nonsense=1", "has no option 'nonsense'"),
        ("int:group=many", "takes int"),
        ("int,sight,int", "'int' twice"),
        ("quanto:nbits=2", "quanto cannot take part"),
    ],
)
def test_bad_methods_are_refused(text, words):
    with pytest.raises(KVSightError, match=words):
        contenders(text)


def test_budgets_rise_and_are_checked():
    assert budgets("3, 2,2.50,3") == (2.0, 2.5, 3.0)
    for text, words in (
        ("two", "takes numbers"),
        ("", "takes numbers"),
        ("2,0", "above 0"),
        ("nan", "above 0"),
    ):
        with pytest.raises(KVSightError, match=words):
            budgets(text)
    with pytest.raises(KVSightError, match="at most 16; got 17"):
        budgets("3,17")


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_quantisers_round_down(backend):
    for bits in (2.25, 2.5, 3.0, 4.0, 4.5, 9.0):
        setting = best_setting(backend, bits)
        mine = nominal_bits(backend, setting.width, setting.group)
        assert mine <= bits
        for group in (32, 64, 128):
            other = nominal_bits(backend, setting.width, group)
            assert not mine < other <= bits
    with pytest.raises(KVSightError, match=f"{backend} cannot meet 0.9 bits; its cheapest .* stores"):
        best_setting(backend, 0.9)
    assert nominal_bits("hqq", 3, 64) == pytest.approx(3.5 + 0.5)

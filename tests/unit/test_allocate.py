"""The allocator against an integer programme, and its bound against the optimum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from kvsight import allocate as solver
from kvsight.allocate import InfeasibleError, Unit, allocate, lower_hull
from kvsight.errors import KVSightError
from kvsight.quantizers.lloyd_max import gaussian
from kvsight.waterfill import falling_gains

DISTORTION = [1.0, *(gaussian(bits).distortion for bits in range(1, 9))]


def optimum(units, budget):
    """Least damage by branch and bound: one option of every unit, costs within the budget."""
    damage = np.concatenate([unit.damage for unit in units])
    cost = np.concatenate([unit.cost for unit in units])
    owner = np.repeat(np.arange(len(units)), [len(unit.cost) for unit in units])
    one_each = (owner == np.arange(len(units))[:, None]).astype(float)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None].astype(float), 0, budget)]
    whole, exact = np.ones(len(damage)), {"mip_rel_gap": 0.0}
    found = milp(damage, constraints=limits, integrality=whole, bounds=Bounds(0, 1), options=exact)
    assert found.success
    return float(damage @ np.round(found.x))


def convex_units(draw, count):
    """Σ_i λ_i D(b_i) of rows of 1..8 bytes in 8 coordinates: convex up to rounding to bytes."""
    spread = draw.lognormal(0, 2, size=(count, 1)) * np.exp(-draw.uniform(0.1, 1) * np.arange(8))
    costs = np.arange(1, 9) * 12
    return [Unit(costs, damage) for damage in row_damage(spread)[:, 1:]]


def row_damage(variances):
    """Damage of rows of 0, 1, ... bytes with water-filled bits, [units, bytes + 1]."""
    variances = torch.as_tensor(variances, dtype=torch.float64)
    coordinate, width = falling_gains(variances, DISTORTION)
    falls = torch.tensor(DISTORTION, dtype=torch.float64)
    gains = variances.gather(-1, coordinate) * (falls[width - 1] - falls[width])
    saved = gains.unflatten(-1, (-1, 8)).sum(-1).cumsum(-1)
    whole = variances.sum(-1, keepdim=True)
    return torch.cat([whole, whole - saved], dim=-1).numpy()


def ragged_units(draw, count):
    """Options in any order, as a method with scales has them: dearer ones may be worse."""
    units = []
    for _ in range(count):
        size = int(draw.integers(1, 7))
        units.append(Unit(draw.integers(0, 60, size=size), draw.lognormal(0, 1.5, size=size)))
    return units


def budgets(draw, units, count=3):
    low = sum(int(unit.cost.min()) for unit in units)
    high = sum(int(unit.cost.max()) for unit in units)
    return [low, high, high + 7, *(int(b) for b in draw.integers(low, high + 1, size=count))]


def spent(units, found):
    chosen = list(zip(units, found.choice, strict=True))
    assert found.cost == sum(unit.cost[i] for unit, i in chosen)
    assert found.damage == pytest.approx(sum(unit.damage[i] for unit, i in chosen), rel=1e-12)
    return found.cost


@pytest.mark.parametrize("make", [convex_units, ragged_units])
@pytest.mark.parametrize("seed", range(12))
def test_small_problems_are_solved_exactly(make, seed):
    draw = np.random.default_rng(seed)
    units = make(draw, int(draw.integers(1, 7)))
    for budget in budgets(draw, units):
        found = allocate(units, budget)
        assert spent(units, found) <= budget
        assert found.damage == pytest.approx(optimum(units, budget), rel=1e-9)
        assert found.bound == pytest.approx(found.damage, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_relaxation_is_near_the_optimum_on_rate_distortion_curves(seed, monkeypatch):
    monkeypatch.setattr(solver, "_EXACT_CELLS", 0)
    draw = np.random.default_rng(100 + seed)
    spread = draw.lognormal(0, 1.5, size=(48, 1)) * np.exp(-draw.uniform(0.02, 0.2) * np.arange(32))
    units = [Unit(np.arange(1, 33) * 100, damage) for damage in row_damage(spread)[:, 1:]]
    for share in (0.1, 0.3, 0.37, 0.5, 0.9):
        budget = int(48 * 3200 * share) + seed * 13
        found = allocate(units, budget)
        best = optimum(units, budget)
        assert spent(units, found) <= budget
        rounding = 1e-12 * sum(unit.damage.max() for unit in units)
        assert found.bound <= best + rounding
        assert best <= found.damage * (1 + 1e-9)
        assert found.damage <= best * 1.001


@pytest.mark.parametrize("make", [convex_units, ragged_units])
@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_on_any_curves(make, seed, monkeypatch):
    monkeypatch.setattr(solver, "_EXACT_CELLS", 0)
    draw = np.random.default_rng(200 + seed)
    units = make(draw, int(draw.integers(1, 7)))
    rounding = 1e-12 * sum(unit.damage.max() for unit in units)
    for budget in budgets(draw, units):
        found = allocate(units, budget)
        best = optimum(units, budget)
        assert spent(units, found) <= budget
        assert found.bound <= best + rounding
        assert best <= found.damage * (1 + 1e-9)


def test_the_bound_is_that_of_the_line_between_two_hull_points(monkeypatch):
    # both units gain 10 for 4 bytes; 5 spare bytes buy one step and a quarter of the other
    units = [Unit(np.array([2, 6]), np.array([10.0, 0.0]))] * 2
    monkeypatch.setattr(solver, "_EXACT_CELLS", 0)
    found = allocate(units, 4 + 5)
    assert (found.cost, found.damage, found.bound) == (8, 10.0, 10.0 - 10 / 4)


def test_what_rounding_leaves_over_is_spent(monkeypatch):
    # the steepest step leaves 3 bytes; the option of 3 bytes lies above the hull and still helps
    unit = Unit(np.array([0, 3, 10]), np.array([10.0, 8.0, 0.0]))
    monkeypatch.setattr(solver, "_EXACT_CELLS", 0)
    assert lower_hull(unit.cost, unit.damage) == [0, 2]
    assert allocate([unit, unit], 13).choice == (2, 1)
    # where two would fit and only one does, the better one
    better = Unit(np.array([0, 3, 10]), np.array([10.0, 7.0, 0.0]))
    steep = Unit(np.array([0, 1]), np.array([50.0, 0.0]))
    for units in ([unit, better, steep], [better, unit, steep]):
        assert allocate(units, 5).damage == 17


curves = st.lists(
    st.tuples(st.integers(0, 50), st.floats(0, 1e6, allow_subnormal=False)), min_size=1, max_size=12
)


@given(curves)
def test_the_hull_supports_every_option_from_below(points):
    cost, damage = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    hull = lower_hull(cost, damage)
    assert len(set(hull)) == len(hull)
    assert cost[hull[0]] == cost.min()
    assert damage[hull[0]] == damage[cost == cost.min()].min()
    assert damage[hull[-1]] == damage.min()
    assert (np.diff(cost[hull]) > 0).all()
    assert (np.diff(damage[hull]) < 0).all()
    slopes = np.diff(damage[hull]) / np.diff(cost[hull])
    assert (np.diff(slopes) >= 0).all()
    line = np.interp(cost, cost[hull], damage[hull])
    assert (damage >= line - 1e-9 * damage.max()).all()


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.floats(1e-3, 1e3), st.integers(0, 60))
def test_points_on_one_line_never_overspend(steps, slope, budget):
    # rounding must not let a unit take its second step before its first
    cost = np.cumsum([1, *steps])
    units = [
        Unit(cost, (cost[-1] - cost) * slope),
        Unit(cost[::-1].copy(), (cost[-1] - cost[::-1]) * slope),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "_EXACT_CELLS", 0)
        if budget < 2:
            with pytest.raises(InfeasibleError):
                allocate(units, budget)
            return
        assert spent(units, allocate(units, budget)) <= budget


@given(st.integers(0, 10_000))
def test_more_budget_is_never_worse(seed):
    draw = np.random.default_rng(seed)
    units = ragged_units(draw, 4)
    low = sum(int(unit.cost.min()) for unit in units)
    damages = [allocate(units, budget).damage for budget in range(low, low + 80, 4)]
    assert all(a >= b for a, b in itertools.pairwise(damages))


def test_a_budget_below_the_cheapest_names_it():
    units = [Unit(np.array([5, 3]), np.array([0.0, 1.0])), Unit(np.array([4, 9]), np.array([1.0, 0.0]))]
    assert allocate(units, 7).choice == (1, 0)
    with pytest.raises(InfeasibleError, match="the cheapest choice costs 7, the budget is 6") as caught:
        allocate(units, 6)
    assert (caught.value.cheapest, caught.value.budget) == (7, 6)


def test_no_units_cost_nothing():
    found = allocate([], 0)
    assert (found.choice, found.cost, found.damage) == ((), 0, 0.0)


@pytest.mark.parametrize(
    ("cost", "damage", "message"),
    [
        ([1, 2], [1.0], r"got \(2,\) and \(1,\)"),
        ([], [], r"got \(0,\) and \(0,\)"),
        ([[1]], [[1.0]], r"got \(1, 1\) and \(1, 1\)"),
        ([1], [np.nan], "damages must be finite"),
        ([1], [np.inf], "damages must be finite"),
        ([-1], [1.0], "costs not negative"),
    ],
)
def test_units_that_make_no_sense_are_refused(cost, damage, message):
    with pytest.raises(KVSightError, match=message):
        Unit(np.array(cost, dtype=np.int64), np.array(damage))


def test_the_largest_models_are_solved_to_a_hair():
    # 80 layers, 8 heads, keys and values of 128 coordinates; every second layer holds a shorter window
    draw = np.random.default_rng(0)
    level = draw.lognormal(0, 1.5, size=(80 * 8 * 2, 1))
    spread = level * np.exp(-draw.uniform(0.02, 0.1, size=level.shape) * np.arange(128))
    damage = row_damage(spread)[:, 1:]
    units = [Unit(np.arange(1, 129) * (511 if i // 16 % 2 else 1024), row) for i, row in enumerate(damage)]
    for bits in (2, 3, 4):
        budget = len(units) // 2 * 128 * (511 + 1024) * bits // 8
        found = allocate(units, budget)
        assert spent(units, found) <= budget
        assert found.bound <= found.damage <= found.bound * (1 + 1e-4)

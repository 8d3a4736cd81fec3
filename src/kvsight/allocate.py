"""Spend one budget of bytes: choose one configuration for every unit so that total damage is least.

Lagrangian relaxation over the lower convex hulls of the units' curves (Everett 1963; Shoham and Gersho
1988), finished by swaps; small problems are solved exactly by dynamic programming. The relaxation's
bound comes with every answer, so the gap to the optimum is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd

import numpy as np
from numpy.typing import NDArray

from kvsight.errors import KVSightError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# table cells that exact dynamic programming may fill: a tenth of a second
_EXACT_CELLS = 20_000_000


@dataclass(frozen=True)
class Unit:
    """Something that gets one configuration: its options' costs in bytes and their damage, [n] each."""

    cost: Ints
    damage: Floats

    def __post_init__(self) -> None:
        if self.cost.shape != self.damage.shape or self.cost.ndim != 1 or not len(self.cost):
            raise KVSightError(
                f"a unit needs one cost and one damage per option; got {self.cost.shape} and "
                f"{self.damage.shape}."
            )
        if not np.isfinite(self.damage).all() or (self.cost < 0).any():
            raise KVSightError("damages must be finite and costs not negative. Check the statistics.")


@dataclass(frozen=True)
class Allocation:
    """The chosen option of every unit. No choice within the budget has less damage than ``bound``."""

    choice: tuple[int, ...]
    cost: int
    damage: float
    bound: float


class InfeasibleError(Exception):
    """Even the cheapest options cost more than the budget."""

    def __init__(self, cheapest: int, budget: int) -> None:
        super().__init__(f"the cheapest choice costs {cheapest}, the budget is {budget}")
        self.cheapest, self.budget = cheapest, budget


def allocate(units: Sequence[Unit], budget: int) -> Allocation:
    """Options of least total damage whose costs add up to at most ``budget``.

    Raises ``InfeasibleError`` with the cheapest total when there are none.
    """
    cheapest = sum(int(unit.cost.min()) for unit in units)
    if cheapest > budget:
        raise InfeasibleError(cheapest, budget)
    if _cells(units, budget) <= _EXACT_CELLS:
        choice = _exact(units, budget)
        found = _total(units, choice)
        return Allocation(choice, found[0], found[1], found[1])
    choice, bound = _relaxed(units, budget)
    choice = _swapped(units, choice, budget)
    found = _total(units, choice)
    # the two sums round differently
    return Allocation(choice, *found, min(bound, found[1]))


def _total(units: Sequence[Unit], choice: Sequence[int]) -> tuple[int, float]:
    cost = sum(int(unit.cost[i]) for unit, i in zip(units, choice, strict=True))
    return cost, float(sum(unit.damage[i] for unit, i in zip(units, choice, strict=True)))


def lower_hull(cost: Ints, damage: Floats) -> list[int]:
    """Indices of the lower left convex hull, by rising cost and falling damage."""
    hull: list[int] = []
    for i in np.lexsort((damage, cost)).tolist():
        if hull and damage[i] >= damage[hull[-1]]:
            continue
        while len(hull) > 1 and _above(cost, damage, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(cost: Ints, damage: Floats, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    left = (damage[a] - damage[b]) * (cost[c] - cost[b])
    right = (damage[b] - damage[c]) * (cost[b] - cost[a])
    return bool(left <= right)


def _relaxed(units: Sequence[Unit], budget: int) -> tuple[tuple[int, ...], float]:
    """Walk all hulls together by falling slope; the first step that does not fit sets the bound."""
    hulls = [lower_hull(unit.cost, unit.damage) for unit in units]
    steps: list[tuple[float, int, int]] = []
    for u, (unit, hull) in enumerate(zip(units, hulls, strict=True)):
        cost, damage = unit.cost[hull], unit.damage[hull]
        slopes = -np.diff(damage) / np.diff(cost)
        steps += [(-float(slope), u, k + 1) for k, slope in enumerate(slopes)]
    steps.sort()
    at = [0] * len(units)
    spent = sum(int(unit.cost[hull[0]]) for unit, hull in zip(units, hulls, strict=True))
    damage_now = float(sum(unit.damage[hull[0]] for unit, hull in zip(units, hulls, strict=True)))
    bound: float | None = None
    closed: set[int] = set()
    for negative_slope, u, k in steps:
        unit, hull = units[u], hulls[u]
        if u in closed:
            continue
        price = int(unit.cost[hull[k]] - unit.cost[hull[k - 1]])
        if spent + price > budget:
            if bound is None:
                bound = damage_now + negative_slope * (budget - spent)
            # later steps of this unit need this one first
            closed.add(u)
            continue
        spent += price
        damage_now -= float(unit.damage[hull[k - 1]] - unit.damage[hull[k]])
        at[u] = k
    choice = tuple(hull[k] for hull, k in zip(hulls, at, strict=True))
    return choice, damage_now if bound is None else bound


def _swapped(units: Sequence[Unit], choice: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """Use what rounding left over: the best single change that fits, until none helps."""
    chosen = list(choice)
    left = budget - _total(units, chosen)[0]
    while True:
        best: tuple[float, int, int] | None = None
        for u, unit in enumerate(units):
            price = unit.cost - unit.cost[chosen[u]]
            gain = np.where(price <= left, unit.damage[chosen[u]] - unit.damage, -np.inf)
            i = int(gain.argmax())
            if gain[i] > 0 and (best is None or gain[i] > best[0]):
                best = (float(gain[i]), u, i)
        if best is None:
            return tuple(chosen)
        _, u, i = best
        left -= int(units[u].cost[i] - units[u].cost[chosen[u]])
        chosen[u] = i


def _grain(units: Sequence[Unit]) -> int:
    """The largest number of bytes that divides every step between options."""
    steps = (int(c - unit.cost.min()) for unit in units for c in unit.cost)
    return reduce(gcd, steps, 0) or 1


def _cells(units: Sequence[Unit], budget: int) -> int:
    room = budget - sum(int(unit.cost.min()) for unit in units)
    most = sum(int(unit.cost.max() - unit.cost.min()) for unit in units)
    options = sum(len(unit.cost) for unit in units)
    return options * (min(room, most) // _grain(units) + 1)


def _exact(units: Sequence[Unit], budget: int) -> tuple[int, ...]:
    """Least damage for every amount of spare budget, one unit after another."""
    grain = _grain(units)
    room = budget - sum(int(unit.cost.min()) for unit in units)
    most = sum(int(unit.cost.max() - unit.cost.min()) for unit in units)
    size = min(room, most) // grain + 1
    best = np.zeros(size)
    picks: list[Ints] = []
    for unit in units:
        extra = (unit.cost - unit.cost.min()) // grain
        grown = np.full(size, np.inf)
        pick = np.zeros(size, dtype=np.int64)
        for i in range(len(extra)):
            step = int(extra[i])
            if step >= size:
                continue
            candidate = best[: size - step] + unit.damage[i]
            better = candidate < grown[step:]
            grown[step:][better] = candidate[better]
            pick[step:][better] = i
        best = grown
        picks.append(pick)
    choice: list[int] = []
    spare = size - 1
    for unit, pick in zip(reversed(units), reversed(picks), strict=True):
        i = int(pick[spare])
        choice.append(i)
        spare -= int(unit.cost[i] - unit.cost.min()) // grain
    return tuple(reversed(choice))

"""How heads are cut into parts that blocks of threads read, and in which order these begin.

Heads have different widths, so equal numbers of tiles would not take equal time. A part belongs to one
head; a head's parts are merged by the last to finish. A device runs some blocks at once and begins others
as these end, so the largest parts come first.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

# parts of a head are given in units of 2^-20 of its tiles, which may be more when the kernel runs
ONE = 1 << 20
# a block of threads is worth its while from so many tiles
_LEAST = 8
# parts that begin behind others have to end so much earlier than those that all begin at once, and
# unequal parts so much earlier than equal ones
_BEHIND, _UNEQUAL = 1.1, 1.04
# largest parts that are tried, as shares of what a block would have of all work
_SIZES = (0.3, 0.4, 0.5, 0.62, 0.75, 0.88, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)


class Item(NamedTuple):
    """A part of one KV head of one sequence: coded tiles ``start`` to ``stop``, or its exact tokens.

    ``split`` numbers the parts of a head, of which ``coded`` are coded; exact tokens come last. Their
    results lie behind one another from ``slot``.
    """

    sequence: int
    head: int
    split: int
    coded: int
    slot: int
    start: int
    stop: int


def schedule(
    costs: Sequence[int], batch: int, tiles: int, blocks: int, *, entry: int, most: int, exact: bool
) -> list[Item]:
    """Parts in the order in which they should begin; every head of every sequence is covered once.

    Args:
        costs: of a tile of each KV head, in any unit.
        tiles: of each head of each sequence, about.
        blocks: of threads that run at once.
        entry: what a part costs besides its tiles.
        most: tiles that a part may have; one in twenty more where that leaves no small rest.
        exact: whether there are exact tokens.
    """
    spans = [cost * tiles for cost in costs]
    share = batch * sum(spans) / blocks
    least = [min(1.0, _LEAST / tiles)] * len(spans)
    tried: list[tuple[float, bool, list[list[float]]]] = []
    for largest in _SIZES:
        for even in (True, False):
            sizes = [min(largest * share, cost * most) for cost in costs]
            cuts = [_cuts(*one, even) for one in zip(spans, sizes, least, strict=True)]
            # exact tokens are few, and begin behind
            behind = batch * sum(map(len, cuts)) > blocks
            factor = _BEHIND if behind else 1.0 if even else _UNEQUAL
            tried.append((factor * _makespan(spans, cuts, batch, blocks, entry), behind, cuts))
    _, behind, best = min(tried, key=lambda found: found[0])
    items: list[tuple[float, Item]] = []
    slot = 0
    for sequence in range(batch):
        for head, (span, parts) in enumerate(zip(spans, best, strict=True)):
            count, start = len(parts), 0.0
            for split, part in enumerate(parts):
                place = sequence, head, split, count, slot
                stop = ONE if split + 1 == count else round(ONE * (start + part))
                items.append((span * part, Item(*place, round(ONE * start), stop)))
                start += part
            if exact:
                items.append((0.0, Item(sequence, head, count, count, slot, 0, 0)))
            slot += count + exact
    # sorting keeps the order of equals
    order = [item for _, item in sorted(items, key=lambda pair: -pair[0])]
    if behind:
        # those that begin at once are for different heads side by side: they need different things
        order[:blocks] = sorted(order[:blocks], key=lambda item: (item.split, item.sequence, item.head))
    return order


def _cuts(span: int, largest: float, least: float, even: bool) -> list[float]:
    """Shares of a head in parts of at most about ``largest``: equal ones, or full ones and a rest."""
    if not even:
        full = max(largest / span, least)
        count = int(1 / full)
        rest = 1 - count * full
        if count and rest >= max(least, 0.05 * full):
            return [full] * count + [rest]
        return [1 / max(count, 1)] * max(count, 1)
    count = max(1, min(-int(-span // largest), int(1 / least)))
    return [1 / count] * count


def _makespan(
    spans: Sequence[int], cuts: Sequence[Sequence[float]], batch: int, blocks: int, entry: int
) -> float:
    """When the last part ends if each block takes the largest part that is left."""
    one = [span * part + entry for span, parts in zip(spans, cuts, strict=True) for part in parts]
    ends = [0.0] * blocks
    for size in sorted(one * batch, reverse=True):
        heapq.heapreplace(ends, ends[0] + size)
    return max(ends)

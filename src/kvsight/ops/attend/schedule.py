"""Which block of threads reads which tiles: slices of equal cost of one line, all heads one behind another.

Heads have different widths, so equal numbers of tiles would not take equal time. A slice may end within a
head and begin another; every such part is an item, and a head's items are merged by the last to finish.
"""

from collections.abc import Sequence
from typing import NamedTuple

# parts of a head are given in units of 2^-20 of its tiles, which may be more when the kernel runs
ONE = 1 << 20
# a block of threads is worth its while from so many tiles
_LEAST = 8
_HALVINGS = 12


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
    costs: Sequence[int], batch: int, tiles: int, workers: int, *, entry: int, exact: bool
) -> list[list[Item]]:
    """Items of at most ``workers`` blocks of threads; every head of every sequence is covered once.

    Args:
        costs: of a tile of each KV head, in any unit.
        tiles: of each head of each sequence, about.
        entry: cost of beginning with another head once one has ended.
        exact: whether there are exact tokens.
    """
    workers = max(1, min(workers, -(-batch * len(costs) * tiles // _LEAST)))
    spans = [(b, h, cost * tiles) for b in range(batch) for h, cost in enumerate(costs)]
    low = sum(span for _, _, span in spans) / workers
    high = low + entry * len(spans) / workers + max(span for _, _, span in spans)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_cut(spans, middle, entry)) <= workers else (middle, high)
    parts = _cut(spans, high, entry)
    counts: dict[tuple[int, int], int] = {}
    for own in parts:
        for sequence, head, _, _ in own:
            counts[sequence, head] = counts.get((sequence, head), 0) + 1
    slots, slot = {}, 0
    for key, count in counts.items():
        slots[key] = slot
        slot += count + exact
    out: list[list[Item]] = []
    seen = dict.fromkeys(counts, 0)
    for own in parts:
        items: list[Item] = []
        for sequence, head, start, stop in own:
            key = sequence, head
            items.append(Item(*key, seen[key], counts[key], slots[key], start, stop))
            seen[key] += 1
            if exact and stop == ONE:
                items.append(Item(*key, counts[key], counts[key], slots[key], 0, 0))
        if items:
            out.append(items)
    return out


def _cut(
    spans: Sequence[tuple[int, int, int]], capacity: float, entry: int
) -> list[list[tuple[int, int, int, int]]]:
    """Spans (sequence, head, cost) in order, cut so that no block has more than ``capacity`` to do.

    Parts are (sequence, head, start, stop) in units of ``ONE``.
    """
    out: list[list[tuple[int, int, int, int]]] = [[]]
    left = capacity
    for sequence, head, cost in spans:
        start = 0
        while start < ONE:
            if out[-1]:
                left -= entry
            if left * ONE < cost:
                # less than the smallest part is left
                out.append([])
                left = capacity
            stop = min(ONE, start + max(1, int(left * ONE / cost)))
            out[-1].append((sequence, head, start, stop))
            left -= (stop - start) * cost / ONE
            start = stop
    return out

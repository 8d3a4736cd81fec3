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
        entry: cost of beginning with another head.
        exact: whether there are exact tokens.
    """
    workers = max(1, min(workers, -(-batch * len(costs) * tiles // _LEAST)))
    spans = [(b, h, cost * tiles + entry) for b in range(batch) for h, cost in enumerate(costs)]
    total = sum(span for _, _, span in spans)
    parts: list[list[tuple[int, int, int, int]]] = [[] for _ in range(workers)]
    at = 0
    for sequence, head, span in spans:
        # the first worker whose slice ends behind the start of this span
        worker, done = at * workers // total, 0
        while done < ONE:
            end = min((worker + 1) * total // workers - at, span)
            last = end >= span or worker == workers - 1
            upto = ONE if last else max(0, end - entry) * ONE // (span - entry)
            if upto > done:
                parts[worker].append((sequence, head, done, upto))
                done = upto
            worker += 1
        at += span
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

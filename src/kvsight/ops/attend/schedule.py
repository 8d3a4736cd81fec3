"""How heads are cut into parts that blocks of threads read, and in which order these begin.

Heads have different widths, so equal numbers of tiles would not take equal time. A part belongs to one head;
a head's parts are merged by the last to finish. A device runs some blocks at once and begins others as these
end, so the largest parts come first.
"""

from collections.abc import Sequence
from typing import NamedTuple

# parts of a head are given in units of 2^-20 of its tiles, which may be more when the kernel runs
ONE = 1 << 20
# a block of threads is worth its while from so many tiles
_LEAST = 8
_HALVINGS = 24


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
    costs: Sequence[int], batch: int, tiles: int, blocks: int, *, exact: bool, waves: float = 1
) -> list[Item]:
    """Parts in the order in which they should begin; every head of every sequence is covered once.

    Args:
        costs: of a tile of each KV head, in any unit.
        tiles: of each head of each sequence, about.
        blocks: of threads that run at once.
        exact: whether there are exact tokens.
        waves: how many times more parts than blocks, about.
    """
    counts = _counts([cost * tiles for cost in costs], batch, tiles, int(blocks * waves))
    items: list[tuple[float, Item]] = []
    slot = 0
    for sequence in range(batch):
        for head, (cost, count) in enumerate(zip(costs, counts, strict=True)):
            cuts = [ONE * i // count for i in range(count + 1)]
            for split in range(count):
                place = sequence, head, split, count, slot
                items.append((cost / count, Item(*place, cuts[split], cuts[split + 1])))
            if exact:
                items.append((0.0, Item(sequence, head, count, count, slot, 0, 0)))
            slot += count + exact
    # sorting keeps the order of equals
    return [item for _, item in sorted(items, key=lambda pair: -pair[0])]


def _counts(spans: Sequence[int], batch: int, tiles: int, blocks: int) -> list[int]:
    """Parts of each head such that the largest is as small as ``blocks`` of them in all allow."""
    most = max(1, tiles // _LEAST)
    low, high = sum(spans) * batch / blocks, float(max(spans))
    if low >= high:
        return [1] * len(spans)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        few = batch * sum(_parts(span, middle, most) for span in spans) <= blocks
        low, high = (low, middle) if few else (middle, high)
    return [_parts(span, high, most) for span in spans]


def _parts(span: int, largest: float, most: int) -> int:
    return min(most, max(1, -int(-span // largest)))

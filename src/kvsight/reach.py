"""Statistics of keys at positions that calibration did not see.

A cached key at position p is R(p) k. Pairs of coordinates that turn slowly are still near where they began
when a calibration window ends, so their means and covariances there say nothing of later positions. What
was seen is moved: a text that begins at position s has keys and queries turned by R(s), so a moment C
becomes the mean of R(s) C R(s)ᵀ over the places s where the text could begin.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.rope import Rope
from kvsight.stats import Moments, SideStats, Stats

# places that stand for all of them
_PLACES = 128
# multiples of the golden ratio fill an interval evenly, however many there are
_GOLDEN = (5**0.5 - 1) / 2


def spread(stats: Stats, positions: int) -> Stats:
    """As if the calibration's windows lay anywhere in contexts of ``positions`` tokens.

    Raises ``KVSightError`` where the model's rotation is not known. Values, models without RoPE and
    windows that are that long already stay as they are.
    """
    layers = tuple(replace(layer, key=_spread(layer.key, positions)) for layer in stats.layers)
    return replace(stats, layers=layers)


def _spread(side: SideStats, positions: int) -> SideStats:
    if side.rope_unknown is not None:
        raise KVSightError(
            f"positions={positions} turns keys to where they will be, and the model's rotation is not "
            f"known: {side.rope_unknown}. Calibrate on windows of {positions} tokens instead."
        )
    rope, places = side.rope, side.places
    if rope is None or places is None:
        return side
    room = positions - int(places.max()) - 1
    if room <= 0:
        return side
    shifts = torch.linspace(0, room, _PLACES).round().long()
    own = (torch.arange(len(places)) * _GOLDEN % 1 * room).long()
    seen = side.passage_places
    # runs of neighbours stay runs
    apart = None if seen is None else torch.full_like(seen, room // 2)
    return replace(
        side,
        moments=_moments(side.moments, rope, shifts),
        query=None if side.query is None else _moments(side.query, rope, shifts),
        metric=None if side.metric is None else rope.turn_matrix(side.metric, shifts).to(side.metric),
        damage=None if side.damage is None else rope.turn_matrix(side.damage, shifts).to(side.damage),
        sample=rope.turn(side.sample.double(), own).to(side.sample),
        places=places + own,
        passages=_moved(side.passages, rope, apart),
        passage_places=None if seen is None or apart is None else seen + apart,
    )


def _moments(seen: Moments, rope: Rope, shifts: Tensor) -> Moments:
    vectors = seen.total.unsqueeze(-2).expand(-1, len(shifts), -1)
    turns = rope.frequencies != 0
    # a pair that turns is at most as long as both of its peaks together
    longest = torch.hypot(seen.peak, seen.peak[:, rope.partners.long()])
    return replace(
        seen,
        total=rope.turn(vectors, shifts).mean(-2),
        outer=rope.turn_matrix(seen.outer, shifts),
        peak=torch.where(turns, longest, seen.peak),
    )


def _moved(vectors: Tensor | None, rope: Rope, shifts: Tensor | None) -> Tensor | None:
    return vectors if vectors is None or shifts is None else rope.turn(vectors.double(), shifts).to(vectors)

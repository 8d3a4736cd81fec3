"""Tiles of a layer whose model has a sliding window, or that keeps its last tokens exact.

Tokens move in such a layer: out of sight, or from exact to coded. So no graph can hold its steps.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvsight.cache.side import SideState
from kvsight.cache.tiles import Tiles
from kvsight.errors import KVSightError
from kvsight.tiling import TOKENS


class WindowedTiles(Tiles):
    """As ``Tiles``, with a count of its own; ``states`` has tokens that no later query sees, too.

    ``bare`` holds the exact last tokens, and knows how many tokens were freed.
    """

    plain = False

    def __init__(self, key: SideState, value: SideState) -> None:
        """Take over two states of one retention that fit tiles, and have coded tokens."""
        super().__init__(key, value)
        self._new = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "WindowedTiles":
        return WindowedTiles(*self.states())

    @property
    def length(self) -> int:
        return self.bare[0].freed + self.total + self._behind

    @property
    def shown(self) -> int:
        """How many of the last tokens the newest queries see together."""
        held = self.total + self._behind
        return held if self.window is None else min(held, self.window - 1 + self._new)

    def append(self, k: Tensor, v: Tensor, tokens: int | None = None) -> None:
        """As ``Tiles.append``; tokens that are no longer among the last are coded."""
        if self.counter.recording:
            raise KVSightError(
                "a graph cannot hold steps of a layer with a sliding window or exact last tokens; "
                "do not compile or capture this model."
            )
        self._new = k.shape[2]
        last = self.bare[0].retention.exact_last
        leave = max(0, self._behind + k.shape[2] - last)
        if self.tokens + leave > self.room:
            self._forget()
        key, value = self.bare
        if last:
            # codes must not depend on how long a token waited
            pools = [
                torch.cat([state.tail, x.detach().to(state.dense_dtype)], dim=2)
                for state, x in zip((key, value), (k, v), strict=True)
            ]
            k, v = (pool[:, :, :leave].to(k.dtype) for pool in pools)
            key, value = (
                replace(state, tail=pool[:, :, leave:].clone())
                for state, pool in zip((key, value), pools, strict=True)
            )
        if leave:
            super().append(k, v)
        self.bare = key, value

    def _forget(self) -> None:
        """Drop tiles that the next query does not see any of."""
        if self.window is None:
            return
        drop = max(0, self.tokens - (self.window - 1)) // TOKENS
        stay = -(-self.tokens // TOKENS) - drop
        if drop:
            # where they are, so that launches stay prepared
            for tiles in (t for side in self.tiles for t in side):
                tiles[:, :stay] = tiles[:, drop : drop + stay].clone()
            key, value = (replace(state, freed=state.freed + drop * TOKENS) for state in self.bare)
            self.bare = key, value
            self._coded -= drop * TOKENS
            self.counter.advance(self.first + self._coded, self.room)

    @property
    def window(self) -> int | None:
        return self.bare[0].retention.sliding


def has_window(key: SideState, value: SideState) -> bool:
    """Whether tokens of a layer move."""
    return any(s.retention.sliding is not None or s.retention.exact_last for s in (key, value))

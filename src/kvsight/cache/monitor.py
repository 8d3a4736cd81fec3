"""Watches what a cache is given, lightly, and says when it is not what the plan was calibrated on."""

import logging
from collections.abc import Iterator

from torch import Tensor

from kvsight.codec import Placement
from kvsight.drift import ENOUGH_TOKENS, LIMIT, Drift, Seen
from kvsight.plan import SIDES, LayerPlan, Plan, Side

_log = logging.getLogger("kvsight")


class Monitor:
    """Sums over a few tokens of every call that brings more than one; ``most`` per call and sequence."""

    def __init__(self, plan: Plan, most: int = 1024) -> None:
        self.plan, self.most = plan, most
        self._seen: dict[tuple[int, Side, int], Seen] = {}
        self._said = False

    def look(
        self, layer: LayerPlan, side: Side, placements: tuple[Placement, ...], x: Tensor, before: int
    ) -> None:
        """Count some of the new tokens x [B, H, n, d] of a side that already saw ``before``.

        ``placements`` are the layer's, on the device of x.
        """
        first = max(0, self.plan.retention(layer).exact_first - before)
        count = x.shape[2] - first
        if x.shape[2] < 2 or count < 1:
            return
        step = -(-count // self.most)
        x = x[:, :, first::step].detach()
        for i, placement in enumerate(placements):
            if placement.assumed is None:
                continue
            y = placement.codec.transform.forward(x[:, list(placement.heads)].float())
            self._add((layer.index, side, i), Seen.of(y))

    def merge(self, other: "Monitor") -> None:
        """Add what another monitor of the same plan has seen."""
        for key, seen in other._seen.items():
            self._add(key, seen)

    def _add(self, key: tuple[int, Side, int], seen: Seen) -> None:
        self._seen[key] = self._seen[key].add(seen) if key in self._seen else seen

    def drift(self) -> Drift | None:
        """Of all that was seen so far; None before the first tokens and for plans without moments."""
        rows = list(self._rows())
        if not rows:
            return None
        worst, where = max((value, name) for name, value, _ in rows)
        mean = sum(value for _, value, _ in rows) / len(rows)
        return Drift(min(count for *_, count in rows), mean, worst, where)

    def _rows(self) -> Iterator[tuple[str, float, int]]:
        placed: dict[tuple[int, Side, int], Placement] = {
            (layer.index, side, i): placement
            for layer in self.plan.layers
            for side in SIDES
            for i, placement in enumerate(layer.side(side))
        }
        for key, seen in self._seen.items():
            placement = placed[key]
            assert placement.assumed is not None
            values = seen.drift(placement.assumed)
            names = {"k": "keys", "v": "values"}
            for head, value in zip(placement.heads, values.tolist(), strict=True):
                yield f"layer {key[0]} {names[key[1]]} head {head}", value, seen.count

    def say(self) -> None:
        """Log a warning, once, when enough was seen and it is unlike the calibration."""
        if self._said or not self._seen:
            return
        if min(seen.count for seen in self._seen.values()) < ENOUGH_TOKENS:
            return
        drift = self.drift()
        if drift is not None and drift.beyond:
            self._said = True
            _log.warning(
                "this text is unlike what the plan was calibrated on: drift %.3g nats per coordinate "
                "(limit %g), most in %s (%.3g). Fit a plan on text of this kind.",
                drift.mean,
                LIMIT,
                drift.where,
                drift.worst,
            )

    def mute(self) -> None:
        """Never say anything; ``drift`` still works."""
        self._said = True

    def __deepcopy__(self, memo: dict[int, object]) -> "Monitor":
        fresh = Monitor(self.plan, self.most)
        fresh._seen, fresh._said = dict(self._seen), self._said
        return fresh


def monitored(plan: Plan, wanted: bool) -> Monitor | None:
    """A monitor, where it is wanted and the plan knows what it assumed."""
    known = any(p.assumed is not None for layer in plan.layers for s in SIDES for p in layer.side(s))
    return Monitor(plan) if wanted and known else None

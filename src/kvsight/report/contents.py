"""The records of a directory, sorted into what the page shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvsight.errors import KVSightError
from kvsight.records import Records, Row

UNCOMPRESSED = "uncompressed"
# the budget that the page speaks of where there is a choice
_SHOWN_BITS = 3.0
# more bits than asked for by this share still count as the budget
_SLACK = 1.02


@dataclass(frozen=True)
class Saving:
    """How many bits fewer than all other methods an arm needs for its KL; ``least`` if no other reaches it
    with the most bits that were tried."""

    bits: float
    least: bool


@dataclass(frozen=True)
class Contents:
    """Records by kind, in the order of measuring; ``arms`` are the quality records of compressing arms."""

    provenance: tuple[Row, ...]
    arms: tuple[Row, ...]
    refused: tuple[Row, ...]
    pairs: tuple[Row, ...]
    bits: tuple[Row, ...]
    damage: tuple[Row, ...]
    spectra: tuple[Row, ...]
    tasks: tuple[Row, ...]
    memory: tuple[Row, ...]
    fits: tuple[Row, ...]
    speed: tuple[Row, ...]
    break_even: tuple[Row, ...]

    @property
    def model(self) -> str:
        return str(self.provenance[0]["shared"]["model"])

    @property
    def ours(self) -> tuple[Row, ...]:
        """Our arms by rising budget."""
        return tuple(sorted((row for row in self.arms if row["ours"]), key=lambda row: row["budget"]))

    @property
    def shown(self) -> Row | None:
        """Our arm that the page speaks of: the one nearest to 3 bits."""
        return min(self.ours, key=lambda row: abs(row["budget"] - _SHOWN_BITS), default=None)

    @property
    def run_arms(self) -> tuple[str, ...]:
        """The packed arms that were run on tasks or timed, the shown one first."""
        names = dict.fromkeys(
            row["arm"] for row in (*self.tasks, *self.speed) if row["arm"] != UNCOMPRESSED
        )
        first = None if self.shown is None else self.shown["arm"]
        return tuple(sorted(names, key=lambda name: name != first))

    def pair(self, budget: float) -> Row | None:
        """The comparison with the best other method at a budget."""
        return next((row for row in self.pairs if row["key"] == [budget]), None)

    def saving(self, row: Row) -> Saving | None:
        """Of one of our arms; None where no other was compared with it, or tried with more bits."""
        pair = self.pair(row["budget"])
        if pair is None:
            return None
        if pair["bits_saved"] is not None:
            return Saving(pair["bits_saved"], least=False)
        others = [other for other in self.arms if not other["ours"]]
        bits = max(other["true_bits"] for other in others) - row["true_bits"]
        reached = min(other["kl"]["mean"] for other in others) <= row["kl"]["mean"]
        return None if reached or round(bits, 1) <= 0 else Saving(bits, least=True)

    def of_shown(self, rows: Sequence[Row]) -> Row | None:
        """The record of the shown arm, or the first of its kind."""
        shown = self.shown
        own = (row for row in rows if shown is not None and row["arm"] == shown["arm"])
        return next(own, rows[0] if rows else None)


def contents(records: Records) -> Contents:
    """Raises ``KVSightError`` where nothing was measured."""

    def rows(kind: str) -> tuple[Row, ...]:
        return tuple(records.of(kind))

    found = Contents(
        provenance=rows("provenance"),
        arms=tuple(row for row in records.of("quality") if row["arm"] != UNCOMPRESSED),
        refused=rows("refused"),
        pairs=rows("pair"),
        bits=rows("bits"),
        damage=rows("damage"),
        spectra=rows("spectrum"),
        tasks=rows("task"),
        memory=tuple(row for row in records.of("memory") if row["key"][1] != "fit"),
        fits=tuple(row for row in records.of("memory") if row["key"][1] == "fit"),
        speed=rows("speed"),
        break_even=rows("break_even"),
    )
    if not found.provenance or not (found.arms or found.tasks or found.speed or found.memory):
        raise KVSightError(f"{records.path} holds no measurements; run `kvsight compare -o` first.")
    return found


def series(row: Row) -> str:
    """What an arm is called at every budget: ``int axis=channel@3`` is of ``int axis=channel``."""
    return str(row["arm"]).rpartition("@")[0]


def frontier(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The arms that no other beats in both bits and KL, by rising bits."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["true_bits"], row["kl"]["mean"])):
        if row["kl"]["mean"] < (best[-1]["kl"]["mean"] if best else math.inf):
            best.append(row)
    return tuple(best)


def keeps_budget(row: Row) -> bool:
    """Whether an arm stores what was asked for, or less."""
    return bool(row["true_bits"] <= _SLACK * row["budget"])


def has_baseline(row: Row) -> bool:
    """Whether a task can turn out better than uncompressed: agreement is with the uncompressed model."""
    return bool(row["metric"] != "agreement")

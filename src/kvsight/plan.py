"""Which codec serves which layer, head and side; its byte ledger; its file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kvsight.codec import Placement
from kvsight.formats import Dense
from kvsight.retention import Retention, Stored

Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")


@dataclass(frozen=True)
class LayerPlan:
    """One cached layer. ``window`` is the model's sliding window (None = full attention)."""

    index: int
    window: int | None
    heads: int
    key: tuple[Placement, ...]
    value: tuple[Placement, ...]

    def side(self, side: Side) -> tuple[Placement, ...]:
        return self.key if side == "k" else self.value


@dataclass(frozen=True)
class LedgerRow:
    """Stored bits per element of one head's keys or values at the plan's reference length."""

    layer: int
    head: int
    side: Side
    codec: str
    format: str
    data_bits: float
    meta_bits: float
    window_bits: float
    true_bits: float

    def __getitem__(self, key: str) -> object:
        return asdict(self)[key]


@dataclass(frozen=True)
class Ledger:
    """Every head's bits, and apart from them the bytes of calibration tensors, paid once."""

    rows: tuple[LedgerRow, ...]
    static_bytes: int
    tokens: int

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Plan:
    """A fitted plan: the only thing that crosses from calibration to run time."""

    layers: tuple[LayerPlan, ...]
    method: str | dict[str, str]
    options: Mapping[str, object]
    sinks: int
    window: int
    dense_dtype: torch.dtype
    reference_length: int
    fingerprint: str
    config: Mapping[str, object]
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def true_bits(self) -> float:
        """Stored bits per cached element, K and V, all metadata counted, at the reference length."""
        return _bits(self, SIDES)

    @property
    def key_bits(self) -> float:
        return _bits(self, ("k",))

    @property
    def value_bits(self) -> float:
        return _bits(self, ("v",))

    def nbytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes that a cache of this plan holds after ``tokens`` tokens, to the byte."""
        total = 0
        for layer in self.layers:
            for side in SIDES:
                kept = self.stored(layer, side, tokens)
                for placement in layer.side(side):
                    total += len(placement.heads) * sum(_head_bytes(self, placement, kept))
        return batch * total

    def elements(self, tokens: int, batch: int = 1) -> int:
        """Numbers that the uncompressed cache holds after ``tokens`` tokens."""
        return batch * sum(
            self.retention(layer).visible(tokens) * len(p.heads) * p.codec.dim
            for layer in self.layers
            for side in SIDES
            for p in layer.side(side)
        )

    def retention(self, layer: LayerPlan) -> Retention:
        """What the plan keeps exact and the model drops; methods may keep more (``side_retention``)."""
        return Retention(self.sinks, self.window, layer.window)

    def stored(self, layer: LayerPlan, side: Side, tokens: int) -> Stored:
        """Sinks, coded and tail tokens of one side after ``tokens`` tokens."""
        placements = layer.side(side)
        return side_retention(self.retention(layer), placements).stored(tokens, side_block(placements))

    def __deepcopy__(self, memo: dict[int, object]) -> "Plan":
        # a plan never changes, so copies of a cache share it
        return self

    def ledger(self) -> Ledger:
        """One row per layer, head and side at ``reference_length`` tokens; static bytes apart."""
        rows = tuple(
            row
            for layer in self.layers
            for side in SIDES
            for placement in layer.side(side)
            for row in _ledger_rows(self, layer, side, placement)
        )
        static = sum(
            placement.static_nbytes
            for layer in self.layers
            for side in SIDES
            for placement in layer.side(side)
        )
        order = {"k": 0, "v": 1}
        return Ledger(
            tuple(sorted(rows, key=lambda r: (r.layer, order[r.side], r.head))),
            static,
            self.reference_length,
        )

    def save(self, path: str | Path) -> None:
        """Write a plan directory, all of it or nothing."""
        from kvsight.planfile import save_plan

        save_plan(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan directory; a missing, truncated or newer one raises ``KVSightError``."""
        from kvsight.planfile import load_plan

        return load_plan(Path(path))


def side_block(placements: tuple[Placement, ...]) -> int:
    """Tokens committed together: every head of a side commits the same ones."""
    return max(placement.block for placement in placements)


def side_retention(retention: Retention, placements: tuple[Placement, ...]) -> Retention:
    """``retention`` with what the side's methods keep exact by themselves."""
    for placement in placements:
        retention = retention.holding(placement.hold)
    return retention


def _head_bytes(plan: Plan, placement: Placement, kept: Stored) -> tuple[int, int, int]:
    """(codes, metadata, dense) bytes of one head."""
    form = placement.codec.format
    meta = form.meta_nbytes(kept.coded)
    dense = Dense(placement.codec.dim, plan.dense_dtype).nbytes(kept.dense)
    return form.nbytes(kept.coded) - meta, meta, dense


def _bits(plan: Plan, sides: tuple[Side, ...]) -> float:
    stored = elements = 0
    for layer in plan.layers:
        for side in sides:
            kept = plan.stored(layer, side, plan.reference_length)
            for placement in layer.side(side):
                heads = len(placement.heads)
                stored += heads * sum(_head_bytes(plan, placement, kept))
                elements += heads * placement.codec.dim * kept.visible
    return 8 * stored / elements


def _ledger_rows(plan: Plan, layer: LayerPlan, side: Side, placement: Placement) -> Iterator[LedgerRow]:
    form = placement.codec.format
    kept = plan.stored(layer, side, plan.reference_length)
    per_element = 8 / (placement.codec.dim * kept.visible)
    data, meta, dense = (n * per_element for n in _head_bytes(plan, placement, kept))
    for head in placement.heads:
        yield LedgerRow(
            layer.index,
            head,
            side,
            placement.codec.name,
            form.name,
            data,
            meta,
            dense,
            data + meta + dense,
        )


def digest(value: object) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()

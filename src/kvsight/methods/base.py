"""What a method is: a recipe from statistics and a budget to codecs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from kvsight.codec import Codec, Placement
from kvsight.errors import KVSightError
from kvsight.formats import Format
from kvsight.quantizers.base import Quantizer
from kvsight.retention import NOTHING, Hold, Retention
from kvsight.stats import SideStats
from kvsight.transforms import Transform

Side = Literal["k", "v"]
Option = bool | int | float | str
F = TypeVar("F", bound=Format)


@dataclass(frozen=True)
class Budget:
    """At most ``bits`` stored bits per visible element after ``seen`` tokens, exact tokens included.

    ``asked`` is the user's own number, for messages: a layer's share may differ by a byte. ``total`` is
    what keys and values may store on average, where one method got one budget for both.
    """

    bits: float
    seen: int
    retention: Retention
    dense_dtype: torch.dtype
    asked: float | None = None
    total: float | None = None

    @property
    def named(self) -> str:
        """The budget as its user knows it."""
        return f"{self.bits if self.asked is None else self.asked:.4g} bits"

    def cost(self, form: Format, dim: int | None = None, hold: Hold = NOTHING) -> float:
        """Stored bits per element of one head in this format, with what its method keeps exact.

        ``dim`` is head_dim, by default the format's.
        """
        dim = form.dim if dim is None else dim
        kept = self.retention.holding(hold).stored(self.seen, max(form.block, hold.commit))
        dense = kept.dense * dim * self.dense_dtype.itemsize
        return 8 * (form.nbytes(kept.coded) + dense) / (kept.visible * dim)

    def coded_bits(self) -> float:
        """What is left per coded element for a format of single tokens, once exact tokens are paid."""
        kept = self.retention.stored(self.seen, 1)
        if kept.coded == 0:
            return self.bits
        dense = kept.dense * 8 * self.dense_dtype.itemsize
        return (self.bits * kept.visible - dense) / kept.coded

    def best(self, candidates: Sequence[F], method: str, dim: int | None = None, hold: Hold = NOTHING) -> F:
        """The dearest affordable candidate (the first of equals); raises when none is."""
        costs = {form: self.cost(form, dim, hold) for form in candidates}
        affordable = [form for form in candidates if costs[form] <= self.bits + 1e-9]
        if affordable:
            return max(affordable, key=costs.__getitem__)
        cheapest = min(costs.values())
        raise KVSightError(
            f"{method} cannot meet {self.named}; its cheapest configuration here stores "
            f"{cheapest:.4g}. Raise the budget or choose another method."
        )


class Build(Protocol):
    """(side, stats, budget, options) to one placement per group of heads that share a format."""

    def __call__(
        self, side: Side, stats: SideStats, budget: Budget, options: Mapping[str, Option]
    ) -> tuple[Placement, ...]: ...


class RowMaker(Protocol):
    """A method fitted to one side of a layer, for rows of any whole number of bytes per head.

    ``damage`` [H, d + 1] is the predicted cost of rows of 0, 1, ... d bytes in the units of
    ``SideStats.damage``, nats of final KL per token; ``error`` [H, d + 1] is the squared error per vector.
    ``sizes`` are the rows in bytes that an allocation may choose from.
    """

    @property
    def sizes(self) -> Sequence[int]: ...

    @property
    def damage(self) -> Tensor: ...

    @property
    def error(self) -> Tensor: ...

    def place(self, rows: Sequence[int]) -> tuple[Placement, ...]:
        """Codecs whose heads store ``rows`` bytes per token."""
        ...


class Rows(Protocol):
    def __call__(self, side: Side, stats: SideStats, options: Mapping[str, Option]) -> RowMaker: ...


@dataclass(frozen=True)
class Method:
    """A published method. ``options`` are its settings with their defaults.

    A method with ``rows`` takes any row size, so a fractional budget is spread over layers and heads;
    the others round down to their next configuration. ``allocate`` is how ``fit`` spends the budget
    unless told otherwise. A ``fixed`` one says its bits itself and needs no budget. ``calibrated`` ones
    learn from the text, so that ``fit`` warns of a short one; for those with ``gradients`` it reads them,
    too. ``page`` is its page in docs/methods where that has another name.
    """

    name: str
    summary: str
    paper: str
    build: Build
    options: Mapping[str, Option] = field(default_factory=dict)
    rows: Rows | None = None
    allocate: str = "uniform"
    fixed: bool = False
    calibrated: bool = False
    gradients: bool = False
    page: str = ""

    def with_defaults(self, options: Mapping[str, object]) -> dict[str, Option]:
        """All options, given ones first; unknown names and misfitting values raise."""
        merged: dict[str, Option] = dict(self.options)
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(f"{k}={v}" for k, v in self.options.items()) or "none"
                raise KVSightError(f"{self.name} has no option {name!r}; its options: {known}.")
            merged[name] = _like(self.name, name, self.options[name], value)
        return merged


@dataclass(frozen=True)
class Family:
    """Methods whose names spell their settings: ``named`` makes one of any such name, or None."""

    usual: tuple[Method, ...]
    named: Callable[[str], Method | None]


def _like(method: str, name: str, default: Option, value: object) -> Option:
    """``value`` (perhaps text from a command line) as the type of ``default``."""
    kind = type(default)
    if kind is bool and str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
        return str(value).lower() in ("true", "1", "yes")
    if kind is not bool:
        try:
            return kind(str(value))
        except ValueError:
            pass
    raise KVSightError(
        f"{method} option {name!r} takes {kind.__name__} (default {default}); got {value!r}."
    )


def all_heads(
    name: str, stats: SideStats, transform: Transform, quantizer: Quantizer, hold: Hold = NOTHING
) -> tuple[Placement, ...]:
    """One placement for every head of the layer."""
    return (Placement(tuple(range(stats.heads)), Codec(name, transform, quantizer), hold=hold),)

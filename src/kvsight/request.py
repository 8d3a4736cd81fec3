"""What a user asks of ``fit``, checked before any model is read."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvsight.errors import KVSightError
from kvsight.formats import KINDS
from kvsight.methods import get
from kvsight.plan import SIDES, Side
from kvsight.rules import RULES

MAX_BITS = 16.0
ALLOCATIONS = ("uniform", *RULES)
EQUAL_ROWS = ("free", "heads", "layers")


@dataclass(frozen=True)
class Constraints:
    """Limits on what an allocation may choose.

    Args:
        min_head_bits: stored bits per coded element that every head gets at least.
        rows: "free"; "heads" for rows of one size in all heads of a layer's side; "layers" for the same
            bytes per token in every layer, keys and values together, as paged engines want.
        formats: allowed kinds of format (``formats.KINDS``); None allows all.
        protected: cache layers that stay exact, in 16 bits, within the budget.
    """

    min_head_bits: float = 0.0
    rows: str = "free"
    formats: tuple[str, ...] | None = None
    protected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """A method and a budget for each side, and what stays exact.

    ``total_bits`` or ``bytes_per_token`` is one budget for both sides; ``bits`` are ceilings per side.
    ``sinks=None`` leaves the number to the allocation.
    """

    methods: Mapping[Side, str]
    bits: Mapping[Side, float | None]
    options: Mapping[str, object]
    sinks: int | None = 0
    window: int = 0
    reference_length: int = 1024
    allocate: str | None = None
    total_bits: float | None = None
    bytes_per_token: float | None = None
    constraints: Constraints = field(default_factory=Constraints)

    def rule(self, side: Side) -> str:
        """How this side's budget is spent."""
        return get(self.methods[side]).allocate if self.allocate is None else self.allocate

    @property
    def joint(self) -> bool:
        """Whether keys and values draw on one budget."""
        one = self.total_bits is not None or self.bytes_per_token is not None
        return one and self.rule("k") == self.rule("v") != "uniform"


def make_request(
    method: str | Mapping[str, str],
    bits: float | None = None,
    *,
    key_bits: float | None = None,
    value_bits: float | None = None,
    options: Mapping[str, object] | None = None,
    allocate: str | None = None,
) -> Request:
    """A request for one method or one per side; a budget per side defaults to ``bits``."""
    names = {"k": method, "v": method} if isinstance(method, str) else dict(method)
    if set(names) != {"k", "v"}:
        raise KVSightError(f"method is a name or {{'k': name, 'v': name}}; got keys {sorted(names)}.")
    limits: dict[Side, float | None] = {
        "k": bits if key_bits is None else key_bits,
        "v": bits if value_bits is None else value_bits,
    }
    total = bits if key_bits is None and value_bits is None else None
    methods: dict[Side, str] = {"k": names["k"], "v": names["v"]}
    return Request(methods, limits, options or {}, allocate=allocate, total_bits=total)


def check(request: Request) -> None:
    """Raise ``KVSightError`` for what no model could satisfy."""
    for side, name in request.methods.items():
        get(name)
        limit = request.bits[side]
        if limit is None and name != "identity" and request.bytes_per_token is None:
            raise KVSightError(
                "no budget: give bits= (--bits), or key_bits= and value_bits= (--key-bits, --value-bits), "
                "or bytes= per token (--bytes), or max_kl= (--max-kl)."
            )
        if limit is not None and not 0 < limit <= MAX_BITS:
            raise KVSightError(f"bits must be above 0 and at most {MAX_BITS:g}; got {limit:g}.")
    if request.bytes_per_token is not None and not request.bytes_per_token > 0:
        raise KVSightError(f"bytes per token must be above 0; got {request.bytes_per_token:g}.")
    for name, count in (("sinks", request.sinks), ("window", request.window)):
        if count is not None and count < 0:
            raise KVSightError(f"{name} counts tokens and cannot be negative; got {count}.")
    if request.reference_length < 1:
        raise KVSightError(f"reference_length must be positive; got {request.reference_length}.")
    if request.allocate is not None:
        one_of("allocate", request.allocate, ALLOCATIONS)
    _check_constraints(request)


def _check_constraints(request: Request) -> None:
    limits = request.constraints
    one_of("rows", limits.rows, EQUAL_ROWS)
    for name in limits.formats or ():
        one_of("formats", name, KINDS)
    if not 0 <= limits.min_head_bits <= MAX_BITS:
        raise KVSightError(
            f"min_head_bits must be from 0 to {MAX_BITS:g} stored bits; got {limits.min_head_bits:g}."
        )
    if limits != Constraints() and any(request.rule(side) == "uniform" for side in SIDES):
        raise KVSightError(
            "constraints guide an allocation, and 'uniform' has no choice to make. "
            "Use allocate='measured', or leave the constraints out."
        )
    if limits.rows == "layers" and not request.joint and len(set(request.bits.values())) > 1:
        raise KVSightError(
            "equal layers need one budget for keys and values; give bits= alone, without key_bits= "
            "and value_bits=."
        )


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise for an unknown word, with the nearest one and the list."""
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise KVSightError(f"unknown {name} {value!r}.{hint} Available: {', '.join(known)}.")

"""What is compared: methods and their options, from the registry and from outside, at budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvsight.errors import KVSightError
from kvsight.eval.peers import BACKENDS, missing
from kvsight.methods import available, get
from kvsight.request import MAX_BITS

OURS = "sight"
# copies of the model's own numbers: the reference point, not a rival
CONTROL = "identity"
UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class Contender:
    """A method with its options; ``external`` ones are quantisers of other libraries."""

    method: str
    options: Mapping[str, str]
    external: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.method, *(f"{n}={v}" for n, v in self.options.items())])

    def arm(self, bits: float) -> str:
        """How records call it at a budget."""
        return f"{self.name}@{bits:g}"


def contenders(methods: str) -> tuple[tuple[Contender, ...], tuple[str, ...]]:
    """What ``all`` or ``name[:option=value]...,name...`` stands for, and why some of ``all`` is left out.

    Raises ``KVSightError`` for unknown methods and options, and for backends that are not installed.
    """
    if methods == "all":
        own = [Contender(name, {}) for name in available() if name != CONTROL]
        reasons = {name: missing(name) for name in BACKENDS}
        others = [Contender(name, {}, external=True) for name, why in reasons.items() if why is None]
        skipped = tuple(f"{name} is left out: {why}" for name, why in reasons.items() if why is not None)
        return (*own, *others), skipped
    named = [_parse(text.strip()) for text in methods.split(",") if text.strip()]
    found = tuple(c for c in named if c.method != CONTROL)
    for twice in {c.name for c in found if found.count(c) > 1}:
        raise KVSightError(f"--methods names {twice!r} twice; name it once.")
    return found, ()


def _parse(text: str) -> Contender:
    method, *pairs = text.split(":")
    options = dict(_option(text, pair) for pair in pairs)
    if method in BACKENDS:
        why = missing(method)
        if why is not None or options:
            raise KVSightError(f"{method} cannot take part: {why or 'it takes no options here'}.")
        return Contender(method, {}, external=True)
    get(method).with_defaults(options)
    return Contender(method, options)


def _option(text: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise KVSightError(f"--methods takes name:option=value; got {text!r}.")
    return name, value


def budgets(text: str) -> tuple[float, ...]:
    """Rising budgets of ``2,2.5,3``, each above 0 and at most 16 bits per element."""
    try:
        bits = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise KVSightError(f"--bits takes numbers, as in 2,2.5,3; got {text!r}.") from None
    wrong = [b for b in bits if not 0 < b <= MAX_BITS]
    if wrong:
        raise KVSightError(f"bits must be above 0 and at most {MAX_BITS:g}; got {wrong[0]:g}.")
    return bits


def named(found: Sequence[Contender]) -> str:
    """The contenders as one text, the same for the same ones."""
    return ", ".join(sorted(c.name for c in found))

"""What all tasks share: what they are made of, what they ask of an arm, and what comes back."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from kvsight.errors import KVSightError
from kvsight.eval.tasks.arms import Arm

# where a config names no limit, and how far a default goes where it names a very long one
_UNKNOWN_LIMIT = 2048
_DEFAULT_MOST = 8192


@dataclass(frozen=True)
class Source:
    """A text by its name."""

    name: str
    text: str

    @property
    def identity(self) -> str:
        """The name with the first half of the text's sha256."""
        return f"{self.name} {hashlib.sha256(self.text.encode()).hexdigest()[:32]}"


@dataclass(frozen=True, eq=False)
class Setting:
    """What tasks are made of, the same for every arm.

    Args:
        texts: what books, probes and prompts are cut from.
        lambada: passages in LAMBADA's form, one JSON object with a ``text`` per line.
        samples: how many samples of every task; None leaves the number to the task.
        length: longest context in tokens, the model's limit or less.
        generated: tokens of a continuation.
    """

    model: PreTrainedModel
    tokenizer: Any
    texts: tuple[Source, ...]
    lambada: Source | None
    samples: int | None
    length: int
    generated: int

    def __post_init__(self) -> None:
        names = [source.name for source in self.texts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            # a sample is told by the name of its text
            raise KVSightError(f"two texts are named {twice}; give each a name of its own.")

    def describe(self) -> dict[str, str | int]:
        """By name, what numbers may depend on."""
        return {
            "texts": ", ".join(source.identity for source in self.texts),
            "lambada": "none" if self.lambada is None else self.lambada.identity,
            "length": self.length,
            "generated": self.generated,
        }


@dataclass(frozen=True)
class Part:
    """Means over ``count`` tokens of one sample that lie at one place: a distance, a range of positions."""

    at: Mapping[str, int]
    count: int
    means: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """One sample's value of the task's metric, further values by name (0 or more), and its parts."""

    id: str
    value: float
    extras: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task: ``prepare`` makes items of so many samples once, ``measure`` reads one item with one arm.

    Args:
        samples: how many by default.
        least, most: what the metric can be at all.
        uses: names from ``Setting.describe`` that its numbers depend on.
        needs: what must be given for the task to run, or "".
        places: what its parts are called in a record.
    """

    name: str
    metric: str
    higher_is_better: bool
    least: float
    most: float
    samples: int
    uses: tuple[str, ...]
    prepare: Callable[[Setting, int], tuple[Any, ...]]
    measure: Callable[[Arm, Any], tuple[Sample, ...]]
    needs: str = ""
    places: str = ""

    def count(self, setting: Setting) -> int:
        return self.samples if setting.samples is None else setting.samples

    def items(self, setting: Setting) -> tuple[Any, ...]:
        """What every arm is given."""
        return self.prepare(setting, self.count(setting))

    def conditions(self, setting: Setting) -> dict[str, str | int]:
        """What the numbers depend on, beside model and versions."""
        described = setting.describe()
        return {"samples": self.count(setting), **{name: described[name] for name in self.uses}}


def context_limit(model: PreTrainedModel) -> int:
    """The longest context that the model's config allows."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _UNKNOWN_LIMIT)


def context_length(model: PreTrainedModel, asked: int | None) -> int:
    """What was asked for, or the model's limit up to 8,192; more than the limit is refused."""
    limit = context_limit(model)
    if asked is not None and asked > limit:
        raise KVSightError(f"contexts of {asked} tokens are longer than the model's {limit}; ask for less.")
    return min(limit, _DEFAULT_MOST) if asked is None else asked

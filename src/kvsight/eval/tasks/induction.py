"""Induction: a sequence of random tokens, other text, and the same sequence again.

Nothing but the context foretells a random token. The first token of the second copy is not scored.
"""

from kvsight.eval.tasks import probes
from kvsight.eval.tasks.base import Setting, Task
from kvsight.eval.tasks.probes import Block, Material

_TOKENS = 32


def block(material: Material) -> Block:
    """Tokens drawn uniformly from those that the text uses, so that none is special or untrained."""
    special = set(material.tokenizer.all_special_ids)
    ordinary = sorted(set(material.ids) - special)
    drawn = material.random.choices(ordinary, k=_TOKENS)
    return Block(drawn, drawn, list(range(1, _TOKENS)))


def _prepare(setting: Setting) -> tuple[probes.Probe, ...]:
    return probes.prepare(setting, TASK.name, TASK.count(setting), block)


TASK = Task(
    "induction",
    "accuracy",
    True,
    0.0,
    1.0,
    8,
    ("texts", "length"),
    _prepare,
    probes.measure,
    places="distances",
)

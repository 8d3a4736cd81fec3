"""Copying: a passage of text, other text, and the same passage again.

Small models copy words in their order long before they copy random tokens. Part of the accuracy needs no
copy, since text foretells itself; the uncompressed model has that part too.
"""

from kvsight.eval.tasks import probes
from kvsight.eval.tasks.base import Setting, Task
from kvsight.eval.tasks.probes import Block, Material, filler

_TOKENS = 48


def block(material: Material) -> Block:
    """Consecutive tokens from a random place of the text."""
    passage = filler(material, _TOKENS)
    return Block(passage, passage, list(range(1, _TOKENS)))


def _prepare(setting: Setting) -> tuple[probes.Probe, ...]:
    return probes.prepare(setting, TASK.name, TASK.count(setting), block)


TASK = Task(
    "copy",
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

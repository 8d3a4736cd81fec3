"""Copying: a passage of text, other text, and the same passage again.

Small models copy words in their order long before they copy random tokens. Part of the accuracy needs no
copy, since text foretells itself; the uncompressed model has that part too.
"""

from kvsight.eval.tasks.probes import Block, Material, filler, probe_task

_TOKENS = 48


def block(material: Material) -> Block:
    """Consecutive tokens from a random place of the text."""
    passage = filler(material, _TOKENS)
    return Block(passage, passage, list(range(1, _TOKENS)))


TASK = probe_task("copy", block)

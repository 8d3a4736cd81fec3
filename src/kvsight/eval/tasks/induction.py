"""Induction: a sequence of random tokens, other text, and the same sequence again.

Nothing but the context foretells a random token. The first token of the second copy is not scored.
"""

from kvsight.eval.tasks.probes import Block, Material, probe_task

_TOKENS = 32


def block(material: Material) -> Block:
    """Tokens drawn uniformly from those that the text uses, so that none is special or untrained."""
    special = set(material.tokenizer.all_special_ids)
    ordinary = sorted(set(material.ids) - special)
    drawn = material.random.choices(ordinary, k=_TOKENS)
    return Block(drawn, drawn, list(range(1, _TOKENS)))


TASK = probe_task("induction", block)

"""Key–value recall: pairs of names, other text, then each key again; what is its value?

Keys and values are capitalised words of the text, paired at random. The list is shown several times in
changing order, since small models need that; only the tokens of the values in the question are scored.
"""

import re

from kvsight.errors import KVSightError
from kvsight.eval.tasks.probes import Block, Material, probe_task
from kvsight.eval.tasks.tokens import encode

_PAIRS = 6
_SHOWN = 4
# a word that takes more tokens than this is left out: questions stay short in any tokenizer
_WORD_TOKENS = 2
_NAME = re.compile(r"\b[A-Z][a-z]{3,}\b")
# names are sought in the beginning of the text, which is long enough
_CHARACTERS = 200_000


def block(material: Material) -> Block:
    """Six pairs, shown four times and asked for once."""
    words = _names(material, 2 * _PAIRS)
    separator = encode(material.tokenizer, ",")
    pairs = list(zip(words[:_PAIRS], words[_PAIRS:], strict=True))
    shown: list[int] = []
    for _ in range(_SHOWN):
        material.random.shuffle(pairs)
        for key, value in pairs:
            shown += [*key, *value, *separator]
    material.random.shuffle(pairs)
    asked: list[int] = []
    scored: list[int] = []
    for key, value in pairs:
        start = len(asked) + len(key)
        scored += range(start, start + len(value))
        asked += [*key, *value, *separator]
    return Block(shown, asked, scored)


def _names(material: Material, count: int) -> list[list[int]]:
    """Different words with a space before them, as token ids."""
    known = sorted(set(_NAME.findall(material.text[:_CHARACTERS])))
    material.random.shuffle(known)
    out: list[list[int]] = []
    for word in known:
        ids = encode(material.tokenizer, f" {word}")
        if len(ids) <= _WORD_TOKENS:
            out.append(ids)
        if len(out) == count:
            return out
    raise KVSightError(
        f"recall needs {count} capitalised words of at most {_WORD_TOKENS} tokens; the text has "
        f"{len(out)}. Give a longer text."
    )


TASK = probe_task("recall", block)

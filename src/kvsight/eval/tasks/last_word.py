"""Last words of passages: is the whole word foretold, given what comes before it?

``lambada`` reads LAMBADA's passages (Paperno et al., 2016, https://arxiv.org/abs/1606.06031), chosen so
that people need all of the passage for the word. ``last-word`` cuts passages from running text, where
nobody made sure of that: it is easier in part and impossible in part, and not comparable with LAMBADA.
"""

import json
import re
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, arange, tensor

from kvsight.errors import KVSightError
from kvsight.eval.tasks.arms import Arm, score
from kvsight.eval.tasks.base import Sample, Setting, Source, Task
from kvsight.eval.tasks.tokens import encode, lead, spread

# a passage of running text has at least so many words, as LAMBADA's have (75 on average)
_WORDS = 60
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_LAST = re.compile(r"([^\W\d_]{3,})\s*[.!?]$")


@dataclass(frozen=True, eq=False)
class Passage:
    """Ids [T] of a passage; its last ``target`` tokens are the word."""

    id: str
    ids: Tensor
    target: int


def lambada_passages(source: Source) -> list[tuple[str, str]]:
    """(context, " word") of every line of a file in LAMBADA's form."""
    out = []
    for number, line in enumerate(source.text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"].strip()
            context, word = text.rsplit(maxsplit=1)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise KVSightError(
                f"{source.name}, line {number}: not a LAMBADA passage; "
                'wanted a JSON object per line, {"text": "... last"}.'
            ) from None
        out.append((context, f" {word}"))
    return out


def text_passages(source: Source) -> list[tuple[str, str]]:
    """(context, " word") of passages of whole sentences, none of which share a sentence."""
    out = []
    for paragraph in source.text.split("\n"):
        kept: list[str] = []
        for sentence in _SENTENCE.split(paragraph.strip()):
            kept.append(sentence)
            passage = " ".join(kept)
            found = _LAST.search(passage)
            if len(passage.split()) >= _WORDS and found and passage[: found.start()].strip():
                out.append((passage[: found.start()].rstrip(), f" {found[1]}"))
                kept = []
    return out


def _prepare_lambada(setting: Setting) -> tuple[Passage, ...]:
    if setting.lambada is None:
        raise KVSightError("lambada reads a file of passages; give --lambada FILE.")
    return _encoded(setting, lambada_passages(setting.lambada), LAMBADA.count(setting))


def _prepare_text(setting: Setting) -> tuple[Passage, ...]:
    found = [pair for source in setting.texts for pair in text_passages(source)]
    return _encoded(setting, found, LAST_WORD.count(setting))


def _encoded(setting: Setting, found: list[tuple[str, str]], count: int) -> tuple[Passage, ...]:
    if not found:
        raise KVSightError("the text has no passage that ends with a word; give a longer text.")
    first = lead(setting.tokenizer)
    passages = []
    for i in spread(count, len(found)):
        context, word = found[i]
        before = encode(setting.tokenizer, context)
        whole = encode(setting.tokenizer, context + word)
        # a word may change the last token before it: what follows the common start is the target
        common = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        )
        target = len(whole) - common
        ids = tensor([*first, *whole])[-setting.length :]
        passages.append(Passage(str(i), ids, target))
    return tuple(passages)


def _measure(arm: Arm, passage: Passage) -> tuple[Sample, ...]:
    scores = score(arm, passage.ids)
    word = arange(len(passage.ids) - passage.target, len(passage.ids))
    right = float(scores.accuracy(word) == 1)
    return (Sample(passage.id, right, {"loss": passage.target * scores.mean_loss(word)}),)


LAMBADA = Task(
    "lambada",
    "accuracy",
    True,
    0.0,
    1.0,
    128,
    ("lambada", "length"),
    _prepare_lambada,
    _measure,
    needs="lambada",
)
LAST_WORD = Task("last-word", "accuracy", True, 0.0, 1.0, 64, ("texts", "length"), _prepare_text, _measure)

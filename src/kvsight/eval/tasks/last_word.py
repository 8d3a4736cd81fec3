"""Last words of passages: is the whole word foretold, given what comes before it?

``lambada`` reads LAMBADA's passages (Paperno et al., 2016, https://arxiv.org/abs/1606.06031), chosen so
that people need all of the passage for the word. ``last-word`` cuts passages from running text, where
nobody made sure of that: it is easier in part and impossible in part, and not comparable with LAMBADA.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import Tensor, arange, tensor

from kvsight.errors import KVSightError
from kvsight.eval.tasks.arms import Arm, score
from kvsight.eval.tasks.base import Sample, Setting, Source, Task
from kvsight.eval.tasks.tokens import encode, lead, spread

# a passage of running text has at least so many words, as LAMBADA's have (75 on average)
_WORDS = 60
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_BLANK = re.compile(r"\n\s*\n")
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
    # a text of wrapped lines has no line of so many words; there, blank lines part paragraphs
    return _passages(source.text.split("\n")) or _passages(_BLANK.split(source.text))


def _passages(paragraphs: Sequence[str]) -> list[tuple[str, str]]:
    out = []
    for paragraph in paragraphs:
        kept: list[str] = []
        for sentence in _SENTENCE.split(paragraph.strip()):
            kept.append(sentence)
            passage = " ".join(kept)
            found = _LAST.search(passage)
            if len(passage.split()) >= _WORDS and found and passage[: found.start()].strip():
                out.append((passage[: found.start()].rstrip(), f" {found[1]}"))
                kept = []
    return out


def _prepare_lambada(setting: Setting, count: int) -> tuple[Passage, ...]:
    if setting.lambada is None:
        raise KVSightError("lambada reads a file of passages; give --lambada FILE.")
    return _encoded(setting, lambada_passages(setting.lambada), count)


def _prepare_text(setting: Setting, count: int) -> tuple[Passage, ...]:
    found = [pair for source in setting.texts for pair in text_passages(source)]
    return _encoded(setting, found, count)


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
    name="lambada",
    metric="accuracy",
    higher_is_better=True,
    least=0.0,
    most=1.0,
    samples=128,
    uses=("lambada", "length"),
    prepare=_prepare_lambada,
    measure=_measure,
    needs="lambada",
)
LAST_WORD = replace(
    LAMBADA, name="last-word", samples=64, uses=("texts", "length"), prepare=_prepare_text, needs=""
)

"""Token ids as tasks want them."""

from typing import Any

from torch import Tensor, tensor

from kvsight.errors import KVSightError
from kvsight.eval.tasks.base import Source


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def lead(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts first, where it does: models are used to it."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("", verbose=False)["input_ids"][:1] == [first] else []


def source_ids(tokenizer: Any, source: Source, least: int) -> Tensor:
    """Ids [n] of a text of at least so many tokens."""
    ids = encode(tokenizer, source.text)
    if len(ids) < least:
        raise KVSightError(
            f"the text {source.name} has {len(ids)} tokens; this task takes {least}. "
            "Give a longer text, or a shorter --length."
        )
    return tensor(ids)


def spread(count: int, among: int) -> list[int]:
    """``count`` indices, or as many as there are, spread evenly over ``among``."""
    count = min(count, among)
    return [i * among // count for i in range(count)]

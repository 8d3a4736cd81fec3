"""Text in, token windows out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from kvsight.errors import KVSightError


class Tokenizer(Protocol):
    """What this module needs of a transformers tokenizer."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, verbose: bool
    ) -> "dict[str, Sequence[int]]": ...


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file. Raises KVSightError if it is missing, unreadable or empty."""
    try:
        text = Path(path).read_bytes().decode()
    except FileNotFoundError:
        raise KVSightError(f"Text file {path} does not exist; give the path of a text file.") from None
    except UnicodeDecodeError as error:
        raise KVSightError(
            f"Text file {path} is not UTF-8 (byte {error.start}); convert it to UTF-8."
        ) from None
    except OSError as error:
        raise KVSightError(
            f"Text file {path} cannot be read ({error.strerror}); give the path of a text file."
        ) from None
    if not text.strip():
        raise KVSightError(f"Text file {path} is empty; give a file with text in it.")
    return text


def windows(tokenizer: Tokenizer, text: str, length: int = 1024, count: int | None = None) -> torch.Tensor:
    """Consecutive windows of `length` tokens from the start of the text: int64 [n, length].

    No special tokens are added, and the tokens left over at the end are dropped. `count` is the
    most windows to return; None returns all. Raises KVSightError for a text without one window.
    """
    if length < 2:
        raise KVSightError(f"A window has 2 tokens or more; got a length of {length}.")
    if count is not None and count < 1:
        raise KVSightError(f"The number of windows is 1 or more; got {count}.")
    if not text.strip():
        raise KVSightError(f"The text is empty; windows of {length} tokens need at least {length}.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = len(ids) // length
    if found == 0:
        raise KVSightError(
            f"The text has {len(ids)} tokens, one window takes {length}; "
            "give a longer text or shorter windows."
        )
    kept = found if count is None else min(found, count)
    return torch.tensor(ids[: kept * length], dtype=torch.int64).view(kept, length)

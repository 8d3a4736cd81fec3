"""What a broken law says."""

from collections.abc import Callable

import torch

from kvsight.errors import KVSightError


class LawBroken(AssertionError):
    """A law of this module does not hold; the message starts with the law's name."""


def hold(law: str, holds: bool, otherwise: str) -> None:
    """Raise ``LawBroken`` unless the law holds; ``otherwise`` says what was found."""
    if not holds:
        raise LawBroken(f"{law}: {otherwise}")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refused(call: Callable[[], object], what: str, naming: str) -> None:
    """``call`` must raise one clear ``KVSightError`` line that contains ``naming``."""
    try:
        call()
    except KVSightError as error:
        text = str(error)
        clear = "\n" not in text and naming in text and any(sign in text for sign in (". ", "; "))
        hold("refusals", clear, f"{what}: message {text!r} does not say what was wrong and what to do")
    except Exception as error:
        raise LawBroken(f"refusals: {what} raises {error!r} instead of KVSightError") from error
    else:
        raise LawBroken(f"refusals: {what} is taken")

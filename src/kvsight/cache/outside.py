"""Code that ``torch.compile`` leaves alone."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

_REASON = (
    "kvsight: a compiled step wants a cache in tiles with room for it. Fit the plan with the option "
    "layout=tiles, feed 64 tokens and then call cache.reserve(tokens)."
)


def outside_graphs(function: _F) -> _F:
    """``function``, run as it is between graphs, with all that it calls.

    Where a graph breaks, torch compiles what is called next piece by piece, and inside of a piece nothing
    tells that from one whole graph.
    """
    kept: list[Callable[..., Any]] = []

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # importing the compiler takes seconds
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not kept:
            kept.append(torch.compiler.disable(function, reason=_REASON))
        return kept[0](*args, **kwargs)

    return run  # type: ignore[return-value]

"""Code that ``torch.compile``, or ``torch.autocast``, leaves alone."""

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


def _unwatched() -> bool:
    """Whether the compiler looks at nothing that is called now: to keep it off takes 10 µs a call."""
    # a function of torch's own: without it the compiler is always kept off
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return callback is not None and callback() is None


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
        if not torch.compiler.is_compiling() and _unwatched():
            return function(*args, **kwargs)
        return kept[0](*args, **kwargs)

    return run  # type: ignore[return-value]


def outside_autocast(function: _F) -> _F:
    """``function``, run in the precision that it chooses itself."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return function(*args, **kwargs)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]

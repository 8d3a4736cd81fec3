"""What attention by a kernel answers to whoever asks for its gradient."""

from typing import Any

import torch
from torch import Tensor

from kvsight.errors import KVSightError


class _Without(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, instead: str) -> Tensor:
        ctx.instead = instead
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KVSightError(f"attention on codes in tiles has no gradient; {ctx.instead}.")


def without_gradient(out: Tensor, q: Tensor, instead: str) -> Tensor:
    """``out``; where queries want a gradient, asking for it raises ``KVSightError``: do this ``instead``.

    As far as torch knows a kernel's output depends on nothing, so the gradient would be lost silently.
    """
    if not (q.requires_grad and torch.is_grad_enabled()):
        return out
    result: Tensor = _Without.apply(out, q, instead)  # type: ignore[no-untyped-call]
    return result

"""Which attention runs: plain torch, or Triton where it is asked for and reads these segments."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.ops.attend import ref
from kvsight.ops.attend.ref import Segment, head_dim

BACKENDS = ("ref", "triton")


def attend(  # noqa: PLR0913
    q: Tensor,
    keys: Sequence[Segment],
    values: Sequence[Segment],
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scaling · q kᵀ) v over packed segments; arguments and result are those of ``ref.attend``.

    ``backend``: "ref" (default) is plain torch, "triton" raises for what its kernels do not cover. The
    kernels have run in Triton's interpreter only, so nothing chooses them by itself.
    """
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and q.requires_grad):
        from kvsight.ops.attend import op

        tensors, layout = op.flatten((keys, values))
        dim = head_dim(values[0])
        out = op.attend_op(q, tensors, layout, dim, scaling, mask, causal, softcap, sink_logits, backend)
        return cast(Tensor, out)
    function = ref.attend
    if choose(q, keys, values, causal and mask is None, backend) == "triton":
        from kvsight.ops.attend import triton

        function = triton.attend
    return function(
        q,
        keys,
        values,
        scaling=scaling,
        mask=mask,
        causal=causal,
        softcap=softcap,
        sink_logits=sink_logits,
    )


def choose(
    q: Tensor,
    keys: Sequence[Segment],
    values: Sequence[Segment],
    causal: bool = True,
    backend: str | None = None,
) -> str:
    """``backend`` if it can do this, or raise; plain torch where none is named."""
    if backend in (None, "ref"):
        return "ref"
    if backend != "triton":
        raise KVSightError(f"backend is one of {', '.join(BACKENDS)}; got {backend!r}.")
    if not has_triton():
        raise KVSightError("backend 'triton' needs the triton package; pip install 'kvsight[gpu]'.")
    if not _supports(q, keys, values, causal):
        raise KVSightError(
            f"backend 'triton' does not read these segments for queries {tuple(q.shape)} in {q.dtype} on "
            f"{q.device}; leave backend unset for plain torch."
        )
    return backend


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether triton is installed; it is not imported for the answer."""
    return find_spec("triton") is not None


def _supports(q: Tensor, keys: Sequence[Segment], values: Sequence[Segment], causal: bool) -> bool:
    from kvsight.ops.attend import triton

    return triton.supports(q, keys, values, causal)

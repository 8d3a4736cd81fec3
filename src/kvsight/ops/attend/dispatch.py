"""Which attention runs: Triton for decoding on GPUs where its kernels read the codes, else plain torch."""

import os
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
# more queries than this reuse what is decoded, and matrix products are better at it
DECODE = 16
_FORCED = "KVSIGHT_ATTEND"


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

    ``backend``: "ref" is plain torch, "triton" raises for what its kernels do not cover, "auto" (default)
    is what README.md's table says. The environment variable KVSIGHT_ATTEND replaces the default.
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
    """``backend`` if it can do this, or raise; where none is named, README.md's table."""
    backend = backend or os.environ.get(_FORCED) or "auto"
    if backend == "ref" or (backend == "auto" and not _decodes(q, keys, values)):
        return "ref"
    if backend not in ("auto", *BACKENDS):
        raise KVSightError(f"backend is one of auto, {', '.join(BACKENDS)}; got {backend!r}.")
    if not has_triton():
        if backend == "auto":
            return "ref"
        raise KVSightError("backend 'triton' needs the triton package; pip install 'kvsight[gpu]'.")
    reason = _refusal(q, keys, values, causal)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "ref"
    raise KVSightError(f"backend 'triton' does not read {reason}; leave backend unset for plain torch.")


def _decodes(q: Tensor, keys: Sequence[Segment], values: Sequence[Segment]) -> bool:
    """A few new tokens of a half-precision model against codes on a GPU, outside of graph capture."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] <= DECODE
        and any(segment.dense is None for segment in (*keys, *values))
        # the table of addresses would have to be copied in the graph
        and not torch.cuda.is_current_stream_capturing()
    )


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether triton is installed; it is not imported for the answer."""
    return find_spec("triton") is not None


def _refusal(q: Tensor, keys: Sequence[Segment], values: Sequence[Segment], causal: bool) -> str | None:
    from kvsight.ops.attend import triton

    return triton.refusal(q, keys, values, causal)

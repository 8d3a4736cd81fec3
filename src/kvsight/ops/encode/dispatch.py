"""Which encoder runs: plain torch, or Triton where it is asked for."""

from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.ops.attend.dispatch import BACKENDS, has_triton
from kvsight.ops.encode import ref
from kvsight.ops.encode.ref import Rounding


def encode(
    x: Tensor,
    shift: Tensor | None,
    matrix: Tensor | None,
    rule: Rounding,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """``ref.encode``; ``backend`` as in ``ops.attend.attend``."""
    if backend not in (None, *BACKENDS):
        raise KVSightError(f"backend is one of {', '.join(BACKENDS)}; got {backend!r}.")
    if backend != "triton":
        return ref.encode(x, shift, matrix, rule)
    if not has_triton():
        raise KVSightError("backend 'triton' needs the triton package; pip install 'kvsight[gpu]'.")
    from kvsight.ops.encode import triton

    if triton.supports(x, rule):
        return triton.encode(x, shift, matrix, rule)
    raise KVSightError(
        f"backend 'triton' does not encode {tuple(x.shape)} in {x.dtype} on {x.device}; leave backend "
        "unset for plain torch."
    )

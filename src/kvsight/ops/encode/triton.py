"""Encoding rows with Triton: the result of ``ref.encode``, in one pass over the tokens, in fp32."""

import torch
import triton
from torch import Tensor

from kvsight.ops.encode import kernels
from kvsight.ops.encode.ref import Rounding
from kvsight.packing import packed_width, piece_table, pieces

INTERPRETED = not isinstance(kernels.encode_rows, triton.JITFunction)

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_N = 32
_BLOCK_K = 32


def supports(x: Tensor, rule: Rounding) -> bool:
    """Whether the kernel covers these arguments; what it does not cover is for ``ref.encode``."""
    return (
        x.dtype in _TYPES
        and (x.is_cuda or INTERPRETED)
        and x.dim() == 4
        and x.numel() > 0
        and rule.format.stored > 0
        and rule.format.dim == x.shape[-1]
        and rule.edges.device == x.device
    )


def encode(x: Tensor, shift: Tensor | None, matrix: Tensor | None, rule: Rounding) -> tuple[Tensor, ...]:
    """As ``ref.encode``, of x [B, H, n, d]."""
    batch, heads, tokens, dim = x.shape
    form, lines = rule.format, rule.lines
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = torch.empty(batch, heads, tokens, form.row_bytes, dtype=torch.uint8, device=x.device)
    norms = torch.empty(batch, heads, tokens, 1, dtype=torch.float16, device=x.device)
    first, inverse_step = (rule.edges, rule.edges) if lines is None else lines
    block_d = max(16, triton.next_power_of_2(dim))
    shift = None if shift is None else shift.float().contiguous()
    matrix = None if matrix is None else matrix.float().contiguous()
    owners = [piece.owner for piece in pieces(form.widths)]
    grid = (triton.cdiv(tokens, _BLOCK_N), heads, batch)
    with torch.cuda.device_of(x):
        kernels.encode_rows[grid](
            x,
            x if shift is None else shift,
            x if matrix is None else matrix,
            first,
            inverse_step,
            rule.edges,
            piece_table(form.widths, block_d).to(x.device),
            rows,
            norms,
            *x.stride()[:3],
            _by_head(shift),
            _by_head(matrix),
            0 if lines is None else _by_head(first),
            _by_head(rule.edges) if rule.edges.dim() == 3 else 0,
            rule.edges.stride(1) if rule.edges.dim() == 3 else 0,
            tokens,
            dim,
            form.stored,
            packed_width(form.widths),
            SHIFT=shift is not None,
            MAP=matrix is not None,
            NORM=form.norm,
            EVEN=lines is not None,
            WIDEST=max(form.widths),
            PIECES=max(map(owners.count, set(owners))),
            PRECISION="tf32x3",
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
            BLOCK_D=block_d,
            BLOCK_R=max(16, triton.next_power_of_2(form.row_bytes)),
            num_warps=4 if block_d <= 128 else 8,
        )
    return (rows, norms) if form.norm else (rows,)


def _by_head(x: Tensor | None) -> int:
    """Stride from head to head; 0 where they share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)

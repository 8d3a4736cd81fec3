"""Attention over packed segments with Triton: the contract of ``ref.attend``, split over the context.

The query is folded once, kernels.py reads bytes, and the weighted sums are decoded once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsight.formats import Dense, Grouped, Row
from kvsight.ops.attend import kernels
from kvsight.ops.attend.features import Kind
from kvsight.ops.attend.ref import Coded, Segment
from kvsight.ops.attend.sources import Side, read_side

INTERPRETED = not isinstance(kernels.attend_splits, triton.JITFunction)

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOG2E = math.log2(math.e)
# folded queries in fp16 are scaled to this largest number, far from both ends of the type
_LARGEST = 2.0**14
# weights in fp16 are this many octaves up, so that small ones stay normal numbers
_HEADROOM = 15.0
# numbers of partial sums in one pass
_SCRATCH = 1 << 26
# accumulated numbers of one program
_REGISTERS = 1 << 14
_BLOCK_N = 64
# fewer tokens are not worth a split of their own
_SPLIT = 256


def supports(q: Tensor, keys: Sequence[Segment], values: Sequence[Segment], causal: bool = True) -> bool:
    """Whether the kernels cover these arguments; what they do not cover is for ``ref.attend``."""
    tokens = sum(segment.tokens for segment in keys)
    return (
        q.dtype in _TYPES
        and (q.is_cuda or INTERPRETED)
        and q.numel() > 0
        and tokens > 0
        # with more queries than keys the first ones see nothing
        and (not causal or q.shape[2] <= tokens)
        and not (torch.is_grad_enabled() and q.requires_grad)
        and all(_readable(segment, q.device) for segment in (*keys, *values))
    )


def _readable(segment: Segment, device: torch.device) -> bool:
    if segment.dense is not None:
        return segment.dense.dtype in _TYPES and segment.dense.device == device
    return all(_known(c) and c.packed.tensors[0].device == device for c in segment.coded)


def _known(coded: Coded) -> bool:
    if coded.rope is not None:
        return False
    match coded.packed.format:
        case Dense(dtype=dtype):
            return dtype in _TYPES
        case Row():
            levels = coded.tables[0]
            return levels.dtype == torch.float32 and levels.is_contiguous()
        case Grouped():
            return True
    return False


@dataclass(frozen=True, eq=False)
class _Scoring:
    """What becomes of a product before softmax; ``causal`` only where no mask says it."""

    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    causal: bool

    @property
    def unit(self) -> float:
        """What scores are multiplied by to suit exp2; a softcap comes first."""
        return _LOG2E if self.softcap is None else 1.0


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
    splits: int | None = None,
) -> Tensor:
    """As ``ref.attend``. The context is cut into about ``splits`` pieces, by default to fill the device."""
    batch, heads, count, _ = q.shape
    scoring = _Scoring(scaling, softcap, sink_logits, causal and mask is None and count > 1)
    left, right = (read_side(side, q.device, _mapping(q.dtype)) for side in (keys, values))
    tokens = left.ends[-1]
    cuts = _cuts(left.ends, right.ends, _filling(q, left, right) if splits is None else splits)
    step = max(1, _SCRATCH // (len(cuts) * batch * heads * right.padded.width))
    blocks: list[Tensor] = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        visible = None if mask is None else mask[:, :, start:stop].expand(batch, heads, -1, -1)
        block = q[:, :, start:stop]
        blocks.append(_attend(block, left, right, cuts, scoring, visible, tokens - count + stop))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _mapping(dtype: torch.dtype) -> torch.dtype:
    """In what queries are folded and outputs decoded: fp32 queries have no digits to lose there."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _filling(q: Tensor, left: Side, right: Side) -> int:
    """Splits that give every multiprocessor a few programs."""
    if q.device.type != "cuda":
        return 1
    rows = q.shape[1] // left.heads * q.shape[2]
    programs = q.shape[0] * left.heads * -(-rows // _block_m(rows, left, right))
    wanted = 4 * torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(wanted // programs, left.ends[-1] // _SPLIT))


def _cuts(left: Sequence[int], right: Sequence[int], splits: int) -> list[list[int]]:
    """First and last token, key segment and value segment of each split: none crosses a segment's end."""
    size = -(-left[-1] // (splits * _BLOCK_N)) * _BLOCK_N
    cuts: list[list[int]] = []
    for start, stop in pairwise(sorted({0, *left, *right})):
        key = sum(end <= start for end in left)
        value = sum(end <= start for end in right)
        cuts += [[at, min(at + size, stop), key, value] for at in range(start, stop, size)]
    return cuts


def _block_m(rows: int, left: Side, right: Side) -> int:
    width = max(left.padded.width, right.padded.width)
    block = 16
    while block < min(rows, 64) and 2 * block * width <= _REGISTERS:
        block *= 2
    return block


def _attend(
    q: Tensor,
    left: Side,
    right: Side,
    cuts: list[list[int]],
    scoring: _Scoring,
    mask: Tensor | None,
    tokens: int,
) -> Tensor:
    """A block of queries [B, Hq, Q, d]; the last of them sees ``tokens`` tokens if causal."""
    batch, heads, count, _ = q.shape
    grouped = q.reshape(batch, left.heads, -1, q.shape[-1]).to(_mapping(q.dtype))
    rows = grouped.shape[2]
    queries, scales, offsets = _fold(grouped, left, scoring)
    lead = len(cuts), left.heads, batch, rows
    tops, sums = (torch.empty(lead, dtype=torch.float32, device=q.device) for _ in range(2))
    acc = torch.empty(*lead, right.padded.width, dtype=torch.float32, device=q.device)
    parts = cuts, left.sources, right.sources, _segment_cuts(cuts, right), _written(right)
    table = torch.tensor([n for rows in parts for row in rows for n in row]).to(q.device)
    at = list(accumulate((sum(map(len, rows)) for rows in parts), initial=0))
    visible = mask if mask is not None else table
    block = _block_m(rows, left, right)
    light = q.dtype != torch.float32 and max(left.pieces, right.pieces) == 0
    grid = (len(cuts) * left.heads, triton.cdiv(rows, block), batch)
    with torch.cuda.device_of(q):
        kernels.attend_splits[grid](
            table,
            queries,
            scales,
            offsets,
            tops,
            sums,
            acc,
            visible.view(torch.uint8) if visible.dtype == torch.bool else visible,
            *(visible.stride() if mask is not None else (0, 0, 0, 0)),
            scoring.softcap or 1.0,
            count,
            tokens,
            rows,
            at[1],
            at[2],
            **_constants(q.dtype, left, right),
            **_pairs(cuts, left, right),
            MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
            CAUSAL=scoring.causal,
            SOFTCAP=scoring.softcap is not None,
            BLOCK_M=block,
            BLOCK_N=_BLOCK_N if light else _BLOCK_N // 2,
            num_warps=4 if light and block * right.padded.width <= _REGISTERS // 4 else 8,
            num_stages=3 if light else 1,
        )
        mixed, mass = _merge(tops, sums, acc, table[at[3] :], count, right, scoring.sink_logits)
    out = _decode(mixed, mass, right)
    out = out.view(left.heads, batch, heads // left.heads, count, -1)
    return out.permute(1, 3, 0, 2, 4).reshape(batch, count, heads, -1).to(q.dtype)


def _fold(q: Tensor, side: Side, scoring: _Scoring) -> tuple[Tensor, Tensor, Tensor]:
    """Query features [groups, B, H, rows, width], and scale and offset of scores [groups, B, H, rows].

    Everything that does not depend on the token is in the offset: centring, and the middle of the levels.
    """
    factor = scoring.scaling * scoring.unit
    exact = q.dtype == torch.float64
    features: list[Tensor] = []
    scales: list[Tensor] = []
    offsets: list[Tensor] = []
    for group in side.groups:
        scale = q.new_full(q.shape[:-1], 1.0 if exact else factor)
        if group.matrix is None or group.constant is None:
            folded = torch.nn.functional.pad(q, (0, side.padded.width - q.shape[-1]))
            offset = torch.zeros_like(scale)
        else:
            folded = q @ group.matrix.mT
            offset = (q @ group.constant.unsqueeze(-1)).squeeze(-1) * factor
            if not exact:
                largest = folded.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
                folded, scale = folded / largest.unsqueeze(-1), scale * largest
        features.append(folded * factor if exact else folded)
        scales.append(scale)
        offsets.append(offset)
    return torch.stack(features).float(), torch.stack(scales).float(), torch.stack(offsets).float()


def _constants(dtype: torch.dtype, left: Side, right: Side) -> dict[str, object]:
    """What a launch is compiled for, apart from its mask and its blocks."""
    half = dtype != torch.float32
    return {
        "KV_HEADS": left.heads,
        "Q_WIDTH": left.padded.width,
        "V_WIDTH": right.padded.width,
        "NIBBLES_K": left.padded.nibbles,
        "CRUMBS_K": left.padded.crumbs,
        "BITS_K": left.padded.bits,
        "NIBBLES_V": right.padded.nibbles,
        "CRUMBS_V": right.padded.crumbs,
        "BITS_V": right.padded.bits,
        "DIM_K": left.padded.dim,
        "DIM_V": right.padded.dim,
        "PIECES_K": left.pieces,
        "PIECES_V": right.pieces,
        "ALIGN_K": left.plane_align,
        "ALIGN_V": right.plane_align,
        "DENSE_ALIGN_K": left.dense_align,
        "DENSE_ALIGN_V": right.dense_align,
        "STORED_K": _TYPES[left.stored],
        "STORED_V": _TYPES[right.stored],
        "DENSE_K": _operand(dtype, left),
        "DENSE_V": _operand(dtype, right),
        "CODES": tl.float16 if half else tl.float32,
        "PRECISION": "tf32x3" if half else "ieee",
        "HEADROOM": _HEADROOM if half else 0.0,
    }


def _operand(dtype: torch.dtype, side: Side) -> tl.dtype:
    """In what products of dense numbers are taken: the query's own type if both have it, else fp32."""
    folded = any(Kind.DENSE in own.kinds and own.matrix is not None for own in side.groups)
    # the interpreter gets products of bfloat16 wrong
    wrong = INTERPRETED and dtype == torch.bfloat16
    return _TYPES[dtype if dtype == side.stored and not folded and not wrong else torch.float32]


def _pairs(cuts: list[list[int]], left: Side, right: Side) -> dict[str, int]:
    """The pairs of kinds that occur in a launch, six bits each."""
    found: set[int] = set()
    for _, _, key, value in cuts:
        kinds = zip(left.readings[key].kinds, right.readings[value].kinds, strict=True)
        found |= {8 * k + v for k, v in kinds}
    packed = sum(pair << 6 * i for i, pair in enumerate(sorted(found)))
    return {"PAIRS": packed, "PAIR_COUNT": len(found)}


def _segment_cuts(cuts: list[list[int]], right: Side) -> list[list[int]]:
    """First and last split of each value segment."""
    of = [value for _, _, _, value in cuts]
    return [[of.index(i), of.index(i) + of.count(i)] for i in range(len(right.readings))]


def _written(right: Side) -> list[list[int]]:
    """Columns that splits of each value segment write, by head."""
    padded = right.padded
    return [
        [padded.planes if kind == Kind.PLANES else padded.dim for kind in reading.kinds]
        for reading in right.readings
    ]


def _merge(
    tops: Tensor,
    sums: Tensor,
    acc: Tensor,
    table: Tensor,
    count: int,
    right: Side,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of features and their mass for each value segment: [segments, H, B, rows, width]."""
    splits, heads, batch, rows = tops.shape
    segments, width = len(right.readings), acc.shape[-1]
    mixed = acc.new_empty(segments, *acc.shape[1:])
    mass = tops.new_empty(segments, *tops.shape[1:])
    columns = triton.next_power_of_2(width)
    block = max(1, 4096 // columns)
    kernels.merge_splits[(heads * batch, triton.cdiv(rows, block), segments)](
        table,
        table[2 * segments :],
        tops,
        sums,
        acc,
        tops if sink_logits is None else sink_logits.contiguous(),
        mixed,
        mass,
        splits,
        count,
        rows,
        KV_HEADS=heads,
        V_WIDTH=width,
        SINKS=sink_logits is not None,
        BLOCK_M=block,
        BLOCK_F=columns,
    )
    return mixed, mass


def _decode(mixed: Tensor, mass: Tensor, right: Side) -> Tensor:
    """[H, B, rows, d] of sums of features."""
    total: Tensor | None = None
    for features, weight, own in zip(mixed, mass, right.readings, strict=True):
        if own.matrix is None or own.constant is None:
            part = features[..., : own.sizes[0][0]]
        else:
            part = features.to(own.matrix) @ own.matrix.unsqueeze(1)
            part = part + weight.unsqueeze(-1) * own.constant[:, None, None]
        total = part if total is None else total + part
    assert total is not None
    return total

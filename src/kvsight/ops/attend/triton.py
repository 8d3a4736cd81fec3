"""Attention over packed segments with Triton: the contract of ``ref.attend``, split over the context.

The query is folded once, kernels.py reads bytes, and the weighted sums are decoded once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsight.formats import Dense, Grouped, Row
from kvsight.ops.attend import kernels
from kvsight.ops.attend.features import JOINED, Kind, Uniform
from kvsight.ops.attend.ref import Coded, Segment
from kvsight.ops.attend.sources import Side, read_side

INTERPRETED = not isinstance(kernels.attend_splits, triton.JITFunction)
_NVIDIA = not INTERPRETED and torch.version.hip is None

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOG2E = math.log2(math.e)
# folded queries in fp16 are scaled to less than 2 to this, far from both ends of the type
_LARGEST = 14
# weights in fp16 are this many octaves up, so that small ones stay normal numbers
_HEADROOM = 15.0
# numbers of partial sums in one pass
_SCRATCH = 1 << 26
# accumulated numbers of one program
_REGISTERS = 1 << 14
_BLOCK_N = 64
# fewer tokens are not worth a split of their own
_SPLIT = 256


def refusal(
    q: Tensor, keys: Sequence[Segment], values: Sequence[Segment], causal: bool = True
) -> str | None:
    """Why the kernels do not cover these arguments, in a few words; None where they do."""
    tokens = sum(segment.tokens for segment in keys)
    if q.dtype not in _TYPES:
        return f"queries in {q.dtype}"
    if not (q.is_cuda or INTERPRETED):
        return f"tensors on {q.device}"
    if not q.numel() or not tokens:
        return "nothing to attend to"
    if causal and q.shape[2] > tokens:
        return "more causal queries than keys"
    if torch.is_grad_enabled() and q.requires_grad:
        return "gradients"
    reasons = (_unreadable(segment, q.device) for segment in (*keys, *values))
    return next((reason for reason in reasons if reason is not None), None)


def _unreadable(segment: Segment, device: torch.device) -> str | None:
    if segment.dense is not None:
        dense = segment.dense
        return (
            None if dense.dtype in _TYPES and dense.device == device else f"{dense.dtype} on {dense.device}"
        )
    for coded in segment.coded:
        if coded.rope is not None:
            return "keys that turn as they are read"
        if not _known(coded):
            return f"the format {coded.packed.format.name}"
        if coded.packed.tensors[0].device != device:
            return f"codes on {coded.packed.tensors[0].device}"
    return None


def _known(coded: Coded) -> bool:
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
class Scoring:
    """What becomes of a product before softmax; ``causal`` only where no mask says it."""

    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    causal: bool

    @property
    def unit(self) -> float:
        """What scores are multiplied by to suit exp2; a softcap comes first."""
        return _LOG2E if self.softcap is None else 1.0


@dataclass(frozen=True, eq=False)
class Prepared:
    """Where the bytes are and how a launch is cut; good for as long as the segments' tensors live."""

    left: Side
    right: Side
    cuts: list[list[int]]
    table: Tensor
    places: list[int]

    @property
    def tokens(self) -> int:
        return self.left.ends[-1]


def prepare(
    q: Tensor, keys: Sequence[Segment], values: Sequence[Segment], splits: int | None = None
) -> Prepared:
    """All that does not depend on what is in ``q``: the host's work, and one copy to the device."""
    block = None if q.dtype == torch.float32 else _BLOCK_N
    exact = q.dtype != torch.bfloat16
    left, right = (read_side(side, q.device, _mapping(q.dtype), block, exact) for side in (keys, values))
    cuts = _cuts(left.ends, right.ends, _filling(q, left, right) if splits is None else splits)
    begins = [_begins(cut, left, right) for cut in cuts]
    if None in begins:
        # blocks of tokens follow the groups of one side
        right = replace(right, uniform=None)
        begins = [_begins(cut, left, right) for cut in cuts]
    cuts = [[*cut, begin] for cut, begin in zip(cuts, begins, strict=True) if begin is not None]
    parts = cuts, left.sources, right.sources, _segment_cuts(cuts, right), _written(right)
    table = torch.tensor([n for rows in parts for row in rows for n in row])
    if q.is_cuda:
        # from pageable memory the host would wait for the device
        table = table.pin_memory().to(q.device, non_blocking=True)
    return Prepared(
        left, right, cuts, table, list(accumulate((sum(map(len, r)) for r in parts), initial=0))
    )


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
    scoring = Scoring(scaling, softcap, sink_logits, causal and mask is None and q.shape[2] > 1)
    return launch(prepare(q, keys, values, splits), q, scoring, mask)


def launch(prepared: Prepared, q: Tensor, scoring: Scoring, mask: Tensor | None = None) -> Tensor:
    """The device's work: nothing waits for it, and sizes depend on shapes only, so a graph can hold it."""
    batch, heads, count, _ = q.shape
    width = len(prepared.cuts) * batch * heads * prepared.right.padded.width
    step = max(1, _SCRATCH // width)
    blocks: list[Tensor] = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        visible = None if mask is None else mask[:, :, start:stop].expand(batch, heads, -1, -1)
        tokens = prepared.tokens - count + stop
        blocks.append(_attend(q[:, :, start:stop], prepared, scoring, visible, tokens))
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


def _begins(cut: list[int], left: Side, right: Side) -> int | None:
    """Where a split's blocks of tokens begin so that groups of tokens divide them; None if nowhere."""
    at = cut[0]
    grouped = [
        at - side.firsts[segment]
        for side, segment in ((left, cut[2]), (right, cut[3]))
        if side.uniform is not None and side.uniform.span > 1
        if any(kind in JOINED for kind in side.readings[segment].kinds)
    ]
    above = {row % _BLOCK_N for row in grouped}
    return at - max(above, default=0) if len(above) < 2 else None


def _block_m(rows: int, left: Side, right: Side) -> int:
    width = max(left.padded.width, right.padded.width)
    block = 16
    while block < min(rows, 64) and 2 * block * width <= _REGISTERS:
        block *= 2
    return block


def _attend(q: Tensor, prepared: Prepared, scoring: Scoring, mask: Tensor | None, tokens: int) -> Tensor:
    """A block of queries [B, Hq, Q, d]; the last of them sees ``tokens`` tokens if causal."""
    left, right, cuts, table, at = (
        prepared.left,
        prepared.right,
        prepared.cuts,
        prepared.table,
        prepared.places,
    )
    batch, heads, count, _ = q.shape
    grouped = q.reshape(batch, left.heads, -1, q.shape[-1]).to(_mapping(q.dtype))
    rows = grouped.shape[2]
    queries, scales, offsets = _fold(grouped, left, scoring)
    lead = len(cuts), left.heads, batch, rows
    tops, sums = (torch.empty(lead, dtype=torch.float32, device=q.device) for _ in range(2))
    acc = torch.empty(*lead, right.padded.width, dtype=torch.float32, device=q.device)
    visible = mask if mask is not None else table
    block = _block_m(rows, left, right)
    light = q.dtype != torch.float32 and not any(s.pieces and s.uniform is None for s in (left, right))
    looked_up = [side for side in (left, right) if _looks_up(side)]
    # the addresses of single levels take the registers of two programs
    few = light and all(side.uniform is not None and side.uniform.book for side in looked_up)
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
            num_warps=4 if few and block * right.padded.width <= _REGISTERS // 4 else 8,
            # fetching what is looked up ahead takes space, and waits for codes all the same
            num_stages=3 if light and not looked_up else 1,
        )
        mixed, mass = _merge(tops, sums, acc, table[at[3] :], count, right, scoring.sink_logits)
    out = _decode(mixed, mass, right)
    out = out.view(left.heads, batch, heads // left.heads, count, -1)
    return out.permute(1, 3, 0, 2, 4).reshape(batch, count, heads, -1).to(q.dtype)


def _fold(q: Tensor, side: Side, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
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
        if not exact and (group.matrix is not None or side.uniform is not None):
            # by a power of two: a query that was not folded stays exact
            largest = torch.frexp(folded.abs().amax(-1)).exponent.clamp_min(-100)
            folded = torch.ldexp(folded, _LARGEST - largest.unsqueeze(-1))
            scale = torch.ldexp(scale, largest - _LARGEST)
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
        **_uniform("K", left),
        **_uniform("V", right),
        "FOLDED": any(group.matrix is not None for group in left.groups),
        # bf16 rounds outputs to fewer digits than fp16 gives decoded keys
        "FINE": dtype == torch.float16,
        # with PTX; the interpreter, moreover, rounds products before it adds
        "CELLS": tl.float16 if dtype == torch.bfloat16 and _NVIDIA else tl.float32,
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


def _uniform(name: str, side: Side) -> dict[str, int]:
    """How codes of one width are read; a width of 0 if they are not."""
    found = side.uniform or Uniform(0, 1, 1)
    return {
        f"WIDTH_{name}": found.width,
        f"CELL_{name}": found.cell,
        f"SPAN_{name}": found.span,
        f"BOOK_{name}": found.book,
        f"CODE_ALIGN_{name}": side.code_align,
    }


def _looks_up(side: Side) -> bool:
    return any(kind in (Kind.LEVELS, Kind.NORMED) for own in side.readings for kind in own.kinds)


def _operand(dtype: torch.dtype, side: Side) -> tl.dtype:
    """In what products of dense numbers are taken: the query's own type if both have it, else fp32."""
    folded = any(Kind.DENSE in own.kinds and own.matrix is not None for own in side.groups)
    # the interpreter gets products of bfloat16 wrong
    wrong = INTERPRETED and dtype == torch.bfloat16
    return _TYPES[dtype if dtype == side.stored and not folded and not wrong else torch.float32]


def _pairs(cuts: list[list[int]], left: Side, right: Side) -> dict[str, int]:
    """The pairs of kinds that occur in a launch, six bits each."""
    found: set[int] = set()
    for _, _, key, value, _ in cuts:
        kinds = zip(left.readings[key].kinds, right.readings[value].kinds, strict=True)
        found |= {8 * k + v for k, v in kinds}
    packed = sum(pair << 6 * i for i, pair in enumerate(sorted(found)))
    return {"PAIRS": packed, "PAIR_COUNT": len(found)}


def _segment_cuts(cuts: list[list[int]], right: Side) -> list[list[int]]:
    """First and last split of each value segment."""
    of = [value for _, _, _, value, _ in cuts]
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

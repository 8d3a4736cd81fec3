"""Attention on codes in plain torch: the definition that kernels are judged against.

Queries go through the dual map once, scores are dot products with what the bytes mean, and the inverse
map is applied once to the output: the decoded history is never materialised, only ``_CHUNK`` tokens of
transform coordinates at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsight.formats import Packed
from kvsight.rope import Rope

_CHUNK = 4096
_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class Folded:
    """y @ inverse + shift decodes. ``inverse`` [H or 1, stored, d], ``shift`` [H or 1, d], or None."""

    inverse: Tensor | None
    shift: Tensor | None

    def query(self, q: Tensor) -> Tensor:
        """[B, H, m, d] to [B, H, m, stored]."""
        return q if self.inverse is None else q @ self.inverse.mT.to(q)

    def offset(self, q: Tensor) -> Tensor | None:
        """[B, H, m, 1]: the score that centring took away, the same for every key."""
        return None if self.shift is None else q @ self.shift.unsqueeze(-1).to(q)

    def decode(self, y: Tensor) -> Tensor:
        """[..., H, n, stored] to [..., H, n, d]; a map works in fp32 at least."""
        if self.inverse is not None or self.shift is not None:
            y = y.to(torch.promote_types(y.dtype, torch.float32))
        x = y if self.inverse is None else y @ self.inverse.to(y)
        return x if self.shift is None else x + self.shift.unsqueeze(-2).to(x)

    def output(self, y: Tensor, mass: Tensor) -> Tensor:
        """Weighted sums of coordinates, of total weight ``mass`` [B, H, m, 1], to head_dim."""
        x = y if self.inverse is None else y @ self.inverse.to(y)
        return x if self.shift is None else x + mass * self.shift.unsqueeze(-2).to(x)


@dataclass(frozen=True, eq=False)
class Coded:
    """Packed tokens of some KV heads, with all that is needed to read them.

    With a ``rope`` decoded rows are turned by their index in the cache, from ``first`` on, so that nothing
    of their transform folds into a query.
    """

    heads: tuple[int, ...]
    packed: Packed
    tables: tuple[Tensor, ...]
    folded: Folded
    rope: Rope | None = None
    first: int = 0

    def decode(self) -> Tensor:
        """[B, h, n, d]."""
        x = self.folded.decode(self.packed.read(self.tables))
        return x if self.rope is None else self.rope.forth(x, self.first)


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens of one layer's keys or values: dense [B, H, n, d], or coded per head.

    ``skip`` leading tokens of a coded segment are stored but no longer visible.
    """

    tokens: int
    dense: Tensor | None = None
    coded: tuple[Coded, ...] = ()
    skip: int = 0

    def decode(self, dtype: torch.dtype) -> Tensor:
        """[B, H, tokens, d] in ``dtype``."""
        if self.dense is not None:
            return self.dense.to(dtype)
        parts = [c.decode()[..., self.skip :, :] for c in self.coded]
        return merge_heads(parts, [c.heads for c in self.coded]).to(dtype)


def kv_heads(segment: Segment) -> int:
    if segment.dense is not None:
        return segment.dense.shape[1]
    return sum(len(coded.heads) for coded in segment.coded)


def head_dim(segment: Segment) -> int:
    if segment.dense is not None:
        return segment.dense.shape[-1]
    coded = segment.coded[0]
    inverse = coded.folded.inverse
    return coded.packed.format.dim if inverse is None else inverse.shape[-1]


def merge_heads(parts: Sequence[Tensor], heads: Sequence[tuple[int, ...]]) -> Tensor:
    """[B, h_i, ...] parts to [B, H, ...] with heads in order."""
    order = [h for group in heads for h in group]
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    if order == sorted(order):
        return joined
    back = torch.tensor(order, device=joined.device).argsort()
    return joined.index_select(1, back)


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
) -> Tensor:
    """softmax(scaling · q kᵀ) v over packed segments, in at least fp32.

    Args:
        q: [B, Hq, Q, d]; query heads h·G .. h·G + G - 1 share KV head h.
        keys, values: segments in token order, S tokens on each side.
        mask: [B or 1, Hq or 1, Q, >= S]; bool (True = visible) or additive.
        causal: without a mask, query i sees keys up to S - Q + i.
        softcap: c · tanh(score / c) before the mask (Gemma 2).
        sink_logits: [Hq], one more logit per head that takes mass and gives nothing (gpt-oss).

    Returns: [B, Q, Hq, d_v] in q's dtype.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    tokens = sum(segment.tokens for segment in keys)
    rows = max(1, _SCORES // max(1, q.shape[0] * q.shape[1] * tokens))
    blocks: list[Tensor] = []
    for start in range(0, q.shape[2], rows):
        block = q[:, :, start : start + rows].to(compute)
        visible = _visible(q, block, start, tokens, mask, causal)
        weights = _weights(block, keys, tokens, scaling, visible, softcap, sink_logits)
        blocks.append(_mix(weights, values))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return out.transpose(1, 2).contiguous().to(q.dtype)


def _visible(
    q: Tensor, block: Tensor, start: int, tokens: int, mask: Tensor | None, causal: bool
) -> Tensor | None:
    stop = start + block.shape[2]
    if mask is not None:
        return mask[..., start:stop, :tokens]
    if not causal or q.shape[2] == 1:
        return None
    last = torch.arange(start, stop, device=q.device) + tokens - q.shape[2]
    return torch.arange(tokens, device=q.device) <= last.unsqueeze(-1)


def _weights(
    q: Tensor,
    keys: Sequence[Segment],
    tokens: int,
    scaling: float,
    visible: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    batch, heads, count, _ = q.shape
    scores = _scores(q * scaling, keys).view(batch, heads, count, tokens)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # the lowest finite number keeps fully masked rows (left padding) finite
    lowest = torch.finfo(scores.dtype).min
    if visible is not None and visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible, lowest)
    elif visible is not None:
        scores = (scores + visible.to(scores)).clamp_min(lowest)
    if sink_logits is None:
        return torch.softmax(scores, dim=-1)
    extra = sink_logits.to(scores).view(1, -1, 1, 1).expand(batch, heads, count, 1)
    return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]


def _scores(q: Tensor, keys: Sequence[Segment]) -> Tensor:
    """[B, Hq, Q, d] against all segments: [B, Hk, G·Q, S]."""
    grouped = q.reshape(q.shape[0], kv_heads(keys[0]), -1, q.shape[-1])
    columns: list[Tensor] = []
    for segment in keys:
        if segment.dense is not None:
            columns.append(grouped @ segment.dense.to(grouped).mT)
            continue
        parts = [_coded_scores(grouped, coded, segment.skip) for coded in segment.coded]
        columns.append(merge_heads(parts, [coded.heads for coded in segment.coded]))
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def _coded_scores(q: Tensor, coded: Coded, skip: int) -> Tensor:
    q = _take_heads(q, coded.heads)
    turning = coded.rope is not None
    folded = q if turning else coded.folded.query(q)
    chunks = [folded @ y.to(folded).mT for _, _, y in _chunks(coded, skip)]
    scores = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
    offset = None if turning else coded.folded.offset(q)
    return scores if offset is None else scores.add_(offset)


def _mix(weights: Tensor, values: Sequence[Segment]) -> Tensor:
    """Weights [B, Hq, Q, S] times values: [B, Hq, Q, d_v]."""
    batch, heads, count, _ = weights.shape
    grouped = weights.reshape(batch, kv_heads(values[0]), -1, weights.shape[-1])
    total: Tensor | None = None
    start = 0
    for segment in values:
        share = grouped[..., start : start + segment.tokens]
        start += segment.tokens
        if segment.dense is not None:
            part = share @ segment.dense.to(share)
        else:
            mixed = [_coded_mix(share, coded, segment.skip) for coded in segment.coded]
            part = merge_heads(mixed, [coded.heads for coded in segment.coded])
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(batch, heads, count, -1)


def _coded_mix(share: Tensor, coded: Coded, skip: int) -> Tensor:
    share = _take_heads(share, coded.heads)
    total: Tensor | None = None
    for start, stop, y in _chunks(coded, skip):
        part = share[..., start:stop] @ y.to(share)
        total = part if total is None else total + part
    assert total is not None
    if coded.rope is not None:
        return total
    return coded.folded.output(total, share.sum(dim=-1, keepdim=True))


def _chunks(coded: Coded, skip: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, coordinates) of visible tokens, ``_CHUNK`` at a time, whole blocks each.

    Coordinates of turning keys are those of the head: decoded and turned.
    """
    packed = coded.packed
    step = max(1, _CHUNK // packed.format.block) * packed.format.block
    for start in range(0, packed.tokens, step):
        stop = min(start + step, packed.tokens)
        if stop <= skip:
            continue
        piece = packed.narrow(start, stop)
        y = piece.read(coded.tables)
        if coded.rope is not None:
            y = coded.rope.forth(coded.folded.decode(y), coded.first + start)
        hidden = max(0, skip - start)
        yield start + hidden - skip, stop - skip, y[..., hidden:, :]


def _take_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    if len(heads) == x.shape[1] and heads == tuple(range(len(heads))):
        return x
    if len(heads) == 1:
        return x[:, heads[0] : heads[0] + 1]
    return x[:, list(heads)]

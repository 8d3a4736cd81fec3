"""Attention on tiles in plain torch: what the kernel computes, in at least fp32."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvsight.ops.attend.cuda import Exact, TiledTokens
from kvsight.ops.attend.ref import merge_heads
from kvsight.tiling import TOKENS


def attend_tiles_ref(  # noqa: PLR0913
    q: Tensor,
    keys: TiledTokens,
    values: TiledTokens,
    ranges: Tensor,
    *,
    scaling: float,
    exact: Exact | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As ``cuda.TileReader.call`` and ``cuda.attend_tiles``; [B, Q, Hq, d] in q's dtype."""
    batch, query_heads, queries, dim = q.shape
    heads = len(keys.tiles)
    compute = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(compute).reshape(batch, heads, -1, dim) * scaling
    scores = [_scores(rows[:, [h]], keys, h) for h in range(heads)]
    score = merge_heads(scores, [(h,) for h in range(heads)])
    if exact is not None:
        first, last = (x.to(compute) for x in (exact.first_keys, exact.last_keys))
        score = torch.cat([rows @ first.mT, score, rows @ last.mT], dim=-1)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(
        ~_visible(ranges, keys.tokens, score.shape[-1], exact, rows.shape[2]), -torch.inf
    )
    if sink_logits is not None:
        sinks = sink_logits.to(compute).view(1, heads, -1, 1).repeat_interleave(queries, dim=2)
        score = torch.cat([score, sinks.expand(batch, -1, -1, -1)], dim=-1)
    weight = torch.softmax(score, dim=-1).nan_to_num()
    before = 0 if exact is None else exact.first_keys.shape[2]
    coded = weight[..., before : before + keys.tokens]
    out = merge_heads([_mix(coded[:, [h]], values, h) for h in range(heads)], [(h,) for h in range(heads)])
    if exact is not None:
        behind = weight[..., before + keys.tokens :][..., : exact.last_keys.shape[2]]
        out = (
            out
            + weight[..., :before] @ exact.first_values.to(compute)
            + behind @ exact.last_values.to(compute)
        )
    return out.reshape(batch, query_heads, queries, dim).transpose(1, 2).to(q.dtype).contiguous()


def _codes(side: TiledTokens, head: int, like: Tensor) -> Tensor:
    """[B, 1, tokens, d] of one head; zero behind the stored coordinates."""
    tiling = side.folded.tilings[head]
    codes = tiling.unpack(side.tiles[head][:, : -(-side.tokens // TOKENS)])[:, : side.tokens]
    return pad(codes.to(like.dtype), (0, like.shape[-1] - codes.shape[-1])).unsqueeze(1)


def _scores(rows: Tensor, keys: TiledTokens, head: int) -> Tensor:
    folded = rows @ keys.folded.matrix[head].mT.to(rows)
    offset = rows @ keys.folded.shift[head].to(rows)
    return folded @ _codes(keys, head, rows).mT + offset.unsqueeze(-1)


def _mix(weight: Tensor, values: TiledTokens, head: int) -> Tensor:
    matrix = values.folded.matrix[head].to(weight)
    sums = weight @ _codes(values, head, matrix.unsqueeze(0)) @ matrix
    return sums + weight.sum(-1, keepdim=True) * values.folded.shift[head].to(weight)


def _visible(ranges: Tensor, coded: int, total: int, exact: Exact | None, rows: int) -> Tensor:
    """[B, 1, rows, total] from ranges [B, Q, 6]; rows are query tokens of one query head after another."""
    first = 0 if exact is None else exact.first_keys.shape[2]
    at = torch.arange(total, device=ranges.device)
    kinds = ((0, first, 0), (first, first + coded, 2), (first + coded, total, 4))
    seen = torch.zeros(*ranges.shape[:2], total, dtype=torch.bool, device=ranges.device)
    for start, stop, i in kinds:
        inside = at[start:stop] - start
        seen[..., start:stop] = (inside >= ranges[..., i, None]) & (inside < ranges[..., i + 1, None])
    return seen.repeat(1, rows // ranges.shape[1], 1).unsqueeze(1)

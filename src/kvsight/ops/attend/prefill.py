"""Attention of many new tokens over tiles, by torch's own kernels on codes as they are.

A code c decodes to c @ matrix + shift, so a score q · k is linear in it: folded once, the query meets
centred codes in a plain dot product, and what the shift adds to scores is the same for all coded tokens.
Weighted sums of codes go through the values' matrix once, at the end. Tokens are taken in pieces, none
of which is larger than ``_PIECE_BYTES``; softmaxes over pieces are merged by the logarithms of their
masses. Maths: src/kvsight/ops/attend/README.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvsight.errors import KVSightError
from kvsight.ops.attend.cuda import Exact, TiledTokens
from kvsight.ops.attend.tiles import FoldedTiles
from kvsight.ops.attend.unpack import Unpacker
from kvsight.tiling import CHUNK, TOKENS, Tiling

# centred codes that exist at once
_PIECE_BYTES = 256 << 20
# tokens of a piece, and scores that exist at once, where no kernel is used
_PLAIN_PIECE, _PLAIN_SCORES = 4096, 1 << 25
# rows of queries whose sums exist at once: enough to fill a large GPU
_ROWS = 1 << 18
# cuDNN takes long to plan for a shape that it has not seen, so it gets sizes that come again
_USUAL = 1024
# what flash attention takes: numbers of a token, and the oldest devices
_MOST_COLUMNS, _FLASH = 256, (8, 0)

Kernel = Literal["cudnn", "flash", "cpu", "plain"]
Kind = Literal["first", "coded", "last"]
# weighted means and logarithms of masses of q [B, Hq, Q, d], over k and v [B, H, n, d], from scaled scores
Fused = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class PrefillReader:
    """What stays the same from call to call while tiles stay where they are.

    ``fold`` [H, d, columns] and ``offset`` [H, d] bring queries to centred codes of keys; sums of centred
    codes of values decode by ``unfold`` [H, columns, d] and ``shift`` [H, d].
    """

    keys: Unpacker
    values: Unpacker
    scaling: float
    fold: "_Map"
    offset: Tensor
    unfold: "_Map"
    shift: Tensor

    @classmethod
    def of(cls, keys: TiledTokens, values: TiledTokens, scaling: float) -> "PrefillReader":
        """For tiles of both sides."""
        # kernels want keys and values of one width
        columns = columns_of(*keys.folded.tilings, *values.folded.tilings)
        (fold, offset), (unfold, shift) = (_centred(side.folded, columns) for side in (keys, values))
        k, v = (Unpacker.of(side.folded.tilings, side.tiles, columns) for side in (keys, values))
        return cls(k, v, scaling, _Map(fold.mT * scaling), offset * scaling, _Map(unfold), shift)

    @property
    def columns(self) -> int:
        return self.keys.columns

    @property
    def heads(self) -> int:
        return len(self.shift)

    @torch.no_grad()
    def attend(  # noqa: PLR0913
        self,
        q: Tensor,
        tokens: int,
        *,
        skip: int = 0,
        exact: Exact | None = None,
        hidden: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        kernel: Kernel | None = None,
    ) -> Tensor:
        """Attention of the newest tokens' queries, without gradients; each sees all tokens up to its own.

        Tokens are exact ones, coded ones, then exact ones again, such as new tokens that see each other
        uncompressed.

        Args:
            q: [B, Hq, Q, d]; query heads h·G .. h·G + G - 1 share KV head h.
            tokens, skip: stored coded tokens, and how many of the first are no longer visible.
            hidden: [B], how many of the first visible tokens are padding.
            window: a query sees this many tokens at most, itself included.
            softcap: c · tanh(score / c).
            sink_logits: [Hq], one more logit per head that takes mass and gives nothing.
            kernel: of torch; None for the fastest that can do this.

        Returns: [B, Q, Hq, d] in q's dtype. Queries of padding, which see nothing, get zeros.
        """
        batch, query_heads, queries, _ = q.shape
        if query_heads % self.heads:
            raise KVSightError(f"{query_heads} query heads cannot share {self.heads} KV heads evenly.")
        widest = max(self.columns, q.shape[-1])
        if kernel is None and (window is not None or softcap is not None or not fused(q, widest)):
            kernel = "plain"
        number = number_of(q.dtype, plain=kernel == "plain")
        call = _Call(self, tokens, skip, exact, window, softcap, sink_logits, kernel, number)
        begin = [0] * batch if hidden is None else hidden.tolist()
        at_once = max(_USUAL, _ROWS // query_heads)
        out = q.new_empty(batch, queries, query_heads, self.shift.shape[-1])
        for start in range(0, queries, at_once):
            block = q[:, :, start : start + at_once]
            together = max(1, _ROWS // (query_heads * block.shape[2]))
            for own in _alike(begin, together):
                mixed = _attend(call, block[own], own, begin[own.start], start - queries)
                out[own, start : start + at_once] = mixed.transpose(1, 2)
        return out


def fused(like: Tensor, widest: int) -> bool:
    """Whether torch has a kernel that tells masses, of tokens of at most ``widest`` numbers like these."""
    if not like.is_cuda:
        return like.dtype != torch.float64
    narrow = like.dtype.itemsize == 2 and widest <= _MOST_COLUMNS
    return narrow and torch.cuda.get_device_capability(like.device) >= _FLASH


def number_of(dtype: torch.dtype, *, plain: bool) -> torch.dtype:
    """What codes become: without a kernel everything is in at least fp32."""
    return _compute(dtype) if plain else dtype


def columns_of(*tilings: Tiling) -> int:
    """Centred codes of a token, alike for all heads of both sides."""
    return max(CHUNK, *(tiling.stored for tiling in tilings))


@dataclass(frozen=True, eq=False)
class _Call:
    """What all queries of a call share."""

    reader: PrefillReader
    tokens: int
    skip: int
    exact: Exact | None
    window: int | None
    softcap: float | None
    sink_logits: Tensor | None
    kernel: Kernel | None
    number: torch.dtype

    @property
    def ends(self) -> dict[Kind, tuple[int, int]]:
        """Positions from and to of each kind."""
        first = 0 if self.exact is None else self.exact.first_keys.shape[2]
        last = 0 if self.exact is None else self.exact.last_keys.shape[2]
        coded = first + self.tokens - self.skip
        return {"first": (0, first), "coded": (first, coded), "last": (coded, coded + last)}

    def most_tokens(self, batch: int) -> int:
        """Of a piece of so many sequences."""
        if self.kernel == "plain":
            return _PLAIN_PIECE
        each = 2 * batch * self.reader.heads * self.reader.columns * self.number.itemsize
        return max(1, _PIECE_BYTES // each // _USUAL) * _USUAL

    def read(self, kind: Kind, start: int, stop: int, own: slice) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, n, columns or d] of tokens that are so far behind the first of a kind."""
        if kind == "coded":
            sides = self.reader.keys, self.reader.values
            k, v = (self._codes(side, start, stop, own) for side in sides)
            return k, v
        assert self.exact is not None
        k, v = self.exact.last_keys, self.exact.last_values
        if kind == "first":
            k, v = self.exact.first_keys, self.exact.first_values
        return k[own, :, start:stop].to(self.number), v[own, :, start:stop].to(self.number)

    def _codes(self, side: Unpacker, start: int, stop: int, own: slice) -> Tensor:
        start, stop = start + self.skip, stop + self.skip
        tile = start // TOKENS
        codes = side.codes(own, tile, -(-stop // TOKENS) - tile, self.number)
        return codes[:, :, start - tile * TOKENS : stop - tile * TOKENS]


class _Map:
    """Products with a static fp32 matrix [H, a, b]."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._parts: dict[torch.dtype, Tensor] = {}

    def product(self, x: Tensor) -> Tensor:
        """x [B, H, n, a] times the matrix, in at least fp32."""
        if not (x.is_cuda and x.dtype.itemsize == 2):
            number = _compute(x.dtype)
            return x.to(number) @ self.matrix.to(number)
        if x.dtype not in self._parts:
            # in two parts of x's type it is as good as fp32, and tensor cores sum their products exactly
            high = self.matrix.to(x.dtype)
            self._parts[x.dtype] = torch.cat([high, (self.matrix - high).to(x.dtype)], dim=1)
        twice = torch.cat([x, x], dim=-1).flatten(0, 1)
        parts = self._parts[x.dtype].repeat(len(x), 1, 1)
        out: Tensor = torch.bmm(twice, parts, out_dtype=torch.float32)
        return out.view(*x.shape[:3], -1)


def _centred(folded: FoldedTiles, columns: int) -> tuple[Tensor, Tensor]:
    """Matrix [H, columns, d] and shift [H, d] of centred codes, fp32."""
    matrix = folded.matrix[:, :columns]
    return pad(matrix, (0, 0, 0, columns - matrix.shape[1])), folded.middle


def _alike(begin: Sequence[int], most: int) -> Iterator[slice]:
    """Sequences one behind another that begin alike, at most so many."""
    start = 0
    for i in range(1, len(begin) + 1):
        if i == len(begin) or i - start == most or begin[i] != begin[start]:
            yield slice(start, i)
            start = i


class _Sums:
    """Weighted means over some tokens, and the logarithms of their masses, merged piece by piece."""

    def __init__(self, like: Tensor, width: int) -> None:
        """For queries ``like`` [B, Hq, Q, d] and means of ``width`` numbers."""
        self.out = like.new_empty(*like.shape[:3], width)
        self.log = like.new_full(like.shape[:3], -torch.inf, dtype=_compute(like.dtype))
        self.whole = False

    def add(self, rows: slice, out: Tensor, log: Tensor) -> None:
        """Means and logarithms over other tokens for some of the queries."""
        if not self.whole:
            if out.shape[2] == self.log.shape[2]:
                self.out, self.log, self.whole = out, log.to(self.log), True
                return
            self.out, self.whole = self.out.to(self.log.dtype).zero_(), True
        self.out = self.out.to(self.log.dtype)
        total = torch.logaddexp(self.log[:, :, rows], log.to(self.log))
        share = _share(log, total)
        self.out[:, :, rows].lerp_(out.to(self.out), share.to(self.out))
        self.log[:, :, rows] = total


def _share(log: Tensor, total: Tensor) -> Tensor:
    """What part of a mass is of some tokens, [..., 1]; none where there is no mass."""
    return (log - total).exp().nan_to_num(0.0).unsqueeze(-1)


def _compute(number: torch.dtype) -> torch.dtype:
    return torch.promote_types(number, torch.float32)


def _attend(call: _Call, q: Tensor, own: slice, begin: int, from_end: int) -> Tensor:
    """Queries [B, Hq, Q, d] of the sequences ``own``, whose first ``begin`` tokens are padding.

    The first query's token is ``-from_end`` tokens before the end. Returns [B, Hq, Q, d].
    """
    reader, position = call.reader, call.ends["last"][1] + from_end
    grouped = q.reshape(q.shape[0], reader.heads, -1, q.shape[-1])
    folded = reader.fold.product(grouped).to(call.number).view(*q.shape[:3], -1)
    plain = q.to(call.number)
    coded, exact = _Sums(folded, reader.columns), _Sums(plain, q.shape[-1])
    single = call.exact is None and call.sink_logits is None and call.softcap is None
    offset = None if single else _offset(grouped, reader.offset).reshape(q.shape[:3])
    most = call.most_tokens(len(q))
    for kind, start, stop, rows, causal in _pieces(call, begin, position, q.shape[2], most):
        at = call.ends[kind][0]
        k, v = call.read(kind, start - at, stop - at, own)
        apart = position + rows.start - start
        if kind == "coded":
            more = None if offset is None else offset[:, :, rows]
            coded.add(rows, *_piece(call, folded[:, :, rows], k, v, 1.0, more, causal, apart))
        else:
            exact.add(rows, *_piece(call, plain[:, :, rows], k, v, reader.scaling, None, causal, apart))
    return _merged(call, coded, exact, blind=begin > position)


def _merged(call: _Call, coded: _Sums, exact: _Sums, *, blind: bool) -> Tensor:
    """Coded and exact tokens together, [B, Hq, Q, d]; ``blind`` where some queries see no token."""
    reader, parts = call.reader, []
    if coded.whole:
        decoded = reader.unfold.product(coded.out.reshape(len(coded.out), reader.heads, -1, reader.columns))
        decoded += reader.shift.unsqueeze(1).to(decoded)
        parts.append((decoded.view(*coded.log.shape, -1), coded.log))
    if exact.whole:
        parts.append((exact.out.to(exact.log.dtype), exact.log))
    if not parts:
        return torch.zeros_like(exact.out)
    if len(parts) == 1 and call.sink_logits is None and not blind:
        return parts[0][0]
    total = parts[0][1] if len(parts) == 1 else torch.logaddexp(parts[0][1], parts[1][1])
    if call.sink_logits is not None:
        total = torch.logaddexp(total, call.sink_logits.to(total).view(1, -1, 1))
    out, log = parts[0]
    out = out * _share(log, total)
    for more, log in parts[1:]:
        out.addcmul_(more, _share(log, total))
    return out


def _pieces(
    call: _Call, begin: int, position: int, queries: int, most: int
) -> Iterator[tuple[Kind, int, int, slice, bool]]:
    """Kind, tokens from and to, rows that see some of them, and whether only causally.

    Tokens before the queries are seen by all; new ones by their own rows causally, and by all behind.
    """
    earliest = begin if call.window is None else max(begin, position - call.window + 1)
    for kind, (start, stop) in call.ends.items():
        start, stop = max(start, earliest), min(stop, position + queries)
        for left, right in _cut(start, min(stop, position), most):
            yield kind, left, right, slice(0, queries), False
        start = max(start, position)
        if start < stop:
            first, last = start - position, stop - position
            yield kind, start, stop, slice(first, last), True
            if last < queries:
                yield kind, start, stop, slice(last, queries), False


def _cut(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """At most ``most`` tokens at a time; what is left over of a usual size apart."""
    while start < stop:
        step = min(most, stop - start)
        step = step // _USUAL * _USUAL or step
        yield start, start + step
        start += step


def _piece(  # noqa: PLR0913
    call: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    offset: Tensor | None,
    causal: bool,
    apart: int,
) -> tuple[Tensor, Tensor]:
    """Means [B, Hq, Q, d] and logarithms of masses [B, Hq, Q] of one piece, with ``offset`` in scores.

    The first query's position is ``apart`` behind the first token's.
    """
    if call.kernel == "plain":
        return _plain(q, k, v, scaling, offset, call.softcap, causal, apart, call.window)
    batch, query_heads, queries, dim = q.shape
    if not causal:
        # the queries of a group are queries of one head
        q = q.reshape(batch, k.shape[1], -1, dim)
    kernel = _usual(q, k, v, causal) if call.kernel is None else call.kernel
    out, log = KERNELS[kernel](q, k, v, causal, scaling)
    out = out.reshape(batch, query_heads, queries, -1)
    log = log.reshape(batch, q.shape[1], -1)[..., : q.shape[2]].reshape(batch, query_heads, queries)
    return out, log if offset is None else log + offset


def _usual(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Kernel:
    if not q.is_cuda:
        return "cpu"
    sizes = q.shape[2], k.shape[2]
    if any(size % _USUAL for size in sizes):
        return "flash"
    shared = q.shape[1] != k.shape[1]
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, shared)
    return "cudnn" if torch.backends.cuda.can_use_cudnn_attention(asked) else "flash"


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scaling
    )
    return found[0], found[1]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scaling)
    return found[0], found[1]


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    out, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scaling
    )
    return out, log


KERNELS: dict[str, Fused] = {"cudnn": _cudnn, "flash": _flash, "cpu": _cpu}


def _plain(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    offset: Tensor | None,
    softcap: float | None,
    causal: bool,
    apart: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """As ``_piece``, some queries at a time."""
    batch, query_heads, queries, dim = q.shape
    heads, tokens = k.shape[1:3]
    step = max(1, _PLAIN_SCORES // (batch * query_heads * tokens))
    outs: list[Tensor] = []
    logs: list[Tensor] = []
    for start in range(0, queries, step):
        block = q[:, :, start : start + step]
        rows = block.shape[2]
        scores = (block.reshape(batch, heads, -1, dim) * scaling @ k.mT).view(batch, query_heads, rows, -1)
        if offset is not None:
            scores = scores + offset[:, :, start : start + step].unsqueeze(-1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if causal or window is not None:
            behind = apart + start + torch.arange(rows, device=q.device).unsqueeze(-1)
            behind = behind - torch.arange(tokens, device=q.device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            scores = scores.masked_fill(~seen, -torch.inf)
        log = scores.logsumexp(dim=-1)
        weights = (scores - log.unsqueeze(-1)).exp().nan_to_num(0.0)
        outs.append((weights.view(batch, heads, -1, tokens) @ v).view(batch, query_heads, rows, -1))
        logs.append(log)
    return (outs[0], logs[0]) if len(outs) == 1 else (torch.cat(outs, dim=2), torch.cat(logs, dim=2))


def _offset(x: Tensor, vector: Tensor) -> Tensor:
    """x [B, H, n, d] times fp32 [H, d]: [B, H, n]."""
    number = _compute(x.dtype)
    out: Tensor = torch.einsum("bhnd,hd->bhn", x.to(number), vector.to(number))
    return out

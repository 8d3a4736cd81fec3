"""Keys and values of one layer in tiles while a model runs: storage that grows, written in place.

Rows (``cache.side``) are what every operation of a cache but appending and attending wants: ``Tiles``
takes rows over, ``Tiles.states`` gives them back, codes unchanged.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvsight.cache.counter import Counter
from kvsight.cache.side import SideState, check_batch
from kvsight.codec import Placement, check_finite
from kvsight.errors import KVSightError
from kvsight.formats import Packed, Row
from kvsight.ops.attend.cuda import (
    MOST_ROWS,
    Exact,
    TiledTokens,
    TileReader,
    attend_tiles,
    placed,
    token_ranges,
)
from kvsight.ops.attend.gradient import without_gradient
from kvsight.ops.attend.prefill import PrefillReader
from kvsight.ops.attend.ref import Coded
from kvsight.ops.attend.tiles import FoldedTiles, fold, tileable
from kvsight.ops.attend.tiles_op import attend_tiles_op, widths
from kvsight.ops.attend.tiles_ref import attend_tiles_ref
from kvsight.ops.encode.op import encode_tiles_op
from kvsight.ops.encode.tiles import Encoder, FoldedEncoder, TileWriter, fold_encoder, write_tiles_ref
from kvsight.packing import pack_row, unpack_row
from kvsight.tiling import TOKENS, Rows, Tiling

# the decoding kernel reads tiles for so many new tokens at a time, torch's kernels for more
MOST_NEW = 16
_DETACH = "generate under torch.no_grad(), or make the cache with tiles=False"
_GROWTH = 8
_PIECE = 64 * TOKENS


@dataclass(frozen=True, eq=False)
class Fresh:
    """New tokens [B, H, n, d] that see each other uncompressed, behind so many exact and coded ones."""

    keys: Tensor
    values: Tensor
    first: int
    tokens: int


class Tiles:
    """Both sides of one layer. Appending writes in place; ``nbytes`` counts tiles that hold tokens."""

    # whether queries see all tokens up to their own, of which all but the first are coded
    plain = True

    def __init__(
        self, key: SideState, value: SideState, counter: Counter | None = None, leads: bool = True
    ) -> None:
        """Take over two states that are ``ready`` and have all their exact first tokens.

        Layers of a cache share a ``counter``; in graphs the one that ``leads``, the first, counts for all.
        """
        # all of the states but their codes
        self.bare = replace(key, coded=()), replace(value, coded=())
        self.first = key.sinks.shape[2]
        self.counter = Counter(key.sinks.device) if counter is None else counter
        self.leads = leads
        # coded tokens that steps in graphs may reach; none where no room was asked for
        self.reserved = 0
        # coded tokens but those that graphs counted
        self._coded = key.coded[0].tokens - self.counter.settle()
        folded = [_folded(state, rows) for state, rows in _both(key, value)]
        self.folded = folded[0], folded[1]
        encoders = [_encoders(state, rows) for state, rows in _both(key, value)]
        self.encoders = fold_encoder(*encoders[0]), fold_encoder(*encoders[1])
        # what operators take, made here: every layer of a graph would trace it again
        self.reading, self.writing = numbers(*self.folded), numbers(*self.encoders)
        tiles = [_tiled(state, f.tilings) for state, f in zip((key, value), folded, strict=True)]
        self.tiles = tiles[0], tiles[1]
        self._reader: dict[float, TileReader] = {}
        self._prefill_reader: dict[float, PrefillReader] = {}
        self._writer: TileWriter | None = None
        # the first layer's step that tokens were last appended in, where this was not in a graph
        self._step = self.counter.steps
        # whether the first layer has tokens of a step without a graph that this one has not yet
        self._waits = False
        if not leads:
            self.counter.others.add(self)
        self.counter.advance(self.total, self.first + self.room)

    @property
    def tokens(self) -> int:
        """Coded tokens. Waits for the device where graphs count; while one is recorded they are old."""
        self.counter.settle()
        return self.known

    @property
    def known(self) -> int:
        """Coded tokens, without those of graphs that were replayed since they were last settled."""
        return self.counter.counted - self.first if self._follows else self._coded + self.counter.replayed

    @property
    def _follows(self) -> bool:
        # where some layers are in graphs, what the first layer counts is all that is known
        return not self.leads and self.counter.in_graphs

    def before(self, new: int) -> int:
        """Coded tokens that ``new`` ones lie behind; the first layer may have counted these already."""
        if self._follows:
            self.counter.settle()
            return self.known - new
        return self.tokens if self.leads else self.known

    @property
    def total(self) -> int:
        """Exact and coded tokens."""
        return self.first + self.tokens

    @property
    def length(self) -> int:
        """Tokens so far, those that are held no more included."""
        return self.total

    @property
    def shown(self) -> int:
        """How many of the last tokens the newest queries see together, as far as is ``known``."""
        return self.first + self.known

    @property
    def window(self) -> int | None:
        """How many tokens a query sees at most, if the model limits it."""
        return None

    @property
    def reached(self) -> int:
        """As ``length``, without tokens that the first layer has in this step and this one not yet."""
        return self.length - self._late

    @property
    def reached_in_graph(self) -> Tensor:
        """As ``reached``, int64 on the device: a number would stay the same in every replay."""
        if torch.compiler.is_compiling() and not self.leads:
            raise KVSightError(
                "only the first layer of a compiled step knows how many tokens there are, and this model "
                "asks a later one. Do not compile it."
            )
        return self.counter.before - self._late

    @property
    def _late(self) -> int:
        return self.counter.new if self._follows and self._waits else 0

    @property
    def seen(self) -> Tensor:
        """int32 [1]: tokens of a sequence, exact ones included, where launches read it."""
        return self.counter.seen

    @property
    def room(self) -> int:
        """How many coded tokens have a place."""
        return TOKENS * self.tiles[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of tiles that hold tokens, and of exact tokens."""
        used = -(-self.tokens // TOKENS)
        coded = sum(t.shape[0] * used * t.shape[2] for side in self.tiles for t in side)
        return coded + sum(state.nbytes for state in self.bare)

    @property
    def allocated(self) -> int:
        """Bytes with the room for tokens to come."""
        return sum(t.numel() for side in self.tiles for t in side) + sum(s.nbytes for s in self.bare)

    def __deepcopy__(self, memo: dict[int, object]) -> "Tiles":
        # prepared launches hold addresses
        out = Tiles(*self.states(), copy.deepcopy(self.counter, memo), self.leads)
        if self.reserved:
            out.reserve(self.reserved)
        return out

    def append(self, k: Tensor, v: Tensor, tokens: int | None = None) -> None:
        """Code new tokens [B, H, n, d], that are ``check``ed, behind the others: ``before`` of them."""
        new = k.shape[2]
        # autocast has keys of another precision
        v = v.to(k.dtype)
        if torch.compiler.is_compiling():
            self._waits = False
            if self.leads:
                self.counter.advance_in_graph(new, self.first + self._limit)
            else:
                self.counter.join()
            encode_tiles_op(k, v, *self.tiles, *self.writing, self.seen, self.first)
            return
        if tokens is None:
            tokens = self.before(new)
        # the move to larger storage would be part of a graph, or pass by layers that are in one
        if tokens + new > self._limit and (self.counter.recording or self._leaves_some_behind()):
            raise KVSightError(
                f"a graph has room for {self._limit} tokens and cannot have {tokens + new}; "
                "call cache.reserve(tokens) with more before."
            )
        self._make_room_for(tokens + new)
        if self.counter.recording:
            # of layers that are replayed alone, too
            self.counter.join()
        if self.leads:
            self._begin_step(new)
        self._step, self._waits = self.counter.steps, False
        self._coded += new
        self.counter.advance(self.first + tokens + new, self.first + self._limit)
        if k.is_cuda:
            if self._writer is None or self._writer.dtype != k.dtype:
                self._writer = TileWriter.of(*self.encoders, *self.tiles, k.dtype)
            self._writer.write(k, v, self.seen, self.first)
        else:
            write_tiles_ref(self.encoders, self.tiles, k, v, tokens)

    def _begin_step(self, new: int) -> None:
        self.counter.steps, self.counter.new = self.counter.steps + 1, new
        # otherwise layers count themselves
        if self.counter.in_graphs or self.counter.recording:
            for other in self.counter.others:
                other._waits = True

    def _leaves_some_behind(self) -> bool:
        """Whether some layers are in graphs while this one, the first, is not."""
        late = (other._step != self.counter.steps for other in self.counter.others)
        return self.leads and self.counter.in_graphs and any(late)

    def make_room(self, tokens: int) -> None:
        """Room for so many coded tokens."""
        if tokens > self.room:
            self._grow(-(-tokens // TOKENS))

    @property
    def _limit(self) -> int:
        """How many coded tokens there may be before anything moves."""
        return self.reserved or self.room

    def _make_room_for(self, tokens: int) -> None:
        """Room for so many, and some more if there was not enough; as much in all layers with graphs."""
        if tokens > self._limit:
            most = TOKENS * _room(tokens)
            self.make_room(most)
            self.reserved = most if self.reserved else 0

    def reserve(self, tokens: int) -> None:
        """Room for so many coded tokens in graphs, whose launches are cut for all of it."""
        self.make_room(tokens)
        self.reserved = tokens

    def leave(self) -> None:
        """Be no layer of the count any more: tracing keeps what it saw for a while."""
        self.counter.others.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        # prepared launches hold addresses
        return {**self.__dict__, "_reader": {}, "_prefill_reader": {}, "_writer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.leads:
            self.counter.others.add(self)

    def attend(
        self,
        q: Tensor,
        *,
        scaling: float,
        hidden: Tensor | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        fresh: Fresh | None = None,
    ) -> Tensor:
        """Attention of the newest tokens' queries [B, Hq, Q, d]: [B, Q, Hq, d].

        ``hidden`` [B] first tokens of each sequence are padding. The newest tokens' own codes are not read
        where they are ``fresh``.
        """
        if torch.compiler.is_compiling() and hidden is None and not many(q, fresh):
            return self._attend_compiled(q, scaling, softcap, sink_logits)
        exact = self._exact(q, fresh)
        options: dict[str, Any] = {"exact": exact, "softcap": softcap, "sink_logits": sink_logits}
        if many(q, fresh):
            tokens = self.known if fresh is None else fresh.tokens
            return self._prefill(scaling).attend(
                q, tokens, hidden=hidden, skip=self._skip, window=self.window, **options
            )
        return without_gradient(self._attend_few(q, scaling, hidden, options), q, _DETACH)

    def _attend_few(
        self, q: Tensor, scaling: float, hidden: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        queries, heads = q.shape[2], len(self.tiles[0])
        group = q.shape[1] // heads
        if group > MOST_ROWS:
            return self._attend_by_query_heads(q, scaling, hidden, options)
        step = MOST_ROWS // group
        # a graph that is recorded cannot be given another schedule
        about = self.room if self.reserved else self.known
        ranges = self._ranges(q, hidden)
        parts: list[Tensor] = []
        for start in range(0, queries, step):
            block = (q if step >= queries else q[:, :, start : start + step]).contiguous()
            own = None if ranges is None else ranges[:, start : start + step]
            if q.is_cuda:
                after = max(0, queries - start - step)
                reader = self._read(scaling)
                call = reader.call(block, about, own, seen=self.seen, after=after, **options)
                parts.append(attend_tiles(call))
            else:
                assert own is not None
                parts.append(attend_tiles_ref(block, *self._tokens(), own, scaling=scaling, **options))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend_by_query_heads(
        self, q: Tensor, scaling: float, hidden: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """As ``_attend_few``, with as many query heads of each KV head at a time as a launch takes."""
        sinks, heads = options["sink_logits"], len(self.tiles[0])
        parts: list[Tensor] = []
        for start in range(0, q.shape[1] // heads, MOST_ROWS):
            own = slice(start, start + MOST_ROWS)
            block = q.unflatten(1, (heads, -1))[:, :, own].flatten(1, 2)
            logits = None if sinks is None else sinks.unflatten(0, (heads, -1))[:, own].flatten()
            out = self._attend_few(block, scaling, hidden, options | {"sink_logits": logits})
            parts.append(out.unflatten(2, (heads, -1)))
        return torch.cat(parts, dim=3).flatten(2, 3)

    def _attend_compiled(
        self, q: Tensor, scaling: float, softcap: float | None, sink_logits: Tensor | None
    ) -> Tensor:
        """As ``_attend_few`` for one operator of a graph."""
        if q.shape[2] * q.shape[1] > MOST_ROWS * len(self.tiles[0]):
            heads, rows = len(self.tiles[0]), q.shape[2] * q.shape[1]
            raise KVSightError(
                f"compiled attention takes {MOST_ROWS} query rows for each of {heads} KV heads; got {rows} "
                "rows. Feed fewer tokens at a time, or do not compile."
            )
        key, value = self.bare
        exact = [key.sinks, value.sinks] if self.first else []
        out: Tensor = attend_tiles_op(
            q, *self.tiles, *self.reading, self.seen, exact, scaling, softcap, sink_logits
        )
        return out

    def states(self, fresh: Fresh | None = None) -> tuple[SideState, SideState]:
        """The same tokens in rows, or those before ``fresh`` ones."""
        first, tokens = (self.first, self.tokens) if fresh is None else (fresh.first, fresh.tokens)
        out = [
            replace(
                state,
                sinks=state.sinks[:, :, :first],
                coded=tuple(_rows(p, side, f.tilings, tokens) for p in state.placements),
            )
            for state, side, f in zip(self.bare, self.tiles, self.folded, strict=True)
        ]
        return out[0], out[1]

    def _exact(self, q: Tensor, fresh: Fresh | None) -> Exact | None:
        """First and fresh tokens, if there are any."""
        key, value = self.bare
        if fresh is not None:
            first = slice(0, fresh.first)
            return Exact(key.sinks[:, :, first], value.sinks[:, :, first], fresh.keys, fresh.values)
        if not self.first + self._behind:
            return None
        return Exact(key.sinks, value.sinks, key.tail, value.tail)

    @property
    def _behind(self) -> int:
        """Exact last tokens."""
        return int(self.bare[0].tail.shape[2])

    @property
    def _skip(self) -> int:
        """Coded tokens before the first that is seen."""
        return self.first + self.known + self._behind - self.shown

    def _ranges(self, q: Tensor, hidden: Tensor | None) -> Tensor | None:
        # the kernel finds plain ranges itself
        if q.is_cuda and hidden is None and self.plain:
            return None
        skip = self._skip
        sizes = q.shape[0], q.shape[2], self.first, self.known - skip, self._behind
        if hidden is None:
            return _ranges(*sizes, skip, self.window, q.device)
        return placed(token_ranges(*sizes, skip=skip, hidden=hidden.cpu(), window=self.window), q.device)

    def _tokens(self) -> tuple[TiledTokens, TiledTokens]:
        sides = [TiledTokens(f, t, self.known) for f, t in zip(self.folded, self.tiles, strict=True)]
        return sides[0], sides[1]

    def _read(self, scaling: float) -> TileReader:
        if scaling not in self._reader:
            self._reader[scaling] = TileReader.of(*self._tokens(), scaling)
        return self._reader[scaling]

    def _prefill(self, scaling: float) -> PrefillReader:
        if scaling not in self._prefill_reader:
            self._prefill_reader[scaling] = PrefillReader.of(*self._tokens(), scaling)
        return self._prefill_reader[scaling]

    def _grow(self, room: int) -> None:
        grown = [tuple(_larger(t, room) for t in side) for side in self.tiles]
        self.tiles = grown[0], grown[1]
        # addresses changed
        self._reader.clear()
        self._prefill_reader.clear()
        self._writer = None


def fits_tiles(key: SideState, value: SideState) -> bool:
    """Whether all codecs of a layer have tiles, and both sides are as wide, with the same tokens exact."""
    tiled = all(tileable(coded) for state in (key, value) for coded in _coded(state))
    alike = key.retention == value.retention and key.tail.shape[3] == value.tail.shape[3]
    return tiled and alike


def ready(key: SideState, value: SideState, new: int) -> bool:
    """Whether states that fit tiles will hold enough with ``new`` more coded tokens to be taken over."""
    return all(
        state.coded[0].tokens + new - missing(state) >= TOKENS
        and state.skip == 0
        and state.tail.shape[2] <= state.retention.exact_last
        for state in (key, value)
    )


def missing(state: SideState) -> int:
    """How many exact first tokens are still to come."""
    return state.retention.exact_first - int(state.sinks.shape[2])


def check(state: SideState, x: Tensor) -> None:
    """As ``cache.side.append``, but a few new tokens are not looked into: a device would wait for that."""
    check_batch(state, x)
    if x.shape[2] > MOST_NEW:
        check_finite(x)


def many(q: Tensor, fresh: Fresh | None) -> bool:
    """Whether attention of these queries is torch's rather than the decoding kernel's."""
    return fresh is not None or q.shape[2] > MOST_NEW


def numbers(
    keys: FoldedTiles | FoldedEncoder, values: FoldedTiles | FoldedEncoder
) -> tuple[list[Tensor], str, str]:
    """Maps of both sides, and widths of keys and of values, as operators take them."""
    return [*keys.maps, *values.maps], widths(keys.tilings), widths(values.tilings)


def _both(key: SideState, value: SideState) -> tuple[tuple[SideState, Rows], tuple[SideState, Rows]]:
    return (key, "tokens"), (value, "coordinates")


def _coded(state: SideState) -> list[Coded]:
    return [p.codec.coded(p.heads, c) for p, c in zip(state.placements, state.coded, strict=True)]


def _folded(state: SideState, rows: Rows) -> FoldedTiles:
    return fold(_coded(state), rows)


def _encoders(state: SideState, rows: Rows) -> tuple[list[Encoder], Rows]:
    transforms = [p.codec.transform for p in state.placements]
    pairs = zip(_coded(state), transforms, strict=True)
    return [Encoder(coded, t.matrix, t.shift) for coded, t in pairs], rows


def _heads_of(placements: Sequence[Placement]) -> dict[int, tuple[int, int]]:
    """Which placement has a head, and where in it."""
    return {head: (i, at) for i, p in enumerate(placements) for at, head in enumerate(p.heads)}


def _tiled(state: SideState, tilings: Sequence[Tiling]) -> tuple[Tensor, ...]:
    """Rows to tiles of each head [B, n, nbytes], with room behind."""
    where = _heads_of(state.placements)
    tokens = state.coded[0].tokens
    room = _room(tokens)
    out: list[Tensor] = []
    for head, tiling in enumerate(tilings):
        part, at = where[head]
        packed = state.coded[part]
        form = packed.format
        assert isinstance(form, Row)
        tiles = _no_codes(packed.tensors[0], state.batch, room, tiling.nbytes)
        for start in range(0, tokens, _PIECE):
            codes = unpack_row(packed.tensors[0][:, at, start : start + _PIECE], form.widths)
            codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[1] % TOKENS))
            packed_tiles = tiling.pack(codes)
            tiles[:, start // TOKENS : start // TOKENS + packed_tiles.shape[1]] = packed_tiles
        out.append(tiles)
    return tuple(out)


def _rows(placement: Placement, tiles: Sequence[Tensor], tilings: Sequence[Tiling], tokens: int) -> Packed:
    """Tiles of a placement's heads to rows [B, h, tokens, bytes]."""
    form = placement.codec.format
    assert isinstance(form, Row)
    used = -(-tokens // TOKENS)
    rows = [
        pack_row(tilings[head].unpack(tiles[head][:, :used])[:, :tokens], form.widths)
        for head in placement.heads
    ]
    return Packed(form, (torch.stack(rows, dim=1),))


def _room(tokens: int) -> int:
    """Tiles to allocate for so many tokens, and some for those to come."""
    used = -(-tokens // TOKENS)
    return used + max(1, used // _GROWTH)


def _larger(tiles: Tensor, room: int) -> Tensor:
    out = _no_codes(tiles, tiles.shape[0], room, tiles.shape[2])
    out[:, : tiles.shape[1]] = tiles
    return out


def _no_codes(like: Tensor, *shape: int) -> Tensor:
    # caches outlive inference mode
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=16)
def _ranges(  # noqa: PLR0913
    batch: int,
    queries: int,
    first: int,
    coded: int,
    last: int,
    skip: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    # all layers of a step ask for the same
    return placed(token_ranges(batch, queries, first, coded, last, skip=skip, window=window), device)

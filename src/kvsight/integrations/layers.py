"""Layers of the cache: what they hold, in rows or in tiles, and what steps do to it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvsight.cache import side as sides
from kvsight.cache.ahead import Ahead
from kvsight.cache.counter import Counter
from kvsight.cache.monitor import Monitor
from kvsight.cache.outside import outside_autocast, outside_graphs
from kvsight.cache.packed import Held, PackedKV, Reads, TracedKV
from kvsight.cache.side import SideState, check_batch
from kvsight.cache.tiles import MOST_NEW, Fresh, Tiles, check, fits_tiles, missing, ready
from kvsight.cache.windows import WindowedTiles, has_window
from kvsight.errors import KVSightError
from kvsight.ops.attend import Segment
from kvsight.ops.attend.cuda import reads_tiles
from kvsight.plan import LayerPlan, Plan

# from so many tokens on, attention of one new token on rows takes longer than Python does
_LONG = 1024


class PackedLayer(CacheLayerMixin):
    """Full attention: every token is kept, coded by the plan."""

    is_sliding = False
    is_croppable = True

    def __init__(  # noqa: PLR0913
        self,
        plan: Plan,
        layer: LayerPlan,
        reads: Reads,
        raw_prefill: bool,
        ahead: Ahead,
        monitor: Monitor | None = None,
        tiled: bool | None = None,
        counters: dict[torch.device, tuple[Counter, int]] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.layer, self.reads, self.raw_prefill = plan, layer, reads, raw_prefill
        self.ahead, self.monitor, self.tiled = ahead, monitor, tiled
        self.counters = {} if counters is None else counters
        self.tiles: Tiles | None = None
        self.key_state: SideState | None = None
        self.value_state: SideState | None = None
        self._length = 0

    @property
    def cumulative_length(self) -> int:
        """Tokens so far."""
        return self._length if self.tiles is None else self.tiles.length

    @cumulative_length.setter
    def cumulative_length(self, tokens: int) -> None:
        self._length = tokens

    @property
    def _reached(self) -> int:
        return self._length if self.tiles is None else self.tiles.reached

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        retention = self.plan.retention(self.layer)
        dense = self.plan.dense_dtype
        self.key_state = sides.start(self.layer.key, retention, dense, key_states)
        self.value_state = sides.start(self.layer.value, retention, dense, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        able = reads_tiles(self.device, self.dtype)
        tiled = able if self.tiled is None else self.tiled
        if tiled and self.device.type == "cuda" and not able:
            raise KVSightError(
                "tiles on a GPU need compute capability 9.0 (Hopper), 228 KB of shared memory, torch 2.9 "
                f"and at most 32 bits a number; got {torch.cuda.get_device_name(self.device)} and "
                f"{self.dtype}. "
                "Leave tiles unset for rows."
            )
        self.fits_tiles = tiled and fits_tiles(self.key_state, self.value_state)
        self.windowed = has_window(self.key_state, self.value_state)
        # who asks for rows knows
        self.slow = able and self.tiled is None and not self.fits_tiles
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Code the new tokens; return handles to all visible ones."""
        if self._in_one_graph:
            return self._update_in_graph(key_states, value_states)  # type: ignore[return-value]
        return self._update(key_states, value_states)

    @property
    def _in_one_graph(self) -> bool:
        """Whether a step is traced that shall be a graph: others compile in pieces, around the cache."""
        return self.tiles is not None and self.tiles.reserved > 0 and torch.compiler.is_compiling()

    @outside_graphs
    @outside_autocast
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.layer.index == self.plan.layers[0].index:
            self.reads.begin_step()
        if self._to_tiles(key_states.shape[2]):
            return self._update_tiles(key_states, value_states)
        if key_states.is_cuda and torch.cuda.is_current_stream_capturing():
            raise KVSightError(
                f"layer {self.layer.index} is in rows, whose steps a CUDA graph cannot hold: a replay adds "
                "no token. Call cache.reserve(tokens) before, or do not capture."
            )
        if self.slow and key_states.shape[2] <= MOST_NEW and self._length >= _LONG:
            self.reads.on_rows()
        self.to_rows()
        assert self.key_state is not None and self.value_state is not None
        before = self.key_state, self.value_state
        key = sides.append(self.key_state, key_states)
        value = sides.append(self.value_state, value_states)
        if self.monitor is not None and key_states.shape[2] > 1:
            self._look(self.monitor, key, value, key_states, value_states, self.cumulative_length)
        self.cumulative_length += key_states.shape[2]
        self.key_state, self.value_state = self._retain(key), self._retain(value)
        if self.raw_prefill and key_states.shape[2] > 1:
            return (
                self._handle(self._segments(before[0]), key_states, fresh=key_states),
                self._handle(self._segments(before[1]), value_states, fresh=value_states),
            )
        last = self._shown(key_states.shape[2])
        return (
            self._handle(sides.segments(key, last), key_states),
            self._handle(sides.segments(value, last), value_states),
        )

    def _to_tiles(self, new: int) -> bool:
        """Whether an update of this many tokens goes to tiles."""
        if not self.fits_tiles or (self.windowed and not self._moves_in_tiles(new)):
            return False
        if self.tiles is not None:
            return True
        assert self.key_state is not None and self.value_state is not None
        # where tokens move, new ones may stay exact
        return ready(self.key_state, self.value_state, 0 if self.windowed else new)

    def _moves_in_tiles(self, new: int) -> bool:
        """Whether a layer whose tokens move takes so many in tiles: a few, which read codes."""
        return new <= MOST_NEW and not (self.raw_prefill and new > 1)

    def to_rows(self) -> None:
        """Give tokens in tiles back to rows, which all operations but appending want."""
        if self.tiles is not None:
            key, value = self.tiles.states()
            self.tiles.leave()
            self._length, self.tiles = self.tiles.length, None
            self.key_state, self.value_state = self._retain(key), self._retain(value)

    def _update_tiles(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        entered = self.tiles is None
        new = key_states.shape[2]
        coded = None if self.tiles is None else self.tiles.before(new)
        tiles, first = self._tiles(key_states, value_states)
        before = self._length if coded is None else tiles.first + coded
        fresh = None
        if self.raw_prefill and new > 1:
            exact = min(tiles.first, before)
            fresh = Fresh(key_states, value_states, exact, before - exact)
        if entered:
            reads_codes = new > MOST_NEW if fresh is None else fresh.tokens > 0
            self.ahead.start(key_states[:, :, first:], reads_codes=reads_codes)
        if fresh is None and new <= MOST_NEW:
            self.ahead.step(key_states)
        tiles.append(key_states[:, :, first:], value_states[:, :, first:], coded)
        if self.monitor is not None and new > MOST_NEW:
            self._look(self.monitor, *tiles.bare, key_states, value_states, before)
        return (
            PackedKV(Held.in_tiles(tiles, 0, fresh), key_states, self.reads),
            PackedKV(Held.in_tiles(tiles, 1, fresh), value_states, self.reads),
        )

    def _tiles(self, key_states: Tensor, value_states: Tensor) -> tuple[Tiles, int]:
        """The tiles that all tokens so far are in, and how many of the new ones are exact first tokens."""
        states = (self.key_state, self.value_state) if self.tiles is None else self.tiles.bare
        key, value = states
        assert key is not None and value is not None
        check(key, key_states)
        check(value, value_states)
        first = missing(key)
        if self.tiles is None:
            if first:
                key = sides.append(key, key_states[:, :, :first])
                value = sides.append(value, value_states[:, :, :first])
            self.tiles = self._take(key, value)
        return self.tiles, first

    def _take(self, key: SideState, value: SideState) -> Tiles:
        """Tiles of states, counted with those of other layers."""
        self.key_state = self.value_state = None
        if self.windowed:
            return WindowedTiles(key, value)
        if self.device not in self.counters:
            self.counters[self.device] = Counter(self.device), self.layer.index
        counter, leader = self.counters[self.device]
        return Tiles(key, value, counter, leader == self.layer.index)

    def _update_in_graph(self, key_states: Tensor, value_states: Tensor) -> tuple[TracedKV, TracedKV]:
        """As ``_update_tiles``, but numbers of the host stay, as a graph would hold on to them."""
        assert self.tiles is not None
        if self.raw_prefill and key_states.shape[2] > 1:
            raise KVSightError(
                f"compiled steps of a cache with prefill='raw' take one token; got {key_states.shape[2]}."
            )
        check_batch(self.tiles.bare[0], key_states)
        self.tiles.append(key_states, value_states)
        handle = TracedKV(self.tiles, self.reads)
        return handle, handle

    def reservable(self) -> Tiles:
        """The layer's tiles; raises where there cannot be any by now."""
        if self.tiles is None and self.is_initialized and not self.windowed and self._to_tiles(0):
            assert self.key_state is not None and self.value_state is not None
            self.tiles = self._take(self.key_state, self.value_state)
        if self.tiles is None or self.windowed:
            raise KVSightError(
                f"layer {self.layer.index} has no tiles to reserve room in; it has {self._length} tokens. "
                "Tiles want a plan fitted with the option layout=tiles, a GPU or tiles=True, 64 tokens, "
                "and no sliding window nor exact last tokens."
            )
        return self.tiles

    def _look(
        self,
        monitor: Monitor,
        key: SideState,
        value: SideState,
        key_states: Tensor,
        value_states: Tensor,
        before: int,
    ) -> None:
        # the states hold the placements where the tensors are
        monitor.look(self.layer, "k", key.placements, key_states, before)
        monitor.look(self.layer, "v", value.placements, value_states, before)
        if self.layer.index == self.plan.layers[-1].index:
            monitor.say()

    def _segments(self, state: SideState) -> tuple[Segment, ...]:
        return sides.segments(state) if state.visible else ()

    def _handle(self, segments: tuple[Segment, ...], like: Tensor, fresh: Tensor | None = None) -> PackedKV:
        if fresh is not None:
            segments = (*segments, Segment(fresh.shape[2], dense=fresh))
        return PackedKV(Held.in_segments(segments), like, self.reads)

    def _retain(self, state: SideState) -> SideState:
        return state

    def _shown(self, new: int) -> int | None:
        return None

    def get_seq_length(self) -> int:
        tiles = self.tiles
        if tiles is not None and tiles.reserved and tiles.counter.recording:
            # callers add it to a tensor of positions
            return tiles.reached_in_graph  # type: ignore[return-value]
        return self._reached

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._in_one_graph and self.tiles is not None:
            # graphs must not depend on how many tokens there are
            return self.tiles.room, 0
        return self._reached + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of ``get_max_length`` before transformers 5.16."""
        return self.get_max_length()

    @property
    def nbytes(self) -> int:
        if self.tiles is not None:
            return self.tiles.nbytes
        return sum(state.nbytes for state in (self.key_state, self.value_state) if state is not None)

    def reset(self) -> None:
        if self.tiles is not None:
            self.tiles.leave()
        self.key_state = self.value_state = self.tiles = None
        # graphs that counted are of no use any more
        self.counters.clear()
        self.cumulative_length = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        remove = self._removed(tokens_to_remove)
        self._each(lambda state: sides.crop(state, remove))
        self.cumulative_length -= remove

    def _removed(self, tokens_to_remove: int) -> int:
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.cumulative_length)
        return min(-tokens_to_remove, self.cumulative_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda state: sides.select(state, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda state: sides.select(state, torch.arange(state.batch).repeat_interleave(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        def chosen(state: SideState) -> SideState:
            return sides.select(state, torch.arange(state.batch)[indices.cpu()])

        self._each(chosen)

    def offload(self) -> None:
        self._each(lambda state: sides.move(state, "cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda state: sides.move(state, self.device))

    def _each(self, change: Any) -> None:
        self.to_rows()
        if self.key_state is not None and self.value_state is not None:
            self.key_state, self.value_state = change(self.key_state), change(self.value_state)


class PackedSlidingLayer(PackedLayer):
    """Sliding window of the model: blocks that left it are freed."""

    is_sliding = True
    record_past = False

    @property
    def sliding_window(self) -> int:
        assert self.layer.window is not None
        return self.layer.window

    def activate_past_recording(self) -> None:
        """Keep everything until the next ``crop`` (assisted decoding may roll back)."""
        self.record_past = True

    def _retain(self, state: SideState) -> SideState:
        return state if self.record_past else sides.hide(state, self.sliding_window - 1)

    def _moves_in_tiles(self, new: int) -> bool:
        return super()._moves_in_tiles(new) and not self.record_past

    def _shown(self, new: int) -> int | None:
        return self.sliding_window - 1 + new

    def _segments(self, state: SideState) -> tuple[Segment, ...]:
        return sides.segments(state, self.sliding_window - 1) if state.visible else ()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return min(self.cumulative_length, self.sliding_window - 1) + query_length, offset

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        full = self.cumulative_length >= self.sliding_window
        if full and not self.record_past and tokens_to_remove != 0:
            raise KVSightError(
                "a sliding layer cannot be cropped past its window unless it records the past; "
                "call cache.activate_past_recording() first."
            )
        remove = self._removed(tokens_to_remove)
        state = self.tiles.bare[0] if self.tiles is not None else self.key_state
        freed = 0 if state is None else state.freed
        if freed > max(0, self.cumulative_length - remove - self.sliding_window + 1):
            raise KVSightError(
                f"a sliding layer holds its tokens from {freed} on, which is too few to forget the last "
                f"{remove} of {self.cumulative_length}; its past is recorded since the last crop only."
            )
        super().crop(tokens_to_remove)
        if full:
            self._each(lambda state: sides.hide(state, self.sliding_window - 1))

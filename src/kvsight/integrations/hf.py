"""kvsight inside transformers: the cache, and attention straight on its codes."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvsight.atomic import replace_file
from kvsight.cache import side as sides
from kvsight.cache.ahead import Ahead
from kvsight.cache.counter import Counter
from kvsight.cache.monitor import Monitor, monitored
from kvsight.cache.outside import outside_graphs
from kvsight.cache.packed import Held, PackedKV, Reads, TracedKV
from kvsight.cache.side import SideState, check_batch
from kvsight.cache.tiles import MOST_NEW, Fresh, Tiles, check, fits_tiles, many, missing, ready
from kvsight.drift import Drift
from kvsight.errors import KVSightError
from kvsight.fingerprint import check_model, fingerprint
from kvsight.integrations.attention import (
    attention_override,
    default_scaling,
    fused_arguments,
    implementations,
    original,
)
from kvsight.ops.attend import Segment, attend
from kvsight.ops.attend.cuda import reads_tiles
from kvsight.plan import SIDES, LayerPlan, Plan
from kvsight.planfile import plan_hash

ATTENTION = "kvsight_packed"


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
        return self._length if self.tiles is None else self.tiles.total

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
        return self.tiles is not None and self.tiles.reserved and torch.compiler.is_compiling()

    @outside_graphs
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.layer.index == self.plan.layers[0].index:
            self.reads.begin_step()
        if self._to_tiles(key_states.shape[2]):
            return self._update_tiles(key_states, value_states)
        self._in_rows()
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
        if self.tiles is not None or not self.fits_tiles:
            return self.fits_tiles
        assert self.key_state is not None and self.value_state is not None
        return ready(self.key_state, self.value_state, new)

    def _in_rows(self) -> None:
        """Give tokens in tiles back to rows, which all operations but appending want."""
        if self.tiles is not None:
            self.key_state, self.value_state = self.tiles.states()
            self._length, self.tiles = self.tiles.total, None

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
        if self.device not in self.counters:
            self.counters[self.device] = Counter(self.device), self.layer.index
        counter, leader = self.counters[self.device]
        self.key_state = self.value_state = None
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

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens in all, in ``reservable`` tiles."""
        self.reservable().reserve(tokens, more=False)

    def reservable(self) -> Tiles:
        """The layer's tiles; raises where there cannot be any by now."""
        if self.tiles is None and self.is_initialized and self._to_tiles(0):
            assert self.key_state is not None and self.value_state is not None
            self.tiles = self._take(self.key_state, self.value_state)
        if self.tiles is None:
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
        self.key_state = self.value_state = self.tiles = None
        # graphs that counted are of no use any more
        self.counters.clear()
        self.cumulative_length = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.cumulative_length)
        remove = min(-tokens_to_remove, self.cumulative_length)
        self._each(lambda state: sides.crop(state, remove))
        self.cumulative_length -= remove

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
        self._in_rows()
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
        super().crop(tokens_to_remove)
        if full:
            self._each(lambda state: sides.hide(state, self.sliding_window - 1))


class PackedCache(Cache):
    """A transformers cache that holds a plan's packed rows.

    Args:
        plan: what to store and how.
        config: the model's config; by default rebuilt from the plan.
        prefill: "packed" (default) lets every query read coded keys and values, so that one forward
            pass measures the cache; "raw" lets the tokens of one call of more than one token see each
            other uncompressed, as most serving engines do.
        monitor: compare some of the tokens of every call of more than one with the calibration, and log
            a warning when they are unlike it; ``drift`` has the figures.
        tiles: hold tokens in tiles from the 64th on, where the plan was fitted with the option
            ``layout=tiles``. On NVIDIA GPUs since Hopper kernels read them, and they are the default;
            elsewhere plain torch does, for tests.

    ``model.generate(ids, past_key_values=PackedCache(plan))`` works as it is; inside
    ``kvsight.enable(model)`` attention runs on the codes.
    """

    def __init__(
        self,
        plan: Plan,
        config: PreTrainedConfig | None = None,
        *,
        prefill: str = "packed",
        monitor: bool = True,
        tiles: bool | None = None,
    ) -> None:
        if prefill not in ("packed", "raw"):
            raise KVSightError(f"prefill is 'packed' or 'raw'; got {prefill!r}.")
        self.plan, self.prefill, self.tiles = plan, prefill, tiles
        self.reads = Reads(plan)
        # of every device, and the number of the first layer there
        self.counters: dict[torch.device, tuple[Counter, int]] = {}
        self.monitor = monitored(plan, monitor)
        planned = {layer.index: layer for layer in plan.layers}
        config = config_of(plan) if config is None else config
        text = config.get_text_config(decoder=True)
        self.ahead = Ahead(
            plan, getattr(text, "num_attention_heads", None), getattr(text, "attn_logit_softcapping", None)
        )
        template = DynamicCache(config=config).layers
        if not template or max(planned, default=0) >= len(template):
            raise KVSightError(
                f"the plan has {len(planned)} cached layers, the config {len(template)}. "
                "Pass the config of the model that the plan was fitted to."
            )
        layers = [self._layer(kind, planned.get(i)) for i, kind in enumerate(template)]
        super().__init__(layers=layers)

    def _layer(self, template: Any, layer: LayerPlan | None) -> Any:
        # layers that hold no keys and values (linear attention, KV sharing) stay as transformers made them
        if layer is None:
            return template
        kind = {DynamicLayer: PackedLayer, DynamicSlidingWindowLayer: PackedSlidingLayer}
        packed = kind.get(type(template))
        if packed is None:
            raise KVSightError(
                f"layer {layer.index} is a {type(template).__name__}, which kvsight cannot pack. "
                "Pass the config of the model that the plan was fitted to."
            )
        raw, counters = self.prefill == "raw", self.counters
        return packed(self.plan, layer, self.reads, raw, self.ahead, self.monitor, self.tiles, counters)

    def _packed_layers(self) -> Iterator[PackedLayer]:
        return (layer for layer in self.layers if isinstance(layer, PackedLayer))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for cached tokens: codes, scales, norms, sinks, window and pending ones."""
        return sum(layer.nbytes for layer in self._packed_layers())

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all: no step until then allocates, so steps can be graphs.

        Steps of one token that ``torch.compile`` compiled, or that a CUDA graph holds, are replayed without
        Python, so they cannot make room themselves; one too many fails, on a GPU for good. What moves
        tokens (``crop``, ``save``, beams, a copy, more room) ends graphs that were captured: reserve and
        capture again. Raises ``KVSightError`` unless all layers can be held in tiles by now.
        """
        if tokens < 1:
            raise KVSightError(f"room is for at least one token; got {tokens}.")
        # all layers or none
        for layer in self._packed_layers():
            layer.reservable()
        for layer in self._packed_layers():
            layer.reserve(tokens)

    def to_rows(self) -> None:
        """Give tokens in tiles back to rows, as the ledger counts them: the last tile may be part empty."""
        for layer in self._packed_layers():
            layer._in_rows()

    @property
    def drift(self) -> Drift | None:
        """How far the cached text is from the calibration; None if nothing was looked at yet."""
        return None if self.monitor is None else self.monitor.drift()

    def save(self, path: str | Path) -> None:
        """Write the cache's tokens to one safetensors file; ``load`` needs the same plan."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, PackedLayer):
                # a layer that reads another's keys and values is no cache layer and holds nothing
                if isinstance(layer, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
                    raise KVSightError(
                        f"layer {i} keeps other state than keys and values; this cache cannot be saved."
                    )
                continue
            layer._in_rows()
            if layer.key_state is None or layer.value_state is None:
                continue
            state[str(i)] = {
                "length": layer.cumulative_length,
                "skip": [layer.key_state.skip, layer.value_state.skip],
                "dtype": str(layer.dtype).removeprefix("torch."),
            }
            for name, side in zip(SIDES, (layer.key_state, layer.value_state), strict=True):
                tensors |= {f"{i}.{name}.{n}": t for n, t in sides.tensors(side).items()}
        metadata = {"plan": plan_hash(self.plan), "prefill": self.prefill, "layers": json.dumps(state)}
        with replace_file(Path(path)) as scratch:
            save_file(tensors, scratch, metadata=metadata)

    @classmethod
    def load(
        cls,
        path: str | Path,
        plan: Plan,
        config: PreTrainedConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        tiles: bool | None = None,
        monitor: bool = True,
    ) -> "PackedCache":
        """Read a saved cache onto the model's device; another plan, or a damaged file, raises.

        ``tiles`` and ``monitor`` are as for a new one.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise KVSightError(f"no cache at {path}: the file does not exist.") from None
        except (OSError, SafetensorError) as error:
            raise KVSightError(f"{path} is not a readable cache file ({error}).") from error
        if "plan" not in metadata:
            raise KVSightError(f"{path} was not written by PackedCache.save.")
        if metadata["plan"] != plan_hash(plan):
            raise KVSightError(f"{path} was saved under another plan; load that plan first.")
        cache = cls(plan, config, prefill=metadata["prefill"], tiles=tiles, monitor=monitor)
        for index, state in json.loads(metadata["layers"]).items():
            layer = cache.layers[int(index)]
            assert isinstance(layer, PackedLayer)
            _restore(layer, index, state, tensors)
        return cache


def _restore(layer: PackedLayer, index: str, state: Any, tensors: dict[str, Tensor]) -> None:
    stored = {
        name: {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"{index}.{name}.")}
        for name in SIDES
    }
    layer.lazy_initialization(stored["k"]["tail"], stored["v"]["tail"])
    assert layer.key_state is not None and layer.value_state is not None
    layer.key_state = sides.restore(layer.key_state, stored["k"], state["skip"][0], state["length"])
    layer.value_state = sides.restore(layer.value_state, stored["v"], state["skip"][1], state["length"])
    layer.cumulative_length = state["length"]
    layer.dtype = getattr(torch, state["dtype"])


def config_of(plan: Plan) -> PreTrainedConfig:
    """The model config that the plan was fitted to, rebuilt from its JSON."""
    stored = copy.deepcopy(dict(plan.config))
    kind = stored.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **stored)
    except (ValueError, KeyError, TypeError) as error:
        raise KVSightError(
            f"this transformers cannot rebuild a {kind!r} config; pass config=model.config."
        ) from error


@contextmanager
def enable(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention over a ``PackedCache`` runs straight on the codes; other caches are untouched.

    A model without the attention interface runs the decode path; the cache counts and warns once.
    """
    now = implementations(model)[""]
    if now.startswith(ATTENTION):
        yield
        return
    # masks are built for one implementation; eager understands all that a model can ask for
    stock_name = "sdpa" if now == "sdpa" else "eager"
    here = fingerprint(model)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(key, TracedKV):
            if key.reads.plan.fingerprint != here:
                check_model(key.reads.plan, model)
            scale = default_scaling(module, query, scaling)
            return _in_graph(module, query, key, attention_mask, scale, kwargs), None
        if isinstance(key, PackedKV) and isinstance(value, PackedKV) and fused_arguments(kwargs):
            if key.reads.plan.fingerprint != here:
                check_model(key.reads.plan, model)
            scale = default_scaling(module, query, scaling)
            return _on_codes(module, query, key, value, attention_mask, scale, kwargs), None
        stock = original(module, stock_name)
        arguments = {"scaling": scaling, "dropout": dropout, **kwargs}
        return stock(module, query, key, value, attention_mask, **arguments)

    with attention_override(model, ATTENTION, attention, mask_like=stock_name):
        yield


def _in_graph(
    module: nn.Module,
    query: Tensor,
    handle: TracedKV,
    mask: Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """As ``_on_codes`` while a step is compiled: one new token of each sequence sees all others."""
    if not torch.compiler.is_compiling():
        return _on_codes(module, query, *_behind_graph(query, handle), mask, scaling, kwargs)
    if mask is not None or not _causal(module, kwargs) or not fused_arguments(kwargs):
        raise KVSightError(
            "compiled attention over a PackedCache is causal and has no mask: feed one token of every "
            "sequence and no attention_mask."
        )
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    return handle.tiles.attend(query, scaling=scaling, softcap=softcap, sink_logits=sink_logits)


@outside_graphs
def _behind_graph(query: Tensor, handle: TracedKV) -> tuple[PackedKV, PackedKV]:
    """Keys and values that a graph traced, where it ended before attention."""
    handle.tiles.counter.settle()
    if handle.tiles.leads:
        handle.reads.begin_step()
    like = query.new_empty(query.shape[0], len(handle.tiles.tiles[0]), 0, query.shape[3])
    key, value = (PackedKV(Held.in_tiles(handle.tiles, side), like, handle.reads) for side in (0, 1))
    return key, value


def _causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


@outside_graphs
def _on_codes(
    module: nn.Module,
    query: Tensor,
    key: PackedKV,
    value: PackedKV,
    mask: Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> Tensor:
    key.reads.packed += 1
    causal = _causal(module, kwargs)
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    tiles, fresh = key.held.tiles, key.held.fresh
    # torch's kernels tell no gradient of the masses that merge pieces
    differentiable = query.requires_grad and torch.is_grad_enabled() and many(query, fresh)
    if tiles is not None and tiles is value.held.tiles and causal and not differentiable:
        padding = None if mask is None else key.reads.padding(mask)
        if mask is None or padding is not None:
            return tiles.attend(
                query,
                scaling=scaling,
                hidden=padding,
                softcap=softcap,
                sink_logits=sink_logits,
                fresh=fresh,
            )
    return attend(
        query,
        key.segments,
        value.segments,
        scaling=scaling,
        mask=mask,
        causal=causal,
        softcap=softcap,
        sink_logits=sink_logits,
    )

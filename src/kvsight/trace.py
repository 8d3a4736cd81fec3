"""Watch a model read real text: post-RoPE queries, cached keys and values, and how outputs are read.

Keys and values are what the cache is given (so MLA latents and models without the attention interface
work too); queries come from the attention interface. Memory is bounded: moments and a fixed sample.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvsight.errors import KVSightError
from kvsight.integrations.attention import attention_override, implementations, original
from kvsight.stats import LayerStats, Moments, SideStats, Stats

Progress = Callable[[str, int, int], None]
CacheSink = Callable[[int, Tensor, Tensor], None]
QuerySink = Callable[[nn.Module, int, Tensor, Tensor], None]

_NAME = "kvsight_observe"


class SpyCache(DynamicCache):
    """The stock cache, which also tells ``sink(layer, k, v)`` about the tokens that it is given."""

    def __init__(self, config: Any, sink: CacheSink) -> None:
        super().__init__(config=config)
        self._sink = sink
        self._owner: dict[int, int] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._sink(layer_idx, key_states, value_states)
        self._owner[keys.data_ptr()] = layer_idx
        return keys, values

    def owner(self, keys: Tensor) -> int | None:
        """The layer whose cache these keys came from (KV-sharing layers read another layer's)."""
        return self._owner.get(keys.data_ptr())


@contextmanager
def capture(model: PreTrainedModel, sink: QuerySink) -> Iterator[bool]:
    """Inside, every attention call first goes to ``sink(module, layer_idx, q, k)``; logits are unchanged.

    Yields False where the model has no attention interface, so that ``sink`` is never called.
    """
    names = implementations(model)

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        name = _name_for(model, names, module)
        result = original(module, name)(module, query, key, value, mask, **kwargs)
        sink(module, int(getattr(module, "layer_idx", -1)), query, key)
        return result

    with attention_override(model, _NAME, function) as listens:
        yield listens


def _name_for(model: PreTrainedModel, names: dict[str, str], module: nn.Module) -> str:
    for key, name in names.items():
        if key and getattr(module, "config", None) is getattr(model.config, key):
            return name
    return names[""]


@dataclass
class _Sampler:
    """A uniform sample of tokens by random priority, the same tokens in every layer."""

    size: int
    generator: torch.Generator
    priority: Tensor = field(default_factory=lambda: torch.empty(0))
    keep: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def draw(self, tokens: int) -> None:
        new = torch.rand(tokens, generator=self.generator)
        every = torch.cat([self.priority, new])
        self.keep = every.topk(min(self.size, len(every))).indices.sort().values
        self.priority = every[self.keep]

    def update(self, old: Tensor | None, new: Tensor) -> Tensor:
        """[H, n, d] of kept tokens after ``new`` [H, tokens, d] came in."""
        new = new.detach().float().cpu()
        pool = new if old is None else torch.cat([old, new], dim=1)
        return pool[:, self.keep]


@dataclass
class LayerTrace:
    """What one cached layer showed: moments of K, V and pooled Q, a bounded sample, the output metric."""

    index: int
    window: int | None
    key: Moments
    value: Moments
    query: Moments | None = None
    key_sample: Tensor | None = None
    value_sample: Tensor | None = None
    query_sample: Tensor | None = None
    output_metric: Tensor | None = None


@dataclass
class Trace:
    """Sampled post-RoPE Q, K, V of a model on text, per cached layer and KV head."""

    layers: dict[int, LayerTrace]
    tokens: int
    notes: tuple[str, ...]

    def merge(self, other: "Trace") -> "Trace":
        """Moments add up; the samples of both are kept side by side."""
        if self.layers.keys() != other.layers.keys():
            raise KVSightError("cannot merge traces of models with different cached layers.")
        layers = {i: _merge_layer(a, other.layers[i]) for i, a in self.layers.items()}
        notes = tuple(dict.fromkeys(self.notes + other.notes))
        return Trace(layers, self.tokens + other.tokens, notes)


def _merge_layer(a: LayerTrace, b: LayerTrace) -> LayerTrace:
    def join(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return x if y is None else y if x is None else torch.cat([x, y], dim=1)

    query = a.query if b.query is None else b.query if a.query is None else a.query.merge(b.query)
    return LayerTrace(
        a.index,
        a.window,
        a.key.merge(b.key),
        a.value.merge(b.value),
        query,
        join(a.key_sample, b.key_sample),
        join(a.value_sample, b.value_sample),
        join(a.query_sample, b.query_sample),
        a.output_metric if a.output_metric is not None else b.output_metric,
    )


def observe(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    sample_tokens: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Run ``batches`` (LongTensor [B, T] each) through the model and keep what attention saw."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise KVSightError(
            f"{type(model).__name__} is an encoder-decoder; kvsight packs caches of decoder-only models."
        )
    observer = _Observer(model, _Sampler(sample_tokens, torch.Generator().manual_seed(seed)))
    total = len(batches) if isinstance(batches, Sized) else 0
    count = 0
    with capture(model, observer.on_query) as listens:
        for ids in batches:
            observer.run(check_ids(ids, model))
            count += 1
            if progress is not None:
                progress("observe", count, total)
    if observer.tokens == 0:
        raise KVSightError("calibration needs at least one batch of token ids; got none.")
    return observer.trace(listens)


def check_ids(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """Token ids [B, T] that this model can embed, or a clear error."""
    if not isinstance(ids, Tensor):
        raise KVSightError(f"batches must be non-empty LongTensors [B, T]; got a {type(ids).__name__}.")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
        raise KVSightError(
            f"batches must be non-empty LongTensors [B, T]; got {tuple(ids.shape)} of {ids.dtype}."
        )
    size = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise KVSightError(
            f"token ids must be in 0..{size - 1}; got {int(ids.min())}..{int(ids.max())}. "
            "Use the model's own tokenizer."
        )
    return ids


class _Observer:
    def __init__(self, model: PreTrainedModel, sampler: _Sampler) -> None:
        self.model, self.sampler = model, sampler
        self.layers: dict[int, LayerTrace] = {}
        self.tokens = 0
        self.unpackable: set[str] = set()
        self.cache: SpyCache | None = None
        self.hooks: dict[int, list[torch.utils.hooks.RemovableHandle]] = {}

    def run(self, ids: Tensor) -> None:
        self.sampler.draw(ids.numel())
        self.cache = SpyCache(self.model.config, self.on_cache)
        arguments: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            arguments["logits_to_keep"] = 1
        try:
            with torch.inference_mode():
                self.model(ids.to(self.model.device), **arguments)
        finally:
            for handles in self.hooks.values():
                for handle in handles:
                    handle.remove()
            self.cache = None
        self.tokens += ids.numel()

    def on_cache(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self.cache is not None
        kind = self.cache.layers[layer]
        if type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer):
            self.unpackable.add(type(kind).__name__)
            return
        key, value = _tokens(k), _tokens(v)
        if layer not in self.layers:
            self.layers[layer] = LayerTrace(
                layer,
                int(kind.sliding_window) if isinstance(kind, DynamicSlidingWindowLayer) else None,
                Moments.zero(key.shape[0], key.shape[2]),
                Moments.zero(value.shape[0], value.shape[2]),
            )
        seen = self.layers[layer]
        seen.key, seen.value = seen.key.add(key), seen.value.add(value)
        seen.key_sample = self.sampler.update(seen.key_sample, key)
        seen.value_sample = self.sampler.update(seen.value_sample, value)

    def on_query(self, module: nn.Module, layer: int, q: Tensor, k: Tensor) -> None:
        assert self.cache is not None
        owner = self.cache.owner(k)
        seen = self.layers.get(layer if owner is None else owner)
        if seen is None or seen.key.total.shape != (k.shape[1], q.shape[-1]):
            return
        if k.shape[2] != q.shape[2] and owner is None:
            return
        pooled = _pool(q, k.shape[1])
        if seen.query is None:
            seen.query = Moments.zero(k.shape[1], q.shape[-1])
        seen.query = seen.query.add(pooled.flatten(1, 2))
        if layer == seen.index:
            first = pooled[:, :, 0]
            seen.query_sample = self.sampler.update(seen.query_sample, first)
            self._find_projection(module, seen, q.shape[1])

    def _find_projection(self, module: nn.Module, seen: LayerTrace, heads: int) -> None:
        """The first child that is fed the attention output is the output projection."""
        if seen.output_metric is not None or id(module) in self.hooks:
            return
        width = heads * int(seen.value.total.shape[1])

        def found(child: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if inputs else None
            for handle in self.hooks[id(module)]:
                handle.remove()
            usable = isinstance(x, Tensor) and x.shape[-1] == width and _is_linear(child, x)
            if usable and seen.output_metric is None:
                seen.output_metric = _output_metric(child, width, seen.value, heads, x)

        children = [child for child in module.modules() if child is not module]
        self.hooks[id(module)] = [child.register_forward_pre_hook(found) for child in children]

    def trace(self, listens: bool) -> Trace:
        kinds = ", ".join(sorted(self.unpackable))
        if not self.layers:
            raise KVSightError(
                "this model caches no keys and values that kvsight can pack"
                + (f": its layers are of the kind {kinds}." if kinds else ".")
            )
        notes = [f"layers of the kind {kinds} keep other state too and stay unpacked"] if kinds else []
        if not listens:
            notes.append(
                "the model has no attention interface: queries were not seen, keys use storage error"
            )
        elif any(layer.query is None for layer in self.layers.values()):
            notes.append(
                "some layers cache something else than attention reads (MLA latents): "
                "their keys and values use storage error"
            )
        return Trace(dict(sorted(self.layers.items())), self.tokens, tuple(notes))


def _tokens(x: Tensor) -> Tensor:
    """[B, H, T, d] to [H, B·T, d]."""
    return x.transpose(0, 1).flatten(1, 2)


def _pool(q: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, T, d] to [Hk, B·T, G, d]: the queries that share each KV head."""
    batch, heads, tokens, dim = q.shape
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    return grouped.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _is_linear(child: nn.Module, x: Tensor) -> bool:
    """Whether doubling one token doubles what the module adds to its bias (a norm fails here)."""
    token = x.flatten(0, -2)[:1]
    none, once, twice = (child(token * factor).double() for factor in (0, 1, 2))
    # half precision rounds by under 1 %, a norm is off by all of it
    return bool((twice - none - 2 * (once - none)).norm() <= 0.2 * (twice - none).norm())


def _output_metric(child: nn.Module, width: int, value: Moments, heads: int, x: Any) -> Tensor:
    """Σ over the group of W_Oᵀ W_O [Hk, d, d], with W_O probed by the identity (any linear module)."""
    eye = torch.eye(width, dtype=x.dtype, device=x.device)
    weight = (child(eye) - child(torch.zeros_like(eye[:1]))).double().cpu()
    kv_heads, dim = value.total.shape
    blocks = weight.reshape(kv_heads, heads // kv_heads, dim, -1)
    metric: Tensor = (blocks @ blocks.mT).sum(dim=1)
    return metric


def summarise(trace: Trace) -> Stats:
    """Stats of a trace: what methods fit to."""
    layers: list[LayerStats] = []
    for seen in trace.layers.values():
        assert seen.key_sample is not None and seen.value_sample is not None
        query_metric = None if seen.query is None else seen.query.second
        layers.append(
            LayerStats(
                seen.index,
                seen.window,
                SideStats(seen.key, query_metric, seen.key_sample),
                SideStats(seen.value, seen.output_metric, seen.value_sample),
            )
        )
    return Stats(tuple(layers), trace.tokens, trace.notes)

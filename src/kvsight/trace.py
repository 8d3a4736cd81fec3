"""Watch a model read real text: post-RoPE queries, cached keys and values, and how both are read.

Keys and values are what the cache is given (so MLA latents and models without the attention interface
work too); queries come from the attention interface; gradients of the model's own log-likelihood say
what an error costs at the output. Memory is bounded: moments and a fixed sample.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvsight.errors import KVSightError
from kvsight.integrations.attention import (
    AttentionFunction,
    attention_override,
    default_scaling,
    original,
)
from kvsight.projections import Norms, projection_norms
from kvsight.rotary import Turning, turnings
from kvsight.stats import LayerStats, Moments, SideStats, Stats, damage_metric, expected_mass

Progress = Callable[[str, int, int], None]
CacheSink = Callable[[int, Tensor, Tensor], None]
QuerySink = Callable[[nn.Module, int, Tensor, Tensor, Tensor], None]

_NAME = "kvsight_observe"
# neighbouring tokens that are kept together, for codecs of token blocks, and how many in all
_RUN = 128
_PASSAGE_TOKENS = 2048
# queries of a sequence whose attention is worked out again, for its entropy
_FOCUSED = 32


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
    """Inside, ``sink(module, layer_idx, q, k, out)`` hears of every attention call; logits are unchanged.

    Yields False where the model has no attention interface, so that ``sink`` is never called.
    """

    def make(name: str) -> AttentionFunction:
        def function(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            result = original(module, name)(module, query, key, value, attention_mask, **kwargs)
            layer = getattr(module, "layer_idx", None)
            sink(module, -1 if layer is None else int(layer), query, key, result[0])
            return result

        return function

    with attention_override(model, _NAME, make) as listens:
        yield listens


@dataclass
class _Sampler:
    """A uniform sample of tokens, or of runs of them, by random priority: the same in every layer."""

    size: int
    generator: torch.Generator
    run: int = 1
    priority: Tensor = field(default_factory=lambda: torch.empty(0))
    keep: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    open: bool = True

    def draw(self, tokens: int, take: bool) -> None:
        """Choose among the kept tokens and, if ``take``, the next ``tokens``."""
        self.open = take
        if not take:
            return
        runs = torch.rand(-(-tokens // self.run), generator=self.generator)
        every = torch.cat([self.priority, runs.repeat_interleave(self.run)[:tokens]])
        # a stable sort cuts only the last run when the sample is full
        order = every.sort(descending=True, stable=True).indices
        self.keep = order[: self.size].sort().values
        self.priority = every[self.keep]

    def update(self, old: Tensor | None, new: Tensor) -> Tensor | None:
        """[H, n, ...] of kept tokens after ``new`` [H, tokens, ...] came in."""
        if not self.open:
            return old
        new = new.detach().float().cpu()
        pool = new if old is None else torch.cat([old, new], dim=1)
        return pool[:, self.keep]


@dataclass
class LayerTrace:
    """What one cached layer showed: moments of K, V and pooled Q, a bounded sample, the output metric.

    ``read`` are moments of what attention read from the values, averaged over the query heads of a group;
    ``focus`` are those of a few tokens, times exp(-½ H), H the mean entropy [nats] of its attention.
    Gradients are of the log-likelihood of text drawn from the model itself, with respect to each cached
    vector; ``key_salience`` and ``value_salience`` [H, n] are their norms at the sampled tokens.
    ``passages`` [H, m, d] are a second sample, of runs of 128 neighbours.
    """

    index: int
    window: int | None
    key: Moments
    value: Moments
    query: Moments | None = None
    read: Moments | None = None
    focus: Moments | None = None
    key_sample: Tensor | None = None
    value_sample: Tensor | None = None
    query_sample: Tensor | None = None
    output_metric: Tensor | None = None
    key_gradient: Moments | None = None
    value_gradient: Moments | None = None
    key_salience: Tensor | None = None
    value_salience: Tensor | None = None
    key_passages: Tensor | None = None
    value_passages: Tensor | None = None
    norms: tuple[Norms, Norms] | None = None
    turning: Turning = field(default_factory=Turning)


@dataclass
class Trace:
    """Sampled post-RoPE Q, K, V of a model on text, per cached layer and KV head.

    ``places`` [n] and ``passage_places`` [m] are the indices of sampled tokens in their sequence.
    """

    layers: dict[int, LayerTrace]
    tokens: int
    notes: tuple[str, ...]
    places: Tensor | None = None
    passage_places: Tensor | None = None

    def merge(self, other: "Trace") -> "Trace":
        """Moments add up; the samples of both are kept side by side."""
        if self.layers.keys() != other.layers.keys():
            raise KVSightError("cannot merge traces of models with different cached layers.")
        layers = {i: _merge_layer(a, other.layers[i]) for i, a in self.layers.items()}
        notes = tuple(dict.fromkeys(self.notes + other.notes))
        places = _join(self.places, other.places), _join(self.passage_places, other.passage_places)
        return Trace(layers, self.tokens + other.tokens, notes, *places)


def _join(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Sampled tokens side by side: the last dimension of places [n], the second of vectors [H, n, ...]."""
    return x if y is None else y if x is None else torch.cat([x, y], dim=min(1, x.dim() - 1))


def _merge_layer(a: LayerTrace, b: LayerTrace) -> LayerTrace:
    def add(x: Moments | None, y: Moments | None) -> Moments | None:
        return x if y is None else y if x is None else x.merge(y)

    # the sample and its salience stay aligned only if both sides have one
    weighed = a.key_salience is not None and b.key_salience is not None
    return LayerTrace(
        a.index,
        a.window,
        a.key.merge(b.key),
        a.value.merge(b.value),
        add(a.query, b.query),
        add(a.read, b.read),
        add(a.focus, b.focus),
        _join(a.key_sample, b.key_sample),
        _join(a.value_sample, b.value_sample),
        _join(a.query_sample, b.query_sample),
        a.output_metric if a.output_metric is not None else b.output_metric,
        add(a.key_gradient, b.key_gradient),
        add(a.value_gradient, b.value_gradient),
        _join(a.key_salience, b.key_salience) if weighed else None,
        _join(a.value_salience, b.value_salience) if weighed else None,
        _join(a.key_passages, b.key_passages),
        _join(a.value_passages, b.value_passages),
        a.norms if a.norms is not None else b.norms,
        a.turning,
    )


def observe(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    sample_tokens: int = 8192,
    gradient_tokens: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Run ``batches`` (LongTensor [B, T] each) through the model and keep what attention saw.

    Args:
        sample_tokens: tokens whose vectors are kept as they are.
        gradient_tokens: read gradients on about this many tokens, spread evenly over the batches
            (over the first ones if ``batches`` has no length). The sample is then drawn from these.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise KVSightError(
            f"{type(model).__name__} is an encoder-decoder; kvsight packs caches of decoder-only models."
        )
    sampler = _Sampler(sample_tokens, torch.Generator().manual_seed(seed))
    draws = torch.Generator(model.device).manual_seed(seed)
    observer = _Observer(model, sampler, draws, weighing=gradient_tokens > 0)
    total = len(batches) if isinstance(batches, Sized) else 0
    count = 0
    with _evaluating(model), capture(model, observer.on_query) as listens:
        for ids in batches:
            checked = check_ids(ids, model)
            observer.run(checked, gradient_tokens > 0 and _chosen(count, total, gradient_tokens, checked))
            count += 1
            if progress is not None:
                progress("observe", count, total)
    if observer.tokens == 0:
        raise KVSightError("calibration needs at least one batch of token ids; got none.")
    trace = observer.trace(listens)
    with _evaluating(model):
        found = turnings(model, partial(_first_keys, model))
    for layer, seen in trace.layers.items():
        seen.turning = found[layer]
    return trace


def _first_keys(model: PreTrainedModel, count: int, **arguments: Tensor) -> dict[int, Tensor]:
    """Cached keys [1, H, count, d] of a short text."""
    keys: dict[int, Tensor] = {}

    def sink(layer: int, k: Tensor, v: Tensor) -> None:
        keys[layer] = k

    ids = torch.arange(count, device=model.device).unsqueeze(0)
    with torch.no_grad():
        model(ids, past_key_values=SpyCache(model.config, sink), use_cache=True, **arguments)
    return keys


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout would be part of what is observed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _chosen(index: int, total: int, tokens: int, ids: Tensor) -> bool:
    """Whether batch ``index`` of ``total`` is one of the evenly spread ones that hold ``tokens``."""
    wanted = -(-tokens // ids.numel())
    if total == 0:
        return index < wanted
    share = min(1.0, wanted / total)
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


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
    def __init__(
        self, model: PreTrainedModel, sampler: _Sampler, draws: torch.Generator, weighing: bool
    ) -> None:
        self.model, self.sampler, self.draws = model, sampler, draws
        self.weighing = weighing
        self.passages = _Sampler(_PASSAGE_TOKENS, sampler.generator, _RUN)
        self.layers: dict[int, LayerTrace] = {}
        self.places: Tensor | None = None
        self.passage_places: Tensor | None = None
        self.tokens = 0
        self.unpackable: set[str] = set()
        self.no_gradient: str | None = None
        self.cache: SpyCache | None = None
        self.hooks: dict[int, list[torch.utils.hooks.RemovableHandle]] = {}
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}
        self.weighed: set[int] = set()

    def run(self, ids: Tensor, gradient: bool) -> None:
        gradient = gradient and self.no_gradient is None
        self.sampler.draw(ids.numel(), take=gradient or not self.weighing)
        self.passages.draw(ids.numel(), take=True)
        places = torch.arange(ids.shape[1]).repeat(ids.shape[0]).unsqueeze(0)
        self.places = self.sampler.update(self.places, places)
        self.passage_places = self.passages.update(self.passage_places, places)
        self.cache = SpyCache(self.model.config, self.on_cache)
        ids = ids.to(self.model.device)
        try:
            if gradient:
                self._read_gradient(ids)
            else:
                with torch.no_grad():
                    self.model(ids, **self._arguments(last_only=True))
        finally:
            for handles in self.hooks.values():
                for handle in handles:
                    handle.remove()
            self.cache = None
            self.cached = {}
        self.tokens += ids.numel()

    def _arguments(self, last_only: bool) -> dict[str, Any]:
        out: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if last_only and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            out["logits_to_keep"] = 1
        return out

    def _read_gradient(self, ids: Tensor) -> None:
        """Moments of ∂ log p(y) / ∂(cached vector) for one text y drawn from the model's own p."""
        before = {index: copy.copy(layer) for index, layer in self.layers.items()}, set(self.weighed)
        logits: Tensor | None = None
        try:
            with _differentiable(self.model), torch.enable_grad():
                logits = self.model(ids, **self._arguments(last_only=False)).logits
                log_p = torch.log_softmax(logits.float(), dim=-1)
                drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=self.draws)
                total = log_p.flatten(0, 1).gather(-1, drawn).sum()
                vectors = [x for pair in self.cached.values() for x in pair]
                found = torch.autograd.grad(total, vectors, allow_unused=True)
        except torch.OutOfMemoryError as error:
            raise KVSightError(
                "gradients of a calibration batch do not fit into memory. Give smaller batches, "
                "or fit with propagation='perturbation'."
            ) from error
        except RuntimeError as error:
            # attention kernels and quantised weights without a backward pass
            self._give_up(str(error).splitlines()[0])
            if logits is None:
                self._look_again(ids, *before)
            return
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(vectors, found, strict=True)]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self._give_up("they are not finite")
            return
        for layer, key, value in zip(self.cached, gradients[::2], gradients[1::2], strict=True):
            self._add_gradient(self.layers[layer], _tokens(key), _tokens(value))

    def _look_again(self, ids: Tensor, layers: dict[int, LayerTrace], weighed: set[int]) -> None:
        """Without gradients, where the model stopped half-way with them."""
        self.layers, self.weighed, self.cached = layers, weighed, {}
        for handle in (handle for handles in self.hooks.values() for handle in handles):
            handle.remove()
        self.hooks = {}
        self.cache = SpyCache(self.model.config, self.on_cache)
        with torch.no_grad():
            self.model(ids, **self._arguments(last_only=True))

    def _add_gradient(self, seen: LayerTrace, key: Tensor, value: Tensor) -> None:
        if seen.key_gradient is None or seen.value_gradient is None:
            seen.key_gradient = Moments.zero(key.shape[0], key.shape[2])
            seen.value_gradient = Moments.zero(value.shape[0], value.shape[2])
        seen.key_gradient = seen.key_gradient.add(key)
        seen.value_gradient = seen.value_gradient.add(value)
        seen.key_salience = self.sampler.update(seen.key_salience, key.float().norm(dim=-1))
        seen.value_salience = self.sampler.update(seen.value_salience, value.float().norm(dim=-1))

    def _give_up(self, why: str) -> None:
        self.no_gradient = why
        self.weighing = False

    def on_cache(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self.cache is not None
        kind = self.cache.layers[layer]
        if type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer):
            self.unpackable.add(type(kind).__name__)
            return
        self.cached[layer] = (k, v)
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
        seen.key_passages = self.passages.update(seen.key_passages, key)
        seen.value_passages = self.passages.update(seen.value_passages, value)

    def on_query(self, module: nn.Module, layer: int, q: Tensor, k: Tensor, out: Tensor) -> None:
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
        if out.shape == (q.shape[0], q.shape[2], q.shape[1], seen.value.total.shape[1]):
            self._add_read(module, seen, q, k, out)
        if layer == seen.index:
            first = pooled[:, :, 0]
            seen.query_sample = self.sampler.update(seen.query_sample, first)
            self._find_projection(module, seen, q.shape[1])
            if seen.norms is None and seen.index not in self.weighed:
                self.weighed.add(seen.index)
                dims = (q.shape[-1], int(seen.value.total.shape[1]))
                seen.norms = projection_norms(module, q.shape[1], k.shape[1], dims)

    def _add_read(self, module: nn.Module, seen: LayerTrace, q: Tensor, k: Tensor, out: Tensor) -> None:
        """Count what attention gave, [B, T, Hq, d], and the focused part of it."""
        read = _pool(out.transpose(1, 2), k.shape[1]).double().mean(dim=2)
        if seen.read is None or seen.focus is None:
            seen.read = seen.focus = Moments.zero(*seen.value.total.shape)
        seen.read = seen.read.add(read)
        batch, _, tokens, _ = q.shape
        at = torch.arange(0, tokens, -(-tokens // _FOCUSED), device=q.device)
        scaling = default_scaling(module, q, None)
        entropy = _entropy(q[:, :, at], k, at + k.shape[2] - tokens, seen.window, scaling)
        weight = torch.exp(-entropy.unflatten(1, (k.shape[1], -1)).mean(2) / 2)
        chosen = read.unflatten(1, (batch, tokens))[:, :, at] * weight.transpose(0, 1).unsqueeze(-1)
        seen.focus = seen.focus.add(chosen.flatten(1, 2))

    def _find_projection(self, module: nn.Module, seen: LayerTrace, heads: int) -> None:
        """The first child that is fed the attention output is the output projection."""
        if seen.output_metric is not None or id(module) in self.hooks:
            return
        width = heads * int(seen.value.total.shape[1])

        def found(child: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach() if inputs and isinstance(inputs[0], Tensor) else None
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
        if self.no_gradient is not None:
            notes.append(f"gradients could not be read: {self.no_gradient}")
            for layer in self.layers.values():
                layer.key_gradient = layer.value_gradient = None
                layer.key_salience = layer.value_salience = None
        assert self.places is not None and self.passage_places is not None
        places = self.places[0].long(), self.passage_places[0].long()
        return Trace(dict(sorted(self.layers.items())), self.tokens, tuple(notes), *places)


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Activations carry gradients, parameters do not: nothing is kept for them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)

    def carry(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # a copy, as some models write into it
        return output.requires_grad_().clone()

    hook = model.get_input_embeddings().register_forward_hook(carry)
    try:
        yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _tokens(x: Tensor) -> Tensor:
    """[B, H, T, d] to [H, B·T, d]."""
    return x.transpose(0, 1).flatten(1, 2)


def _pool(q: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, T, d] to [Hk, B·T, G, d]: the queries that share each KV head."""
    batch, heads, tokens, dim = q.shape
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    return grouped.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _entropy(q: Tensor, k: Tensor, at: Tensor, window: int | None, scaling: float) -> Tensor:
    """Nats of plain softmax attention, [B, Hq, n], of queries [B, Hq, n, d] at the places ``at`` [n]."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scaling * (q.float() @ keys.float().mT)
    behind = at.unsqueeze(-1) - torch.arange(k.shape[2], device=q.device)
    visible = (behind >= 0) & (behind < (k.shape[2] if window is None else window))
    log_p = torch.log_softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return -(log_p.exp() * log_p.masked_fill(~visible, 0.0)).sum(-1)


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
        key = SideStats(
            seen.key,
            query_metric,
            seen.key_sample,
            passages=seen.key_passages,
            rope=seen.turning.rope,
            rope_unknown=seen.turning.unknown,
            places=trace.places,
            passage_places=trace.passage_places,
            query=seen.query,
        )
        value = SideStats(seen.value, seen.output_metric, seen.value_sample, passages=seen.value_passages)
        value = replace(value, read=seen.read, focus=seen.focus)
        if seen.query is not None:
            # both samples are of the same tokens
            value = replace(value, mass=expected_mass(seen.key_sample, seen.query))
        if seen.key_gradient is not None and seen.value_gradient is not None:
            damage = damage_metric(seen.key_gradient, key)
            key = replace(key, damage=damage, salience=seen.key_salience)
            damage = damage_metric(seen.value_gradient, value)
            value = replace(value, damage=damage, salience=seen.value_salience)
        layers.append(LayerStats(seen.index, seen.window, key, value, seen.norms))
    return Stats(tuple(layers), trace.tokens, trace.notes)

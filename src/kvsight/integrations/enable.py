"""Attention of a transformers model straight on the codes of its cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvsight.cache.outside import outside_autocast, outside_graphs
from kvsight.cache.packed import Held, PackedKV, TracedKV
from kvsight.cache.tiles import many
from kvsight.errors import KVSightError
from kvsight.fingerprint import check_model, fingerprint
from kvsight.integrations.attention import (
    AttentionFunction,
    attention_override,
    default_scaling,
    fused_arguments,
    implementations,
    original,
)
from kvsight.ops.attend import attend

ATTENTION = "kvsight_packed"


@contextmanager
def enable(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention over a ``PackedCache`` runs straight on the codes; other caches are untouched.

    A model without the attention interface runs the decode path; the cache counts and warns once.
    """
    if implementations(model)[""].startswith(ATTENTION):
        yield
        return
    here = fingerprint(model)

    def make(stock_name: str) -> AttentionFunction:
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

        return attention

    with attention_override(model, ATTENTION, make, like=_understanding):
        yield


def _understanding(name: str) -> str:
    # masks are built for one implementation; eager understands all that a model can ask for
    return "sdpa" if name == "sdpa" else "eager"


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
        key, value = _behind_graph(query, handle)
        # a graph's masks are as long as there is room
        seen = None if mask is None else mask[..., : key.shape[2]]
        return _on_codes(module, query, key, value, seen, scaling, kwargs)
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


def _checked(mask: Tensor, query: Tensor, key: PackedKV) -> Tensor:
    """A mask [B or 1, H or 1, Q, S] of all queries and tokens; raises where it is of others."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise KVSightError(f"an attention mask is boolean, or added to scores; got {mask.dtype}.")
    sizes = query.shape[2], key.shape[2]
    if mask.shape[2:] == sizes:
        return mask
    if any(own not in (1, size) for own, size in zip(mask.shape[2:], sizes, strict=True)):
        raise KVSightError(
            f"the attention mask is of {mask.shape[2]} queries and {mask.shape[3]} tokens; this layer has "
            f"{sizes[0]} and shows {sizes[1]}. Pass a mask [B, tokens]; layers get theirs from it."
        )
    return mask.expand(-1, -1, *sizes)


@outside_graphs
@outside_autocast
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
    if kwargs.get("output_attentions"):
        key.reads.on_weights()
    mask = None if mask is None else _checked(mask, query, key)
    causal = _causal(module, kwargs)
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    tiles, fresh = key.held.tiles, key.held.fresh
    # torch's kernels tell no gradient of the masses that merge pieces
    differentiable = query.requires_grad and torch.is_grad_enabled() and many(query, fresh)
    if tiles is not None and tiles is value.held.tiles and causal and not differentiable:
        padding = None if mask is None else key.reads.padding(mask, tiles.window)
        if padding is not None and len(padding) == 1:
            padding = padding.expand(len(query))
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

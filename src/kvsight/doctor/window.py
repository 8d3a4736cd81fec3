"""One forward pass over a window or two: who attends to the first positions, and what the layers are."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvsight.integrations.attention import (
    AttentionFunction,
    attention_override,
    default_scaling,
    fused_arguments,
    original,
)
from kvsight.ops.attend import Segment, attend
from kvsight.trace import SpyCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# sinks are the first position, or the first few
FIRST = 8
# one window shows a sink; a second guards against an odd first token
WINDOWS = 2

_NAME = "kvsight_doctor"


@dataclass(frozen=True)
class Attention:
    """One attention layer. ``owner``: the cached layer that it reads; None where it reads no cached keys.

    ``first_mass`` [FIRST]: mean attention that the first positions draw; ``logit_mass``: that of the extra
    logit, None without one. Both are None for windows that are too short.
    """

    module: nn.Module
    owner: int | None
    query_heads: int
    softcap: float | None
    first_mass: tuple[float, ...] | None
    logit_mass: float | None


@dataclass(frozen=True)
class Reading:
    """What one pass showed: ``attention`` by layer (empty for a model without the attention interface).

    ``lengths``: (keys, values) of cached layers, norms of the first positions over the median norm, None
    for windows that are too short. ``kinds``: class names of all cache layers. ``length``: tokens.
    """

    attention: Mapping[int, Attention]
    lengths: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]] | None]
    kinds: tuple[str, ...]
    length: int


def read(model: "PreTrainedModel", ids: Tensor) -> Reading:
    """Let the model read ids [B, T] and watch; its logits are unchanged."""
    attention: dict[int, Attention] = {}
    lengths: dict[int, tuple[tuple[float, ...], tuple[float, ...]] | None] = {}

    def on_cache(layer: int, k: Tensor, v: Tensor) -> None:
        long = k.shape[2] >= 2 * FIRST
        lengths[layer] = (first_lengths(k), first_lengths(v)) if long else None

    cache = SpyCache(model.config, on_cache)

    def make(name: str) -> AttentionFunction:
        def on_attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            owner = cache.owner(key)
            layer = getattr(module, "layer_idx", owner)
            if layer is not None:
                attention[int(layer)] = _hear(module, owner, query, key, attention_mask, kwargs)
            return original(module, name)(module, query, key, value, attention_mask, **kwargs)

        return on_attention

    with attention_override(model, _NAME, make), torch.inference_mode():
        model(ids.to(model.device), past_key_values=cache, use_cache=True, **_last_logits(model))
    kinds = tuple(type(layer).__name__ for layer in cache.layers)
    return Reading(attention, lengths, kinds, ids.shape[1])


def windows_of(batches: Iterable[Tensor]) -> Tensor:
    """The first ``WINDOWS`` rows [B, T] of the first batch's length."""
    rows: list[Tensor] = []
    for ids in batches:
        rows += [row for row in ids if not rows or row.shape == rows[0].shape]
        if len(rows) >= WINDOWS:
            break
    return torch.stack(rows[:WINDOWS])


def _hear(
    module: nn.Module,
    owner: int | None,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Attention:
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    mass: list[float] | None = None
    if key.shape[2] == query.shape[2] >= 2 * FIRST and fused_arguments(kwargs):
        scaling = default_scaling(module, query, kwargs.get("scaling"))
        mass = first_mass(
            query,
            key,
            mask if isinstance(mask, Tensor) and mask.dim() == 4 else None,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
        ).tolist()
    return Attention(
        module,
        owner,
        query.shape[1],
        None if softcap is None else float(softcap),
        None if mass is None else tuple(mass[:FIRST]),
        None if mass is None or sink_logits is None else 1 - mass[FIRST],
    )


def first_mass(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """[FIRST + 1]: attention that the first positions draw, and that all positions together draw.

    Means over the batch, the heads of query [B, Hq, T, d] and the queries of the second half, which have
    many other keys to look at. key: [B, Hk, T, d].
    """
    half = query.shape[2] // 2
    # values that mark positions turn attention's output into attention weights
    markers = key.new_zeros(*key.shape[:3], FIRST + 1, dtype=torch.float32)
    markers[..., range(FIRST), range(FIRST)] = 1
    markers[..., FIRST] = 1
    drawn = attend(
        query[:, :, half:].float(),
        [Segment(key.shape[2], dense=key.float())],
        [Segment(key.shape[2], dense=markers)],
        scaling=scaling,
        mask=None if mask is None else mask[..., half:, :],
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return drawn.double().mean(dim=(0, 1, 2)).cpu()


def first_lengths(x: Tensor) -> tuple[float, ...]:
    """[B, H, T, d] to the norms of the first positions over the median norm, mean over heads and batch."""
    norms = x.detach().double().norm(dim=-1)
    usual = norms[..., FIRST:].quantile(0.5, dim=-1, keepdim=True)
    ratio = norms[..., :FIRST] / usual.clamp_min(torch.finfo(torch.float32).tiny)
    return tuple(ratio.mean(dim=(0, 1)).tolist())


def _last_logits(model: "PreTrainedModel") -> dict[str, int]:
    """Models that can leave out all logits but the last are asked to."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

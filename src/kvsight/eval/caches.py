"""What is measured side by side: the uncompressed cache, and one arm per plan."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from kvsight.integrations.enable import enable
from kvsight.integrations.hf import PackedCache
from kvsight.plan import Plan

_PIECE = 1 << 14


@dataclass(frozen=True)
class LayerShape:
    """One cached layer: its index in the model, KV heads, and head_dim of keys and of values."""

    index: int
    heads: int
    key_dim: int
    value_dim: int


def layer_shapes(plan: Plan) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(layer.index, layer.heads, layer.key[0].codec.dim, layer.value[0].codec.dim)
        for layer in plan.layers
    )


@dataclass(frozen=True, eq=False)
class Arm:
    """A way of caching, by the label that records use; no plan is transformers' own cache."""

    name: str
    plan: Plan | None = None

    def cache(self, config: PreTrainedConfig) -> Cache:
        """A new, empty cache."""
        if self.plan is None:
            return DynamicCache(config=config)
        return PackedCache(self.plan, config, monitor=False)

    def attention(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Inside, the model reads this arm's caches the fastest way there is."""
        return nullcontext() if self.plan is None else enable(model)


def arm_of(plan: Plan) -> Arm:
    """The arm of a plan, named METHOD@BITS with the bits that it stores, to two digits."""
    method = plan.method if isinstance(plan.method, str) else f"{plan.method['k']}/{plan.method['v']}"
    return Arm(f"{method}@{round(plan.true_bits, 2):g}", plan)


def held_bytes(cache: Cache) -> int:
    """Bytes allocated for cached tokens, storage behind views included."""
    if isinstance(cache, PackedCache):
        return cache.nbytes
    held = (getattr(layer, side, None) for layer in cache.layers for side in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


def draw(
    shapes: Sequence[LayerShape], tokens: int, batch: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Standard normal keys and values [batch, heads, tokens, dim] for every layer; the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, dim: int) -> Tensor:
        drawn = torch.randn(batch, heads, tokens, dim, generator=generator, device=device)
        return drawn.to(dtype)

    return [(normal(shape.heads, shape.key_dim), normal(shape.heads, shape.value_dim)) for shape in shapes]


def fill(cache: Cache, shapes: Sequence[LayerShape], tokens: int, batch: int, device: torch.device) -> None:
    """Append ``tokens`` drawn BF16 tokens, in pieces that bound the scratch memory."""
    step = max(1, _PIECE // batch)
    for start in range(0, tokens, step):
        new = draw(shapes, min(step, tokens - start), batch, torch.bfloat16, device)
        for shape, (key, value) in zip(shapes, new, strict=True):
            cache.update(key, value, shape.index)

"""How long a greedy continuation from a compressed cache stays that of the uncompressed model."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvsight.errors import KVSightError


def prompts(ids: Tensor, count: int, length: int) -> Tensor:
    """At most ``count`` pieces of ``length`` tokens, spread evenly over windows [n, T]."""
    if ids.shape[1] < length:
        raise KVSightError(
            f"prompts of {length} tokens are cut from windows of {ids.shape[1]}; give longer windows."
        )
    pieces = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    count = min(count, len(pieces))
    return pieces[[i * len(pieces) // count for i in range(count)]]


def continuation(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """The model's own greedy next tokens [B, tokens] of prompts [B, T]."""
    steps = _greedy(model, ids, DynamicCache(config=model.config))
    return torch.stack([next(steps) for _ in range(tokens)], dim=1)


def agreement(model: PreTrainedModel, ids: Tensor, wanted: Tensor, cache: Cache) -> list[int]:
    """Tokens of each row until the first that is not ``wanted`` [B, n]; n where there is none."""
    agreed = torch.zeros(len(ids), dtype=torch.int64, device=wanted.device)
    alive = torch.ones(len(ids), dtype=torch.bool, device=wanted.device)
    steps = _greedy(model, ids, cache)
    for column in wanted.unbind(1):
        alive = alive & (next(steps) == column)
        if not bool(alive.any()):
            break
        agreed += alive
    return [int(n) for n in agreed]


def _greedy(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Iterator[Tensor]:
    """Next tokens [B], one step after another."""
    ids = ids.to(model.device)
    while True:
        # a generator must not hold the mode of its caller
        with torch.inference_mode():
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        yield ids[:, 0]

"""Greedy continuation of a prompt, on a packed cache or on transformers' own."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsight.errors import KVSightError

if TYPE_CHECKING:
    from kvsight.plan import Plan


@dataclass(frozen=True)
class Completion:
    """New text, the tokens that the cache held at the end, and the bytes they took."""

    text: str
    tokens: int
    nbytes: int


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, plan: "Plan | None" = None
) -> Completion:
    """Continue the prompt; without a plan the cache is transformers' own, counted at 16 bits."""
    from kvsight.fingerprint import check_model
    from kvsight.integrations.enable import enable
    from kvsight.integrations.hf import PackedCache

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    ids = inputs["input_ids"]
    if ids.shape[-1] == 0:
        raise KVSightError("The prompt is empty; give some text to continue.")
    if plan is not None:
        check_model(plan, model)
    cache = _stock_cache(model) if plan is None else PackedCache(plan, model.config)
    with nullcontext() if plan is None else enable(model):
        out = model.generate(
            **inputs.to(model.device),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=_padding(model),
        )
    text = tokenizer.decode(out[0, ids.shape[-1] :], skip_special_tokens=True)
    nbytes = _stock_nbytes(cache) if plan is None else cache.nbytes
    return Completion(text, int(cache.get_seq_length()), nbytes)


def _stock_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _stock_nbytes(cache: Any) -> int:
    """Bytes of the cached keys and values in BF16, whatever type the model computes in."""
    return sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)


def _padding(model: Any) -> int:
    """Some valid token: one row is never padded, but transformers warns where it is not set."""
    config = model.generation_config
    chosen = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    return int(torch.tensor(0 if chosen is None else chosen).flatten()[0])

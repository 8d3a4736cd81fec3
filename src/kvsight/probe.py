"""Final KL of a plan on a few windows: how ``fit`` tries what it cannot predict."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.integrations.enable import enable
from kvsight.integrations.hf import PackedCache
from kvsight.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 256
# logits of the uncompressed model that are kept between plans: 1 GiB in fp32
_KEPT = 1 << 28


def read(model: "PreTrainedModel", ids: Tensor, cache: PackedCache | None) -> Tensor:
    """Logits [B, T, V] of one pass, through the packed cache or without one."""
    with torch.inference_mode():
        out: Tensor = model(ids, past_key_values=cache, use_cache=cache is not None).logits
    return out


def log_rows(logits: Tensor) -> Iterable[tuple[slice, Tensor]]:
    """Log-probabilities in fp64 for a few positions [n, V] at a time, with the rows that they are."""
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, torch.log_softmax(logits[rows].double(), dim=-1)


def total_kl(reference: Tensor, coded: Tensor) -> float:
    """Σ over positions of KL(reference ‖ coded) in nats for logits [n, V]."""
    total = 0.0
    for (_, p), (_, q) in zip(log_rows(reference), log_rows(coded), strict=True):
        total += float((p.exp() * (p - q)).sum())
    return total


class Probe:
    """KL of plans on the same windows; the uncompressed model is read once where memory allows."""

    def __init__(self, model: "PreTrainedModel", batches: Iterable[Tensor]) -> None:
        self.model = model
        self.batches = [ids.to(model.device) for ids in batches]
        self._references: dict[int, Tensor] = {}
        self._kept = 0

    def kl(self, plan: Plan) -> float:
        """Mean KL in nats per token."""
        total, tokens = 0.0, 0
        with enable(self.model), warnings.catch_warnings():
            # a model whose attention decodes on read is no news while its plan is being made
            warnings.filterwarnings("ignore", "kvsight: attention decodes")
            for i, ids in enumerate(self.batches):
                coded = read(self.model, ids, PackedCache(plan, self.model.config, monitor=False))
                total += total_kl(self._reference(i, ids).flatten(0, 1), coded.flatten(0, 1))
                tokens += ids.numel()
        if tokens == 0:
            raise KVSightError("a plan is tried on at least one batch of token ids; got none.")
        return total / tokens

    def _reference(self, index: int, ids: Tensor) -> Tensor:
        known = self._references.get(index)
        if known is None:
            known = read(self.model, ids, None)
            if self._kept + known.numel() <= _KEPT:
                self._kept += known.numel()
                self._references[index] = known
        return known

"""An arm is what is compared: a plan, or the uncompressed model. Every task reads through one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvsight.errors import KVSightError
from kvsight.eval import caches
from kvsight.fingerprint import check_model
from kvsight.integrations.hf import PackedCache
from kvsight.plan import Plan
from kvsight.planfile import plan_hash

# logits of one forward pass: 1 GiB in fp32
_ELEMENTS = 1 << 28


@dataclass(frozen=True, eq=False)
class Arm:
    """A model with the cache that a plan makes, or with transformers' own where there is no plan.

    The packed cache is read as coded also by the tokens of one long pass (``prefill="packed"``): that
    is how a single pass over a text measures it.
    """

    label: str
    model: PreTrainedModel
    plan: Plan | None = None

    @property
    def plan_hash(self) -> str:
        return "" if self.plan is None else plan_hash(self.plan)

    @property
    def _way(self) -> caches.Arm:
        return caches.Arm(self.label, self.plan)

    def cache(self) -> Cache:
        """An empty cache."""
        return self._way.cache(self.model.config)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it attention runs on the codes, and nothing records gradients."""
        with torch.inference_mode(), self._way.attention(self.model):
            yield

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """Append tokens [B, T] to the cache; logits [B, T, V]."""
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each token but the first: was it the top token, and its loss in nats, both [T - 1]."""

    hit: Tensor
    loss: Tensor

    def accuracy(self, positions: Tensor) -> float:
        """Share of the tokens at these positions [n] of the sequence that were the top token."""
        return float(self.hit[positions - 1].double().mean())

    def mean_loss(self, positions: Tensor) -> float:
        """Nats per token at these positions."""
        return float(self.loss[positions - 1].double().mean())


def packed_arm(model: PreTrainedModel, plan: Plan) -> Arm:
    """An arm named after its method and its stored bits to two decimals, such as ``sight@3``."""
    check_model(plan, model)
    return Arm(caches.arm_of(plan).name, model, plan)


def score(arm: Arm, ids: Tensor) -> Scores:
    """Read one sequence [T] and score its tokens; long ones of large vocabularies in several passes."""
    ids = ids.to(arm.model.device)
    cache = arm.cache()
    step = max(1, _ELEMENTS // arm.model.get_input_embeddings().weight.shape[0])
    hits, losses = [], []
    for start in range(0, len(ids) - 1, step):
        read = ids[start : start + step]
        logits = arm.step(read[None], cache)[0].float()
        target = ids[start + 1 : start + step + 1]
        logits = logits[: len(target)]
        hits.append(logits.argmax(-1) == target)
        losses.append(logits.logsumexp(-1) - logits.gather(-1, target[:, None])[:, 0])
    check_read(cache)
    return Scores(torch.cat(hits).cpu(), torch.cat(losses).cpu())


def check_read(cache: Cache) -> None:
    """Raise if this is a packed cache that no attention read: its numbers would be the model's own."""
    if isinstance(cache, PackedCache) and not cache.reads.packed + cache.reads.decoded:
        raise KVSightError("the model did not read the packed cache; nothing would be measured.")

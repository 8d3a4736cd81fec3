"""KL, perplexity and same-top-token of a packed cache against the uncompressed model."""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsight.cache.monitor import Monitor
from kvsight.drift import Drift
from kvsight.errors import KVSightError
from kvsight.eval.intervals import Estimate, mean_interval, perplexity_interval
from kvsight.eval.selftest import check_logits, check_reads, checked_bytes
from kvsight.fingerprint import check_model
from kvsight.integrations.enable import enable
from kvsight.integrations.hf import PackedCache
from kvsight.plan import Plan
from kvsight.probe import log_rows, read
from kvsight.trace import Progress, check_ids


@dataclass(frozen=True)
class Window:
    """Means over the tokens of one window: KL in nats, losses in nats per token, same top token.

    ``kl_p99`` is the 99th percentile of KL over these tokens.
    """

    kl: float
    loss: float
    baseline_loss: float
    same_top: float
    kl_p99: float


@dataclass(frozen=True)
class Result:
    """What a plan costs on a text. Intervals (95 %) are over windows; windows are kept for pairing.

    ``kl_p99`` is the 99th percentile of KL over all tokens.
    ``drift`` is how far the text is from the calibration, where the plan knows.
    ``cache_bytes`` was measured on the cache; ``baseline_bytes`` is a 16-bit cache of the same tokens.
    """

    method: str
    true_bits: float
    key_bits: float
    value_bits: float
    cache_bytes: int
    baseline_bytes: int
    tokens: int
    kl: Estimate
    kl_p99: float
    perplexity: Estimate
    baseline_perplexity: Estimate
    same_top: Estimate
    windows: tuple[Window, ...]
    drift: Drift | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {
            key: getattr(self, key)
            for key in (
                "method",
                "true_bits",
                "key_bits",
                "value_bits",
                "cache_bytes",
                "baseline_bytes",
                "tokens",
                "kl_p99",
            )
        }
        estimates = {
            key: getattr(self, key).to_json()
            for key in ("kl", "perplexity", "baseline_perplexity", "same_top")
        }
        drift = None if self.drift is None else {**vars(self.drift), "beyond": self.drift.beyond}
        windows = [vars(window) for window in self.windows]
        return {**plain, **estimates, "drift": drift, "windows": windows}


def evaluate(
    model: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Tensor],
    *,
    reference: Callable[[int], Tensor] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Read each window once uncompressed and once through the packed cache, and compare the logits.

    Args:
        batches: LongTensor [B, T] each; every row is a window. Calibration must not have seen them.
        reference: the uncompressed logits [B, T, V] of batch i, where they are known already.

    Raises ``KVSightError`` for a plan of another model, and when the cache is not as small as the plan
    claims, or gives the uncompressed logits (a plan that compresses nothing fails here).
    """
    check_model(plan, model)
    total = len(batches) if isinstance(batches, Sized) else 0
    windows: list[Window] = []
    kls: list[Tensor] = []
    tokens = cache_bytes = baseline_bytes = 0
    monitor = Monitor(plan)
    with enable(model):
        for done, ids in enumerate(batches, start=1):
            ids = check_ids(ids, model).to(model.device)
            if ids.shape[1] < 2:
                raise KVSightError(f"a window needs at least 2 tokens; got {ids.shape[1]}.")
            cache = PackedCache(plan, model.config)
            if cache.monitor is not None:
                # one text, one verdict
                cache.monitor.mute()
            plain = read(model, ids, None) if reference is None else reference(done - 1).to(ids.device)
            coded = read(model, ids, cache)
            found = [compare_logits(*triple) for triple in zip(ids, plain, coded, strict=True)]
            windows += [window for window, _ in found]
            kls += [kl for _, kl in found]
            tokens += ids.numel()
            cache_bytes += checked_bytes(cache, plan, ids)
            check_logits(plan, ids.shape[1], sum(window.kl for window, _ in found) / len(found))
            if done == 1 and model.dtype.itemsize < 4:
                uncoded = PackedCache(plan, model.config, prefill="raw", monitor=False)
                check_reads(plan, ids.shape[1], read(model, ids, uncoded), coded)
            if cache.monitor is not None:
                monitor.merge(cache.monitor)
            baseline_bytes += 2 * plan.elements(ids.shape[1], ids.shape[0])
            if progress is not None:
                progress("evaluate", done, total)
    monitor.say()
    if not windows:
        raise KVSightError("evaluation needs at least one batch of token ids; got none.")
    return Result(
        plan.method if isinstance(plan.method, str) else f"{plan.method['k']}/{plan.method['v']}",
        plan.true_bits,
        plan.key_bits,
        plan.value_bits,
        cache_bytes,
        baseline_bytes,
        tokens,
        **estimates(windows),
        kl_p99=percentile(kls),
        windows=tuple(windows),
        drift=monitor.drift(),
    )


def estimates(windows: Sequence[Window]) -> dict[str, Estimate]:
    """Figures by name, each with its interval over windows."""
    return {
        "kl": mean_interval([w.kl for w in windows], least=0.0),
        "perplexity": perplexity_interval([w.loss for w in windows]),
        "baseline_perplexity": perplexity_interval([w.baseline_loss for w in windows]),
        "same_top": mean_interval([w.same_top for w in windows], least=0.0, most=1.0),
    }


def percentile(kls: Sequence[Tensor], share: float = 99.0) -> float:
    """The percentile over all tokens of some windows [T]."""
    return float(np.percentile(torch.cat(list(kls)).numpy(), share))


def compare_logits(ids: Tensor, reference: Tensor, coded: Tensor) -> tuple[Window, Tensor]:
    """One window's figures, and the KL of each of its tokens: ids [T], logits [T, V], KL fp64 [T]."""
    same = loss = baseline = 0.0
    kls: list[Tensor] = []
    count = len(ids)
    for (rows, p), (_, q) in zip(log_rows(reference), log_rows(coded), strict=True):
        kls.append((p.exp() * (p - q)).sum(-1).cpu())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        target = ids[rows.start + 1 : rows.start + 1 + len(p)]
        index = target.unsqueeze(-1)
        baseline -= float(p[: len(target)].gather(-1, index).sum())
        loss -= float(q[: len(target)].gather(-1, index).sum())
    kl = torch.cat(kls)
    window = Window(
        float(kl.mean()), loss / (count - 1), baseline / (count - 1), same / count, percentile([kl])
    )
    return window, kl

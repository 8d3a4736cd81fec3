"""KL, perplexity and same-top-token of a packed cache against the uncompressed model."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvsight.cache.monitor import Monitor
from kvsight.drift import Drift
from kvsight.errors import KVSightError
from kvsight.eval.intervals import Estimate, mean_interval, perplexity_interval
from kvsight.fingerprint import check_model
from kvsight.integrations.hf import PackedCache, enable
from kvsight.plan import Plan
from kvsight.probe import log_rows, read
from kvsight.trace import Progress, check_ids


@dataclass(frozen=True)
class Window:
    """Means over the tokens of one window: KL in nats, losses in nats per token, same top token."""

    kl: float
    loss: float
    baseline_loss: float
    same_top: float


@dataclass(frozen=True)
class Result:
    """What a plan costs on a text. Intervals (95 %) are over windows; windows are kept for pairing.

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
    progress: Progress | None = None,
) -> Result:
    """Read each window once uncompressed and once through the packed cache, and compare the logits.

    Args:
        batches: LongTensor [B, T] each; every row is a window. Calibration must not have seen them.

    Raises ``KVSightError`` for a plan of another model, and when the cache is not as small as the plan
    claims (a plan that compresses nothing fails here).
    """
    check_model(plan, model)
    total = len(batches) if isinstance(batches, Sized) else 0
    windows: list[Window] = []
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
            reference = read(model, ids, None)
            coded = read(model, ids, cache)
            windows += [_compare(*triple) for triple in zip(ids, reference, coded, strict=True)]
            tokens += ids.numel()
            cache_bytes += _checked_bytes(cache, plan, ids)
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
        mean_interval([w.kl for w in windows], least=0.0),
        perplexity_interval([w.loss for w in windows]),
        perplexity_interval([w.baseline_loss for w in windows]),
        mean_interval([w.same_top for w in windows], least=0.0, most=1.0),
        tuple(windows),
        monitor.drift(),
    )


def _checked_bytes(cache: PackedCache, plan: Plan, ids: Tensor) -> int:
    promised = plan.nbytes(ids.shape[1], ids.shape[0])
    if cache.nbytes != promised:
        raise KVSightError(
            f"the cache holds {cache.nbytes} bytes for {ids.numel()} tokens, the plan's ledger says "
            f"{promised}: the saving is not real. Please report this plan."
        )
    return cache.nbytes


def _compare(ids: Tensor, reference: Tensor, coded: Tensor) -> Window:
    kl = same = loss = baseline = 0.0
    count = len(ids)
    for (rows, p), (_, q) in zip(log_rows(reference), log_rows(coded), strict=True):
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        target = ids[rows.start + 1 : rows.start + 1 + len(p)]
        index = target.unsqueeze(-1)
        baseline -= float(p[: len(target)].gather(-1, index).sum())
        loss -= float(q[: len(target)].gather(-1, index).sum())
    return Window(kl / count, loss / (count - 1), baseline / (count - 1), same / count)

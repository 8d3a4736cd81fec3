"""One text and the uncompressed model on it: what every plan is measured against."""

import datetime
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvsight.eval.agreement import agreement, continuation, prompts
from kvsight.eval.intervals import mean_interval
from kvsight.eval.peers import Setting, measure_stock, stock_cache, stock_jobs
from kvsight.eval.quality import estimates, evaluate, percentile
from kvsight.eval.reference import References
from kvsight.eval.timing import KeysValues, keys_values, plan_jobs, times
from kvsight.integrations.enable import enable
from kvsight.integrations.hf import PackedCache
from kvsight.plan import Plan

Content = dict[str, Any]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 32


class Bench:
    """The windows, and what the uncompressed model makes of them: each computed once, when first needed."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, reference: References) -> None:
        self.model, self.reference = model, reference
        self.batches = ids.split(1)
        self._ids = ids

    @cached_property
    def _prompts(self) -> Tensor:
        return prompts(self._ids, PROMPTS, min(PROMPT_TOKENS, self._ids.shape[1])).to(self.model.device)

    @cached_property
    def _wanted(self) -> Tensor:
        return continuation(self.model, self._prompts, NEW_TOKENS)

    @cached_property
    def _seen(self) -> KeysValues:
        return keys_values(self.model, self.batches[0])

    def _agreement(self, cache: Cache) -> Content:
        found = agreement(self.model, self._prompts, self._wanted, cache)
        mean = mean_interval(found, least=0.0, most=float(NEW_TOKENS))
        return {"agreement": mean.to_json(), "agreements": found, "agreement_cap": NEW_TOKENS}

    def plan(self, plan: Plan) -> Content:
        """What a plan costs on all windows."""
        result = evaluate(self.model, plan, self.batches, reference=self.reference)
        with enable(self.model):
            agreed = self._agreement(PackedCache(plan, self.model.config, monitor=False))
        encode, decode = times(list(plan_jobs(plan, self._seen)))
        said = result.to_json()
        del said["method"], said["drift"]
        return {
            **said,
            "static_bytes": plan.ledger().static_bytes,
            "sinks": plan.sinks,
            **agreed,
            "encode_us_per_token": encode,
            "decode_us_per_token": decode,
            "date": datetime.date.today().isoformat(),
        }

    def stock(self, backend: str, setting: Setting) -> Content:
        """The same for a quantiser of another library."""
        model = self.model
        found, stored = measure_stock(model, self.batches, backend, setting, setting, self.reference)
        windows = [window for window, _ in found]
        elements = sum(k.numel() + v.numel() for k, v in self._seen.values()) * len(windows)
        encode, decode = times(list(stock_jobs(model.config, backend, setting, self._seen)))
        return {
            "true_bits": stored.true_bits,
            "key_bits": stored.key_bits,
            "value_bits": stored.value_bits,
            "true_bits_as_run": stored.as_run,
            "cache_bytes": round(stored.true_bits * elements / 8),
            "baseline_bytes": 2 * elements,
            "tokens": sum(ids.numel() for ids in self.batches),
            "kl_p99": percentile([kl for _, kl in found]),
            **{name: figure.to_json() for name, figure in estimates(windows).items()},
            "windows": [vars(window) for window in windows],
            "static_bytes": 0,
            **self._agreement(stock_cache(model.config, backend, setting)),
            "encode_us_per_token": encode,
            "decode_us_per_token": decode,
            "date": datetime.date.today().isoformat(),
        }

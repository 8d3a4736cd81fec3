"""The harness's own transformers model, with every token read through the packed cache.

The stock one reads loglikelihood requests without any cache, so that multiple choice and perplexity say
nothing about a cache. Here loglikelihood, rolling loglikelihood and generation all read codes, the tokens
of one pass too (``prefill="packed"``).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from kvsight.errors import KVSightError
from kvsight.fingerprint import check_model
from kvsight.integrations.enable import enable
from kvsight.integrations.hf import PackedCache
from kvsight.integrations.loading import load_model, placed
from kvsight.plan import Plan


@register_model("kvsight")
class KVSightLM(HFLM):
    """A causal LM with a plan.

    Requests of one length make a batch, so that nothing is ever padded: the first positions of the cache
    stay exact in some plans, the last ones in others, and some formats code blocks of tokens; padding
    would take the place of all of these. A result therefore does not depend on ``batch_size``.

    Args:
        plan: a plan or its directory.
        pretrained: transformers directory, hub name or model; by default the plan's own.
        tokenizer: needed with a model; otherwise it is the checkpoint's.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU and else the checkpoint's.
        device: by default the GPU where there is one.
        batch_size: most requests read at once; "auto" is refused.
        max_length: longest context; by default the model's limit.

    Raises ``KVSightError`` for a plan of another model, and for arguments that it cannot honour.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        pretrained: Any = None,
        tokenizer: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise KVSightError(f"batch_size is a number of 1 or more here; got {batch_size!r}.")
        loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
        model, words = _loaded(loaded, pretrained, tokenizer, dtype, device)
        check_model(loaded, model)
        _name_the_end(words, model)
        super().__init__(
            pretrained=model, tokenizer=words, batch_size=int(batch_size), max_length=max_length
        )
        self.plan = loaded

    def _cache(self) -> PackedCache:
        return PackedCache(self.plan, self.model.config, monitor=False)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert attn_mask is None and labels is None, "only encoder-decoder models are given these"
        with torch.inference_mode(), enable(self.model):
            logits: Tensor = self.model(inps, past_key_values=self._cache(), use_cache=True).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        mask = settings.get("attention_mask")
        assert mask is None or bool(mask.all()), "requests of different lengths in one batch"
        settings["past_key_values"] = self._cache()
        with torch.inference_mode(), enable(self.model):
            out: Tensor = super()._model_generate(context, max_length, stop, **settings)
        return out

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answer = super()._loglikelihood_tokens

        def length(request: Any) -> int:
            return len(request[1]) + len(request[2])

        return _by_length(requests, length, lambda some: answer(some, True, override_bs), disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answer = super().generate_until

        def length(request: Any) -> int:
            return len(self.tok_encode(request.args[0]))

        return _by_length(requests, length, lambda some: answer(some, True), disable_tqdm)


def _loaded(
    plan: Plan, pretrained: Any, tokenizer: Any, dtype: str | None, device: str | None
) -> tuple[Any, Any]:
    if pretrained is None or isinstance(pretrained, (str, Path)):
        source = plan.provenance.get("model", "") if pretrained is None else pretrained
        model, words = load_model(source or None, *placed(device, dtype))
        return model, words if tokenizer is None else tokenizer
    if tokenizer is None:
        raise KVSightError("a model that is loaded already comes without its tokenizer; give tokenizer=.")
    return pretrained, tokenizer


def _name_the_end(tokenizer: Any, model: Any) -> None:
    """A tokenizer.json without settings does not say which token ends a text; the model's config does."""
    end = model.config.get_text_config().eos_token_id
    if tokenizer.eos_token_id is None and end is not None:
        first = end[0] if isinstance(end, list) else end
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)


def _by_length(
    requests: Sequence[Any],
    length: Callable[[Any], int],
    answer: Callable[[list[Any]], list[Any]],
    quiet: bool,
) -> list[Any]:
    """Answers in the order of the requests, asked for in groups of one length, the longest first."""
    groups: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(length(request), []).append(i)
    out: list[Any] = [None] * len(requests)
    with tqdm(total=len(requests), disable=quiet, desc="requests") as bar:
        for size in sorted(groups, reverse=True):
            indices = groups[size]
            for i, result in zip(indices, answer([requests[i] for i in indices]), strict=True):
                out[i] = result
            bar.update(len(indices))
    return out

"""Swap a model's attention function for a while. Imports nothing of kvsight but its error type."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsight.errors import KVSightError

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

# transformers registers functions by name for the whole process: two models need two names
_active: set[str] = set()


@contextmanager
def attention_override(
    model: PreTrainedModel,
    name: str,
    make: Callable[[str], AttentionFunction],
    like: Callable[[str], str] = str,
) -> Iterator[bool]:
    """Run ``model`` with functions of ours as its attention; yields whether the model listens to them.

    Parts of a model may have implementations of their own. ``make(stock)`` is what stands for one that is
    ``stock``, after ``like``. Masks are built as for that: without a registered mask, padding and causality
    would vanish silently. On exit the old implementations are back.
    """
    before = [(config, config._attn_implementation) for config in _configs(model)]
    names: dict[str, str] = {}
    for _, now in before:
        if now is not None and now not in names:
            names[now] = next(free for i in count(1) if (free := f"{name}_{i}") not in _active)
            _active.add(names[now])
            stock = like(now)
            AttentionInterface.register(names[now], make(stock))
            mask = _graphable(ALL_MASK_ATTENTION_FUNCTIONS.get(stock, sdpa_mask))
            AttentionMaskInterface.register(names[now], mask)
    try:
        if _listens(model):
            model.set_attn_implementation({key: names[now] for key, now in implementations(model).items()})
            for config, now in before:
                # parts of parts get what their parent gets
                if config._attn_implementation in names.values():
                    config._attn_implementation_internal = names.get(now)
        yield model.config._attn_implementation in names.values()
    finally:
        for config, now in before:
            config._attn_implementation_internal = now
        _active.difference_update(names.values())


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Of a model, of its parts, and of theirs."""
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, PreTrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found and isinstance(config, PreTrainedConfig):
            found[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


def _graphable(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build``, but no mask where one new token sees all others while a graph is compiled or captured.

    Some versions of transformers build masks then that they leave out otherwise, and nobody can look
    into them.
    """

    def mask(**arguments: Any) -> Any:
        sees_all = (
            arguments.get("q_length") == 1
            and arguments.get("attention_mask") is None
            and arguments.get("local_size") is None
            and arguments.get("allow_is_causal_skip", True)
        )
        if sees_all and (torch.compiler.is_compiling() or _captures()):
            return None
        return build(**arguments)

    return mask


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _listens(model: PreTrainedModel) -> bool:
    # models without the interface ignore the call and log a warning each time
    check = getattr(model, "_can_set_attn_implementation", None)
    return True if check is None else bool(check())


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """Names now in use: "" for the model itself, else the key of a sub-config."""
    names = {"": str(model.config._attn_implementation)}
    for key in model.config.sub_configs:
        sub = getattr(model.config, key, None)
        now = getattr(sub, "_attn_implementation", None)
        # some have none, and take none
        if now is not None:
            names[key] = str(now)
    return names


def original(module: nn.Module, name: str) -> AttentionFunction:
    """The attention function that ``name`` stands for in this module's file."""
    if name == "eager":
        eager: AttentionFunction | None = getattr(
            sys.modules[type(module).__module__], "eager_attention_forward", None
        )
        if eager is None:
            raise KVSightError(
                f"{type(module).__name__} has no eager attention function to delegate to. "
                "Load the model with attn_implementation='sdpa'."
            )
        return eager
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[name]
    return function


def fused_arguments(kwargs: dict[str, Any]) -> bool:
    """Whether ``ops.attend`` covers what a model passes beside q, k, v, mask and scaling."""
    return all(kwargs.get(key) is None for key in ("position_bias", "block_indices", "cache"))


def default_scaling(module: nn.Module, q: Tensor, scaling: float | None) -> float:
    """The softmax scale: as passed, as the module says, or 1/√d."""
    if scaling is not None:
        return float(scaling)
    own = getattr(module, "scaling", None)
    return float(own) if own is not None else float(q.shape[-1]) ** -0.5

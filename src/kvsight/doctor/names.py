"""What only the names of modules tell: biases of key projections, and norms of queries and keys."""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from kvsight.stats import Moments

_SEPARATE = re.compile(r"k|k_proj|key|key_proj")
_FUSED = re.compile(r"[Ww]?q?kv|q?kv_proj|query_key_value|key_value|c_attn|kv_[ab]_proj\w*|k_b_proj")
_NORM = re.compile(r"(q|k|qk|query|key)_?(layer_?)?norm")


def key_bias(modules: Iterable[nn.Module]) -> tuple[str, ...] | None:
    """Names of key projections with a bias that is not all zero; None if no projection is recognised."""
    found = [
        (name, child)
        for name, child in _children(modules)
        if _SEPARATE.fullmatch(name) or _FUSED.fullmatch(name)
    ]
    if not found:
        return None
    return tuple(sorted({name for name, child in found if _bias(child) is not None}))


def qk_norm(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """Names of the norms that queries and keys go through."""
    return tuple(sorted({name for name, _ in _children(modules) if _NORM.fullmatch(name)}))


def bias_share(module: nn.Module, keys: Moments) -> tuple[float, ...] | None:
    """‖b‖² / E‖k‖² per KV head for the bias b of a separate projection whose output is the key.

    RoPE keeps norms, so this is what a bias adds to the energy of cached keys. None without such a bias.
    """
    if qk_norm([module]):
        return None
    for name, child in _children([module]):
        bias = _bias(child)
        if _SEPARATE.fullmatch(name) and bias is not None and bias.numel() == keys.total.numel():
            energy = keys.second.diagonal(dim1=-2, dim2=-1).sum(-1)
            heads = bias.detach().double().cpu().view(keys.total.shape)
            return tuple((heads.square().sum(-1) / energy).tolist())
    return None


def _children(modules: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for module in modules:
        for path, child in module.named_modules():
            yield path.rpartition(".")[2], child


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) and bool(bias.any()) else None

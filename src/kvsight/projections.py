"""Norms of the key and value projections: what "Quantize What Counts" spends bits by."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SEPARATE = {"k": re.compile(r"k|k_proj|key|key_proj"), "v": re.compile(r"v|v_proj|value|value_proj")}
_FUSED = re.compile(r"[Ww]?qkv|qkv_proj|c_attn")
# one block of query, key and value per head, instead of all queries first
_INTERLEAVED = re.compile(r"query_key_value")


@dataclass(frozen=True)
class Norms:
    """Frobenius and spectral norm of a projection matrix."""

    frobenius: float
    spectral: float


def projection_norms(
    attention: nn.Module, query_heads: int, kv_heads: int, dims: tuple[int, int]
) -> tuple[Norms, Norms] | None:
    """Norms of W_K and W_V of an attention module; None where its projections are not recognised.

    Args:
        dims: head_dim of keys (and queries) and of values.
    """
    sizes = {"k": kv_heads * dims[0], "v": kv_heads * dims[1]}
    found: dict[str, Tensor] = {}
    for path, child in attention.named_modules():
        name = path.rpartition(".")[2]
        weight = _weight(child)
        if weight is None:
            continue
        for side, pattern in _SEPARATE.items():
            if pattern.fullmatch(name) and weight.shape[0] == sizes[side]:
                found[side] = weight
        queries = query_heads * dims[0]
        if weight.shape[0] != queries + sizes["k"] + sizes["v"]:
            continue
        if _FUSED.fullmatch(name):
            _, found["k"], found["v"] = weight.split([queries, sizes["k"], sizes["v"]])
        if _INTERLEAVED.fullmatch(name) and query_heads == kv_heads:
            blocks = weight.unflatten(0, (kv_heads, 2 * dims[0] + dims[1]))
            _, key, value = blocks.split([dims[0], *dims], dim=1)
            found["k"], found["v"] = key.flatten(0, 1), value.flatten(0, 1)
    if found.keys() != {"k", "v"}:
        return None
    return _norms(found["k"]), _norms(found["v"])


def _weight(module: nn.Module) -> Tensor | None:
    """The matrix of a linear module as [out, in]; None for anything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point:
        return None
    # transformers' Conv1D, known by its size attribute, keeps [in, out]
    return weight.T if hasattr(module, "nf") else weight


def _norms(weight: Tensor) -> Norms:
    weight = weight.detach().double()
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return Norms(float(gram.diagonal().sum()) ** 0.5, max(largest, 0.0) ** 0.5)

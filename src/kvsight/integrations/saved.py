"""Tokens of a cache in a file, and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvsight.atomic import replace_file
from kvsight.cache import side as sides
from kvsight.errors import KVSightError
from kvsight.integrations.layers import PackedLayer
from kvsight.plan import SIDES, Plan
from kvsight.planfile import plan_hash


@dataclass(frozen=True, eq=False)
class Saved:
    """What a file holds: the cache's way of prefill, numbers of each layer, and tensors of all."""

    prefill: str
    layers: Mapping[int, Any]
    tensors: Mapping[str, Tensor]


def write(path: str | Path, layers: Sequence[Any], plan: Plan, prefill: str) -> None:
    """Tokens of packed layers to one safetensors file; raises where a layer keeps anything else."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        if not isinstance(layer, PackedLayer):
            # a layer that reads another's keys and values is no cache layer and holds nothing
            if isinstance(layer, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
                raise KVSightError(
                    f"layer {i} keeps other state than keys and values; this cache cannot be saved."
                )
            continue
        layer.to_rows()
        if layer.key_state is None or layer.value_state is None:
            continue
        numbers[str(i)] = {
            "length": layer.cumulative_length,
            "skip": [layer.key_state.skip, layer.value_state.skip],
            "dtype": str(layer.dtype).removeprefix("torch."),
        }
        for name, side in zip(SIDES, (layer.key_state, layer.value_state), strict=True):
            tensors |= {f"{i}.{name}.{n}": t for n, t in sides.tensors(side).items()}
    metadata = {"plan": plan_hash(plan), "prefill": prefill, "layers": json.dumps(numbers)}
    with replace_file(Path(path)) as scratch:
        save_file(tensors, scratch, metadata=metadata)


def read(path: str | Path, plan: Plan, device: torch.device | str) -> Saved:
    """What ``write`` wrote, on ``device``; another plan, or a damaged file, raises."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise KVSightError(f"no cache at {path}: the file does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise KVSightError(f"{path} is not a readable cache file ({error}).") from error
    if "plan" not in metadata:
        raise KVSightError(f"{path} was not written by PackedCache.save.")
    if metadata["plan"] != plan_hash(plan):
        raise KVSightError(f"{path} was saved under another plan; load that plan first.")
    layers = {int(index): numbers for index, numbers in json.loads(metadata["layers"]).items()}
    return Saved(metadata["prefill"], layers, tensors)


def restore(layer: PackedLayer, index: int, saved: Saved) -> None:
    """Give an empty layer the tokens that one of this ``index`` had."""
    stored = {
        name: {n.split(".", 2)[2]: t for n, t in saved.tensors.items() if n.startswith(f"{index}.{name}.")}
        for name in SIDES
    }
    numbers = saved.layers[index]
    layer.lazy_initialization(stored["k"]["tail"], stored["v"]["tail"])
    assert layer.key_state is not None and layer.value_state is not None
    layer.key_state = sides.restore(layer.key_state, stored["k"], numbers["skip"][0], numbers["length"])
    layer.value_state = sides.restore(layer.value_state, stored["v"], numbers["skip"][1], numbers["length"])
    layer.cumulative_length = numbers["length"]
    layer.dtype = getattr(torch, numbers["dtype"])

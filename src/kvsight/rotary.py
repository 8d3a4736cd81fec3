"""Which rotation a model gives its cached keys: read from its buffers, and proved by moving the text.

Attention with RoPE sees distances only. The same tokens at positions s later have keys R(s) k, in every
layer; a candidate that says so is the model's rotation, whatever its code looks like.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvsight.rope import Rope, pairs

# a prime, so that no pair comes back to where it was
_SHIFT = 29
_TOKENS = 8
# half precision rounds keys of deep layers by a few per cent; a wrong rotation is off by all of them
_CLOSE = 0.1
# frequencies of these change with the length of the text
_CHANGING = {"dynamic", "longrope"}

ReadKeys = Callable[..., Mapping[int, Tensor]]


@dataclass(frozen=True, eq=False)
class Turning:
    """How one layer's keys turn with the position: by ``rope``, not at all (None), or ``unknown`` (why)."""

    rope: Rope | None = None
    unknown: str | None = None


def turnings(model: PreTrainedModel, read_keys: ReadKeys) -> dict[int, Turning]:
    """For every layer that ``read_keys(count, position_ids)`` gives the keys [1, H, n, d] of."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        turns = next(_frequencies(model), None) is not None
        reason = "it takes no position_ids, so that its rotation cannot be proved" if turns else None
        return {layer: Turning(unknown=reason) for layer in read_keys(_TOKENS)}
    at = torch.arange(_TOKENS, device=model.device).unsqueeze(0)
    try:
        here, there = read_keys(_TOKENS, position_ids=at), read_keys(_TOKENS, position_ids=at + _SHIFT)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = f"its keys could not be read at other positions ({str(error).splitlines()[0]})"
        return {layer: Turning(unknown=reason) for layer in read_keys(_TOKENS)}
    changing = sorted(_CHANGING & set(_types(model)))
    frequencies = list(_frequencies(model))
    out: dict[int, Turning] = {}
    for layer, k in here.items():
        out[layer] = _turning(k.double().cpu(), there[layer].double().cpu(), frequencies)
        if changing and out[layer].rope is not None:
            reason = f"the frequencies of its {changing[0]} RoPE change with the length of the text"
            out[layer] = Turning(unknown=reason)
    return out


def _turning(here: Tensor, there: Tensor, frequencies: list[Tensor]) -> Turning:
    scale = here.norm().clamp_min(torch.finfo(torch.float64).tiny)
    moved = torch.full((here.shape[-2],), _SHIFT)
    best, least = None, float((there - here).norm() / scale)
    for rope in _candidates(frequencies, here.shape[-1]):
        error = float((there - rope.turn(here, moved)).norm() / scale)
        if error < least:
            best, least = rope, error
    if least < _CLOSE:
        return Turning(best)
    lengths = here.norm(dim=-1), there.norm(dim=-1)
    # positions that are added to embeddings change lengths, and leave nothing to turn back
    if not frequencies and float((lengths[1] - lengths[0]).norm() / scale) > 0.01:
        return Turning()
    return Turning(unknown="its keys change with the position as no RoPE that kvsight knows does")


def _candidates(frequencies: list[Tensor], dim: int) -> Iterator[Rope]:
    for each in frequencies:
        turned = 2 * len(each)
        if turned <= dim:
            for first in dict.fromkeys((0, dim - turned)):
                for interleaved in (False, True):
                    yield pairs(each, dim, first=first, interleaved=interleaved)


def _frequencies(model: nn.Module) -> Iterator[Tensor]:
    """Every buffer of inverse frequencies, [pairs]; those before a rescaling are not used."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and buffer.dim() == 1:
            yield buffer.detach().float().cpu()


def _types(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        yield from (kind.values() if isinstance(kind, dict) else [str(kind)])

"""Rivals that are not ours: the quantisers of transformers' ``QuantizedCache``, quanto and hqq.

That cache shows a prompt its own keys and values uncoded and keeps recent tokens exact, so one pass over a
window would measure nothing of it. Here its own code quantises and dequantises the whole window, and
attention reads what came back: each token is coded and read coded, as in ours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from kvsight.errors import KVSightError
from kvsight.eval.quality import Window, compare_logits
from kvsight.eval.timing import Job, KeysValues
from kvsight.probe import read

Axis = str | int | None

_LAYERS: dict[str, Callable[[], Any]] = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}
_WIDTHS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}
_GROUPS = (32, 64, 128)
BACKENDS = tuple(_LAYERS)


@dataclass(frozen=True)
class Setting:
    """How one side is coded. ``axis`` is in the peer's own words; None where it has no such choice."""

    width: int
    group: int | None
    axis: Axis


@dataclass(frozen=True)
class Stored:
    """Stored bits per element. An fp32 model stores fp32 scales; they count as 16 bits, not ``as_run``."""

    true_bits: float
    key_bits: float
    value_bits: float
    as_run: float


def missing(backend: str) -> str | None:
    """The first line of what stops this backend from being imported, or None."""
    try:
        _LAYERS[backend]()
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


def refused(backend: str, config: PreTrainedConfig) -> str | None:
    """The first line of why this backend does not take this model here, or None."""
    try:
        QuantizedCache(backend, config)
    except (ImportError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def nominal_bits(backend: str, width: int, group: int) -> float:
    """Bits per element by arithmetic, to choose settings by; what is reported is counted."""
    # hqq packs ten 3-bit codes into 32 bits, and a group takes whole words
    words = backend == "hqq" and width == 3
    codes = 32 * math.ceil(group / 10) / group if words else width
    return codes + 32 / group


def best_setting(backend: str, bits: float) -> Setting:
    """The dearest setting within ``bits``, with the stock axis; raises where there is none."""
    rates = {
        Setting(width, group, 0): nominal_bits(backend, width, group)
        for width, group in product(_WIDTHS[backend], _GROUPS)
    }
    affordable = [setting for setting, rate in rates.items() if rate <= bits + 1e-9]
    if not affordable:
        raise KVSightError(
            f"{backend} cannot meet {bits:.4g} bits; its cheapest configuration here stores "
            f"{min(rates.values()):.4g}. Raise the budget or choose another method."
        )
    return max(affordable, key=rates.__getitem__)


class ReadBack(DynamicLayer):
    """A layer that codes one window with the quantisers of two stock layers and shows what they decode."""

    def __init__(self, key: Any, value: Any) -> None:
        super().__init__()
        self.key, self.value = key, value
        self.stored: tuple[Any, ...] = ()
        self.elements: tuple[int, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for layer in (self.key, self.value):
            layer.lazy_initialization(key_states, value_states)
        key = self.key._quantize(key_states.contiguous(), axis=self.key.axis_key)
        value = self.value._quantize(value_states.contiguous(), axis=self.value.axis_value)
        self.stored, self.elements = (key, value), (key_states.numel(), value_states.numel())
        return self.key._dequantize(key), self.value._dequantize(value)


def stock_cache(config: PreTrainedConfig, backend: str, setting: Setting) -> QuantizedCache:
    """transformers' own cache, as a user would make it."""
    axes = {"axis_key": setting.axis, "axis_value": setting.axis}
    return QuantizedCache(backend, config, nbits=setting.width, q_group_size=setting.group, **axes)


def read_back_cache(config: PreTrainedConfig, backend: str, key: Setting, value: Setting) -> Cache:
    """The layers of one stock cache per side, joined, for one window."""
    sides = (stock_cache(config, backend, setting).layers for setting in (key, value))
    return Cache(layers=[ReadBack(k, v) for k, v in zip(*sides, strict=True)])


def measure_stock(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    backend: str,
    key: Setting,
    value: Setting,
    reference: Callable[[int], Tensor] | None = None,
) -> tuple[list[tuple[Window, Tensor]], Stored]:
    """What ``compare_logits`` gives for every row of ``batches``, and what was stored meanwhile."""
    found: list[tuple[Window, Tensor]] = []
    layers: list[ReadBack] = []
    for i, ids in enumerate(batches):
        ids = ids.to(model.device)
        cache = read_back_cache(model.config, backend, key, value)
        coded = read(model, ids, cache)
        plain = read(model, ids, None) if reference is None else reference(i).to(ids.device)
        found += [compare_logits(*triple) for triple in zip(ids, plain, coded, strict=True)]
        layers += cache.layers
    both, keys, values = (_stored_bits(layers, sides, widest=2) for sides in ((0, 1), (0,), (1,)))
    return found, Stored(both, keys, values, _stored_bits(layers, (0, 1)))


def stock_jobs(config: PreTrainedConfig, backend: str, setting: Setting, seen: KeysValues) -> Iterator[Job]:
    """The backend's own quantisers, to be timed on what the layers cache."""
    for i, layer in enumerate(stock_cache(config, backend, setting).layers):
        layer.lazy_initialization(*seen[i])
        encode = partial(layer._quantize, axis=setting.axis)
        for x in seen[i]:
            yield Job(encode, layer._dequantize, x.contiguous())


def _stored_tensors(stored: Any) -> Iterator[Tensor]:
    """The plain tensors inside what a backend keeps."""
    if isinstance(stored, Tensor):
        inner = stored.__tensor_flatten__()[0] if hasattr(stored, "__tensor_flatten__") else ()
        yield from (t for name in inner for t in _stored_tensors(getattr(stored, name)))
        if not inner:
            yield stored
    elif isinstance(stored, dict):
        yield from (t for item in stored.values() for t in _stored_tensors(item))
    elif isinstance(stored, (tuple, list)):
        yield from (t for item in stored for t in _stored_tensors(item))


def _stored_bits(layers: Sequence[ReadBack], sides: Sequence[int], widest: int = 8) -> float:
    """Stored bits per element of these sides; no float counts for more than ``widest`` bytes."""
    tensors = (t for layer in layers for side in sides for t in _stored_tensors(layer.stored[side]))
    nbytes = sum(t.numel() * min(t.element_size(), widest if t.is_floating_point() else 8) for t in tensors)
    return 8 * nbytes / sum(layer.elements[side] for layer in layers for side in sides)

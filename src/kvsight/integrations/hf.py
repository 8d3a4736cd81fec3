"""The cache for transformers."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvsight.cache.ahead import Ahead
from kvsight.cache.counter import Counter
from kvsight.cache.monitor import monitored
from kvsight.cache.packed import Reads
from kvsight.drift import Drift
from kvsight.errors import KVSightError
from kvsight.integrations.layers import PackedLayer, PackedSlidingLayer
from kvsight.integrations.saved import read, restore, write
from kvsight.plan import LayerPlan, Plan


class PackedCache(Cache):
    """A transformers cache that holds a plan's packed rows.

    Args:
        plan: what to store and how.
        config: the model's config; by default rebuilt from the plan.
        prefill: "packed" (default) lets every query read coded keys and values, so that one forward
            pass measures the cache; "raw" lets the tokens of one call of more than one token see each
            other uncompressed, as most serving engines do.
        monitor: compare some of the tokens of every call of more than one with the calibration, and log
            a warning when they are unlike it; ``drift`` has the figures.
        tiles: hold tokens in tiles from the 64th on, where the plan was fitted with the option
            ``layout=tiles``. On NVIDIA GPUs since Hopper kernels read them, and they are the default;
            elsewhere plain torch does, for tests.

    ``model.generate(ids, past_key_values=PackedCache(plan))`` works as it is; inside
    ``kvsight.enable(model)`` attention runs on the codes.
    """

    def __init__(
        self,
        plan: Plan,
        config: PreTrainedConfig | None = None,
        *,
        prefill: str = "packed",
        monitor: bool = True,
        tiles: bool | None = None,
    ) -> None:
        if prefill not in ("packed", "raw"):
            raise KVSightError(f"prefill is 'packed' or 'raw'; got {prefill!r}.")
        self.plan, self.prefill, self.tiles = plan, prefill, tiles
        self.reads = Reads(plan)
        # of every device, and the number of the first layer there
        self.counters: dict[torch.device, tuple[Counter, int]] = {}
        self.monitor = monitored(plan, monitor)
        planned = {layer.index: layer for layer in plan.layers}
        config = config_of(plan) if config is None else config
        text = config.get_text_config(decoder=True)
        self.ahead = Ahead(
            plan, getattr(text, "num_attention_heads", None), getattr(text, "attn_logit_softcapping", None)
        )
        template = DynamicCache(config=config).layers
        if not template or max(planned, default=0) >= len(template):
            raise KVSightError(
                f"the plan has {len(planned)} cached layers, the config {len(template)}. "
                "Pass the config of the model that the plan was fitted to."
            )
        layers = [self._layer(kind, planned.get(i)) for i, kind in enumerate(template)]
        super().__init__(layers=layers)

    def _layer(self, template: Any, layer: LayerPlan | None) -> Any:
        # layers that hold no keys and values (linear attention, KV sharing) stay as transformers made them
        if layer is None:
            return template
        kind = {DynamicLayer: PackedLayer, DynamicSlidingWindowLayer: PackedSlidingLayer}
        packed = kind.get(type(template))
        if packed is None:
            raise KVSightError(
                f"layer {layer.index} is a {type(template).__name__}, which kvsight cannot pack. "
                "Pass the config of the model that the plan was fitted to."
            )
        raw, counters = self.prefill == "raw", self.counters
        return packed(self.plan, layer, self.reads, raw, self.ahead, self.monitor, self.tiles, counters)

    def _packed_layers(self) -> Iterator[PackedLayer]:
        return (layer for layer in self.layers if isinstance(layer, PackedLayer))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for cached tokens: codes, scales, norms, sinks, window and pending ones."""
        return sum(layer.nbytes for layer in self._packed_layers())

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all: no step until then allocates, so steps can be graphs.

        Steps of one token that ``torch.compile`` compiled, or that a CUDA graph holds, are replayed without
        Python, so they cannot make room themselves; one too many fails, on a GPU for good. What moves
        tokens (``crop``, ``save``, beams, a copy, more room) ends graphs that were captured: reserve and
        capture again. Raises ``KVSightError`` unless all layers can be held in tiles by now.
        """
        if tokens < 1:
            raise KVSightError(f"room is for at least one token; got {tokens}.")
        # all layers or none
        held = [layer.reservable() for layer in self._packed_layers()]
        for tiles in held:
            tiles.make_room(tokens)
        # the first counts for all, and stops where any would end
        room = min((tiles.room for tiles in held), default=0)
        for tiles in held:
            tiles.reserve(room)

    def to_rows(self) -> None:
        """Give tokens in tiles back to rows, as the ledger counts them: the last tile may be part empty."""
        for layer in self._packed_layers():
            layer.to_rows()

    @property
    def drift(self) -> Drift | None:
        """How far the cached text is from the calibration; None if nothing was looked at yet."""
        return None if self.monitor is None else self.monitor.drift()

    def save(self, path: str | Path) -> None:
        """Write the cache's tokens to one safetensors file; ``load`` needs the same plan."""
        write(path, self.layers, self.plan, self.prefill)

    @classmethod
    def load(
        cls,
        path: str | Path,
        plan: Plan,
        config: PreTrainedConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        tiles: bool | None = None,
        monitor: bool = True,
    ) -> "PackedCache":
        """Read a saved cache onto the model's device; another plan, or a damaged file, raises.

        ``tiles`` and ``monitor`` are as for a new one.
        """
        saved = read(path, plan, device)
        cache = cls(plan, config, prefill=saved.prefill, tiles=tiles, monitor=monitor)
        for index in saved.layers:
            restore(cache.layers[index], index, saved)
        return cache


def config_of(plan: Plan) -> PreTrainedConfig:
    """The model config that the plan was fitted to, rebuilt from its JSON."""
    stored = copy.deepcopy(dict(plan.config))
    kind = stored.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **stored)
    except (ValueError, KeyError, TypeError) as error:
        raise KVSightError(
            f"this transformers cannot rebuild a {kind!r} config; pass config=model.config."
        ) from error

"""One decoding step of a whole model: as transformers runs it, compiled by torch, and as a CUDA graph."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import milliseconds, wall_milliseconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Cache

Step = Callable[[], Tensor]
STEPS, SECONDS = 16, 1.5
# how many kernels are listed, the longest first
KERNELS = 16


class Stepper:
    """A model and its cache; the newest tokens [B, 1] and their position stay on the device."""

    def __init__(self, model: Any, cache: Any, batch: int, context: int) -> None:
        self.model, self.cache = model, cache
        self.device = next(model.parameters()).device
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.at = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.rewind(context)

    def rewind(self, context: int) -> None:
        """Go back to where the cache has ``context`` tokens; the next step writes over what came behind."""
        self.ids.zero_()
        self.at.fill_(context)
        for layer in self.cache.layers:
            if getattr(layer, "tiles", None) is not None:
                layer.tiles.seen.fill_(context)

    def step(self) -> Tensor:
        """One greedy step, all of it on the device; logits [B, vocabulary]."""
        out = self.model(self.ids, position_ids=self.at, past_key_values=self.cache, use_cache=True)
        return self._choose(out.logits[:, -1])

    def _choose(self, logits: Tensor) -> Tensor:
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.at.add_(1)
        return logits

    def compiled(self, how: str) -> Step:
        """``step`` as one graph of inductor ("model"), or as one that layers share ("layers")."""
        return _compiled(self.step) if how == "model" else self._layered()

    def _layered(self) -> Step:
        core = self.model.model
        # a layer asks for its number, which would be a constant of its graph
        for layer in core.layers:
            layer.self_attn.layer_idx = 0
        caches = [Cache(layers=[own]) for own in self.cache.layers]

        def start() -> tuple[Tensor, Any]:
            x = core.embed_tokens(self.ids)
            return x, core.rotary_emb(x, position_ids=self.at)

        def middle(layer: Any, x: Tensor, rotation: Any, cache: Cache) -> Tensor:
            out: Tensor = layer(x, position_embeddings=rotation, past_key_values=cache, use_cache=True)
            return out

        def stop(x: Tensor) -> Tensor:
            return self._choose(self.model.lm_head(core.norm(x))[:, -1])

        start, middle, stop = _compiled(start), _compiled(middle), _compiled(stop)

        def step() -> Tensor:
            x, rotation = start()
            for layer, cache in zip(core.layers, caches, strict=True):
                x = middle(layer, x, rotation, cache)
            return stop(x)

        return step

    def restore(self) -> None:
        """Give layers their numbers back."""
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.layer_idx = i


def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, fullgraph=True, dynamic=False)


def timed(step: Step) -> float:
    """Median milliseconds of a step, of as many as ``SECONDS`` allow, five at least."""
    clock = milliseconds if torch.cuda.is_available() else wall_milliseconds
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (len(times) < STEPS and time.perf_counter() - begin < SECONDS):
        times.append(clock(step))
    return statistics.median(times[2:])


def as_graph(step: Step) -> Step:
    """``step``, that ran before, as a CUDA graph; without CUDA as it is."""
    if not torch.cuda.is_available():
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def kernels(step: Step, times: int = 3) -> list[dict[str, Any]]:
    """What a step launches, the longest first: name, launches and microseconds in a step."""
    if not torch.cuda.is_available():
        return []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    rows = [
        {"kernel": e.key[:120], "launches": e.count / times, "us": e.self_device_time_total / times}
        for e in seen.key_averages()
        if e.self_device_time_total
    ]
    rows.sort(key=lambda row: -row["us"])
    total = {
        "kernel": "all",
        "launches": sum(r["launches"] for r in rows),
        "us": sum(r["us"] for r in rows),
    }
    return [total, *rows[:KERNELS]]

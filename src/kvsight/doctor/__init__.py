"""Look at a model before anything is fitted: what its keys, values and attention mean for a plan."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvsight.doctor import names
from kvsight.doctor.figures import Figures, LayerFigures, head_figures
from kvsight.doctor.findings import Finding
from kvsight.doctor.verdict import Recommendation, diagnose, recommend
from kvsight.doctor.window import Reading, read, windows_of
from kvsight.trace import LayerTrace, observe, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsight.stats import LayerStats
    from kvsight.trace import Progress

__all__ = ["Diagnosis", "Figures", "Finding", "Recommendation", "examine"]


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, what it means, and what to fit."""

    figures: Figures
    findings: tuple[Finding, ...]
    recommendation: Recommendation

    def finding(self, name: str) -> Finding:
        """The finding of that name."""
        return next(f for f in self.findings if f.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.figures),
            "findings": [asdict(finding) for finding in self.findings],
            "recommendation": asdict(self.recommendation),
        }


def examine(
    model: "PreTrainedModel", batches: Iterable[Tensor], *, progress: "Progress | None" = None
) -> Diagnosis:
    """Diagnose ``model`` on text.

    Args:
        model: a transformers causal LM.
        batches: token ids, LongTensor [B, T] each; moments use all, attention the first two windows.

    Raises ``KVSightError`` for bad token ids and for a model that caches nothing that can be packed.
    """
    batches = list(batches)
    trace = observe(model, batches, progress=progress)
    reading = read(model, windows_of(batches))
    layers = tuple(_layer(stats, trace.layers[stats.index], reading) for stats in summarise(trace).layers)
    cached, readers = set(trace.layers), {reader for layer in layers for reader in layer.readers}
    unpacked = {i: kind for i, kind in enumerate(reading.kinds) if i not in cached | readers}
    modules = [attention.module for attention in reading.attention.values()] or [model]
    figures = Figures(
        type(model).__name__,
        trace.tokens,
        reading.length,
        bool(reading.attention),
        layers,
        unpacked,
        names.key_bias(modules),
        names.qk_norm(modules),
    )
    findings = diagnose(figures)
    return Diagnosis(figures, findings, recommend(figures, findings))


def _layer(stats: "LayerStats", seen: LayerTrace, reading: Reading) -> LayerFigures:
    i = stats.index
    attention = reading.attention.get(i)
    # the cache keeps the last tokens only: the first positions are behind most queries
    left_behind = stats.window is not None and stats.window < reading.length
    first = None if attention is None or left_behind else attention.first_mass
    lengths = reading.lengths[i]
    return LayerFigures(
        i,
        stats.window,
        None if attention is None else attention.query_heads,
        stats.key.heads,
        stats.key.dim,
        stats.value.dim,
        attention is not None and seen.query is None,
        tuple(reader for reader, other in reading.attention.items() if i in (reader, other.owner)),
        None if attention is None else attention.softcap,
        None if attention is None else names.bias_share(attention.module, stats.key.moments),
        first,
        None if attention is None else attention.logit_mass,
        None if lengths is None else lengths[0],
        None if lengths is None else lengths[1],
        head_figures(stats.key),
        head_figures(stats.value),
    )

"""A diagnosis as text of at most 80 columns."""

from collections.abc import Iterator, Sequence
from shlex import quote
from textwrap import fill

from kvsight.doctor.figures import Figures, LayerFigures
from kvsight.doctor.findings import Finding
from kvsight.doctor.verdict import Recommendation

WIDTH = 80
HEADER = ("layer", "sees", "heads", "dim", "mean", "peak", "K gain", "V gain", "sink")
LEGEND = fill(
    "heads: query and KV heads. mean: its share of key energy. peak: rms of the strongest key channel over "
    "the median one. gain: bits per element that unequal bits can save. sink: the most attention that one "
    "of the first tokens draws. Mean and peak are of the layer's worst head.",
    WIDTH,
)


def rows(figures: Figures) -> list[tuple[str, ...]]:
    """One row per cached layer, as ``HEADER`` says."""
    return [_row(layer) for layer in figures.layers]


def _row(layer: LayerFigures) -> tuple[str, ...]:
    same = layer.key_dim == layer.value_dim
    gains = [sum(head.gain for head in side) / len(side) for side in (layer.keys, layer.values)]
    return (
        str(layer.index),
        "all" if layer.window is None else str(layer.window),
        f"{'?' if layer.query_heads is None else layer.query_heads}:{layer.kv_heads}",
        str(layer.key_dim) if same else f"{layer.key_dim}/{layer.value_dim}",
        f"{max(head.mean_share for head in layer.keys):.0%}",
        f"{max(head.channel_ratio for head in layer.keys):.1f}",
        *(f"{gain:.2f}" for gain in gains),
        "-" if layer.first_mass is None else f"{max(layer.first_mass):.1%}",
    )


def paragraphs(
    findings: Sequence[Finding], recommendation: Recommendation, model: str | None
) -> Iterator[str]:
    """What was found, each with what it means; what was not; the command to go on with."""
    for finding in findings:
        if finding.status == "found":
            yield "\n".join(_finding(finding))
    clear = ", ".join(finding.name for finding in findings if finding.status == "clear")
    if clear:
        yield _wrapped(f"Nothing to note: {clear}.", "", "  ")
    unknown = [finding for finding in findings if finding.status == "unknown"]
    for reason in dict.fromkeys(finding.summary for finding in unknown):
        names = ", ".join(finding.name for finding in unknown if finding.summary == reason)
        yield _wrapped(f"Not measured ({reason}): {names}.", "", "  ")
    yield "\n".join(_recommendation(recommendation, model))


def _finding(finding: Finding) -> Iterator[str]:
    yield _wrapped(f"{finding.name.upper()}: {finding.summary}", "", "  ")
    for line in (finding.evidence, finding.meaning):
        if line:
            yield _wrapped(line[0].upper() + line[1:].removesuffix(".") + ".", "  ", "  ")
    if finding.advice:
        yield _wrapped(f"-> {finding.advice}", "  ", "     ")


def _recommendation(recommendation: Recommendation, model: str | None) -> Iterator[str]:
    yield f"RECOMMENDED: {recommendation.method}"
    sinks = f"--sinks {recommendation.sinks}" if recommendation.sinks else ""
    parts = ("  kvsight fit", model and quote(model), "--bits 3", sinks, "-o plan")
    yield " ".join(part for part in parts if part)
    for reason in recommendation.reasons:
        yield _wrapped(f"- {reason}", "  ", "    ")


def _wrapped(text: str, first: str, rest: str) -> str:
    return fill(text, WIDTH, initial_indent=first, subsequent_indent=rest)

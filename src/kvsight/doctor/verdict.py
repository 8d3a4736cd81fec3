"""All checks in order, and what to fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsight.doctor import contents, structure
from kvsight.doctor.figures import Figures
from kvsight.doctor.findings import Finding, first_tokens

CHECKS: tuple[Callable[[Figures], Finding], ...] = (
    contents.text,
    structure.unpacked,
    structure.queries,
    structure.latents,
    contents.key_mean,
    contents.key_bias,
    contents.outliers,
    contents.tails,
    contents.sinks,
    structure.sink_logits,
    contents.directions,
    structure.softcap,
    structure.qk_norm,
    structure.gqa,
    structure.sliding,
    structure.shared,
    structure.head_dim,
)


@dataclass(frozen=True)
class Recommendation:
    """A method, how many first tokens to keep exact, and why."""

    method: str
    sinks: int
    reasons: tuple[str, ...]


def diagnose(figures: Figures) -> tuple[Finding, ...]:
    """Every check, in the order in which they matter to a plan."""
    return tuple(check(figures) for check in CHECKS)


def recommend(figures: Figures, findings: Sequence[Finding]) -> Recommendation:
    """``sight``, which copes with all that is looked for, and the sinks that were seen."""
    found = {finding.name for finding in findings if finding.status == "found"}
    count = contents.sink_count(figures)
    reasons: list[str] = []
    if "unequal directions" in found:
        k, v = contents.mean_gains(figures)
        reasons.append(f"bits go where attention looks, worth up to {k:.2f} bits (K) and {v:.2f} (V)")
    if found & {"key mean", "key bias", "outlier channels"}:
        reasons.append("keys are centred and each coordinate has its own scale; avoid int per token")
    if found & {"hidden queries", "MLA"}:
        reasons.append("without queries it minimises storage error, as every other method here does")
    if count:
        reasons.append(f"{first_tokens(count)} stay exact: most queries read them")
    return Recommendation("sight", count, tuple(reasons or ("nothing here speaks for another method",)))

"""What each published rule thinks that a configuration costs. The solver is the same for all of them.

Every rule maps the curves of all heads to one damage per configuration. Only their order and ratios
matter; ``measured`` alone is in nats of final KL per token.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvsight.curves import Candidates, Curve, Floats
from kvsight.errors import KVSightError
from kvsight.methods.base import Side
from kvsight.stats import LayerStats, SideStats, shrunk

Damages = list[list[Floats]]
Rule = Callable[[Sequence[Candidates], Sequence[LayerStats]], Damages]


def measured(sides: Sequence[Candidates], layers: Sequence[LayerStats]) -> Damages:
    """The curves themselves: what each head's errors cost at the output."""
    return [[curve.damage for curve in side.curves] for side in sides]


def weight_norm(sides: Sequence[Candidates], layers: Sequence[LayerStats]) -> Damages:
    """‖W‖_F² 4^(-b) with the layer's projection W ("Quantize What Counts", its allocator)."""
    return _by_norm(sides, layers, lambda norm: norm.frobenius)


def weight_norm_spectral(sides: Sequence[Candidates], layers: Sequence[LayerStats]) -> Damages:
    """‖W‖₂² 4^(-b): the same with the spectral norm."""
    return _by_norm(sides, layers, lambda norm: norm.spectral)


def weight_norm_group(sides: Sequence[Candidates], layers: Sequence[LayerStats]) -> Damages:
    """‖W‖_F g for groups of g numbers ("Quantize What Counts", its allocator of group sizes).

    Groups are told by their metadata, which is in inverse proportion to g.
    """

    def damage(sensitivity: float, curve: Curve) -> Floats:
        meta = curve.bits - curve.code_bits
        if not (meta > 0).all():
            raise KVSightError("weight-norm-group chooses group sizes, and this method stores no scales.")
        return sensitivity / meta

    return _by_norm(sides, layers, lambda norm: norm.frobenius, damage)


def ratequant(sides: Sequence[Candidates], layers: Sequence[LayerStats]) -> Damages:
    """w α β^(-b): gradient energy w and α per head, β of the quantiser (RateQuant, arXiv 2605.06675)."""
    curves = [curve for side in sides for curve in side.curves]
    fits = [fit for fit in (curve.beta() for curve in curves) if np.isfinite(fit).all()]
    if not fits:
        raise KVSightError(
            "ratequant needs a method with at least two configurations between 1.5 and 4.5 bits."
        )
    log_beta = float(np.mean([np.log(beta) for _, beta in fits]))
    out: Damages = []
    for side, layer in zip(sides, layers, strict=True):
        stats = layer.side(side.curves[0].side)
        seen = shrunk(stats.cost, stats, 0.0)
        energy = seen.diagonal(dim1=-2, dim2=-1).mean(-1)
        scale = (energy * stats.moments.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)).tolist()
        out.append(
            [
                s * _level(c, log_beta) * np.exp(-log_beta * c.code_bits)
                for s, c in zip(scale, side.curves, strict=True)
            ]
        )
    return out


def rdkv(sides: Sequence[Candidates], layers: Sequence[LayerStats]) -> Damages:
    """Σ_c √(M_cc σ_c²) 2^(-b): linear in the amplitude of the error (RDKV, arXiv 2605.08317, in style).

    For keys the weight is that paper's ‖Q_c‖ ‖K_c‖; values take the output projection in place of Q. The
    paper applies it to channels and tokens of one prompt, here it orders heads and layers.
    """
    out: Damages = []
    for side, layer in zip(sides, layers, strict=True):
        stats = layer.side(side.curves[0].side)
        weights = _amplitude(stats)
        out.append([w * np.exp2(-c.code_bits) for w, c in zip(weights, side.curves, strict=True)])
    return out


RULES: dict[str, Rule] = {
    "measured": measured,
    "weight-norm": weight_norm,
    "weight-norm-spectral": weight_norm_spectral,
    "weight-norm-group": weight_norm_group,
    "ratequant": ratequant,
    "rdkv": rdkv,
}


def _at_bits(sensitivity: float, curve: Curve) -> Floats:
    return sensitivity**2 * np.exp2(-2 * curve.code_bits)


def _by_norm(
    sides: Sequence[Candidates],
    layers: Sequence[LayerStats],
    size: Callable[..., float],
    damage: Callable[[float, Curve], Floats] = _at_bits,
) -> Damages:
    out: Damages = []
    for side, layer in zip(sides, layers, strict=True):
        if layer.norms is None:
            raise KVSightError(
                f"weight-norm needs the key and value projections, and those of layer {layer.index} were "
                "not recognised. Use allocate='measured'."
            )
        of_side: dict[Side, float] = {"k": size(layer.norms[0]), "v": size(layer.norms[1])}
        sensitivity = of_side[side.curves[0].side]
        out.append([damage(sensitivity, curve) for curve in side.curves])
    return out


def _level(curve: Curve, log_beta: float) -> float:
    """α of error ≈ α β^(-b) for a given β, over the rates that β was fitted on."""
    usable = (curve.error > 0) & (curve.code_bits >= 1)
    if not usable.any():
        return 1.0
    return float(np.exp(np.mean(np.log(curve.error[usable]) + log_beta * curve.code_bits[usable])))


def _amplitude(stats: SideStats) -> list[float]:
    metric = shrunk(stats.metric, stats, 0.0).diagonal(dim1=-2, dim2=-1)
    variance = stats.moments.covariance.diagonal(dim1=-2, dim2=-1)
    products: list[float] = (metric * variance).clamp_min(0).sqrt().sum(-1).tolist()
    return products

"""What a model's keys and values look like: plain numbers per layer and KV head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsight.stats import SideStats, shrunk
from kvsight.transforms import karhunen_loeve

Side = Literal["k", "v"]

# a scale shared with a channel this strong leaves log2 6 = 2.6 bits less for the median channel
OUTLIER = 6.0
# gains depend on the rate below which weak coordinates get nothing; plans of 3 bits are the usual ones
BITS = 3.0
# a handful of directions: what a low-rank side code would keep
LEADING = 4
# what sight mixes into metric and covariance
_SHRINK = 0.001
_LEAST = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class HeadFigures:
    """Keys or values of one KV head, as the cache receives them.

    ``mean_share`` is ‖E x‖² / E‖x‖². ``outliers`` are channels whose rms exceeds ``OUTLIER`` times the
    head's median; ``channel_ratio`` is the strongest one's multiple, ``centred_ratio`` the same without
    the mean. ``peak_ratio``: largest |x| of a channel over its rms. ``kurtosis``: excess, median over
    channels. ``norm_variation``: standard deviation of ‖x‖ over its mean. ``leading_share``: part of the
    read metric's trace in its ``LEADING`` directions. ``gain``: bits per element at ``BITS`` that
    water-filling saves over one width for all coordinates; ``metric_gain``: the part of it that only a
    coder that knows the metric has. None where the model hides the metric.
    """

    mean_share: float
    outliers: tuple[int, ...]
    channel_ratio: float
    centred_ratio: float
    peak_ratio: float
    kurtosis: float
    norm_variation: float
    leading_share: float | None
    gain: float
    metric_gain: float | None


@dataclass(frozen=True)
class LayerFigures:
    """One cached layer. What only attention shows (query heads, cap, masses) is None where it is hidden.

    ``latent``: attention reads other keys than the cache stores (MLA). ``readers``: all layers that read
    this one. ``bias_share``: ‖b‖² / E‖k‖² per KV head for the bias b of a separate key projection.
    ``first_mass``: attention that each of the first positions draws, mean over heads and over queries of
    the window's second half; None too where a sliding window has left them behind. ``logit_mass``: what
    the extra logit of a head takes. ``key_length``, ``value_length``: norms of the first positions over
    the median norm.
    """

    index: int
    window: int | None
    query_heads: int | None
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool
    readers: tuple[int, ...]
    softcap: float | None
    bias_share: tuple[float, ...] | None
    first_mass: tuple[float, ...] | None
    logit_mass: float | None
    key_length: tuple[float, ...] | None
    value_length: tuple[float, ...] | None
    keys: tuple[HeadFigures, ...]
    values: tuple[HeadFigures, ...]

    def side(self, side: Side) -> tuple[HeadFigures, ...]:
        return self.keys if side == "k" else self.values


@dataclass(frozen=True)
class Figures:
    """All that was measured: moments on ``tokens`` tokens, attention on windows of ``length`` tokens.

    ``unpacked`` maps layers that keep something else than keys and values to the kind of their cache.
    ``key_bias`` and ``qk_norm`` name the modules that were found; a key bias of None means that no
    projection of keys was recognised.
    """

    model: str
    tokens: int
    length: int
    heard: bool
    layers: tuple[LayerFigures, ...]
    unpacked: Mapping[int, str]
    key_bias: tuple[str, ...] | None
    qk_norm: tuple[str, ...]

    def heads(self, side: Side) -> tuple[HeadFigures, ...]:
        """Every head of every layer."""
        return tuple(head for layer in self.layers for head in layer.side(side))

    def largest(self, side: Side, figure: Callable[[HeadFigures], float]) -> tuple[str, HeadFigures]:
        """Where the figure is largest, in words, and that head."""
        every = [
            (f"layer {layer.index}, head {h}", head)
            for layer in self.layers
            for h, head in enumerate(layer.side(side))
        ]
        return max(every, key=lambda place: figure(place[1]))


def head_figures(side: SideStats) -> tuple[HeadFigures, ...]:
    """The figures of every KV head of one side of a layer."""
    moments = side.moments
    energy = _diagonal(moments.second)
    rms, spread = energy.sqrt(), _diagonal(moments.covariance).clamp_min(0).sqrt()
    share = _over(moments.mean.square().sum(-1), energy.sum(-1))
    peak = _over(moments.peak, rms).amax(-1)
    lengths = side.sample.double().norm(dim=-1)
    variation = _over(lengths.std(-1, correction=0), lengths.mean(-1))
    gain, metric_gain = gains(side)
    leading = None if side.metric is None else _leading(side.metric)
    strong = rms > OUTLIER * _median(rms).unsqueeze(-1)
    tails = kurtosis(side.sample)
    return tuple(
        HeadFigures(
            float(share[h]),
            tuple(strong[h].nonzero().flatten().tolist()),
            float(_over(rms[h].amax(), _median(rms[h]))),
            float(_over(spread[h].amax(), _median(spread[h]))),
            float(peak[h]),
            float(tails[h]),
            float(variation[h]),
            None if leading is None else float(leading[h]),
            float(gain[h]),
            None if metric_gain is None else float(metric_gain[h]),
        )
        for h in range(side.heads)
    )


def gains(side: SideStats) -> tuple[Tensor, Tensor | None]:
    """(gain, metric_gain) per head [H]: ideal Gaussian coders at ``BITS``, error seen through the metric.

    Where every coordinate gets bits, gain = ½ log2 of the product of AM/GM of the eigenvalues of metric
    and covariance, and metric_gain is the metric's factor of it.
    """
    metric = shrunk(side.metric, side, _SHRINK)
    covariance = shrunk(side.moments.covariance, side, _SHRINK)
    seen = water_filled(karhunen_loeve(metric, covariance)[1], BITS).sum(-1).clamp_min(_LEAST)
    alike = _diagonal(metric).sum(-1) * _diagonal(covariance).mean(-1) * 4**-BITS
    gain = 0.5 * torch.log2(alike / seen)
    if side.metric is None:
        return gain, None
    variances, axes = torch.linalg.eigh(covariance)
    blind = (water_filled(variances, BITS) * _diagonal(axes.mT @ metric @ axes)).sum(-1)
    return gain, 0.5 * torch.log2(blind / seen)


def water_filled(variances: Tensor, bits: float) -> Tensor:
    """min(λ, θ) [..., d]: distortions of the ideal coder at ``bits`` each (Cover & Thomas, §10.3.3)."""
    falling = variances.clamp_min(_LEAST).log2().sort(-1, descending=True).values
    coded = torch.arange(1, falling.shape[-1] + 1, dtype=torch.float64)
    # log2 θ if only the n largest are coded; the right n is the last whose variance reaches its θ
    level = falling.cumsum(-1) / coded - 2 * bits * falling.shape[-1] / coded
    last = (falling >= level).sum(-1, keepdim=True) - 1
    return torch.minimum(variances, 2 ** level.gather(-1, last))


def kurtosis(sample: Tensor) -> Tensor:
    """Excess kurtosis [H] of x [H, n, d], median over channels; 0 for a Gaussian and for constants."""
    x = sample.double()
    x = x - x.mean(dim=1, keepdim=True)
    variance = x.square().mean(dim=1)
    fourth = torch.where(variance > 0, _over(x.pow(4).mean(dim=1), variance.square()), 3.0)
    return _median(fourth) - 3


def _leading(metric: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(metric).clamp_min(0)
    return _over(values[..., -LEADING:].sum(-1), values.sum(-1))


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _median(x: Tensor) -> Tensor:
    return x.quantile(0.5, dim=-1)


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, finite: where the whole is nothing, 0 for no part and a very large number for some."""
    return part / whole.clamp_min(torch.finfo(torch.float32).tiny)

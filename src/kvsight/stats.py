"""Mergeable summaries of what attention saw: counts, means, second moments, ranges, read metrics."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.projections import Norms
from kvsight.rope import Rope


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over ``count`` vectors per head: first [H, d], outer products [H, d, d], largest |x| [H, d].

    Sums are fp64, so merging is exact to rounding and its order does not matter.
    """

    count: int
    total: Tensor
    outer: Tensor
    peak: Tensor

    @classmethod
    def zero(cls, heads: int, dim: int) -> Self:
        return cls(
            0,
            torch.zeros(heads, dim, dtype=torch.float64),
            torch.zeros(heads, dim, dim, dtype=torch.float64),
            torch.zeros(heads, dim, dtype=torch.float64),
        )

    def add(self, x: Tensor) -> Self:
        """Count the vectors of x [H, n, d]."""
        x = x.detach().double()
        if not bool(torch.isfinite(x).all()):
            raise KVSightError(
                "the model produced NaN or inf in attention; statistics need finite numbers. "
                "Check the weights, or load the model in bfloat16 or float32."
            )
        return replace(
            self,
            count=self.count + x.shape[-2],
            total=self.total + x.sum(dim=-2).cpu(),
            outer=self.outer + (x.mT @ x).cpu(),
            peak=torch.maximum(self.peak, x.abs().amax(dim=-2).cpu()),
        )

    def merge(self, other: "Moments") -> Self:
        if self.total.shape != other.total.shape:
            raise KVSightError(
                f"cannot merge moments of shapes {tuple(self.total.shape)} and "
                f"{tuple(other.total.shape)}: they come from different models."
            )
        return replace(
            self,
            count=self.count + other.count,
            total=self.total + other.total,
            outer=self.outer + other.outer,
            peak=torch.maximum(self.peak, other.peak),
        )

    @property
    def mean(self) -> Tensor:
        """[H, d]."""
        return self.total / self.count

    @property
    def second(self) -> Tensor:
        """Uncentred second moment E[x xᵀ], [H, d, d]."""
        return self.outer / self.count

    @property
    def covariance(self) -> Tensor:
        """Cov(x), [H, d, d]."""
        mean = self.mean
        return self.second - mean.unsqueeze(-1) * mean.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class SideStats:
    """Keys or values of one layer.

    ``metric`` [H, d, d] says what an error e costs, eᵀ·metric·e: E[q qᵀ] of the queries that share the
    KV head for keys, Σ W_Oᵀ W_O of those heads for values. None where the model hides it.
    ``sample`` [H, n, d] holds a bounded random sample of the vectors themselves.
    ``damage`` [H, d, d] says the same in nats of final KL per token (``damage_metric``); ``salience``
    [H, n] is how strongly the output depends on each sampled vector. None where gradients were not read.
    ``passages`` [H, m, d] are runs of neighbouring tokens, for codecs of token blocks.
    ``read`` are moments of what attention read, Σ_j α_j v_j with α averaged over the query heads that share
    the KV head; ``focus`` are those of a few tokens, weighed by exp(-½ entropy). Of values, where queries
    were seen.
    ``rope`` is how keys turn with the position: None where they do not, or where ``rope_unknown`` says why
    it is not known. ``places`` [n] and ``passage_places`` [m] are the indices of the sampled tokens.
    ``query`` are the moments of the queries that share the KV head, for keys. ``mass`` [H, n] is the
    ``expected_mass`` of each sampled token, for values. None where queries were not seen.
    """

    moments: Moments
    metric: Tensor | None
    sample: Tensor
    damage: Tensor | None = None
    salience: Tensor | None = None
    passages: Tensor | None = None
    read: Moments | None = None
    focus: Moments | None = None
    rope: Rope | None = None
    rope_unknown: str | None = None
    places: Tensor | None = None
    passage_places: Tensor | None = None
    query: Moments | None = None
    mass: Tensor | None = None

    @property
    def cost(self) -> Tensor | None:
        """What an error costs: ``damage`` where gradients were read, else the read metric."""
        return self.metric if self.damage is None else self.damage

    @property
    def heads(self) -> int:
        return int(self.moments.total.shape[0])

    @property
    def dim(self) -> int:
        return int(self.moments.total.shape[1])


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One cached layer: its index in the cache, its sliding window (None = full attention), two sides.

    ``norms`` are those of W_K and W_V, where they were recognised.
    """

    index: int
    window: int | None
    key: SideStats
    value: SideStats
    norms: tuple[Norms, Norms] | None = None

    def side(self, side: Literal["k", "v"]) -> SideStats:
        return self.key if side == "k" else self.value


@dataclass(frozen=True, eq=False)
class Stats:
    """All cached layers, and how many tokens were seen."""

    layers: tuple[LayerStats, ...]
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def weighed(self) -> bool:
        """Whether damage is known everywhere, so that layers and sides have one unit."""
        return all(s.damage is not None for layer in self.layers for s in (layer.key, layer.value))


# places that stand for all of them where a matrix is turned at each
_PLACES = 128


def before_rope(side: SideStats) -> SideStats:
    """The same keys before their rotation; as they are where nothing turns.

    Moments are those of the sample, since those of turned keys do not say. A matrix M that says what an
    error e costs becomes the mean of R(j)ᵀ M R(j) over the places j: what e costs when it is turned forth.
    """
    if side.rope_unknown is not None:
        raise KVSightError(
            f"keys before RoPE are wanted, and the model's rotation is not known: {side.rope_unknown}. "
            "Choose a method that codes keys as they are cached."
        )
    rope, places = side.rope, side.places
    if rope is None:
        return side
    assert places is not None

    def still(x: Tensor, at: Tensor | None) -> Tensor:
        assert rope is not None and at is not None
        return rope.turn(x.double(), -at).float()

    def turned(matrix: Tensor | None) -> Tensor | None:
        if matrix is None:
            return None
        return rope.turn_matrix(matrix, -places[:: -(-len(places) // _PLACES)])

    sample = still(side.sample, places)
    return replace(
        side,
        moments=Moments.zero(side.heads, side.dim).add(sample),
        metric=turned(side.metric),
        sample=sample,
        damage=turned(side.damage),
        passages=None if side.passages is None else still(side.passages, side.passage_places),
        rope=None,
        query=None,
    )


# as many tokens of gradients as the read metric is worth beside them (docs/results.md)
_PRIOR_TOKENS = 4096


def damage_metric(gradient: Moments, side: SideStats) -> Tensor:
    """What an error costs at the output, [H, d, d] in nats: ½ E[g gᵀ], shrunk to the read metric.

    With g the gradient of log p(y), y drawn from the model, E[g gᵀ] is the Fisher information, so errors
    e_j that are independent between tokens raise the final KL by ½ E[(g_jᵀ e_j)²] per token to second
    order. Few gradients make a noisy matrix; the read metric, scaled to the same damage for errors
    shaped as the vectors themselves, counts as ``_PRIOR_TOKENS`` of them.
    """
    fisher = gradient.second / 2
    prior = shrunk(side.metric, side, 0.0)
    covariance = side.moments.covariance
    tiny = torch.finfo(torch.float64).tiny
    level = (fisher * covariance).sum((-1, -2)) / (prior * covariance).sum((-1, -2)).clamp_min(tiny)
    weight = _PRIOR_TOKENS / (_PRIOR_TOKENS + gradient.count)
    return (1 - weight) * fisher + weight * level.clamp_min(0)[:, None, None] * prior


def expected_mass(keys: Tensor, query: Moments) -> Tensor:
    """log E exp(q·k / √d) over Gaussian queries of these moments: keys [H, n, d] to [H, n], in nats.

    μᵀk/√d + ½ kᵀ Cov(q) k / d: the attention that a key draws, before softmax divides by that of others.
    """
    k = keys.double()
    dim = k.shape[-1]
    spread = ((k @ query.covariance) * k).sum(-1) / (2 * dim)
    mass: Tensor = (k @ query.mean.unsqueeze(-1)).squeeze(-1) / dim**0.5 + spread
    return mass


def shrunk(metric: Tensor | None, side: SideStats, strength: float) -> Tensor:
    """(1 - s)·M + s·(tr M / d)·I, fp64: positive definite however short the calibration was.

    Without a metric it is the identity, which makes every method fall back to storage-space error.
    """
    eye = torch.eye(side.dim, dtype=torch.float64).expand(side.heads, -1, -1)
    if metric is None:
        return eye.clone()
    # a head that is always zero keeps a level whose root and inverse root are ordinary fp32 numbers
    level = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - strength) * metric + strength * level[:, None, None] * eye


# statistics of d coordinates want this many tokens per coordinate (docs/results.md)
_TOKENS_PER_COORDINATE = 64


def doubts(stats: Stats) -> tuple[str, ...]:
    """What makes the statistics less than trustworthy, in sentences with numbers."""
    dim = max(max(layer.key.dim, layer.value.dim) for layer in stats.layers)
    wanted = _TOKENS_PER_COORDINATE * dim
    if stats.tokens >= wanted:
        return ()
    return (
        f"calibration is short: {stats.tokens:,} tokens for covariances of {dim} coordinates; "
        f"{wanted:,} or more are wanted, and the plan may cost noticeably more than it could.",
    )

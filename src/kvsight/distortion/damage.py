"""All that attention sees of coded keys and values, in one pass over a trace of any length."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from kvsight.distortion import checks, rows
from kvsight.errors import KVSightError

# scores held at a time; a dozen fp64 tensors of this size exist at once
_SCORES = 1 << 21


@dataclass(frozen=True, eq=False)
class Reference:
    """One layer's exact attention in one sequence: H KV heads, each shared by G query heads.

    Shapes: queries [H, G, n, d], keys [H, T, d], values [H, T, d_v]. A query at position t sees keys 0..t,
    with a window only the last ``window`` of them. ``positions`` [n] are integers in 0..T-1; None means the
    last n. ``metric`` [H, G, d_v, d_v] is W_OᵀW_O of each query head (``output_metric``). ``scaling`` None
    is 1/√d; ``softcap`` as in ``scores``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    metric: Tensor | None = None
    positions: Tensor | None = None
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.rank("queries", self.queries, "H, G, n, d")
        checks.rank("keys", self.keys, "H, T, d")
        checks.rank("values", self.values, "H, T, d_v")
        heads, group, count, dim = self.queries.shape
        tokens, width = self.values.shape[1:]
        checks.shape(
            "keys", self.keys, (heads, tokens, dim), "heads and head_dim of queries, tokens of values"
        )
        checks.shape("values", self.values, (heads, tokens, width), "heads of queries")
        for name in ("queries", "keys", "values"):
            checks.finite(name, getattr(self, name))
        if self.metric is not None:
            wanted = (heads, group, width, width)
            checks.shape("output metric", self.metric, wanted, "one matrix for each query head")
            checks.finite("output metric", self.metric)
        if self.positions is None and count > tokens:
            raise KVSightError(f"{count} queries cannot be the last of {tokens} tokens; pass positions.")
        if self.positions is not None:
            self._check_positions(self.positions, count, tokens)
        if self.window is not None and self.window < 1:
            raise KVSightError(
                f"a window holds at least 1 token; got {self.window}. None is full attention."
            )
        for name in ("scaling", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise KVSightError(
                    f"{name} must be above 0 and finite; got {value}. Leave it out if unknown."
                )

    @staticmethod
    def _check_positions(positions: Tensor, count: int, tokens: int) -> None:
        checks.shape("positions", positions, (count,), "one for each query")
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise KVSightError(f"positions must be integers; got {positions.dtype}. Cast them to int64.")
        if int(positions.min()) < 0 or int(positions.max()) >= tokens:
            found = f"{int(positions.min())}..{int(positions.max())}"
            raise KVSightError(
                f"positions must be in 0..{tokens - 1}; got {found}. Count from the first key passed."
            )

    @property
    def where(self) -> Tensor:
        """The position of each query, [n]."""
        if self.positions is not None:
            return self.positions.to(self.keys.device)
        tokens, count = self.keys.shape[1], self.queries.shape[2]
        return torch.arange(tokens - count, tokens, device=self.keys.device)


@dataclass(frozen=True, eq=False)
class AttentionDamage:
    """Means over ``rows`` rows (query heads of the group times queries) per KV head; fp64 [H] on the CPU.

    score: ``score_mse``. fisher, kl, l1: of the same names in ``rows``. output: ``output_mse``.
    projected: ``projected_error``, a mean over queries of the sum over the group; None without a metric.
    value: ``value_distortion`` with the exact p. flips: share of rows that flip. clear: share of rows whose
    score gap is above ``gap``. clear_flips: share of all rows that are clear and flip.
    """

    rows: int
    gap: float
    score: Tensor
    fisher: Tensor
    kl: Tensor
    l1: Tensor
    output: Tensor
    projected: Tensor | None
    value: Tensor
    flips: Tensor
    clear: Tensor
    clear_flips: Tensor

    @property
    def fisher_rmse(self) -> Tensor:
        """√ of the mean I, [H]."""
        return self.fisher.sqrt()

    @property
    def clear_flip_rate(self) -> Tensor:
        """Share of the clear rows that flip, [H]; NaN where no row is clear."""
        return self.clear_flips / self.clear

    def merge(self, other: "AttentionDamage") -> Self:
        """Both windows as one: each mean is weighted by its rows."""
        if self.kl.shape != other.kl.shape or self.gap != other.gap:
            raise KVSightError(
                f"cannot merge damage of {len(self.kl)} heads at gap {self.gap:g} with that of "
                f"{len(other.kl)} heads at gap {other.gap:g}; both must agree. Merge windows of one layer."
            )
        if (self.projected is None) != (other.projected is None):
            raise KVSightError(
                "cannot merge damage with and without an output metric. Pass it for all windows."
            )
        total = self.rows + other.rows
        means = {
            field.name: (mine * self.rows + getattr(other, field.name) * other.rows) / total
            for field in fields(self)
            if isinstance(mine := getattr(self, field.name), Tensor)
        }
        return replace(self, rows=total, **means)


def attention_damage(
    reference: Reference,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    *,
    gap: float = 0.05,
    chunk: int | None = None,
) -> AttentionDamage:
    """What attention loses when it reads these keys and values, decoded, in place of the exact ones.

    Args:
        keys, values: the reference's shapes; None keeps that side exact (output error of keys alone is
            measured with exact values, as in HeadQ).
        gap: a row is clear when its exact score gap is above this (Salfati, arXiv 2604.11501).
        chunk: queries at a time; memory is a dozen fp64 tensors of G · chunk · T. None bounds it for any T.
    """
    keys = _coded("keys", keys, reference.keys)
    values = _coded("values", values, reference.values)
    heads, group, count, _ = reference.queries.shape
    if chunk is None:
        chunk = max(1, _SCORES // (group * keys.shape[1]))
    if chunk < 1:
        raise KVSightError(f"a chunk holds at least 1 query; got {chunk}. None picks a size.")
    if not gap >= 0:
        raise KVSightError(f"gap is a score difference of at least 0; got {gap}. The usual one is 0.05.")
    sums: dict[str, Tensor] = {}
    for head in range(heads):
        for part in _head(reference, head, keys[head], values[head], gap, chunk):
            for name, row in part.items():
                sums.setdefault(name, torch.zeros(heads, dtype=torch.float64))[head] += row.sum().cpu()
    projected = sums.pop("projected", None)
    rest = {name: total / (group * count) for name, total in sums.items()}
    return AttentionDamage(
        rows=group * count, gap=gap, projected=None if projected is None else projected / count, **rest
    )


def _coded(name: str, coded: Tensor | None, exact: Tensor) -> Tensor:
    if coded is None:
        return exact
    checks.shape(f"coded {name}", coded, tuple(exact.shape), f"that of the exact {name}")
    checks.finite(f"coded {name}", coded)
    return coded


def _head(
    reference: Reference, head: int, coded_keys: Tensor, coded_values: Tensor, gap: float, chunk: int
) -> Iterator[dict[str, Tensor]]:
    """Rows of every measure, [G, m] for m queries at a time; fp64 copies are of one head only."""
    queries = reference.queries[head].detach()
    keys, coded_keys = (x.detach().double() for x in (reference.keys[head], coded_keys))
    values, coded_values = (x.detach().double() for x in (reference.values[head], coded_values))
    for start in range(0, queries.shape[1], chunk):
        where = reference.where[start : start + chunk]
        seen, hidden = _seen(where, reference.window)
        q = queries[:, start : start + chunk]
        s, coded_s = (
            rows.scores(q, k[seen], reference.scaling, reference.softcap).masked_fill(hidden, -torch.inf)
            for k in (keys, coded_keys)
        )
        ds = rows.score_error(s, coded_s)
        log_p, coded_log_p = s.log_softmax(dim=-1), coded_s.log_softmax(dim=-1)
        p, coded_p = log_p.exp(), coded_log_p.exp()
        outputs, coded_outputs = p @ values[seen], coded_p @ coded_values[seen]
        clear, flips = rows.score_gap(s) > gap, rows.route_flips(s, coded_s)
        found = {
            "score": rows.score_mse(ds, (~hidden).expand_as(ds)),
            "fisher": rows.fisher(p, ds),
            "kl": rows.attention_kl(log_p, coded_log_p),
            "l1": rows.l1_drift(p, coded_p),
            "output": rows.output_mse(outputs, coded_outputs),
            "value": rows.value_distortion(p, values[seen], coded_values[seen]),
            "flips": flips.double(),
            "clear": clear.double(),
            "clear_flips": (clear & flips).double(),
        }
        if reference.metric is not None:
            found["projected"] = rows.projected_error(
                outputs, coded_outputs, reference.metric[head].detach()
            )
        yield found


def _seen(where: Tensor, window: int | None) -> tuple[slice, Tensor]:
    """The slice of keys that some query at ``where`` [m] sees, and which of those are hidden [m, keys]."""
    stop = int(where.max()) + 1
    start = 0 if window is None else max(0, int(where.min()) - window + 1)
    column = torch.arange(start, stop, device=where.device)
    hidden = column > where.unsqueeze(-1)
    if window is not None:
        hidden = hidden | (column <= where.unsqueeze(-1) - window)
    return slice(start, stop), hidden

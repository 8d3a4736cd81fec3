"""Laws of methods, and statistics to fit them to."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kvsight.codec import Placement
from kvsight.errors import KVSightError
from kvsight.formats import Dense
from kvsight.methods.base import Budget, Method, Side
from kvsight.retention import Retention
from kvsight.stats import Moments, SideStats, expected_mass
from kvsight.testing.codecs import check_codec, check_compresses
from kvsight.testing.laws import generator, hold, refused

# identity meets the first, and every method must
_HIGHEST = 16.0
_BUDGETS = (_HIGHEST, 8.5, 4.5, 3.0, 2.0)
_SIDES: tuple[Side, ...] = ("k", "v")


def random_stats(heads: int, dim: int, *, tokens: int = 1024, seed: int = 0) -> SideStats:
    """Statistics of Gaussian vectors with means, unequal variances and an unequal read metric."""
    draw = generator(seed)
    mix, read = torch.randn(2, heads, dim, dim, generator=draw) / dim**0.5
    falling = torch.logspace(0, -2, dim)
    mean = torch.randn(heads, 1, dim, generator=draw)
    x = (torch.randn(heads, tokens, dim, generator=draw) * falling) @ mix + mean
    metric = (read.mT * falling) @ read
    sample = x[:, : min(tokens, 256)]
    query = Moments.zero(heads, dim).add(torch.randn(heads, tokens, dim, generator=draw) @ read + mean)
    mass = expected_mass(sample, query)
    return SideStats(Moments.zero(heads, dim).add(x), metric.double(), sample, query=query, mass=mass)


def check_method(
    method: Method,
    *,
    heads: int = 3,
    dim: int = 64,
    seed: int = 0,
    sides: Sequence[Side] = _SIDES,
    budgets: Sequence[float] = _BUDGETS,
) -> None:
    """Budgets kept, heads covered once, fits repeatable, more bits never worse, all codec laws.

    ``budgets`` in bits fall; those below what the method can meet are left out.
    """
    stats = random_stats(heads, dim, seed=seed)
    for side in sides:
        met: list[tuple[float, tuple[Placement, ...]]] = []
        errors: list[float] = []
        for bits in budgets:
            try:
                placements = _build(method, side, stats, bits)
            except KVSightError:
                hold("budget", bits < _HIGHEST, f"{method.name} cannot even meet {bits} bits")
                break
            _placement_laws(method, placements, stats, bits)
            for placement in placements:
                check_codec(placement.codec, seed=seed)
                if not isinstance(placement.codec.format, Dense):
                    check_compresses(placement.codec, seed=seed)
            met.append((bits, placements))
            errors.append(_error(placements, stats.sample))
        # the fewest bits leave the most to choose
        for bits, placements in met[-1:]:
            again = _build(method, side, stats, bits)
            hold("repeatable", _equal(placements, again), f"{method.name}: two fits differ")
        falls = all(a <= b for a, b in pairwise(errors))
        hold("more bits, less error", falls, f"{method.name} {side} at {budgets}: {errors}")
        refused(partial(_build, method, side, stats, 0.01), "0.01 bits", method.name)
        _odd_stats_laws(method, side, stats)
    unknown = {"no such option": 1}
    refused(partial(method.with_defaults, unknown), "an unknown option", "no such option")


def _build(method: Method, side: Side, stats: SideStats, bits: float) -> tuple[Placement, ...]:
    """Placements as a plan file gives them back."""
    budget = Budget(bits, 1024, Retention(0, 0), torch.bfloat16)
    placed = method.build(side, stats, budget, method.with_defaults({}))
    return tuple(replace(p, codec=replace(p.codec, transform=p.codec.transform.stored())) for p in placed)


def _placement_laws(
    method: Method, placements: tuple[Placement, ...], stats: SideStats, bits: float
) -> None:
    covered = sorted(head for placement in placements for head in placement.heads)
    hold("heads", covered == list(range(stats.heads)), f"{method.name} covers heads {covered}")
    spent = 0.0
    budget = Budget(bits, 1024, Retention(0, 0), torch.bfloat16)
    for placement in placements:
        codec, count = placement.codec, len(placement.heads)
        hold("heads", codec.heads in (None, count), f"a codec of {codec.heads} heads serves {count}")
        hold("name", codec.name == method.name, f"{method.name} makes codecs named {codec.name}")
        spent += count * budget.cost(codec.format, codec.dim, placement.hold) / stats.heads
    hold("budget", spent <= bits + 1e-9, f"{method.name} stores {spent} bits of {bits}")
    least = min(bits, 8.0) - 8 / (stats.heads * stats.dim)
    full = method.rows is None or spent >= least - 1e-9
    hold("budget", full, f"{method.name} takes any row size but stores only {spent} bits of {bits}")


def _equal(a: tuple[Placement, ...], b: tuple[Placement, ...]) -> bool:
    def parts(placement: Placement) -> list[Tensor]:
        return list(placement.codec.tensors.values())

    return len(a) == len(b) and all(
        p.heads == r.heads
        and p.codec.format == r.codec.format
        and all(map(torch.equal, parts(p), parts(r)))
        for p, r in zip(a, b, strict=True)
    )


def _error(placements: tuple[Placement, ...], sample: Tensor) -> float:
    """Squared error over whole blocks of the sample, which is repeated where it is too short."""
    total = 0.0
    for placement in placements:
        codec, block = placement.codec, placement.codec.format.block
        x = sample[list(placement.heads)]
        x = x.repeat(1, -(-block // x.shape[1]), 1)
        x = x[:, : x.shape[1] // block * block]
        error = codec.decode(codec.encode(x)) - x
        total += float(error.double().square().sum())
    return total


def _odd_stats_laws(method: Method, side: Side, stats: SideStats) -> None:
    """A head that never changes, no metric, fewer tokens than dimensions: still finite."""
    constant = torch.cat((torch.zeros_like(stats.sample[:1]), stats.sample[1:]))
    odd = {
        "a constant head": (constant, stats.metric),
        "no metric": (stats.sample, None),
        "three tokens": (stats.sample[:, :3], stats.metric),
    }
    for name, (x, metric) in odd.items():
        moments = Moments.zero(stats.heads, stats.dim).add(x)
        placements = _build(method, side, SideStats(moments, metric, x), _HIGHEST)
        finite = _error(placements, x) < torch.inf
        hold("odd statistics", finite, f"{method.name} fitted to {name} decodes to NaN or inf")

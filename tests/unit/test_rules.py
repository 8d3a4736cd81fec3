"""Published allocation rules, against their formulas and against the papers' own ways to solve them."""

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvsight.allocate import Unit, allocate
from kvsight.curves import Candidates, Curve
from kvsight.errors import KVSightError
from kvsight.projections import Norms, projection_norms
from kvsight.rules import RULES
from kvsight.stats import LayerStats
from kvsight.testing import random_stats

HEADS, DIM = 2, 8
INTEGERS = np.arange(1.0, 9.0)


def side_of(layer, side, code_bits, alphas, beta=4.0, meta=0.0):
    """Curves of α β^(-b), one head for each α."""
    curves = tuple(
        Curve(
            layer,
            side,
            head,
            code_bits + meta,
            code_bits,
            np.full(len(code_bits), 7.0 + head),
            alpha * beta**-code_bits,
            ("row",) * len(code_bits),
        )
        for head, alpha in enumerate(alphas)
    )
    return Candidates(curves, lambda budget: np.array([]), lambda choice: ())


def layer_of(index, norms=None, seed=0):
    key, value = (random_stats(HEADS, DIM, tokens=200, seed=2 * seed + i) for i in range(2))
    return LayerStats(index, None, key, value, norms)


class Attention(nn.Module):
    def __init__(self, **weights):
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight)
            self.add_module(name, linear)


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("queries", "heads", "dims"), [(4, 4, (8, 8)), (4, 2, (8, 8)), (6, 2, (8, 4))])
def test_norms_are_those_of_the_matrices(queries, heads, dims):
    key, value = drawn(heads * dims[0], 24, seed=1), drawn(heads * dims[1], 24, seed=2)
    query = drawn(queries * dims[0], 24, seed=3)
    output = drawn(24, queries * dims[1], seed=4)
    separate = Attention(q_proj=query, k_proj=key, v_proj=value, o_proj=output)
    fused = Attention(qkv_proj=torch.cat([query, key, value]), o_proj=output)
    for module in (separate, fused):
        found = projection_norms(module, queries, heads, dims)
        for norms, weight in zip(found, (key, value), strict=True):
            assert norms.frobenius == pytest.approx(float(torch.linalg.matrix_norm(weight)), rel=1e-5)
            wanted = float(torch.linalg.matrix_norm(weight, 2))
            assert norms.spectral == pytest.approx(wanted, rel=1e-5)


def test_interleaved_projections_are_taken_apart_head_by_head():
    query, key, value = (drawn(3, 8, 24, seed=seed) for seed in range(3))
    fused = Attention(query_key_value=torch.cat([query, key, value], dim=1).flatten(0, 1))
    found = projection_norms(fused, 3, 3, (8, 8))
    assert found[0].frobenius == pytest.approx(float(key.norm()), rel=1e-5)
    assert found[1].spectral == pytest.approx(
        float(torch.linalg.matrix_norm(value.flatten(0, 1), 2)), rel=1e-5
    )


@pytest.mark.parametrize(
    "weights",
    [
        {"k_proj": drawn(16, 24, seed=1)},
        {"k_proj": drawn(16, 24, seed=1), "v_proj": drawn(24, 24, seed=2)},
        {"kv_a_proj": drawn(16, 24, seed=1), "kv_b_proj": drawn(16, 24, seed=2)},
        {"qkv_proj": drawn(47, 24, seed=1)},
        {"query_key_value": drawn(64, 24, seed=1)},
    ],
    ids=lambda weights: "-".join(weights),
)
def test_other_projections_are_not_guessed_at(weights):
    assert projection_norms(Attention(**weights), 4, 2, (8, 8)) is None


@pytest.mark.parametrize(("name", "field"), [("weight-norm", 0), ("weight-norm-spectral", 1)])
def test_weight_norms_fall_by_four_per_bit(name, field):
    norms = (Norms(3.0, 2.0), Norms(5.0, 1.5))
    layers = [layer_of(0, norms), layer_of(0, norms)]
    sides = [side_of(0, side, INTEGERS, (1.0, 9.0), meta=0.25) for side in ("k", "v")]
    out = RULES[name](sides, layers)
    for side, own in zip(out, ((3.0, 2.0), (5.0, 1.5)), strict=True):
        # every head of a layer counts the same, and metadata carries no precision
        for damage in side:
            assert damage.tolist() == pytest.approx([own[field] ** 2 * 4.0**-b for b in range(1, 9)])


def test_group_sizes_are_inverse_to_the_root_of_the_weight():
    """min Σ c g under Σ 1/g fixed has g ∝ 1/√c: the damage of a group is c g, and Σ bytes ∝ Σ 1/g."""
    groups = np.array([128.0, 64.0, 32.0])
    layers = 2 * [layer_of(0, (Norms(1.0, 1.0), Norms(4.0, 1.0)))]
    sides = [side_of(0, side, np.full(3, 4.0), (1.0,), meta=32 / groups) for side in ("k", "v")]
    ((keys,), (values,)) = RULES["weight-norm-group"](sides, layers)
    assert keys.tolist() == pytest.approx((groups / 32).tolist())
    assert values.tolist() == pytest.approx((groups / 8).tolist())
    cost = np.array([1, 2, 4])
    chosen = allocate([Unit(cost, keys), Unit(cost, values)], 6).choice
    # a norm of four makes groups of half the size
    assert groups[list(chosen)].tolist() == [64.0, 32.0]
    bare = [side_of(0, "k", INTEGERS, (1.0,))]
    with pytest.raises(KVSightError, match="chooses group sizes, and this method stores no scales"):
        RULES["weight-norm-group"](bare, layers[:1])


def test_weight_norm_needs_projections_that_are_known():
    layers = [layer_of(0, (Norms(1.0, 1.0), Norms(1.0, 1.0))), layer_of(5)]
    sides = [side_of(0, "k", INTEGERS, (1.0, 1.0)), side_of(5, "k", INTEGERS, (1.0, 1.0))]
    for name in ("weight-norm", "weight-norm-spectral"):
        with pytest.raises(KVSightError, match=r"layer 5 were not recognised. Use allocate='measured'"):
            RULES[name](sides, layers)


def greedy(damages, bits):
    """The paper's way: one bit at a time to the unit whose error falls most."""
    at = [0] * len(damages)
    gains = [(d[1] - d[0], u) for u, d in enumerate(damages)]
    heapq.heapify(gains)
    for _ in range(bits):
        if not gains:
            break
        _, u = heapq.heappop(gains)
        at[u] += 1
        if at[u] + 1 < len(damages[u]):
            heapq.heappush(gains, (damages[u][at[u] + 1] - damages[u][at[u]], u))
    return sum(d[i] for d, i in zip(damages, at, strict=True))


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=6),
    st.integers(0, 90),
)
def test_the_solver_finds_what_the_greedy_allocation_of_bits_finds(sizes, bits):
    layers = [layer_of(0, (Norms(*sorted(s, reverse=True)), Norms(*s))) for s in sizes]
    sides = [side_of(i, "kv"[i % 2], INTEGERS, (1.0, 1.0)) for i in range(len(sizes))]
    damages = [d for side in RULES["weight-norm"](sides, layers) for d in side]
    units = [Unit(128 * np.arange(1, 9), d) for d in damages]
    found = allocate(units, 128 * (len(units) + bits))
    assert found.damage == pytest.approx(greedy(damages, bits), rel=1e-9)


def weights_of(stats):
    """tr(G)/d · tr(C) of each head: gradient energy times the energy of the vectors."""
    metric = stats.metric if stats.damage is None else stats.damage
    return [
        float(torch.trace(g) / DIM * torch.trace(c))
        for g, c in zip(metric, stats.moments.covariance, strict=True)
    ]


@pytest.mark.parametrize("beta", [3.5, 5.0])
@pytest.mark.parametrize("with_damage", [False, True])
def test_ratequant_is_its_closed_form_for_continuous_bits(beta, with_damage):
    layers = [layer_of(i, seed=i) for i in range(3)]
    if with_damage:
        layers = [
            replace(x, key=replace(x.key, damage=(i + 1) * x.key.metric)) for i, x in enumerate(layers)
        ]
    step = 1 / 16
    rates = np.arange(0.5, 8 + step, step)
    alphas = [(1.0, 2.5), (0.7, 1.3), (1.1, 0.4)]
    sides = [side_of(i, "k", rates, a, beta) for i, a in enumerate(alphas)]
    damages = [d for side in RULES["ratequant"](sides, layers) for d in side]
    w = [
        v * a
        for x, own in zip(layers, alphas, strict=True)
        for v, a in zip(weights_of(x.key), own, strict=True)
    ]
    for damage, weight in zip(damages, w, strict=True):
        assert damage == pytest.approx(weight * beta**-rates, rel=1e-6)
    mean = 4.0
    units = [Unit(np.arange(8, len(rates) + 8), damage) for damage in damages]
    found = allocate(units, round(mean / step) * len(units))
    log_w = np.log(w)
    wanted = mean + (log_w - log_w.mean()) / math.log(beta)
    assert wanted.min() > 0.5 and wanted.max() < 8
    assert rates[list(found.choice)] == pytest.approx(wanted, abs=step)


def test_ratequant_fits_one_beta_to_all_heads():
    layers = [layer_of(0), layer_of(1)]
    sides = [side_of(0, "k", INTEGERS, (1.0, 1.0), 3.0), side_of(1, "v", INTEGERS, (1.0, 1.0), 5.0)]
    for side in RULES["ratequant"](sides, layers):
        for damage in side:
            # the mean of the exponents
            assert damage[:-1] / damage[1:] == pytest.approx(math.sqrt(15), rel=1e-6)


def test_ratequant_needs_two_rates_to_fit_to():
    sides = [side_of(0, "k", np.array([1.0, 6.0]), (1.0, 1.0))]
    with pytest.raises(KVSightError, match=r"at least two configurations between 1.5 and 4.5 bits"):
        RULES["ratequant"](sides, [layer_of(0)])


@pytest.mark.parametrize("side", ["k", "v"])
def test_rdkv_is_linear_in_the_amplitude_of_the_error(side):
    layer = layer_of(0)
    stats = layer.side(side)
    rates = np.array([1.0, 2.0, 3.5])
    (damages,) = RULES["rdkv"]([side_of(0, side, rates, (1.0, 4.0), meta=0.5)], [layer])
    for head, damage in enumerate(damages):
        metric = stats.metric[head].numpy()
        covariance = stats.moments.covariance[head].numpy()
        weight = sum(math.sqrt(metric[c, c] * covariance[c, c]) for c in range(DIM))
        assert damage == pytest.approx(weight * 2.0**-rates, rel=1e-9)


def test_rdkv_without_a_metric_weighs_standard_deviations():
    layer = layer_of(0)
    layer = replace(layer, key=replace(layer.key, metric=None))
    (damages,) = RULES["rdkv"]([side_of(0, "k", np.array([0.0, 1.0]), (1.0, 1.0))], [layer])
    deviations = layer.key.moments.covariance.diagonal(dim1=-2, dim2=-1).sqrt().sum(-1)
    assert [d[0] for d in damages] == pytest.approx(deviations.tolist(), rel=1e-9)


def test_measured_takes_the_curves_as_they_are():
    sides = [side_of(0, "k", INTEGERS, (1.0, 1.0)), side_of(0, "v", INTEGERS, (1.0, 1.0))]
    out = RULES["measured"](sides, [layer_of(0)] * 2)
    assert [[d.tolist() for d in side] for side in out] == [[[7.0] * 8, [8.0] * 8]] * 2

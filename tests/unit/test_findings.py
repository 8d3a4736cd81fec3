"""The doctor on crafted numbers: what is planted is found, and measured right."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from kvsight.doctor import contents, names
from kvsight.doctor.figures import (
    BITS,
    Figures,
    HeadFigures,
    LayerFigures,
    gains,
    head_figures,
    kurtosis,
    water_filled,
)
from kvsight.doctor.findings import percent, ranges
from kvsight.doctor.layout import HEADER, LEGEND, WIDTH, paragraphs, rows
from kvsight.doctor.verdict import diagnose, recommend
from kvsight.doctor.window import FIRST, first_lengths, first_mass, windows_of
from kvsight.stats import Moments, SideStats


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def side(x, metric=None):
    """Statistics of x [H, n, d]."""
    return SideStats(Moments.zero(x.shape[0], x.shape[2]).add(x), metric, x.float())


def test_mean_share_is_the_energy_of_the_mean():
    x = normal(2, 4000, 16)
    x[1] += 2.0
    plain, shifted = head_figures(side(x))
    expected = x[1].mean(0).square().sum() / x[1].square().sum(-1).mean()
    assert shifted.mean_share == pytest.approx(float(expected), rel=1e-9)
    assert shifted.mean_share == pytest.approx(0.8, abs=0.01)
    assert plain.mean_share < 0.01


def test_outlier_channels_are_found_and_told_from_constant_ones():
    x = normal(3, 4000, 16)
    x[1, :, 5] *= 10
    x[2, :, 3] += 10
    plain, varying, constant = head_figures(side(x))
    assert (plain.outliers, varying.outliers, constant.outliers) == ((), (5,), (3,))
    assert varying.channel_ratio == pytest.approx(10, rel=0.05)
    assert varying.centred_ratio == pytest.approx(10, rel=0.05)
    assert constant.channel_ratio == pytest.approx(101**0.5, rel=0.05)
    assert constant.centred_ratio < 1.1


def test_one_far_token_shows_in_the_peak_and_unequal_norms_in_their_variation():
    x = normal(2, 4000, 16)
    x[0, 7, 2] = 40.0
    x[1] /= x[1].norm(dim=-1, keepdim=True)
    far, level = head_figures(side(x))
    assert far.peak_ratio == pytest.approx(40 / math.sqrt(1 + 1600 / 4000), rel=0.05)
    assert level.peak_ratio < 6
    assert level.norm_variation < 1e-6 < 0.1 < far.norm_variation


def test_kurtosis_of_known_densities():
    n = normal(1, 200_000, 2)
    uniform = torch.rand(1, 200_000, 2, generator=generator(1), dtype=torch.float64)
    sign = torch.where(torch.rand(1, 200_000, 2, generator=generator(2)) < 0.5, -1.0, 1.0)
    laplace = sign * -uniform.clamp_min(1e-12).log()
    found = kurtosis(torch.cat([n + 5, uniform, laplace, torch.ones_like(n)]))
    assert found.tolist() == pytest.approx([0, -1.2, 3, 0], abs=0.2)


@pytest.mark.parametrize("bits", [0.5, 2.0, 3.0])
def test_water_filling_spends_the_bits_and_leaves_one_level(bits):
    variances = torch.stack([torch.logspace(0, -6, 24, dtype=torch.float64), torch.ones(24).double()])
    distortion = water_filled(variances, bits)
    spent = 0.5 * torch.log2(variances / distortion)
    torch.testing.assert_close(spent.mean(-1), torch.full((2,), bits, dtype=torch.float64))
    for own, left in zip(variances, distortion, strict=True):
        coded = left < own
        assert torch.allclose(left[coded], left[coded][:1])
        assert bool((own[~coded] <= left.max() * (1 + 1e-9)).all())


def test_gains_are_arithmetic_over_geometric_means():
    # equal axes, independent sizes: both factors are known, and no coordinate goes without bits
    k = torch.tensor([4.0, 1.0, 2.0, 0.5]).double()
    q = torch.tensor([1.0, 8.0, 2.0, 1.0]).double()
    x = normal(1, 50_000, 4) * k.sqrt()
    x = x - x.mean(1, keepdim=True)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x[0].T @ x[0] / 50_000)).mT * k.sqrt()
    gain, metric_gain = gains(side(x, torch.diag(q).unsqueeze(0)))

    def ratio(v):
        return 0.5 * math.log2(float(v.mean() / v.log().mean().exp()))

    assert float(metric_gain) == pytest.approx(ratio(q), abs=0.01)
    assert float(gain) == pytest.approx(ratio(q) + ratio(k), abs=0.01)
    blind, none = gains(side(x))
    assert none is None
    assert float(blind) == pytest.approx(ratio(k), abs=0.01)


def test_equal_directions_gain_nothing():
    gain, metric_gain = gains(side(normal(1, 50_000, 8), torch.eye(8).double().unsqueeze(0)))
    assert float(gain) == pytest.approx(0, abs=0.01)
    assert float(metric_gain) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 9, 8), torch.full((1, 9, 8), 3.0), torch.full((1, 1, 8), 6e4)]
)
def test_degenerate_heads_have_finite_figures(x):
    for metric in (None, torch.zeros(1, 8, 8).double(), torch.ones(1, 8, 8).double()):
        json.dumps(asdict(head_figures(side(x, metric))[0]), allow_nan=False)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_first_mass_is_that_of_softmax(softcap, logits, masked):
    q, k = normal(2, 4, 24, 8).float(), normal(2, 2, 24, 8, seed=1).float()
    k[:, :, 2] = q.mean(dim=(0, 1, 2)) * 4
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if logits else None
    visible = torch.ones(24, 24).tril().bool()
    if masked:
        visible[:, 1] = False
    mask = visible[None, None] if masked else None
    found = first_mass(q, k, mask, scaling=0.4, softcap=softcap, sink_logits=sinks)

    scores = q @ k.repeat_interleave(2, dim=1).mT * 0.4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 24, 1)], dim=-1)
    weights = scores.softmax(-1)[:, :, 12:, :24].mean(dim=(0, 1, 2)).double()
    torch.testing.assert_close(found[:FIRST], weights[:FIRST], rtol=1e-4, atol=1e-6)
    assert float(found[FIRST]) == pytest.approx(float(weights.sum()), rel=1e-5)


def test_first_mass_of_a_planted_sink():
    q = torch.ones(1, 2, 64, 4)
    k = torch.zeros(1, 1, 64, 4)
    k[:, :, 0] = math.log(99) / 4
    found = first_mass(q, k, scaling=1.0)
    # the sink weighs 99 others, and query i sees i of them
    expected = sum(99 / (99 + i) for i in range(32, 64)) / 32
    assert float(found[0]) == pytest.approx(expected, rel=1e-5)
    assert contents.even_mass(64) == pytest.approx(float(first_mass(q, 0 * k, scaling=1.0)[0]), rel=1e-5)


def test_first_lengths_are_relative_to_the_median():
    x = torch.ones(2, 3, 40, 4)
    x[:, :, 0] *= 0.25
    x[:, :, 2] *= 7
    x[:, :, -1] *= 1000
    assert first_lengths(x) == pytest.approx((0.25, 1, 7, 1, 1, 1, 1, 1))


def test_windows_are_rows_of_one_length():
    batches = [torch.zeros(1, 9), torch.zeros(3, 4), torch.ones(1, 9), torch.ones(1, 9)]
    assert windows_of(iter(batches)).tolist() == [[0.0] * 9, [1.0] * 9]
    assert windows_of([torch.zeros(5, 4)]).shape == (2, 4)


class Attention(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize("name", ["k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "key"])
def test_key_biases_are_found_by_name_and_value(name):
    biased, plain, zero = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    nn.init.zeros_(zero.bias)
    nn.init.ones_(biased.bias)
    assert names.key_bias([Attention(**{name: biased})]) == (name,)
    assert names.key_bias([Attention(**{name: plain}), Attention(**{name: zero})]) == ()
    assert names.key_bias([Attention(o_proj=biased, q_proj=biased)]) is None


@pytest.mark.parametrize("name", ["q_norm", "k_norm", "q_layernorm", "key_layer_norm", "qk_norm"])
def test_norms_of_queries_and_keys_are_found_by_name(name):
    assert names.qk_norm([Attention(**{name: nn.Identity()})]) == (name,)
    assert names.qk_norm([Attention(input_layernorm=nn.Identity(), kv_a_layernorm=nn.Identity())]) == ()


def test_bias_share_is_its_part_of_the_energy():
    projection = nn.Linear(6, 8)
    with torch.no_grad():
        projection.bias.copy_(torch.tensor([3.0, 0, 0, 0, 0, 0, 0, 1]))
    x = normal(2, 5000, 4)
    energy = x.square().sum(-1).mean(-1)
    module = Attention(k_proj=projection)
    share = names.bias_share(module, side(x).moments)
    assert share == pytest.approx([9 / float(energy[0]), 1 / float(energy[1])], rel=1e-6)
    assert names.bias_share(Attention(k_proj=projection, k_norm=nn.Identity()), side(x).moments) is None
    assert names.bias_share(Attention(qkv_proj=projection), side(x).moments) is None


PLAIN = HeadFigures(0.01, (), 1.5, 1.5, 5.0, 0.1, 0.2, 0.3, 0.05, 0.02)
LAYER = LayerFigures(
    index=0,
    window=None,
    query_heads=8,
    kv_heads=8,
    key_dim=64,
    value_dim=64,
    latent=False,
    readers=(0,),
    softcap=None,
    bias_share=None,
    first_mass=(0.01,) * FIRST,
    logit_mass=None,
    key_length=(1.0,) * FIRST,
    value_length=(1.0,) * FIRST,
    keys=(PLAIN,) * 8,
    values=(PLAIN,) * 8,
)
MODEL = Figures("PlainForCausalLM", 8192, 1024, True, (LAYER,), {}, (), ())


def layer(**changes):
    return replace(MODEL, layers=(replace(LAYER, **changes),))


def head(**changes):
    return (replace(PLAIN, **changes), *(PLAIN,) * 7)


CASES = {
    "short text": replace(MODEL, tokens=1000),
    "unpacked layers": replace(MODEL, unpacked={1: "LinearAttentionLayer", 2: "LinearAttentionLayer"}),
    "hidden queries": replace(MODEL, heard=False),
    "MLA": layer(latent=True, kv_heads=1),
    "key mean": layer(keys=head(mean_share=0.75)),
    "key bias": replace(MODEL, key_bias=("k_proj",)),
    "outlier channels": layer(keys=head(outliers=(5,), channel_ratio=9.0, centred_ratio=8.0)),
    "heavy tails": layer(values=head(peak_ratio=30.0)),
    "sinks": layer(first_mass=(0.3, 0.01, 0.2, *(0.0,) * 5)),
    "sink logits": layer(logit_mass=0.4),
    "unequal directions": layer(values=(replace(PLAIN, gain=0.5, metric_gain=None),) * 8),
    "softcap": layer(softcap=50.0),
    "QK-norm": replace(MODEL, qk_norm=("k_norm", "q_norm")),
    "GQA": layer(query_heads=32),
    "sliding layers": layer(window=4096),
    "shared layers": layer(readers=(0, 2, 3)),
    "head_dim": layer(key_dim=96),
}


def test_a_plain_model_has_nothing_to_note():
    findings = diagnose(MODEL)
    assert [finding.name for finding in findings] == list(CASES)
    assert {finding.status for finding in findings} == {"clear"}
    advice = recommend(MODEL, findings)
    assert (advice.method, advice.sinks) == ("sight", 0)
    assert advice.reasons == ("nothing here speaks for another method",)


@pytest.mark.parametrize("name", CASES)
def test_each_property_is_found_alone_and_explained(name):
    findings = diagnose(CASES[name])
    found = [finding for finding in findings if finding.status == "found"]
    assert [finding.name for finding in found] == [name]
    assert found[0].summary and found[0].meaning
    unknown = {finding.name for finding in findings if finding.status == "unknown"}
    needs_attention = {"MLA", "sinks", "sink logits", "softcap", "GQA", "shared layers"}
    assert unknown == (needs_attention if name == "hidden queries" else set())


def found(name, figures):
    return next(finding for finding in diagnose(figures) if finding.name == name)


def test_a_mean_of_three_quarters_costs_one_bit():
    finding = found("key mean", CASES["key mean"])
    assert "75 % in layer 0, head 0" in finding.summary
    assert "up to 1.0 bits" in finding.meaning
    assert "centre=true" in finding.advice


def test_outliers_that_centring_removes_are_told_apart():
    varying = found("outlier channels", CASES["outlier channels"])
    assert "9.0 times its head's median rms (K, layer 0, head 0)" in varying.evidence
    assert "does not remove" in varying.meaning
    head_of = head(outliers=(5,), channel_ratio=9.0, centred_ratio=2.0)
    assert "centring removes them" in found("outlier channels", layer(keys=head_of)).meaning


def test_sinks_are_kept_up_to_the_last_one():
    figures = CASES["sinks"]
    finding = found("sinks", figures)
    assert finding.summary.startswith("position 0 draws 30 % of the attention in layer 0")
    assert "--sinks 3 keeps the first 3 tokens exact for 0.04 bits" in finding.advice
    advice = recommend(figures, diagnose(figures))
    assert advice.sinks == 3
    assert any("exact" in reason for reason in advice.reasons)


def test_sinks_of_short_windows_and_sliding_models_are_not_claimed():
    # a third of all attention is no sink where 16 tokens share it evenly ...
    even = replace(layer(first_mass=(0.3,) * FIRST), length=16)
    assert found("sinks", even).status == "clear"
    # ... and what was not measured is not called absent
    short = replace(layer(first_mass=None), length=15)
    assert found("sinks", short).summary == "windows of 15 tokens are too short"
    assert found("sinks", layer(first_mass=None, window=8)).summary == "no layer sees all tokens"


def test_unknown_projections_are_not_called_clear():
    assert found("key bias", replace(MODEL, key_bias=None)).status == "unknown"


def test_a_measured_bias_is_reported():
    figures = replace(layer(bias_share=(0.9, 0.5)), key_bias=("k_proj",))
    assert found("key bias", figures).evidence == "it is 70 % of key energy, up to 90 %"


@pytest.mark.parametrize("name", CASES)
def test_the_report_fits_80_columns_and_names_the_command(name):
    figures = CASES[name]
    findings = diagnose(figures)
    text = list(paragraphs(findings, recommend(figures, findings), "a model"))
    assert all(len(line) <= WIDTH for part in (*text, LEGEND) for line in part.splitlines())
    assert text[0].startswith(f"{name.upper()}: ")
    assert text[-1].startswith("RECOMMENDED: sight\n  kvsight fit 'a model' --bits 3")
    assert ("--sinks 3" in text[-1]) == (name == "sinks")
    assert all(len(row) == len(HEADER) for row in rows(figures))


def test_numbers_in_words():
    assert ranges([5, 0, 1, 2, 9, 8]) == "0-2, 5, 8-9"
    assert [percent(x) for x in (0.0, 0.0041, 0.0996, 0.61)] == ["0.0 %", "0.4 %", "10 %", "61 %"]
    assert BITS == 3

"""Quantizers against loops over single groups, and their error bounds element by element."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsight.errors import KVSightError
from kvsight.formats import Dense, Grouped, Packed, Row
from kvsight.packing import unpack_row
from kvsight.quantizers import lloyd_max
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import (
    RowQuantizer,
    _SortedSample,
    fitted_levels,
    fitted_stretches,
    gaussian,
    row_quantizer,
    sphere,
    uniform,
)
from kvsight.quantizers.uniform import GroupedQuantizer


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def affine(values, bits):
    """One group with numpy: codes, fp16 scale and fp16 zero of KIVI's quantizer."""
    zero = np.float16(values.min())
    # a zero rounded up may lie above the whole group
    scale = np.float16(max(values.max() - np.float32(zero), 0) / np.float32(2**bits - 1))
    codes = np.round((values - np.float32(zero)) / np.float32(scale)) if scale > 0 else 0 * values
    return np.clip(codes, 0, 2**bits - 1), scale, zero


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("dim", "group"), [(8, 8), (8, 4), (10, 4), (7, 3), (5, 1)])
def test_groups_along_channels_match_a_loop(bits, dim, group):
    x = draw(2, 3, 4, dim, seed=bits)
    quantizer = GroupedQuantizer(Grouped(dim, bits, group, "channel"))
    rows, scale, zero = quantizer.encode(x).tensors
    codes = unpack_row(rows, (bits,) * dim).numpy()
    for index in np.ndindex(2, 3, 4):
        for g, start in enumerate(range(0, dim, group)):
            wanted, s, z = affine(x[index].numpy()[start : start + group], bits)
            assert (codes[index][start : start + group] == wanted).all()
            assert (scale[index][g].item(), zero[index][g].item()) == (s, z)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [1, 4, 6])
def test_groups_along_tokens_match_a_loop(bits, group):
    x = draw(2, 3, 12, 5, seed=bits)
    quantizer = GroupedQuantizer(Grouped(5, bits, group, "token"))
    rows, scale, zero = quantizer.encode(x).tensors
    codes = unpack_row(rows, (bits,) * 5).numpy()
    for b, h, channel in np.ndindex(2, 3, 5):
        for g, start in enumerate(range(0, 12, group)):
            wanted, s, z = affine(x[b, h, start : start + group, channel].numpy(), bits)
            assert (codes[b, h, start : start + group, channel] == wanted).all()
            assert (scale[b, h, g, channel].item(), zero[b, h, g, channel].item()) == (s, z)


@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from(["channel", "token"]))
def test_no_error_is_above_half_a_step(seed, bits, along):
    # plus what fp16 cannot hold: 2^-11 of the minimum, and of the range
    x = draw(1, 1, 12, 12, seed=seed) * 10 ** (seed % 5 - 2) + seed % 7
    quantizer = GroupedQuantizer(Grouped(12, bits, 4, along))
    packed = quantizer.encode(x)
    groups = x.unflatten(-1, (3, 4)) if along == "channel" else x.unflatten(-2, (3, 4)).mT
    spread = groups.amax(-1) - groups.amin(-1)
    half_step = spread / (2**bits - 1) / 2
    rounding = 2**-11 * (1.01 * groups.amin(-1).abs() + 2 * spread) + 2**-24 * 2**bits
    bound = (half_step + rounding).unsqueeze(-1).expand_as(groups)
    error = (quantizer.decode(packed) - x).abs()
    error = error.unflatten(-1, (3, 4)) if along == "channel" else error.unflatten(-2, (3, 4)).mT
    assert (error <= bound).all()


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(-6, 6), st.sampled_from(["channel", "token"]))
def test_powers_of_two_change_scales_and_not_codes(seed, bits, power, along):
    x = draw(1, 2, 8, 8, seed=seed)
    quantizer = GroupedQuantizer(Grouped(8, bits, 4, along))
    codes, scale, zero = quantizer.encode(x).tensors
    others = quantizer.encode(x * 2.0**power).tensors
    assert torch.equal(others[0], codes)
    assert torch.equal(others[1].float(), scale.float() * 2.0**power)
    assert torch.equal(others[2].float(), zero.float() * 2.0**power)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("along", ["channel", "token"])
def test_grids_are_reproduced_exactly(bits, along):
    # the grid spans its range in every group, so scale 0.25 and zero -3 are found again
    codes = torch.arange(2**bits).repeat(2).float()
    x = (codes * 0.25 - 3).reshape(1, 1, 1, -1)
    x = x if along == "channel" else x.mT.contiguous()
    dim, group = x.shape[-1], 2**bits
    quantizer = GroupedQuantizer(Grouped(dim, bits, group, along))
    assert torch.equal(quantizer.decode(quantizer.encode(x)), x)


def test_the_ragged_group_sees_its_own_channels_only():
    x = draw(1, 1, 1, 6)
    x[..., 4:] = torch.tensor([100.0, 101.0])
    quantizer = GroupedQuantizer(Grouped(6, 1, 4, "channel"))
    assert quantizer.encode(x).tensors[2][..., 1].item() == 100
    assert quantizer.decode(quantizer.encode(x))[0, 0, 0, 4:].tolist() == [100, 101]


def test_a_range_beyond_fp16_is_clamped_and_finite():
    x = torch.tensor([[-6e4, 6e4]])
    quantizer = GroupedQuantizer(Grouped(2, 1, 2, "channel"))
    packed = quantizer.encode(x)
    assert packed.tensors[1].item() == torch.finfo(torch.float16).max
    assert torch.isfinite(quantizer.decode(packed)).all()


@pytest.mark.parametrize("size", [1e5, 1e15])
def test_numbers_beyond_fp16_leave_finite_parameters(size):
    # bfloat16 and float32 models can make them; fp16 scales, zeros and norms cannot hold them
    x = size * draw(1, 1, 4, 8)
    for quantizer in (
        GroupedQuantizer(Grouped(8, 4, 8, "channel")),
        GroupedQuantizer(Grouped(8, 4, 4, "token")),
        row_quantizer((4,) * 8, gaussian, norm=True),
    ):
        packed = quantizer.encode(x)
        assert all(torch.isfinite(t).all() for t in packed.tensors[1:])
        assert torch.isfinite(quantizer.decode(packed)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_rounds_once(dtype):
    quantizer = DenseQuantizer(Dense(5, dtype))
    x = draw(2, 1, 3, 5)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), x.to(dtype))


def test_rows_store_the_nearest_level():
    widths = (8, 5, 3, 2, 1, 0)
    quantizer = row_quantizer(widths, gaussian)
    y = draw(3, 2, 50, 6) * 1.5
    decoded = quantizer.decode(quantizer.encode(y))
    for i, width in enumerate(widths[:-1]):
        levels = torch.tensor(gaussian(width).levels, dtype=torch.float32)
        nearest = levels[(y[..., i, None] - levels).abs().argmin(-1)]
        assert torch.equal(decoded[..., i], nearest)


def test_rows_share_one_codebook_per_width():
    quantizer = row_quantizer((3, 3, 1, 0), gaussian)
    assert quantizer.levels.tolist() == pytest.approx([*gaussian(1).levels, *gaussian(3).levels], rel=1e-7)
    assert quantizer.starts.tolist() == [[2, 2, 0]]


def test_heads_read_their_own_levels():
    levels = torch.tensor([-1.0, 1.0, 10.0, 20.0])
    quantizer = RowQuantizer(Row((1, 1)), levels, torch.tensor([[0, 0], [2, 0]], dtype=torch.int32))
    y = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    assert quantizer.decode(quantizer.encode(y)).tolist() == [[[1, 1]], [[10, 1]]]


def test_norms_are_root_mean_squares_of_the_whole_token():
    quantizer = row_quantizer((4, 4, 0, 0), gaussian, norm=True)
    y = draw(2, 2, 9, 4) * 7
    codes, norm = quantizer.encode(y).tensors
    assert torch.equal(norm, y.square().mean(-1, keepdim=True).sqrt().half())
    bare = row_quantizer((4, 4, 0, 0), gaussian).encode(y / norm.float())
    assert torch.equal(codes, bare.tensors[0])
    assert torch.allclose(
        quantizer.decode(Packed(quantizer.format, (codes, norm))),
        row_quantizer((4, 4, 0, 0), gaussian).decode(bare) * norm,
    )


def test_a_token_of_zeros_decodes_to_zeros_with_a_norm():
    quantizer = row_quantizer((2,) * 4, gaussian, norm=True)
    packed = quantizer.encode(torch.zeros(1, 3, 4))
    assert quantizer.decode(packed).eq(0).all()
    # and its codes are those of 0, not of 0 / 0
    assert torch.equal(
        packed.tensors[0], row_quantizer((2,) * 4, gaussian).encode(torch.zeros(1, 3, 4)).tensors[0]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian(0), "1 to 8 bits; got 0"),
        (lambda: gaussian(9), "1 to 8 bits; got 9"),
        (lambda: sphere(2, 3), "head_dim of at least 4; got 3"),
    ],
)
def test_codebooks_that_do_not_exist(make, message):
    with pytest.raises(KVSightError, match=message):
        make()


@pytest.mark.parametrize("bits", range(1, 9))
def test_codebooks_are_symmetric_and_rising(bits):
    for book in (gaussian(bits), uniform(bits), sphere(bits, 64)):
        levels = np.array(book.levels)
        assert len(levels) == 2**bits
        assert (np.diff(levels) > 0).all()
        assert np.allclose(levels, -levels[::-1], atol=1e-12)
        assert isinstance(book.distortion, float) and math.isfinite(book.distortion)
    steps = np.diff(uniform(bits).levels)
    assert np.allclose(steps, steps[0], rtol=1e-12)


def nearest_error(y, levels, weights):
    """Σ_t w_t min_k (y_t - l_k)², with a loop over nothing but arrays."""
    return (weights * (y[:, None] - levels).square().amin(-1)).sum()


def nearest_risk(y, levels, weights):
    """The error of the sample, and of a share of it that is some times as large."""
    larger = nearest_error(lloyd_max._TAIL * y, levels, weights)
    return nearest_error(y, levels, weights) + lloyd_max._TAIL_SHARE * larger


@pytest.fixture
def no_tail(monkeypatch):
    """Fits to the sample alone."""
    monkeypatch.setattr(lloyd_max, "_TAIL_SHARE", 0.0)


def heavy_tailed(*shape, seed=0):
    """Student's t with 5 degrees of freedom, of unit variance: what real coordinates look like."""
    draws = np.random.default_rng(seed).standard_t(5, size=shape) * math.sqrt(3 / 5)
    return torch.from_numpy(draws)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_sorted_samples_know_the_error_of_any_levels(seed, count, tokens, weighted):
    y = draw(2, tokens, 3, seed=seed).double().round(decimals=seed % 3)
    weights = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # two codebooks for every coordinate
    levels = (draw(6, 2, count, seed=seed + 1).double().round(decimals=1)).sort(-1).values
    sample = _SortedSample.of(y, weights if weighted else None)
    error, risk = sample.error(levels), sample.risk(levels)
    assert error.shape == risk.shape == (6, 2)
    for column, trial in np.ndindex(6, 2):
        head, i = divmod(column, 3)
        w = weights[head] if weighted else torch.ones(tokens)
        for found, brute in ((error, nearest_error), (risk, nearest_risk)):
            wanted = brute(y[head, :, i], levels[column, trial], w).item()
            assert found[column, trial].item() == pytest.approx(wanted, rel=1e-9, abs=1e-11)


def test_sorted_samples_share_tokens_out_among_cells():
    weights = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    y = torch.tensor([[[3.0], [-1.0], [0.2], [1.0]]])
    levels = torch.tensor([[[-1.0, 0.0, 2.0]]], dtype=torch.float64)
    weight, first, second = _SortedSample.of(y, weights).cells(levels)[0, :, 0]
    # the edges are -0.5 and 1, and what lies on an edge is equally far from both sides
    assert weight.sum() == 15 and weight[0] == 2 and weight[1] in (4, 12)
    assert first.sum() == pytest.approx(3 - 2 + 0.8 + 8)
    assert second.sum() == pytest.approx(9 + 2 + 0.16 + 8)


@pytest.mark.parametrize("book", [gaussian, uniform])
@pytest.mark.parametrize("weighted", [False, True])
def test_stretches_are_near_the_best_of_a_fine_grid(book, weighted):
    y = heavy_tailed(2, 1500, 2) * torch.tensor([1.0, 0.8])
    weights = heavy_tailed(2, 1500, seed=1).abs() if weighted else torch.ones(2, 1500)
    found = fitted_stretches(y, book, weights if weighted else None)
    grid = np.exp(np.linspace(math.log(0.45), math.log(3.2), 400))
    for head, i, width in np.ndindex(2, 2, 9):
        column, w = y[head, :, i], weights[head].double()
        if width == 0:
            assert found.factors[head, i, 0] == 1
            wanted = (w * column.square()).sum() / w.sum()
            assert found.errors[head, i, 0].item() == pytest.approx(wanted.item(), rel=1e-12)
            continue
        levels = torch.tensor(book(width).levels, dtype=torch.float64)
        sample = _SortedSample.of(column[None, :, None], w[None])
        risks = sample.risk((levels * torch.from_numpy(grid)[:, None]).unsqueeze(0))[0]
        best = levels * found.factors[head, i, width]
        error = nearest_error(column, best, w) / w.sum()
        assert found.errors[head, i, width].item() == pytest.approx(error.item(), rel=1e-9)
        # with few tokens per level there are several minima, all nearly as deep
        assert nearest_risk(column, best, w) <= risks.min() * (1.01 if width <= 5 else 1.25)


def test_stretches_find_the_scale_of_a_gaussian_sample(no_tail):
    y = torch.randn(1, 20_000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = fitted_stretches(y * torch.tensor([1.0, 2.0, 0.8]), gaussian)
    assert found.factors[0, :, 4].tolist() == pytest.approx([1, 2, 0.8], rel=0.04)
    for width in range(1, 5):
        wanted = gaussian(width).distortion
        ratios = found.errors[0, :, width] / torch.tensor([1.0, 4.0, 0.64])
        assert ratios.tolist() == pytest.approx([wanted] * 3, rel=0.06)
    first, second = found.factors[0, 0, 4].item(), found.factors[0, 1, 2].item()
    assert found.of((4, 2, 0), [0])[0].tolist() == [first, second, 1]


def test_a_larger_tail_wants_a_wider_range(monkeypatch):
    y = draw(1, 2000, 1).double()
    factors = []
    for share in (0.0, 0.1, 1.0):
        monkeypatch.setattr(lloyd_max, "_TAIL_SHARE", share)
        factors.append(fitted_stretches(y, gaussian).factors[0, 0, 3].item())
    assert 0.9 < factors[0] < factors[1] < factors[2] < 2.5


def test_judges_measure_what_weights_fit():
    # the first half is narrow and is fitted; the second half is wide and is judged
    y = draw(1, 400, 2).double()
    y[:, 200:] *= 3
    first = torch.cat([torch.ones(1, 200), torch.zeros(1, 200)], dim=-1)
    found = fitted_stretches(y, gaussian, first, 1 - first)
    alone = fitted_stretches(y[:, :200], gaussian)
    assert torch.allclose(found.factors, alone.factors)
    levels = torch.tensor(gaussian(3).levels, dtype=torch.float64)
    for i in range(2):
        second = y[0, 200:, i]
        wanted = nearest_error(second, levels * alone.factors[0, i, 3], torch.ones(200)) / 200
        assert found.errors[0, i, 3].item() == pytest.approx(wanted.item(), rel=1e-9)
        assert found.errors[0, i, 0].item() == pytest.approx(second.square().mean().item(), rel=1e-9)


def test_silent_coordinates_keep_their_levels_and_finite_errors():
    y = draw(1, 50, 3).double()
    y[..., 1] = 0
    found = fitted_stretches(y, gaussian)
    assert (found.factors[0, 1] == 1).all()
    assert torch.isfinite(found.factors).all() and torch.isfinite(found.errors).all()
    # a coordinate that is always zero errs by its level nearest to zero
    assert found.errors[0, 1, 0] == 0
    assert found.errors[0, 1, 2].item() == pytest.approx(min(abs(v) for v in gaussian(2).levels) ** 2)
    weights = torch.zeros(1, 50)
    weights[:, 0] = 1
    fitted = fitted_levels(row_quantizer((3, 3, 1), gaussian), y, weights)
    assert torch.isfinite(fitted.levels).all()


def test_empty_samples_leave_the_codebook_as_it_is():
    found = fitted_stretches(torch.zeros(2, 0, 3), gaussian)
    assert (found.factors == 1).all()
    assert found.errors[1, 2].tolist() == [1.0, *(gaussian(bits).distortion for bits in range(1, 9))]
    quantizer = row_quantizer((2, 1, 0), gaussian)
    assert fitted_levels(quantizer, torch.zeros(2, 0, 3)) is quantizer
    nothing = row_quantizer((0, 0), gaussian)
    assert fitted_levels(nothing, torch.ones(2, 5, 2)) is nothing


@pytest.mark.parametrize("widths", [(4, 2, 2, 1, 0), (8, 7, 3, 0, 0)])
@pytest.mark.parametrize("tokens", [1, 7, 600])
@pytest.mark.parametrize("weighted", [False, True])
def test_fitted_levels_never_raise_the_risk_of_the_sample(widths, tokens, weighted):
    y = heavy_tailed(3, tokens, len(widths), seed=3)
    weights = heavy_tailed(3, tokens, seed=4).abs() + 0.01 if weighted else torch.ones(3, tokens)
    before = row_quantizer(widths, gaussian)
    after = fitted_levels(before, y, weights if weighted else None)
    assert after.format == before.format
    assert after.starts.shape == (3, sum(w > 0 for w in widths))
    for head in range(3):
        for i, width in enumerate(w for w in widths if w > 0):
            old = before.levels[before.starts[0, i] :][: 2**width].double()
            new = after.levels[after.starts[head, i] :][: 2**width].double()
            assert (new.diff() >= 0).all()
            column, w = y[head, :, i], weights[head].double()
            risk, was = (nearest_risk(column, levels, w) for levels in (new, old))
            assert risk <= was * (1 + 1e-6) + 1e-12
            if tokens == 600 and width <= 2:
                # enough tokens in every cell to be worth a visible share
                assert risk < was * 0.999
    # codes and levels belong together
    decoded = after.decode(after.encode(y[None]))[0]
    for head, i in np.ndindex(3, after.format.stored):
        table = after.levels[after.starts[head, i] :][: 2 ** widths[i]]
        nearest = (y[head, :, i, None].float() - table).abs().amin(-1)
        assert torch.allclose((decoded[head, :, i] - y[head, :, i].float()).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("positive", [1.0, 5.0])
def test_fitted_levels_of_many_tokens_are_centroids(positive, no_tail):
    y = heavy_tailed(1, 20_000, 1, seed=5)[0, :, 0] + 0.3
    # tokens far out count more, so that forgotten weights show
    weights = torch.where(y > 1, positive, 1.0)
    fitted = fitted_levels(row_quantizer((2,), gaussian), y[None, :, None], weights[None])
    levels = fitted.levels.double()
    index = (y[:, None] - levels).abs().argmin(-1)
    for k, level in enumerate(levels):
        w = weights * (index == k)
        # 20 tokens' worth of the start remain in cells of some thousand
        assert level.item() == pytest.approx(((w * y).sum() / w.sum()).item(), abs=0.03)


def test_quantizers_of_some_heads_are_those_heads():
    quantizer = fitted_levels(row_quantizer((3, 2, 0), gaussian), draw(4, 300, 3).double())
    x = draw(1, 4, 9, 3, seed=1)
    whole = quantizer.decode(quantizer.encode(x))
    some = quantizer.heads([3, 1])
    assert torch.equal(some.decode(some.encode(x[:, [3, 1]])), whole[:, [3, 1]])
    assert torch.equal(quantizer.rounded(x[0, ..., :2]), whole[0])
    shared = row_quantizer((3, 2, 0), gaussian)
    assert shared.heads([1]) is shared

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
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import RowQuantizer, gaussian, row_quantizer, sphere, uniform
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

"""Triton's encoder: its codes are the definition's, but for coordinates on the brink of a boundary."""

import pytest
import torch
from test_attend import draw
from test_attend_kernels import CODECS, DIM, rows, widths_of

from interpreter import DEVICE, available
from kvsight.codec import Codec
from kvsight.errors import KVSightError
from kvsight.ops.encode import encode, ref
from kvsight.packing import unpack_row
from kvsight.quantizers.lloyd_max import fitted_levels, gaussian, row_quantizer, uniform
from kvsight.transforms import centre, haar, identity

pytestmark = [available, pytest.mark.usefixtures("kernels")]


def by_kernel(codec, x):
    codec, x = codec.to(DEVICE), x.to(DEVICE)
    transform, rule = codec.transform, codec.quantizer.rounding
    return encode(x, transform.shift, transform.matrix, rule, backend="triton")


def coordinates(codec, x):
    """In fp64, and how far fp32 may be from them: 2^-20 Σ |x - shift| |matrix|."""
    x, transform = x.double(), codec.transform
    centred = x if transform.shift is None else x - transform.shift.double().unsqueeze(-2)
    if transform.matrix is None:
        return centred, 2.0**-20 * centred.abs()
    return centred @ transform.matrix.double(), 2.0**-20 * (centred.abs() @ transform.matrix.double().abs())


def check(codec, x, brink=0.01):
    """Codes and norms of the kernel against the definition; at most a share ``brink`` may be in doubt."""
    got = [tensor.cpu() for tensor in by_kernel(codec, x)]
    form, rule = codec.format, codec.quantizer.rounding
    y, slack = coordinates(codec, x)
    if form.norm:
        exact = y.square().mean(-1, keepdim=True).sqrt()
        assert torch.all((got[1].double() - exact).abs() <= 2.0**-11 * 1.001 * exact + 2.0**-25)
        y, slack = y / got[1].double(), slack / got[1].double()
    y, slack = y[..., : form.stored], slack[..., : form.stored]
    codes = unpack_row(got[0], form.widths).long()
    expected = ref.nearest(y.float(), rule.edges).long()
    edges = rule.edges.double() if rule.edges.dim() == 1 else rule.edges.double().unsqueeze(-3)
    largest = edges.abs().nan_to_num(posinf=0).amax(-1)
    gap = (y.unsqueeze(-1) - edges).abs().amin(-1)
    doubt = gap < slack + 2.0**-20 * largest
    assert doubt.double().mean() <= brink
    assert torch.equal(codes[~doubt], expected[~doubt])
    assert (codes - expected).abs().max() <= 1
    # whatever the codes are, the row is packed as the definition packs it
    assert torch.equal(ref.pack_row(codes.to(torch.uint8), form.widths), got[0])


@pytest.mark.parametrize("kind", ["planes", "nibbles", "plain planes", "levels", "fitted", "norm"])
def test_every_kind_of_row(kind):
    check(CODECS[kind], 2 * draw(2, 1, 37, DIM, seed=5))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("codebook", [uniform, gaussian])
def test_every_width_alone_and_in_any_mix(width, codebook):
    check(rows((width,) * DIM, codebook, seed=width), 2 * draw(1, 1, 5, DIM, seed=width))
    check(rows(widths_of(width), codebook, seed=width), 2 * draw(1, 1, 5, DIM, seed=width + 1))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(dim):
    check(rows((4,) * (dim // 2) + (3,) * (dim // 2), norm=True), draw(1, 1, 3, dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(CODECS["planes"], draw(1, 1, 9, DIM).to(dtype))


def test_heads_of_their_own_and_strided_tokens():
    shift = draw(3, DIM, seed=8).double()
    turned = centre(shift).then(haar(DIM)).stored()
    shared = row_quantizer((5,) * 10 + (2,) * 10, uniform)
    own = fitted_levels(row_quantizer((3,) * DIM, gaussian), draw(3, 99, DIM).double())
    x = draw(2, 7, 3, DIM).transpose(1, 2)
    check(Codec("shared", turned, shared), x)
    check(Codec("own", turned, own), x)


def test_extremes():
    x = draw(1, 1, 4, DIM)
    x[..., 0, :], x[..., 1, :], x[..., 2, :] = 0, 3e4, -3e4
    # zeros lie on the middle boundary
    check(Codec("plain", identity(DIM), row_quantizer((4,) * DIM, uniform)), x, brink=0.25)
    silent = Codec("norm", identity(DIM), row_quantizer((4,) * DIM, gaussian, norm=True))
    zeros, sizes = by_kernel(silent, torch.zeros(1, 1, 2, DIM))
    definition, same = silent.encode(torch.zeros(1, 1, 2, DIM)).tensors
    assert torch.equal(zeros.cpu(), definition) and torch.equal(sizes.cpu(), same)


def test_twice_is_equal_and_tokens_are_coded_alone():
    x = draw(1, 1, 40, DIM)
    (whole,) = by_kernel(CODECS["planes"], x)
    assert torch.equal(whole, by_kernel(CODECS["planes"], x)[0])
    parts = [by_kernel(CODECS["planes"], x[:, :, a:b])[0] for a, b in ((0, 1), (1, 34), (34, 40))]
    assert torch.equal(whole, torch.cat(parts, dim=2))


def test_evenly_spaced_boundaries_are_told_from_others():
    assert CODECS["planes"].quantizer.rounding.lines is not None
    assert rows((1,) * DIM, gaussian).quantizer.rounding.lines is not None
    assert CODECS["levels"].quantizer.rounding.lines is None
    assert CODECS["fitted"].quantizer.rounding.lines is None
    first, inverse = CODECS["nibbles"].quantizer.rounding.lines
    levels = torch.tensor(uniform(4).levels)
    assert torch.allclose(first, (levels[0] + levels[1]) / 2)
    assert torch.allclose(inverse, 1 / (levels[1] - levels[0]))


def test_dispatch():
    codec = CODECS["planes"]
    x, rule = draw(1, 1, 3, DIM), codec.quantizer.rounding
    transform = codec.transform.shift, codec.transform.matrix
    (definition,) = ref.encode(x, *transform, rule)
    assert torch.equal(encode(x, *transform, rule)[0], definition)
    assert torch.equal(encode(x, *transform, rule, backend="ref")[0], definition)
    assert torch.equal(codec.encode(x).tensors[0], definition)
    coordinates = codec.transform.forward(x.double())
    assert torch.equal(codec.quantizer.encode(coordinates).tensors[0], definition)
    with pytest.raises(KVSightError, match="backend is one of ref, triton; got 'cuda'"):
        encode(x, *transform, rule, backend="cuda")
    with pytest.raises(KVSightError, match=r"does not encode \(1, 1, 3, 20\) in torch\.float64"):
        encode(x.double(), *transform, rule, backend="triton")

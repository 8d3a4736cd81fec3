"""The laws over all formats: any mix of widths, ragged groups, odd head_dims, 16-bit and wider numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsight.codec import Codec
from kvsight.formats import Dense, Grouped, Indexed, Patched, Polar, Symmetric, Ternary, Tiered
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import RowQuantizer, gaussian, row_quantizer, uniform
from kvsight.quantizers.patched import PatchedQuantizer
from kvsight.quantizers.polar import polar_quantizer
from kvsight.quantizers.tiered import TieredQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.quantizers.vector import VectorQuantizer
from kvsight.testing import check_codec, check_compresses
from kvsight.transforms import centre, haar, identity, linear

widths = st.lists(st.integers(0, 8), min_size=4, max_size=19).map(lambda w: tuple(sorted(w, reverse=True)))


@settings(max_examples=25)
@given(widths, st.booleans(), st.sampled_from(["identity", "haar", "centred"]))
def test_rows(row, norm, kind):
    dim = len(row)
    rotation = haar(dim, seed=1)
    transform = {
        "identity": identity(dim),
        "haar": rotation,
        "centred": centre(torch.ones(2, dim, dtype=torch.float64)).then(rotation),
    }[kind]
    check_codec(Codec("row", transform, row_quantizer(row, gaussian, norm)), seed=2)


@settings(max_examples=25)
@given(
    dim=st.integers(1, 19),
    bits=st.integers(1, 8),
    group=st.integers(1, 19),
    along=st.sampled_from(["channel", "token"]),
)
def test_groups(dim, bits, group, along):
    group = min(group, dim) if along == "channel" else group
    check_codec(Codec("grouped", identity(dim), GroupedQuantizer(Grouped(dim, bits, group, along))), seed=3)


@settings(max_examples=10)
@given(
    dim=st.integers(1, 19),
    bits=st.integers(1, 8),
    group=st.integers(1, 19),
    along=st.sampled_from(["channel", "token"]),
    clip=st.sampled_from([None, 1.0]),
)
def test_trits_and_symmetric_groups(dim, bits, group, along, clip):
    group = min(group, dim) if along == "channel" else group
    form = Ternary(dim, group, along) if bits == 1 else Symmetric(dim, bits, group, along)
    table = None if clip is None else torch.tensor([clip])
    check_codec(Codec("affine", identity(dim), GroupedQuantizer(form, table)), seed=3)


def tiered(form, heads=1, rank=2):
    draw = torch.Generator().manual_seed(form.dim)
    linear = torch.randn(heads, form.dim, generator=draw)
    factor = torch.randn(heads if rank else 1, rank, form.dim, generator=draw)
    return Codec("tiers", identity(form.dim), TieredQuantizer(form, linear, factor, torch.tensor([0.5])))


@settings(max_examples=6)
@given(
    dim=st.integers(1, 19),
    widths=st.sampled_from([(4, 2), (8, 4), (2, 1), (5, 3, 2), (3, 2, 1), (8, 6, 5)]),
    many=st.integers(0, 2),
    along=st.sampled_from(["channel", "token"]),
    rank=st.integers(0, 3),
)
def test_tiers(dim, widths, many, along, rank):
    total = widths[1] * 6 + many * (widths[0] - widths[1])
    form = Tiered(dim, 6, widths, total, along, scaled=along == "channel")
    check_codec(tiered(form, heads=1 + rank % 2, rank=rank), seed=4)


@settings(max_examples=6)
@given(
    dim=st.integers(2, 19),
    bits=st.integers(1, 8),
    along=st.sampled_from(["channel", "token"]),
    outliers=st.integers(0, 2),
    rank=st.integers(0, 2),
)
def test_repairs(dim, bits, along, outliers, rank):
    group = 4 if along == "token" else min(4, dim)
    form = Patched(Grouped(dim, bits, group, along), 8, outliers, rank)
    check_codec(Codec("repaired", identity(dim), PatchedQuantizer(form)), seed=5)


def books(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15)
@given(
    span=st.integers(1, 5),
    cells=st.integers(1, 5),
    bits=st.integers(1, 11),
    stages=st.integers(1, 3),
    strided=st.booleans(),
    norm=st.booleans(),
    own=st.booleans(),
)
def test_indices(span, cells, bits, stages, strided, norm, own):
    form = Indexed(span * cells, span, bits, stages, strided, norm)
    lead = (2, cells) if own else (1, 1)
    root = books(*lead, span, span)
    quantizer = VectorQuantizer(form, books(*lead, stages, 2**bits, span), root.mT @ root if own else None)
    check_codec(Codec("indexed", identity(form.dim), quantizer), seed=10)


@settings(max_examples=10)
@given(blocks=st.integers(1, 3), angles=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_polar_coordinates(blocks, angles):
    form = Polar(blocks << len(angles), tuple(sorted(angles, reverse=True)))
    check_codec(Codec("polar", haar(form.dim, 3) if form.dim > 2 else identity(2), polar_quantizer(form)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dense(dtype):
    check_codec(Codec("dense", identity(7), DenseQuantizer(Dense(7, dtype))), seed=4)


def test_heads_may_have_codebooks_of_their_own():
    # both heads have widths (2, 1); their levels lie in other places of one table
    row = row_quantizer((2, 1), gaussian).format
    books = [*gaussian(2).levels, *gaussian(1).levels, *uniform(2).levels, -3.0, 3.0]
    starts = torch.tensor([[0, 4], [6, 10]], dtype=torch.int32)
    check_codec(Codec("two", identity(2), RowQuantizer(row, torch.tensor(books), starts)), seed=5)


def test_skewed_transforms_keep_the_laws():
    skew = torch.eye(6, dtype=torch.float64) + torch.ones(6, 6, dtype=torch.float64).triu(1)
    check_codec(
        Codec("skew", linear(skew.unsqueeze(0)), row_quantizer((8, 5, 3, 2, 1, 0), gaussian)), seed=6
    )


@pytest.mark.parametrize("tokens", [1, 63, 65, 1000])
def test_awkward_token_counts(tokens):
    grouped = GroupedQuantizer(Grouped(5, 3, 4, "token"))
    for quantizer in (grouped, row_quantizer((7, 5, 3, 2, 0), gaussian, norm=True)):
        check_codec(Codec("counts", identity(5), quantizer), tokens=tokens, seed=8)


def test_a_codec_of_few_bits_compresses():
    check_compresses(Codec("row", identity(64), row_quantizer((4,) * 64, gaussian, norm=True)))
    check_compresses(Codec("grouped", identity(64), GroupedQuantizer(Grouped(64, 8, 64, "channel"))))

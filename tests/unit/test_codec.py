"""Codecs: what the law suite is too small to see, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from kvsight.codec import Codec
from kvsight.errors import KVSightError
from kvsight.formats import Dense, concat
from kvsight.methods import get
from kvsight.methods.base import Budget
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.retention import Retention
from kvsight.testing import random_stats
from kvsight.transforms import centre, haar, identity


def fitted(method, bits, heads=2, dim=64):
    recipe = get(method)
    budget = Budget(bits, 1024, Retention(0, 0), torch.bfloat16)
    stats = random_stats(heads, dim, seed=1)
    codec = recipe.build("k", stats, budget, recipe.with_defaults({}))[0].codec
    return replace(codec, transform=codec.transform.stored())


@pytest.mark.parametrize("method", ["sight", "turboquant"])
def test_codes_do_not_depend_on_how_many_tokens_share_a_call(method):
    # products of one token and of many round differently: in fp32 that moves one 8-bit code in 100,000
    codec = fitted(method, 8.5, heads=4, dim=128)
    x = torch.randn(1, 4, 512, 128, generator=torch.Generator().manual_seed(2))
    whole = codec.encode(x)
    for step in (1, 3, 64):
        parts = concat([codec.encode(part) for part in x.split(step, dim=2)])
        for ours, wanted in zip(parts.tensors, whole.tensors, strict=True):
            assert torch.equal(ours, wanted)


def test_another_number_of_heads_is_refused_rather_than_broadcast():
    codec = Codec("test", centre(torch.randn(2, 8)), row_quantizer((4,) * 8, gaussian))
    assert codec.heads == 2
    for shape in ((1, 1, 3, 8), (1, 3, 3, 8), (3, 8)):
        with pytest.raises(KVSightError, match=r"fitted to 2 KV heads; got a tensor of shape"):
            codec.encode(torch.zeros(shape))


def test_shared_tensors_serve_any_number_of_heads():
    codec = Codec("test", haar(8), row_quantizer((4,) * 8, gaussian))
    assert codec.heads is None
    assert codec.encode(torch.zeros(1, 5, 3, 8)).tensors[0].shape == (1, 5, 3, 4)


def test_coordinates_without_bits_decode_to_their_mean():
    mean = torch.arange(4.0).expand(1, 4)
    codec = Codec("test", centre(mean), row_quantizer((1, 1, 0, 0), gaussian))
    decoded = codec.decode(codec.encode(torch.full((1, 1, 5, 4), 9.0)))
    level = gaussian(1).levels[1]
    assert torch.allclose(decoded, torch.tensor([0 + level, 1 + level, 2, 3]).expand_as(decoded))


def test_static_bytes_are_all_calibration_tensors_but_the_derived_inverse():
    codec = Codec("test", haar(8).stored(), row_quantizer((4,) * 8, gaussian))
    assert codec.static_nbytes == 8 * 8 * 4 + 16 * 4 + 8 * 4
    assert Codec("test", identity(8), row_quantizer((0,) * 8, gaussian)).static_nbytes == 0


def test_dense_coordinates_are_mapped_back_in_full_precision():
    x = torch.randn(1, 1, 50, 16, generator=torch.Generator().manual_seed(3))
    turned = haar(16, seed=1).stored()
    codec = Codec("test", turned, DenseQuantizer(Dense(16, torch.bfloat16)))
    wanted = turned.inverse(codec.encode(x).tensors[0].float())
    assert torch.equal(codec.decode(codec.encode(x)), wanted)
    plain = Codec("test", identity(16), DenseQuantizer(Dense(16, torch.bfloat16)))
    assert plain.decode(plain.encode(x)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["sight", "turboquant"])
def test_what_is_made_in_inference_mode_serves_gradients(method):
    codec = fitted(method, 3.0)
    with torch.inference_mode():
        moved = codec.to("cpu")
        packed = moved.encode(torch.randn(1, 2, 8, 64))
        tensors = [moved.folded.inverse, *moved.tensors.values()]
    assert not any(tensor.is_inference() for tensor in tensors)
    q = torch.randn(1, 2, 1, 64, requires_grad=True)
    moved.folded.query(q).sum().backward()
    assert q.grad is not None and packed.tokens == 8

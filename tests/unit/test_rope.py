"""Turning keys back and forth, against RoPE as transformers applies it."""

from dataclasses import replace

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

from kvsight.codec import Codec
from kvsight.formats import Grouped
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.rope import pairs
from kvsight.testing import check_codec
from kvsight.transforms import haar, identity

DIM = 8
FREQUENCIES = torch.tensor([1.0, 0.3, 0.02, 0.001])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cached(k, positions, interleaved):
    """Post-RoPE keys, by transformers."""
    angle = positions.double()[:, None] * FREQUENCIES.double()
    if interleaved:
        angle = angle.repeat_interleave(2, dim=-1)
        return neighbours(k.float(), k.float(), angle.cos()[None], angle.sin()[None])[1]
    angle = torch.cat([angle, angle], dim=-1)
    return halves(k, k, angle.cos()[None], angle.sin()[None])[1]


@pytest.mark.parametrize("interleaved", [False, True])
def test_back_gives_the_keys_before_rope(interleaved):
    k = draw(2, 3, 50, DIM)
    rope = pairs(FREQUENCIES, DIM, interleaved=interleaved)
    post = cached(k, torch.arange(7, 57), interleaved).double()
    atol = 1e-5 if interleaved else 1e-12
    assert torch.allclose(rope.back(post, first=7), k, atol=atol)
    assert torch.allclose(rope.forth(rope.back(post, first=3), first=3), post, atol=1e-12)


def test_left_padding_turns_every_key_alike():
    # index 10 holds position 6: what is coded is R(-4) k, whatever the token
    k = draw(1, 1, 30, DIM)
    rope = pairs(FREQUENCIES, DIM)
    padded = rope.back(cached(k, torch.arange(6, 36), False), first=10)
    assert torch.allclose(padded, rope.turn(k, torch.full((30,), -4)), atol=1e-12)


def test_part_of_a_head_turns():
    x = draw(1, 5, DIM)
    for first, interleaved in ((0, False), (4, False), (2, True)):
        rope = pairs(FREQUENCIES[:2], DIM, first=first, interleaved=interleaved)
        still = [i for i in range(DIM) if not first <= i < first + 4]
        turned = rope.forth(x, first=1)
        assert torch.equal(turned[..., still], x[..., still])
        assert not torch.isclose(turned[..., first : first + 4], x[..., first : first + 4]).any()
        assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    "quantizer",
    [row_quantizer((5, 4, 3, 3, 2, 1, 1, 0), gaussian), GroupedQuantizer(Grouped(DIM, 3, 4, "token"))],
)
def test_turning_codecs_keep_the_laws(quantizer):
    for transform in (identity(DIM), haar(DIM, seed=1)):
        check_codec(Codec("turning", transform, quantizer, pairs(FREQUENCIES, DIM)), seed=7)


def test_a_turning_codec_codes_what_a_still_one_does_before_rope():
    k = draw(1, 2, 12, DIM).float()
    rope = pairs(FREQUENCIES, DIM)
    turning = Codec("turning", identity(DIM), GroupedQuantizer(Grouped(DIM, 8, 4, "token")), rope)
    still = replace(turning, rope=None)
    packed = turning.encode(rope.forth(k.double(), first=100), first=100)
    wanted = still.decode(still.encode(k))
    assert torch.allclose(rope.back(turning.decode(packed, 100), 100), wanted, atol=1e-2)
    # with another index the bytes mean other keys
    assert not torch.allclose(rope.back(turning.decode(packed, 101), 100), wanted, atol=0.1)
    assert turning.static_nbytes - still.static_nbytes == 8 * DIM

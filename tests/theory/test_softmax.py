"""What softmax sees of coded keys: a shift is invisible, and KL is half the visible damage."""

import pytest
import torch

from kvsight.codec import Codec
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.transforms import centre, haar


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(scores, error):
    p = scores.log_softmax(-1)
    return (p.exp() * (p - (scores + error).log_softmax(-1))).sum(-1)


def visible_damage(scores, error):
    """Σ p (δs − Σ p δs)²."""
    p = scores.softmax(-1)
    mean = (p * error).sum(-1, keepdim=True)
    return (p * (error - mean).square()).sum(-1)


def test_kl_of_coded_keys_is_half_the_visible_damage_up_to_third_order():
    dim = 32
    q, k = 2 * draw(1, 1, 50, dim, seed=1), draw(1, 1, 60, dim, seed=2)
    scores = q @ k.mT / dim**0.5
    rests = []
    for bits in range(2, 9):
        codec = Codec("rows", haar(dim, seed=3), row_quantizer((bits,) * dim, gaussian))
        error = q @ (codec.decode(codec.encode(k)).double() - k).mT / dim**0.5
        rest = (kl(scores, error) - visible_damage(scores, error) / 2).abs()
        assert (rest <= error.abs().amax(-1) ** 3).all()
        rests.append(float(rest.mean() / visible_damage(scores, error).mean()))
    # relative to I the rest is of first order in the error, which falls as √D(b)
    assert rests == sorted(rests, reverse=True)
    fall = (gaussian(2).distortion / gaussian(8).distortion) ** 0.5
    assert rests[0] / rests[-1] == pytest.approx(fall, rel=0.3)


@pytest.mark.parametrize("dim", [5, 64])
def test_centred_keys_need_no_mean_to_be_added_back(dim):
    # one mean for all keys of a head: scores move by offset(q), probabilities not at all
    q, k = draw(2, 3, 4, dim, seed=4), draw(2, 3, 30, dim, seed=5) + 3
    transform = centre(k.mean(dim=(0, 2))).then(haar(dim, seed=6))
    bare = transform.dual(q) @ transform.forward(k).mT
    assert torch.allclose(bare + transform.offset(q), q @ k.mT)
    assert not torch.allclose(bare, q @ k.mT)
    assert torch.allclose(bare.softmax(-1), (q @ k.mT).softmax(-1), atol=1e-12)
    assert kl(q @ k.mT, bare - q @ k.mT).abs().max() < 1e-12

"""What softmax sees of score errors: shifts are invisible, and KL is half the variance under p."""

import pytest
import torch

from kvsight.transforms import centre, haar


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(scores, error):
    p = scores.log_softmax(-1)
    return (p.exp() * (p - (scores + error).log_softmax(-1))).sum(-1)


def visible_damage(scores, error):
    p = scores.softmax(-1)
    mean = (p * error).sum(-1, keepdim=True)
    return (p * (error - mean).square()).sum(-1)


def test_kl_is_half_the_visible_damage_up_to_third_order():
    scores, error = 2 * draw(50, 40, seed=1), draw(50, 40, seed=2)
    scales = [2.0**-i for i in range(2, 9)]
    rest = [(kl(scores, t * error) - visible_damage(scores, t * error) / 2).abs() for t in scales]
    per_cube = torch.stack([r / t**3 for r, t in zip(rest, scales, strict=True)])
    # the remainder over t³ settles on a constant: halving t eightfolds the accuracy
    assert torch.allclose(per_cube[-1], per_cube[-2], rtol=0.1, atol=1e-4)
    assert float(per_cube.max()) < 10 * float(per_cube[-1].max())


def test_a_shift_of_all_scores_costs_nothing():
    scores = draw(5, 9, seed=3)
    shift = torch.full_like(scores, 7.5)
    assert visible_damage(scores, shift).abs().max() < 1e-12
    assert kl(scores, shift).abs().max() < 1e-12


@pytest.mark.parametrize("dim", [5, 64])
def test_centred_keys_need_no_mean_to_be_added_back(dim):
    # one mean for all keys of a head: scores move by offset(q), probabilities not at all
    q, k = draw(2, 3, 4, dim, seed=4), draw(2, 3, 30, dim, seed=5) + 3
    transform = centre(k.mean(dim=(0, 2))).then(haar(dim, seed=6))
    bare = transform.dual(q) @ transform.forward(k).mT
    assert torch.allclose(bare + transform.offset(q), q @ k.mT)
    assert not torch.allclose(bare, q @ k.mT)
    assert torch.allclose(bare.softmax(-1), (q @ k.mT).softmax(-1), atol=1e-12)

"""Every named transform keeps the dual laws, alone and composed."""

import pytest
import torch

from kvsight.testing import check_transform, random_stats
from kvsight.transforms import centre, haar, hadamard, identity, karhunen_loeve, linear

DIMS = (4, 5, 64, 80, 96)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def sight(dim):
    stats = random_stats(3, dim, seed=11)
    eye = 1e-3 * torch.eye(dim, dtype=torch.float64)
    klt, _ = karhunen_loeve(stats.metric + eye, stats.moments.covariance + eye)
    return centre(stats.moments.mean).then(klt)


MAKERS = {
    "identity": identity,
    "centre": lambda dim: centre(draw(3, dim)),
    "shared centre": lambda dim: centre(draw(1, dim)),
    "hadamard": hadamard,
    "haar": haar,
    "fold": lambda dim: linear(draw(3, dim, dim)),
    "shared fold": lambda dim: linear(draw(1, dim, dim)),
    "sight": sight,
    "centred rotation": lambda dim: centre(draw(3, dim)).then(hadamard(dim)),
    "rotation, then centre": lambda dim: hadamard(dim).then(centre(draw(3, dim))),
}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_transform(make, dim):
    check_transform(make(dim), seed=5)

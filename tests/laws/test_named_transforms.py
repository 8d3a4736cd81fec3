"""Every named transform keeps the dual laws, alone and composed."""

import pytest
import torch

from kvsight.testing import check_transform, random_stats
from kvsight.transforms import centre, haar, hadamard, identity, karhunen_loeve, linear, sketch, subspace

DIMS = (4, 5, 64, 80, 96)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def sight(dim):
    stats = random_stats(3, dim, seed=11)
    eye = 1e-3 * torch.eye(dim, dtype=torch.float64)
    klt, _ = karhunen_loeve(stats.metric + eye, stats.moments.covariance + eye)
    return centre(stats.moments.mean).then(klt)


def columns(dim):
    return torch.linalg.qr(draw(3, dim, dim))[0][..., : dim // 2]


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
    "subspace": lambda dim: subspace(columns(dim)),
    "centred subspace of a fold": lambda dim: centre(draw(3, dim)).then(
        linear(draw(1, dim, dim)).then(subspace(columns(dim)))
    ),
    "gaussian sketch": lambda dim: sketch(dim, 2 * dim, "gaussian"),
    "orthogonal sketch": lambda dim: sketch(dim, dim + 3),
    "rotation, then centre": lambda dim: hadamard(dim).then(centre(draw(3, dim))),
}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_transform(make, dim):
    check_transform(make(dim), seed=5)

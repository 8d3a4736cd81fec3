"""The fold in front of rotate-and-scalar coding, and the error of recursive polar coordinates."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, linalg

from kvsight.codec import Codec
from kvsight.formats import Polar, Row
from kvsight.methods.shaping import shaped
from kvsight.quantizers.lloyd_max import angle, row_quantizer, sphere
from kvsight.quantizers.polar import polar_angles, polar_quantizer
from kvsight.transforms import geometric_mean, haar, hadamard, linear, sqrtm

DIM = 64


def spread(cond, seed):
    """Log-evenly spaced eigenvalues of mean one in a random basis."""
    values = torch.logspace(0, math.log10(cond), DIM, dtype=torch.float64)
    basis = haar(DIM, seed).matrix[0]
    return (basis * (values / values.mean())) @ basis.T


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logit_error(queries, keys, shape, seed=7):
    """Exact E (q·e)² of 3-bit codes behind the fold and one rotation."""
    root, inverse_root = sqrtm(shaped(queries, keys, shape, 0.0))
    transform = linear(root[None], inverse_root[None]).then(haar(DIM, seed))
    codec = Codec("fold", transform, row_quantizer((3,) * DIM, lambda bits: sphere(bits, DIM), norm=True))
    k = draw(1, 1, 4000, DIM, seed=8) @ sqrtm(keys)[0]
    e = codec.decode(codec.encode(k)).double() - k
    return float(((e @ queries) * e).sum(-1).mean())


@pytest.mark.parametrize(
    ("cond_q", "cond_k", "gains"),
    [
        (100, 1.0001, {"raw": 0.00, "log1p": 0.27, "power": 0.28, "geometric": 0.28}),
        (100, 20, {"log1p": 0.28, "power": 0.29, "geometric": 0.37}),
    ],
)
def test_the_geometric_mean_is_the_best_fold(cond_q, cond_k, gains):
    queries, keys = spread(cond_q, 1), spread(cond_k, 2)
    plain = logit_error(queries, keys, "identity")
    found = {shape: 1 - logit_error(queries, keys, shape) / plain for shape in gains}
    assert found == pytest.approx(gains, abs=0.03)
    assert found["geometric"] >= max(found.values()) - 0.01


def test_its_error_is_what_theory_says():
    queries, keys = spread(100, 1), spread(20, 2)
    root = sqrtm(keys)[0]
    bound = float(sqrtm(root @ queries @ root)[0].trace()) ** 2 / DIM
    found = sum(logit_error(queries, keys, "geometric", seed) for seed in (10, 11, 12)) / 3
    assert found == pytest.approx(sphere(3, DIM).distortion * bound, rel=0.06)


def test_the_geometric_mean_is_the_solution_of_its_equation():
    a, b = spread(100, 3), spread(20, 4)
    mean = geometric_mean(torch.linalg.inv(a), b)
    assert torch.allclose(mean @ a @ mean, b, atol=1e-9)
    other = linalg.inv(a.numpy()) @ linalg.sqrtm(a.numpy() @ b.numpy())
    assert np.allclose(mean.numpy(), other, atol=1e-8)


def test_the_papers_diagonal_is_that_of_no_coordinate():
    # SMAQ's code takes diag(H M Hᵀ) for the spread of x H; the dossier finds a correlation of -0.03
    turn, metric = hadamard(128, 42).matrix[0], draw(128, 128, seed=5)
    metric = metric @ metric.T
    weights = draw(128, seed=6).exp()
    metric = weights.unsqueeze(-1) * metric * weights
    x = draw(20000, 128, seed=9) @ sqrtm(metric)[0]
    seen = (x @ turn).square().mean(0)
    right, papers = (turn.T @ metric @ turn).diagonal(), (turn @ metric @ turn.T).diagonal()
    assert float(torch.corrcoef(torch.stack((seen, right)))[0, 1]) > 0.99
    assert abs(float(torch.corrcoef(torch.stack((seen, papers)))[0, 1])) < 0.3


def test_compression_of_the_papers_containers_and_of_packed_rows():
    words = -(-256 // (32 // 3))
    assert 512 / (4 * words + 2) == pytest.approx(4.83, abs=0.001)
    assert 512 / (4 * words + 4) == pytest.approx(4.74, abs=0.001)
    assert 512 / Row((3,) * 256, norm=True).nbytes(1) == pytest.approx(5.22, abs=0.005)


def cosine(levels, power):
    """E cos(ψ - ψ̂) for angles of density sin^power(2ψ) on [0, π/2] at their nearest levels."""
    x = np.linspace(0, math.pi / 2, 100_001)
    density = np.sin(2 * x) ** power
    off = np.abs(x[:, None] - np.array(levels)).min(axis=1)
    return integrate.trapezoid(density * np.cos(off), x) / integrate.trapezoid(density, x)


def test_the_error_of_polar_coordinates():
    form = Polar(64, (4, 2, 2, 2))
    cosines = [math.sin(math.pi / 16) / (math.pi / 16)]
    cosines += [cosine(angle(2, level), 2 ** (level - 1) - 1) for level in (2, 3, 4)]
    expected = 2 - 2 * math.prod(cosines)
    x = draw(1, 1, 4000, 64)
    quantizer = polar_quantizer(form)
    error = (quantizer.decode(quantizer.encode(x)) - x).square().mean()
    assert float(error) == pytest.approx(expected, rel=0.02)
    assert expected == pytest.approx(0.0321, abs=0.0005)


def test_angles_are_independent_and_have_the_papers_density():
    found, radius = polar_angles(draw(40000, 16), 4)
    for level, angles in enumerate(found[1:], start=2):
        # E sin²(2ψ) for a density ∝ sin^n(2ψ) is (n + 1) / (n + 2)
        n = 2 ** (level - 1) - 1
        assert float((2 * angles).sin().square().mean()) == pytest.approx((n + 1) / (n + 2), abs=0.01)
    columns = torch.cat([a[:, :1] for a in found] + [radius], dim=-1)
    assert float((torch.corrcoef(columns.T) - torch.eye(5)).abs().max()) < 0.02


def test_published_polar_bits():
    assert 8 * Polar(64, (4, 2, 2, 2)).nbytes(1) / 64 == 3.875

"""Rotations and the Karhunen-Loève map of ``sight``, against what defines them."""

import math

import pytest
import torch

from kvsight.errors import KVSightError
from kvsight.methods import get
from kvsight.methods.base import Budget
from kvsight.quantizers import lloyd_max
from kvsight.quantizers.lloyd_max import gaussian, row_quantizer
from kvsight.retention import Retention
from kvsight.stats import Moments, SideStats
from kvsight.transforms import Transform, haar, hadamard, karhunen_loeve, sqrtm
from kvsight.waterfill import reverse_water_fill

DIMS = (4, 5, 64, 80, 96, 128, 256)
DISTORTION = [1.0, *(gaussian(bits).distortion for bits in range(1, 9))]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(heads, dim, seed, spread=2.0):
    """Random symmetric matrices with eigenvalues from 10^-spread to 1."""
    q = torch.linalg.qr(draw(heads, dim, dim, seed=seed))[0]
    return q * torch.logspace(0, -spread, dim, dtype=torch.float64) @ q.mT


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("make", [hadamard, haar])
def test_rotations_are_orthogonal(make, dim):
    matrix = make(dim, 3).matrix[0]
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-13)
    assert torch.equal(make(dim, 3).inverse_matrix[0], matrix.T)
    assert not all(torch.equal(make(dim, seed).matrix[0], matrix) for seed in range(4, 8))


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_spreads_every_channel_over_all_coordinates(dim):
    size = hadamard(dim, 1).matrix[0].abs() * math.sqrt(dim)
    odd = dim // (dim & -dim)
    # √2·|sin| of the Hartley matrix never vanishes at an odd order; no odd factor, no unevenness
    assert size.min() > 0
    assert size.max() <= math.sqrt(2) + 1e-12
    if odd == 1:
        assert torch.allclose(size, torch.ones_like(size))


def test_haar_rotations_are_uniform():
    # tr Q has mean 0 and variance 1 over O(d); QR without the sign rule has mean far from 0
    traces = torch.stack([haar(6, seed).matrix[0].trace() for seed in range(1500)])
    error = 1 / math.sqrt(len(traces))
    assert abs(float(traces.mean())) < 5 * error
    assert float(traces.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2) * error)


def test_square_roots():
    metric = positive(2, 6, seed=1)
    root, inverse = sqrtm(metric)
    assert torch.allclose(root @ root, metric, atol=1e-14)
    assert torch.allclose(root @ inverse, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), atol=1e-12)
    with pytest.raises(KVSightError, match="positive definite; its smallest eigenvalue is 0"):
        sqrtm(torch.zeros(1, 3, 3))


@pytest.mark.parametrize("dim", [4, 5, 64])
def test_karhunen_loeve_diagonalises_both(dim):
    metric, covariance = positive(2, dim, seed=2), positive(2, dim, seed=3)
    transform, variances = karhunen_loeve(metric, covariance)
    unit = transform.matrix.mT @ covariance @ transform.matrix
    assert torch.allclose(unit, torch.eye(dim, dtype=torch.float64).expand(2, dim, dim), atol=1e-9)
    # an error in coordinate i costs λ_i: M⁻ᵀ-coordinates of the metric are diag(λ)
    cost = transform.inverse_matrix @ metric @ transform.inverse_matrix.mT
    assert torch.allclose(cost, torch.diag_embed(variances), atol=1e-12)
    assert torch.equal(variances, variances.sort(descending=True).values)
    trace = (metric @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(variances.sum(-1), trace)


def test_karhunen_loeve_of_a_flat_direction_is_finite():
    flat = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)).unsqueeze(0)
    transform, variances = karhunen_loeve(torch.eye(3, dtype=torch.float64).unsqueeze(0), flat)
    assert variances[0].tolist() == pytest.approx([2, 1, 0])
    assert torch.allclose(transform.inverse(transform.forward(draw(1, 5, 3))), draw(1, 5, 3))


def metric_error(transform: Transform, widths, x, metric):
    """E eᵀ·metric·e of static Gaussian codes in the coordinates of ``transform``."""
    quantizer = row_quantizer(widths, gaussian)
    y = torch.zeros_like(x)
    y[..., : quantizer.format.stored] = quantizer.decode(quantizer.encode(transform.forward(x))).double()
    error = transform.inverse(y) - x
    return float(torch.einsum("hni,hij,hnj->n", error, metric, error).mean())


@pytest.mark.parametrize("rate", [1, 2, 4])
def test_the_weighted_error_is_what_water_filling_counts(rate):
    # Σ λ_i D(b_i) on Gaussian vectors with that covariance
    dim = 16
    metric, covariance = positive(1, dim, seed=4), positive(1, dim, seed=5)
    x = draw(1, 20_000, dim, seed=6) @ torch.linalg.cholesky(covariance).mT
    transform, variances = karhunen_loeve(metric, covariance)
    widths = reverse_water_fill(variances[0], rate * dim, DISTORTION)
    predicted = sum(v * DISTORTION[w] for v, w in zip(variances[0].tolist(), widths, strict=True))
    assert metric_error(transform, widths, x, metric) == pytest.approx(predicted, rel=0.03)


def test_no_other_orthogonal_basis_of_the_whitened_metric_does_better():
    # at a high rate the cost is the product of variances, which eigenvectors minimise (Hadamard)
    dim = 8
    metric, covariance = positive(1, dim, seed=7), positive(1, dim, seed=8)
    x = draw(1, 20_000, dim, seed=9) @ torch.linalg.cholesky(covariance).mT
    best, variances = karhunen_loeve(metric, covariance)
    widths = reverse_water_fill(variances[0], 3 * dim, DISTORTION)
    ours = metric_error(best, widths, x, metric)
    root, inverse = sqrtm(metric)
    for seed in range(3):
        turn = torch.linalg.qr(draw(1, dim, dim, seed=seed + 20))[0]
        spread = (turn.mT @ root @ covariance @ root @ turn).diagonal(dim1=-2, dim2=-1)
        order = spread[0].argsort(descending=True)
        turn, spread = turn[..., order], spread[:, order]
        forward = root @ turn / spread.sqrt().unsqueeze(-2)
        other = Transform(dim, None, forward, spread.sqrt().unsqueeze(-1) * turn.mT @ inverse)
        filled = reverse_water_fill(spread[0], 3 * dim, DISTORTION)
        assert metric_error(other, filled, x, metric) > 1.05 * ours


@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_sight_costs_what_its_bits_predict_on_gaussian_vectors(rate, monkeypatch):
    # vectors of the calibration's own kind need no room for larger ones
    monkeypatch.setattr(lloyd_max, "_TAIL_SHARE", 0.0)
    dim = 32
    metric, covariance = positive(1, dim, seed=10), positive(1, dim, seed=11)
    x = draw(1, 20_000, dim, seed=12) @ torch.linalg.cholesky(covariance).mT + draw(1, 1, dim, seed=13)
    fit, test = x[:, :10_000], x[:, 10_000:]
    stats = SideStats(Moments.zero(1, dim).add(fit), metric, fit[:, :2000])
    recipe = get("sight")
    budget = Budget(rate, 1024, Retention(0, 0), torch.bfloat16)
    (placement,) = recipe.build(
        "k", stats, budget, recipe.with_defaults({"shrink": 1e-6, "scales": "static"})
    )
    codec = placement.codec
    _, variances = karhunen_loeve(metric, covariance)
    wanted = reverse_water_fill(variances[0], int(rate * dim), DISTORTION)
    predicted = sum(v * DISTORTION[w] for v, w in zip(variances[0].tolist(), wanted, strict=True))
    error = codec.decode(codec.encode(test)).double() - test
    measured = float(torch.einsum("hni,hij,hnj->n", error, metric, error).mean())
    assert measured == pytest.approx(predicted, rel=0.05)


def test_an_identity_metric_leaves_the_principal_axes():
    covariance = positive(1, 6, seed=14)
    transform, variances = karhunen_loeve(torch.eye(6, dtype=torch.float64).unsqueeze(0), covariance)
    assert torch.allclose(variances, torch.linalg.eigvalsh(covariance).flip(-1))
    columns = transform.inverse_matrix / transform.inverse_matrix.norm(dim=-1, keepdim=True)
    assert torch.allclose(columns @ columns.mT, torch.eye(6, dtype=torch.float64), atol=1e-10)

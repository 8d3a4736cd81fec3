"""Codebooks against closed forms, published tables, optimality conditions and simulation.

Simulations are seeded; their bounds are five standard errors, so a fresh seed would fail once in two
million runs.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from kvsight.quantizers.lloyd_max import gaussian, row_quantizer, sphere, uniform
from kvsight.transforms import haar

# Max 1960, tables I and II; TurboQuant (arXiv 2504.19874) prints the first four as .36 .117 .03 .009
DISTORTION = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505, 6: 0.000644}
LEVELS = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}
UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495}


@pytest.mark.parametrize(("bits", "distortion"), DISTORTION.items())
def test_gaussian_distortion(bits, distortion):
    assert gaussian(bits).distortion == pytest.approx(distortion, rel=1e-3)


@pytest.mark.parametrize(("bits", "upper"), LEVELS.items())
def test_gaussian_levels(bits, upper):
    assert gaussian(bits).levels[len(upper) :] == pytest.approx(upper, abs=6e-5)


@pytest.mark.parametrize(("bits", "distortion"), UNIFORM.items())
def test_uniform_distortion(bits, distortion):
    assert uniform(bits).distortion == pytest.approx(distortion, rel=1e-3)
    assert uniform(bits).distortion >= gaussian(bits).distortion * (1 - 1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_lies_between_shannon_and_panter_dite(bits):
    assert 4.0**-bits < gaussian(bits).distortion < math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_panter_dite_is_the_limit():
    ratios = [gaussian(bits).distortion * 4.0**bits for bits in range(1, 9)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(math.sqrt(3) * math.pi / 2, rel=0.01)


def test_each_further_bit_gains_less():
    # greedy water-filling is optimal only because of this
    for book in (gaussian, uniform):
        steps = [1.0, *(book(bits).distortion for bits in range(1, 9))]
        gains = [a - b for a, b in itertools.pairwise(steps)]
        assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("bits", range(1, 7))
def test_gaussian_levels_are_centroids_of_their_cells(bits):
    levels = np.array(gaussian(bits).levels)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    centroids = -np.diff(density) / np.diff(special.ndtr(edges))
    assert levels == pytest.approx(centroids, abs=1e-6)


@pytest.mark.parametrize("dim", [4, 5, 64, 80, 128, 256])
def test_one_bit_on_the_sphere_has_a_closed_form(dim):
    # the level is E|x| of √d times a coordinate of a uniform unit vector
    level = math.sqrt(dim / math.pi) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2))
    assert sphere(1, dim).levels[1] == pytest.approx(level, rel=1e-6)
    assert sphere(1, dim).distortion == pytest.approx(1 - level**2, rel=1e-5)


@pytest.mark.parametrize("dim", [4, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_sphere_distortion_is_the_integral(dim, bits):
    book = sphere(bits, dim)
    levels = np.array(book.levels)
    edges = np.concatenate([[-math.sqrt(dim)], (levels[1:] + levels[:-1]) / 2, [math.sqrt(dim)]])

    def density(x):
        return max(0.0, 1 - x * x / dim) ** ((dim - 3) / 2)

    total = integrate.quad(density, -math.sqrt(dim), math.sqrt(dim))[0]
    cells = zip(levels, itertools.pairwise(edges), strict=True)
    error = sum(integrate.quad(lambda x, c=c: (x - c) ** 2 * density(x), *cell)[0] for c, cell in cells)
    assert book.distortion == pytest.approx(error / total, rel=1e-4)


def test_the_sphere_tends_to_the_gaussian():
    gaps = [gaussian(3).distortion - sphere(3, dim).distortion for dim in (16, 64, 256, 1024)]
    # the gap falls as 1/d
    assert all(a / b == pytest.approx(4, rel=0.1) for a, b in itertools.pairwise(gaps))
    assert 0 < gaps[-1] < 3e-3 * gaussian(3).distortion


@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (3, 64), (4, 80)])
def test_simulated_unit_vectors_have_the_sphere_distortion(bits, dim):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, dim, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    levels = torch.tensor(sphere(bits, dim).levels, dtype=torch.float64)
    edges = (levels[1:] + levels[:-1]) / 2
    errors = (levels[torch.bucketize(x, edges)] - x).square().mean(dim=-1)
    bound = 5 * float(errors.std()) / math.sqrt(len(errors))
    assert float(errors.mean()) == pytest.approx(sphere(bits, dim).distortion, abs=bound)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rotated_codes_shrink_inner_products_by_one_minus_the_distortion(bits):
    # E<y, x̂> = (1 - D(b)) <y, x> over rotations, 2/π at one bit: TurboQuant, after Thm. 2
    dim, rotations = 16, 300
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 40, dim, generator=generator, dtype=torch.float64)
    y = x + torch.randn(1, 40, dim, generator=generator, dtype=torch.float64)
    quantizer = row_quantizer((bits,) * dim, lambda b: sphere(b, dim), norm=True)
    ratios = []
    for seed in range(rotations):
        rotation = haar(dim, seed)
        decoded = rotation.inverse(quantizer.decode(quantizer.encode(rotation.forward(x))).double())
        ratios.append(float((y * decoded).sum() / (y * x).sum()))
    bound = 5 * float(np.std(ratios)) / math.sqrt(rotations) + 2**-11
    assert np.mean(ratios) == pytest.approx(1 - sphere(bits, dim).distortion, abs=bound)
    assert bound < sphere(bits, dim).distortion / 3

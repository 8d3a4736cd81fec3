"""Signs of sketches, the product form and what its bit costs, against their theory.

Fixed maps and many random vectors stand for many maps: both kinds of sketch are rotation invariant.
"""

import math

import pytest
import torch

from kvsight import distortion as d
from kvsight.codec import Codec
from kvsight.formats import Grouped
from kvsight.methods.rotated import mse, product, signs
from kvsight.quantizers.lloyd_max import sphere
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.transforms import haar, identity

DIM = 64
KINDS = ("gaussian", "orthogonal")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coded(codec: Codec, x):
    """x [n, d] coded and decoded in fp64."""
    return codec.decode(codec.encode(x[None, None]))[0, 0].double()


def unit(n, seed, dim=DIM):
    return torch.nn.functional.normalize(draw(n, dim, seed=seed), dim=-1)


def estimates(kind, count, cosine, seeds=8, n=3000):
    """⟨q, x̂⟩ of unit pairs with this cosine, over maps and pairs."""
    out = []
    for seed in range(seeds):
        x, other = unit(n, 2 * seed), draw(n, DIM, seed=2 * seed + 1)
        across = torch.nn.functional.normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
        q = cosine * x + math.sqrt(1 - cosine**2) * across
        out.append((q * coded(signs(DIM, count, kind, seed), x)).sum(-1))
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [DIM, 2 * DIM])
def test_sketched_scores_are_unbiased_over_draws(kind, count):
    for cosine in (0.0, 0.6, 1.0):
        found = estimates(kind, count, cosine)
        deviation = float(found.std()) / math.sqrt(len(found))
        # the norm is rounded to fp16, and one map's own bias averages out over eight only
        assert float(found.mean()) == pytest.approx(cosine, abs=5 * deviation + 0.012)


@pytest.mark.parametrize("count", [DIM, 4 * DIM])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
def test_gaussian_sketches_have_the_variance_of_qjl(count, cosine):
    """π/2 - cos² per sign (QJL, Lemma 3.5)."""
    variance = count * float(estimates("gaussian", count, cosine).var())
    assert variance == pytest.approx(math.pi / 2 - cosine**2, rel=0.06)


@pytest.mark.parametrize("count", [DIM, 4 * DIM])
def test_orthogonal_sketches_of_orthogonal_queries_have_less(count):
    """π/2 - 1, however many rotations are stacked."""
    variance = count * float(estimates("orthogonal", count, 0.0).var())
    assert variance == pytest.approx(math.pi / 2 - 1, rel=0.05)


@pytest.mark.parametrize(("kind", "factor"), [("gaussian", math.pi / 2), ("orthogonal", math.pi / 2 - 1)])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_product_form_leaves_that_much_of_the_residual(kind, factor, bits):
    """Reconstruction error factor · D(b - 1): a Gaussian sketch is worse than dropping the residual."""
    x = unit(2000, 3)
    errors = [
        float((coded(product(DIM, bits, haar(DIM, seed), kind, seed), x) - x).square().sum(-1).mean())
        for seed in range(4)
    ]
    left = sphere(bits - 1, DIM).distortion if bits > 1 else 1.0
    assert sum(errors) / 4 == pytest.approx(factor * left, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_form_is_unbiased_and_plain_codes_shrink(kind):
    x = unit(4000, 5)
    for bits in (1, 2, 3):
        shrunk = mse(DIM, bits, haar(DIM, 1))
        kept = 1 - sphere(bits, DIM).distortion
        assert float((x * coded(shrunk, x)).sum(-1).mean()) == pytest.approx(kept, rel=2e-3)
        true = mse(DIM, bits, haar(DIM, 1), unshrink=True)
        assert float((x * coded(true, x)).sum(-1).mean()) == pytest.approx(1, rel=2e-3)
        signed = [product(DIM, bits, haar(DIM, seed), kind, seed) for seed in range(6)]
        both = [float((x * coded(codec, x)).sum(-1).mean()) for codec in signed]
        assert sum(both) / 6 == pytest.approx(1, abs=0.02)


def test_the_shrink_at_one_bit_is_two_over_pi():
    assert 1 - sphere(1, 4096).distortion == pytest.approx(2 / math.pi, rel=1e-3)


@pytest.mark.parametrize(("bits", "gaussian", "orthogonal"), [(2, 4.86, 1.766), (3, 5.34, 1.941)])
def test_a_sketch_loses_to_a_bit_at_equal_bits(bits, gaussian, orthogonal):
    """Variance of scores and, since KL is half of it, of attention: factor · D(b - 1) / D(b)."""
    x, q = draw(400, DIM, seed=7), draw(64, DIM, seed=8)
    exact = d.scores(q, x).log_softmax(-1)

    def damage(codec):
        return float(d.attention_kl(exact, d.scores(q, coded(codec, x)).log_softmax(-1)).mean())

    plain = sum(damage(mse(DIM, bits, haar(DIM, seed))) for seed in range(6))
    for kind, ratio in (("gaussian", gaussian), ("orthogonal", orthogonal)):
        signed = sum(damage(product(DIM, bits, haar(DIM, seed), kind, seed)) for seed in range(6))
        assert signed / plain == pytest.approx(ratio, rel=0.12)


@pytest.mark.parametrize(("bits", "ratio"), [(3, 15.7), (4, 71.5), (5, 305)])
def test_dropping_a_direction_costs_more_than_integers_by_twelve_steps_over_range_squared(bits, ratio):
    """σ² against Δ²/12 with Δ = ρσ/(2^b - 1): 12·2^2b/ρ² (arXiv 2604.11501, Prop. 2, for any range ρσ)."""
    tokens, dim = 512, 400
    x = draw(tokens, dim, seed=9)
    wide = draw(tokens, dim, seed=10).uniform_(-1, 1, generator=torch.Generator().manual_seed(4))
    for sample, wanted, tolerance in ((x, ratio, 0.03), (wide, (2**bits - 1) ** 2, 0.03)):
        codec = Codec("int", identity(dim), GroupedQuantizer(Grouped(dim, bits, tokens, "token")))
        left = (coded(codec, sample) - sample).square().mean(0)
        assert float(sample.var(0).mean() / left.mean()) == pytest.approx(wanted, rel=tolerance)
        reach = (sample.amax(0) - sample.amin(0)) / sample.std(0)
        predicted = float((12 * (2**bits - 1) ** 2 / reach.square()).mean())
        assert predicted == pytest.approx(wanted, rel=0.04)


def test_coded_keys_take_mass_from_exact_ones_and_the_gain_gives_it_back():
    """512 keys, 64 of them exact, score errors of variance 2: .125 of the mass, then .053, then .130."""
    scores, error = draw(4000, 512, seed=11), math.sqrt(2) * draw(4000, 512, seed=12)
    error[:, :64] = 0

    def mass(s):
        return float(s.softmax(-1)[:, :64].sum(-1).mean())

    assert mass(scores) == pytest.approx(0.125, abs=0.002)
    assert mass(scores + error) == pytest.approx(0.053, abs=0.003)
    corrected = scores + error
    corrected[:, 64:] -= 1
    assert mass(corrected) == pytest.approx(0.130, abs=0.005)


def test_the_gain_of_rotated_codes_is_half_the_variance_of_their_scores():
    lengths = torch.linspace(0.5, 2, 64, dtype=torch.float64)
    keys, queries = lengths.unsqueeze(-1) * draw(64, DIM, seed=13), draw(64, DIM, seed=14)
    errors = [d.scores(queries, coded(mse(DIM, 2, haar(DIM, s)), keys) - keys) for s in range(20)]
    measured = torch.stack(errors).square().mean(0) / 2
    gain = d.rotated_gain(queries, keys.norm(dim=-1), sphere(2, DIM).distortion)
    assert float(gain.mean()) == pytest.approx(float(measured.mean()), rel=0.05)
    assert float(torch.corrcoef(torch.stack([gain.mean(0), measured.mean(0)]))[0, 1]) > 0.95


def test_the_gain_of_uniform_steps_is_exact_where_its_expansion_is_not():
    """log(sinh 2 / 2) = .5952, against 2²/6 = .6667."""
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(d.uniform_gain(one, 4 * one)) == pytest.approx(0.5952, abs=1e-4)
    assert float(d.uniform_gain(one, 1e-6 * one)) == pytest.approx(1e-12 / 24, rel=1e-6)
    assert float(d.uniform_gain(one, 2000 * one)) == pytest.approx(1000 - math.log(2000), rel=1e-9)
    error = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4 - 2
    assert float(error.exp().mean().log()) == pytest.approx(0.5952, abs=0.02)

"""Vector quantisation against brute force, and the properties that make k-means a fit."""

from itertools import pairwise

import pytest
import torch

from kvsight.formats import Indexed
from kvsight.quantizers.vector import VectorQuantizer, kmeans, residual_kmeans


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distortion(x, centres, metric=None, weights=None):
    """Mean weighted distance to the nearest of centres [P, K, s], by brute force."""
    off = x.unsqueeze(-2) - centres.unsqueeze(1)
    distance = off.square().sum(-1) if metric is None else ((off @ metric.unsqueeze(1)) * off).sum(-1)
    nearest = distance.amin(-1)
    return float(nearest.mean() if weights is None else (nearest * weights).sum() / weights.sum())


def test_two_clusters_are_found_exactly():
    x = torch.tensor([[[0.0, 0], [0, 2], [10, 0], [10, 2], [10, 4]]])
    left, right = sorted(kmeans(x, 2)[0].tolist())
    assert left == pytest.approx([0, 1], abs=1e-5)
    assert right == pytest.approx([10, 2], abs=1e-5)


def test_weights_move_centres_and_zero_weights_do_not_count():
    x = torch.tensor([[[0.0], [1], [100]]])
    (centre,) = kmeans(x, 1, weights=torch.tensor([[3.0, 1, 0]]))[0]
    assert centre.item() == pytest.approx(0.25, abs=1e-5)


def test_more_sweeps_never_cost_more():
    x, weights = draw(2, 400, 3), draw(2, 400).abs()
    root = draw(2, 3, 3, seed=1)
    metric = root @ root.mT
    costs = [
        distortion(x, kmeans(x, 16, metric=metric, weights=weights, sweeps=n), metric, weights)
        for n in range(8)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


def test_every_problem_is_fitted_by_itself_and_repeatably():
    x = draw(3, 200, 2)
    together = kmeans(x, 8)
    assert torch.equal(together, kmeans(x, 8))
    assert torch.equal(together, kmeans(x.clone().expand(3, -1, -1), 8))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_vectors_than_centres_are_all_kept(tokens):
    x = draw(2, tokens, 4)
    centres = kmeans(x, 8)
    assert bool(centres.isfinite().all())
    assert distortion(x, centres) < 1e-10


def test_a_cell_without_vectors_keeps_its_centre():
    # all vectors are equal, so that seven of eight cells are empty
    centres = kmeans(torch.full((1, 50, 2), 3.0), 8)
    assert torch.equal(centres, torch.full((1, 8, 2), 3.0, dtype=torch.float64))


def test_large_means_lose_no_digits():
    x = draw(1, 500, 2)
    near, far = kmeans(x, 16), kmeans(x + 1e6, 16) - 1e6
    assert torch.allclose(near, far, atol=1e-4)


def test_stages_code_what_is_left():
    x = draw(1, 500, 4)
    books = residual_kmeans(x, 8, 3)
    form = Indexed(4, 4, 3, stages=3)
    left = x
    for stage in range(3):
        part = VectorQuantizer(Indexed(4, 4, 3), books[:, None, stage : stage + 1])
        left = left - part.decode(part.encode(left.unsqueeze(0)))[0].double()
    whole = VectorQuantizer(form, books.unsqueeze(1))
    decoded = whole.decode(whole.encode(x.unsqueeze(0)))[0]
    assert torch.allclose(x - decoded, left, atol=1e-6)


@pytest.mark.parametrize("strided", [False, True])
def test_cells_join_to_what_was_cut(strided):
    form = Indexed(12, 4, 3, strided=strided)
    y = torch.arange(12.0)
    assert torch.equal(form.join(form.cut(y)), y)
    first = [0, 3, 6, 9] if strided else [0, 1, 2, 3]
    assert form.cut(y)[0].tolist() == first


def test_strided_cells_keep_rope_pairs_together():
    cells = Indexed(64, 8, 8, strided=True).cut(torch.arange(64))
    for cell in cells:
        assert {(int(i) + 32) % 64 for i in cell} == {int(i) for i in cell}


@pytest.mark.parametrize("bits", [1, 5, 8, 9, 11, 16])
def test_indices_of_any_width_come_back(bits):
    form = Indexed(6, 2, bits, stages=2)
    index = torch.randint(0, 2**bits, (5, 2, 3), generator=torch.Generator().manual_seed(bits))
    rows = form.pack(index)
    assert rows.shape == (5, -(-6 * bits // 8))
    assert torch.equal(form.unpack(rows), index)


def test_heads_are_those_asked_for():
    form = Indexed(4, 2, 2)
    own = VectorQuantizer(form, draw(3, 2, 1, 4, 2).float(), draw(3, 2, 2, 2).float())
    picked = own.heads([2, 0])
    assert torch.equal(picked.centroids, own.centroids[[2, 0]])
    assert torch.equal(picked.metric, own.metric[[2, 0]])
    shared = VectorQuantizer(form, draw(1, 2, 1, 4, 2).float())
    assert shared.heads([2, 0]).centroids is shared.centroids

"""Statistics for later positions, against keys and queries that are turned there one by one."""

from dataclasses import replace

import pytest
import torch

from kvsight.errors import KVSightError
from kvsight.reach import spread
from kvsight.rope import pairs
from kvsight.stats import LayerStats, Moments, SideStats, Stats

DIM, HEADS, TOKENS = 8, 2, 60
ROPE = pairs(torch.tensor([1.0, 0.3, 0.02, 0.001]), DIM)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def observed(rope=ROPE, unknown=None):
    keys, queries = draw(HEADS, TOKENS, DIM), draw(HEADS, TOKENS, DIM, seed=1)
    metric = queries.mT @ queries / TOKENS
    key = SideStats(
        Moments.zero(HEADS, DIM).add(keys),
        metric,
        keys.float(),
        damage=3 * metric,
        rope=rope,
        rope_unknown=unknown,
        places=torch.arange(TOKENS),
        query=Moments.zero(HEADS, DIM).add(queries),
    )
    value = SideStats(Moments.zero(HEADS, DIM).add(keys), None, keys.float())
    return Stats((LayerStats(0, None, key, value),), TOKENS), keys, queries


def test_moments_are_those_of_texts_that_begin_anywhere():
    stats, keys, queries = observed()
    key = spread(stats, 1060).layers[0].key
    shifts = torch.linspace(0, 1000, 128).round().long()
    moved = [torch.cat([ROPE.turn(x, s.repeat(TOKENS)) for s in shifts], dim=1) for x in (keys, queries)]
    count = len(shifts) * TOKENS
    torch.testing.assert_close(key.moments.mean, moved[0].mean(1))
    torch.testing.assert_close(key.moments.second, moved[0].mT @ moved[0] / count)
    torch.testing.assert_close(key.metric, moved[1].mT @ moved[1] / count)
    torch.testing.assert_close(key.damage, 3 * key.metric)
    torch.testing.assert_close(key.query.mean, moved[1].mean(1))
    assert (moved[0].abs().amax(1) <= key.moments.peak + 1e-9).all()
    # the slowest pair has hardly moved in the window, and has now
    assert not torch.allclose(key.moments.mean, stats.layers[0].key.moments.mean, atol=0.05)


def test_sampled_keys_are_where_they_say():
    stats, keys, _ = observed()
    key = spread(stats, 1060).layers[0].key
    apart = key.places - torch.arange(TOKENS)
    assert apart.min() >= 0 and key.places.max() < 1060
    # all over the room, not in a part of it
    assert torch.histc(apart.float(), 4, 0, 1000).min() >= TOKENS // 8
    torch.testing.assert_close(key.sample.double(), ROPE.turn(keys, apart), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [1, TOKENS])
def test_windows_that_are_long_enough_stay(positions):
    stats, _, _ = observed()
    assert spread(stats, positions).layers[0].key is stats.layers[0].key


def test_values_and_keys_that_do_not_turn_stay():
    stats, _, _ = observed(rope=None)
    later = spread(stats, 5000).layers[0]
    assert later.key is stats.layers[0].key and later.value is stats.layers[0].value


def test_an_unknown_rotation_is_refused():
    stats, _, _ = observed(rope=None, unknown="its frequencies change")
    with pytest.raises(
        KVSightError, match=r"not known: its frequencies change\. Calibrate on windows of 9"
    ):
        spread(stats, 900)


def test_passages_stay_runs():
    stats, keys, _ = observed()
    layer = stats.layers[0]
    key = replace(layer.key, passages=keys.float(), passage_places=torch.arange(TOKENS))
    moved = spread(replace(stats, layers=(replace(layer, key=key),)), 1060).layers[0].key
    assert torch.equal(moved.passage_places.diff(), torch.ones(TOKENS - 1, dtype=torch.long))
    wanted = ROPE.turn(keys, moved.passage_places - torch.arange(TOKENS))
    torch.testing.assert_close(moved.passages.double(), wanted, atol=1e-5, rtol=1e-5)

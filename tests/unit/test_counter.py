"""One count for all layers, whoever counts."""

import pytest
import torch

from kvsight.cache.counter import Counter


@pytest.fixture
def counter():
    out = Counter(torch.device("cpu"))
    out.advance(10, 64)
    return out


def test_the_first_layer_counts_for_all(counter):
    for total in (11, 11, 11, 14, 14, 9):
        counter.advance(total, 64)
        assert int(counter.seen) == total
    assert counter.settle() == 0


def test_the_host_learns_what_graphs_count(counter, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Counter, "recording", True)
        # two layers of a step that is recorded, and not run
        counter.advance(11, 64)
        counter.advance(11, 64)
        assert int(counter.seen) == 11
        counter.seen.fill_(10)
    # the host has counted one of them already
    for replays in (0, 1, 5):
        counter.seen.fill_(10 + replays)
        assert counter.settle() == replays - 1
    # a layer that holds 11 itself goes on from 15
    counter.advance(11 + counter.settle() + 1, 64)
    assert int(counter.seen) == 16


def test_graphs_end_where_there_is_no_room(counter):
    counter.advance_in_graph(2, 12)
    with pytest.raises(RuntimeError, match="reserve more tokens"):
        counter.advance_in_graph(1, 12)

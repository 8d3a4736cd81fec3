"""The closed form of what a cache holds, against a cache that really appends and hides."""

import itertools

import pytest
import torch

from kvsight.cache import side as sides
from kvsight.codec import Codec, Placement
from kvsight.formats import Dense, Grouped
from kvsight.plan import side_block, side_retention
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.retention import Hold, Retention, Stored
from kvsight.transforms import identity

DIM = 2
CHUNKINGS = ([1] * 24, [7, 1, 1, 9, 1, 5], [24], [3] * 8)


def placement(block):
    if block == 1:
        quantizer = DenseQuantizer(Dense(DIM, torch.float32))
    else:
        quantizer = GroupedQuantizer(Grouped(DIM, 3, block, "token"))
    return Placement((0,), Codec("test", identity(DIM), quantizer))


def simulated(retention, block, chunking):
    """(seen, state) after each chunk, as a cache layer drives its sides."""
    like = torch.randn(1, 1, sum(chunking), DIM, generator=torch.Generator().manual_seed(0))
    state = sides.start((placement(block),), retention, torch.bfloat16, like)
    seen = 0
    for n in chunking:
        state = sides.append(state, like[:, :, seen : seen + n])
        if retention.sliding is not None:
            state = sides.hide(state, retention.sliding - 1)
        seen += n
        yield seen, state


@pytest.mark.parametrize("sliding", [None, 1, 2, 5, 12, 40])
@pytest.mark.parametrize("block", [1, 4])
def test_the_closed_form_is_what_a_cache_holds(sliding, block):
    form = placement(block).codec.format
    for sinks, window, chunking in itertools.product((0, 1, 5), (0, 1, 6), CHUNKINGS):
        retention = Retention(sinks, window, sliding)
        for seen, state in simulated(retention, block, chunking):
            kept = retention.stored(seen, block)
            case = (retention, block, chunking, seen)
            held = (state.sinks.shape[2], state.coded[0].tokens, state.tail.shape[2])
            assert held == (kept.sinks, kept.coded, kept.tail), case
            assert state.visible == kept.visible, case
            assert state.nbytes == form.nbytes(kept.coded) + kept.dense * DIM * 2, case


@pytest.mark.parametrize("block", [1, 4, 32])
def test_at_least_the_window_stays_exact_and_less_than_a_block_waits(block):
    for seen, sinks, window in itertools.product(range(80), (0, 3), (0, 10)):
        kept = Retention(sinks, window).stored(seen, block)
        assert kept.sinks == min(sinks, seen)
        assert kept.sinks + kept.coded + kept.tail == kept.visible == seen
        assert min(window, seen - kept.sinks) <= kept.tail < window + block
        assert kept.coded % block == 0


def test_a_sliding_layer_holds_less_than_a_block_more_than_it_shows():
    for seen, sliding, block in itertools.product(range(80), (1, 2, 9, 33), (1, 4, 32)):
        kept = Retention(4, 6, sliding).stored(seen, block)
        assert kept.sinks == 0
        assert kept.visible == min(seen, sliding - 1)
        assert kept.visible <= kept.coded + kept.tail < kept.visible + block
        assert kept.tail >= min(6, kept.visible)


def test_by_hand():
    assert Retention(4, 10).stored(100, 32) == Stored(4, 64, 32, 100)
    assert Retention(4, 10).stored(3, 32) == Stored(3, 0, 0, 3)
    assert Retention(4, 10, sliding=50).stored(100, 32) == Stored(0, 32, 36, 49)
    assert Retention(4, 10, sliding=50).stored(100, 1) == Stored(0, 39, 10, 49)


def test_a_method_asks_for_a_window_and_for_larger_steps():
    """KIVI with R = 8: keys in steps of 8, values behind exactly the 8 newest, whatever the chunks."""
    quantizer = GroupedQuantizer(Grouped(DIM, 3, 4, "token"))
    keys = (Placement((0,), Codec("test", identity(DIM), quantizer), hold=Hold(commit=8)),)
    per_token = GroupedQuantizer(Grouped(DIM, 3, 2, "channel"))
    values = (Placement((0,), Codec("test", identity(DIM), per_token), hold=Hold(window=8)),)
    like = torch.randn(1, 1, 24, DIM, generator=torch.Generator().manual_seed(0))
    for placements, waiting in ((keys, lambda n: n % 8), (values, lambda n: min(n, 8))):
        for chunking in CHUNKINGS:
            state = sides.start(placements, Retention(0, 0), torch.bfloat16, like)
            seen = 0
            for n in chunking:
                state = sides.append(state, like[:, :, seen : seen + n])
                seen += n
                assert state.tail.shape[2] == waiting(seen)
                kept = side_retention(Retention(0, 0), placements).stored(seen, side_block(placements))
                assert (kept.coded, kept.tail) == (state.coded[0].tokens, state.tail.shape[2])
    # a plan's own window wins where it is larger
    assert Retention(1, 9).holding(Hold(window=8)) == Retention(1, 9)
    assert Retention(1, 3, 20).holding(Hold(window=8)) == Retention(1, 8, 20)

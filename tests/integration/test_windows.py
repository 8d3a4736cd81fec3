"""Layers whose tokens move, by a sliding window or exact last ones, are in tiles what they are in rows."""

import copy
from functools import cache as once

import pytest
import torch
from zoo import build, near, read, tokens

import kvsight
from kvsight.cache.packed import left_padding
from kvsight.cache.windows import WindowedTiles
from kvsight.errors import KVSightError
from kvsight.eval.selftest import checked_bytes

WINDOW = 90
# to the first sliding layer in tiles, over several tiles' ends, and a chunk that goes through rows
SIZES = (100, *[1] * 70, 3, 16, 2, 40, *[1] * 90)


@once
def fitted(kind, window=0, sinks=0):
    """A model with sliding layers beside full ones where its kind has them, and a plan in tiles."""
    more = {} if kind == "llama" else {"sliding_window": WINDOW}
    subject = build(kind, max_position_embeddings=512, **more).eval()
    ids = [tokens(2, 160, seed=5)]
    return subject, kvsight.fit(
        subject, ids, bits=8.0, options={"layout": "tiles"}, window=window, sinks=sinks
    )


def caches(kind, plan, **options):
    subject, made = plan
    return [
        kvsight.PackedCache(made, subject.config, tiles=tiles, monitor=False, **options)
        for tiles in (False, True)
    ]


def windowed(cache):
    return [isinstance(layer.tiles, WindowedTiles) for layer in cache.layers]


CASES = {
    "mistral": ("mistral",),
    "gemma2": ("gemma2",),
    "gpt-oss": ("gpt-oss",),
    "last": ("llama", 20),
    "first and last": ("llama", 20, 3),
    "both": ("gemma2", 7),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_of_any_size(case):
    plan = fitted(*CASES[case])
    subject, ids = plan[0], tokens(2, sum(SIZES), seed=6)
    rows, tiled = caches(case, plan)
    assert near(*(read(subject, cache, ids, SIZES) for cache in (rows, tiled)))
    moves = [layer.layer.window is not None or CASES[case][1:] != () for layer in tiled.layers]
    assert windowed(tiled) == moves and any(moves)
    for layer, other in zip(tiled.layers, rows.layers, strict=True):
        assert layer.cumulative_length == other.cumulative_length == ids.shape[1]
        assert layer.get_mask_sizes(1) == other.get_mask_sizes(1)
        if layer.layer.window is not None:
            assert layer.tiles.room <= WINDOW + 3 * 64
    assert checked_bytes(tiled, plan[1], ids) == rows.nbytes
    assert near(*(read(subject, cache, tokens(2, 3, seed=7), (1, 2)) for cache in (rows, tiled)))


@pytest.mark.parametrize("case", ["mistral", "gemma2", "both"])
def test_left_padding(case):
    plan = fitted(*CASES[case])
    subject, ids = plan[0], tokens(3, 260, seed=6)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    mask[1, :7] = 0
    caches_ = caches(case, plan)
    logits = [read(subject, cache, ids, (100, *[1] * 20, 5, *[1] * 60), mask=mask) for cache in caches_]
    real = mask[:, : logits[0].shape[1]].bool()
    assert near(*(x[real] for x in logits))
    assert any(windowed(caches_[1])) and caches_[1].reads.decoded == 0


def test_masks_of_windows():
    at = torch.arange(12)
    causal = at <= at[6:10].unsqueeze(-1) + 2
    seen = causal & (at > at[6:10].unsqueeze(-1) + 2 - 9)
    mask = seen.expand(2, 1, 4, 12).clone()
    assert left_padding(mask, 9).tolist() == [0, 0]
    assert left_padding(mask) is None and left_padding(mask, 8) is None
    for hidden in (1, 2, 5):
        mask[1, :, :, :hidden] = False
        assert (left_padding(mask, 9) - torch.tensor([0, hidden])).clamp_min(0).sum() == 0
        assert torch.equal(mask[1, 0], seen & (at >= left_padding(mask, 9)[1]))
    mask[0, 0, 1, 7] = False
    assert left_padding(mask, 9) is None


def test_whatever_else_a_cache_does(tmp_path):
    plan = fitted("gemma2")
    subject, ids = plan[0], tokens(2, 200, seed=6)
    cache, kept = caches("gemma2", plan)[1], caches("gemma2", plan)[0]
    for each in (cache, kept):
        read(subject, each, ids, (80, *[1] * 60))
    fork = copy.deepcopy(cache)
    assert windowed(fork) == windowed(cache)
    cache.save(tmp_path / "cache")
    loaded = kvsight.PackedCache.load(tmp_path / "cache", plan[1], subject.config, tiles=True)
    for each in (kept, fork, loaded):
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
    more = ids[[1, 1, 0, 0]]
    wanted = read(subject, kept, more, [1] * 50, start=140)
    for each in (fork, loaded):
        assert near(read(subject, each, more, [1] * 50, start=140), wanted)
        assert any(windowed(each))
    # generate with a draft records the past, and takes tokens back
    for each in (kept, fork):
        each.activate_past_recording()
        read(subject, each, more, (3,), start=190)
        each.crop(-2)
    assert near(*(read(subject, each, more, [1] * 5, start=191) for each in (kept, fork)))


def test_raw_prefill_sees_new_tokens_themselves():
    plan = fitted("mistral")
    subject, ids = plan[0], tokens(2, sum(SIZES), seed=6)
    assert near(*(read(subject, c, ids, SIZES) for c in caches("mistral", plan, prefill="raw")))


def test_readers_that_know_no_tiles():
    plan = fitted("mistral")
    subject, ids = plan[0], tokens(2, 200, seed=6)
    rows, tiled = caches("mistral", plan)
    for cache in (rows, tiled):
        read(subject, cache, ids, (100, *[1] * 50))
    with torch.no_grad(), pytest.warns(UserWarning, match="decodes this cache"):
        outside = [
            subject(ids[:, 150:153], past_key_values=c, use_cache=True).logits for c in (rows, tiled)
        ]
    assert all(windowed(tiled)) and near(*outside)


def test_graphs_cannot_hold_moving_tokens(monkeypatch):
    plan = fitted("mistral")
    subject, ids = plan[0], tokens(2, 200, seed=6)
    cache = caches("mistral", plan)[1]
    read(subject, cache, ids, (100, 1))
    with pytest.raises(KVSightError, match="no sliding window"):
        cache.reserve(200)
    monkeypatch.setattr("kvsight.cache.counter.Counter.recording", True)
    with pytest.raises(KVSightError, match="a graph cannot hold steps"):
        read(subject, cache, ids, (1,), start=101)

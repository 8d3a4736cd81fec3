"""A decoding step that torch compiled: one graph for all steps, with the logits and bytes of eager ones."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter
from zoo import tokens

import kvsight
from kvsight.cache import tiles
from kvsight.cache.counter import Counter
from kvsight.errors import KVSightError

LAYOUT = (("layout", "tiles"),)


@pytest.fixture
def subject(model):
    torch.compiler.reset()
    yield model("llama")
    torch.compiler.reset()


@pytest.fixture
def fed(subject, plan):
    """A cache that has room to token 140, fed with 124 tokens."""
    cache = kvsight.PackedCache(plan("llama", "sight", bits=4.0, options=LAYOUT, sinks=3), tiles=True)
    with torch.no_grad(), kvsight.enable(subject):
        subject(tokens(2, 124), past_key_values=cache, use_cache=True)
    cache.reserve(140)
    return cache


def stepper(run, cache, ids):
    """Logits of one token after another; positions live beside the tokens, as on a device."""

    def step(i, **more):
        at = torch.full((2, 1), i)
        with torch.no_grad():
            return run(
                ids[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True, **more
            ).logits

    return step


def test_a_step_is_compiled_once(subject, fed):
    ids, counter = tokens(2, 200), CompileCounter()
    kept = copy.deepcopy(fed)
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend=counter)
    with kvsight.enable(subject):
        wanted, found = stepper(subject, kept, ids), stepper(run, fed, ids)
        # over the end of a tile; one in between is eager
        for i in range(124, 138):
            step = found if i != 130 else stepper(subject, fed, ids)
            assert torch.equal(step(i), wanted(i))
        assert counter.frame_count == 1
        assert fed.get_seq_length() == kept.get_seq_length() == 138
        assert fed.nbytes == kept.nbytes
        for layer, other in zip(fed.layers, kept.layers, strict=True):
            for state, same in zip(layer.tiles.states(), other.tiles.states(), strict=True):
                for a, b in zip(state.coded, same.coded, strict=True):
                    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        seen = fed.layers[0].tiles.seen
        seen.fill_(fed.layers[0].tiles.first + fed.layers[0].tiles.room)
        with pytest.raises(RuntimeError, match="past the room"):
            found(138)
        seen.fill_(138)
        # what follows goes on from where graphs counted to
        for cache in (fed, kept):
            cache.crop(-3)
        assert torch.equal(stepper(subject, fed, ids)(135), wanted(135))


def test_positions_may_be_left_to_the_cache(model, plan):
    subject, ids, counter = model("llama-1layer"), tokens(2, 80), CompileCounter()
    fitted = plan("llama-1layer", "sight", bits=4.0, options=LAYOUT)
    cache, kept = (kvsight.PackedCache(fitted, tiles=True) for _ in range(2))
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend=counter)
    with torch.no_grad(), kvsight.enable(subject):
        for c in (cache, kept):
            subject(ids[:, :70], past_key_values=c, use_cache=True)
        cache.reserve(80)
        for i in range(70, 74):
            found, wanted = (
                call(ids[:, i : i + 1], past_key_values=c, use_cache=True).logits
                for call, c in ((run, cache), (subject, kept))
            )
            assert torch.equal(found, wanted)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_graphs_may_break_around_the_cache(model, plan):
    """From the first prompt on, with masks, and where nobody asked for one graph."""
    torch.compiler.reset()
    subject, ids = model("llama-1layer"), tokens(2, 81)
    fitted = plan("llama-1layer", "sight", bits=4.0, options=LAYOUT)
    cache, kept = (kvsight.PackedCache(fitted, tiles=True) for _ in range(2))
    run = torch.compile(subject, backend="eager")
    with torch.no_grad(), kvsight.enable(subject):
        for start, stop in ((0, 80), (80, 81)):
            mask = torch.ones(2, stop, dtype=torch.long)
            found, wanted = (
                call(ids[:, start:stop], past_key_values=c, use_cache=True, attention_mask=mask).logits
                for call, c in ((run, cache), (subject, kept))
            )
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            assert cache.get_seq_length() == stop
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [0, 1], ids=["first", "second"])
def test_some_layers_are_compiled_and_others_not(subject, fed, compiled):
    ids, kept, mixed = tokens(2, 140), copy.deepcopy(fed), copy.deepcopy(subject)
    mixed.model.layers[compiled].compile(backend="eager")
    with kvsight.enable(subject), kvsight.enable(mixed):
        wanted, found = stepper(subject, kept, ids), stepper(mixed, fed, ids)
        for i in range(124, 134):
            # eager steps between, and one layer that was in no graph yet
            step = found if i % 4 else stepper(subject, fed, ids)
            torch.testing.assert_close(step(i), wanted(i), atol=1e-5, rtol=1e-5)
            assert {layer.cumulative_length for layer in fed.layers} == {i + 1}
            assert {layer.get_seq_length() for layer in fed.layers} == {i + 1}
    assert fed.nbytes == kept.nbytes


def test_an_eager_first_layer_does_not_outgrow_compiled_ones(subject, fed):
    ids, mixed = tokens(2, 200), copy.deepcopy(subject)
    mixed.model.layers[1].compile(backend="eager")
    room = fed.layers[0].tiles.first + fed.layers[0].tiles.room
    with kvsight.enable(subject), kvsight.enable(mixed):
        for i in range(124, room):
            stepper(mixed, fed, ids)(i)
        with pytest.raises(KVSightError, match="with more before"):
            stepper(mixed, fed, ids)(room)
        fed.reserve(200)
        stepper(mixed, fed, ids)(room)
        assert {layer.cumulative_length for layer in fed.layers} == {room + 1}


def test_lengths_within_an_eager_step_behind_graphs(subject, fed):
    """Some models ask a later layer what it has while the first has the new tokens already."""
    ids, said = tokens(2, 140), []
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with kvsight.enable(subject):
        for i in (124, 125):
            stepper(run, fed, ids)(i)
        hook = subject.model.layers[1].register_forward_pre_hook(
            lambda *_: said.append((fed.get_seq_length(1), fed.layers[1].get_mask_sizes(1)))
        )
        try:
            for i in (126, 127):
                stepper(subject, fed, ids)(i)
        finally:
            hook.remove()
    assert said == [(126, (127, 0)), (127, (128, 0))]
    assert fed.get_seq_length(1) == 128


@pytest.mark.slow
def test_torch_gives_up_compiling_between_graphs(subject, fed):
    """Masks break graphs and grow; at its limit torch compiles what a model calls, but not the model."""
    ids, kept = tokens(2, 140), copy.deepcopy(fed)
    mask = torch.ones(2, 140, dtype=torch.long)
    mask[0, :9] = 0
    run = torch.compile(subject, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2), kvsight.enable(subject):
        wanted, found = stepper(subject, kept, ids), stepper(run, fed, ids)
        for i in range(124, 132):
            logits, same = (step(i, attention_mask=mask[:, : i + 1]) for step in (found, wanted))
            torch.testing.assert_close(logits, same, atol=1e-4, rtol=1e-4)
            assert {layer.cumulative_length for layer in fed.layers} == {i + 1}


def test_a_step_past_the_room_is_not_counted(subject, fed):
    ids, kept = tokens(2, 200), copy.deepcopy(fed)
    room = fed.layers[0].tiles.first + fed.layers[0].tiles.room
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with kvsight.enable(subject):
        wanted, eager = (stepper(subject, cache, ids) for cache in (kept, fed))
        for i in range(124, room):
            wanted(i), eager(i)
        with pytest.raises(RuntimeError, match="past the room"):
            stepper(run, fed, ids)(room)
        assert fed.get_seq_length() == room
        fed.reserve(200)
        torch.testing.assert_close(stepper(run, fed, ids)(room), wanted(room), atol=1e-5, rtol=1e-5)


def test_a_cache_outlives_inference_mode(model, plan):
    subject, ids = model("llama-1layer"), tokens(2, 90)
    cache = kvsight.PackedCache(plan("llama-1layer", "sight", bits=4.0, options=LAYOUT), tiles=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), kvsight.enable(subject):
            subject(ids, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 90
        cache.reset()


def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside(subject, plan):
    ids = tokens(2, 140)
    fitted = plan("llama", "sight", bits=4.0, options=LAYOUT)
    cache, kept = (kvsight.PackedCache(fitted, tiles=True) for _ in range(2))
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with kvsight.enable(subject):
        for mode, one in ((torch.inference_mode, cache), (torch.no_grad, kept)):
            with mode():
                subject(ids[:, :124], past_key_values=one, use_cache=True)
                one.reserve(140)
        with torch.inference_mode():
            cache = copy.deepcopy(cache)
        for i, call in ((124, subject), (125, run), (126, run)):
            found, wanted = stepper(call, cache, ids)(i), stepper(subject, kept, ids)(i)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_room_is_reserved_in_all_layers_or_in_none(subject, plan):
    cache = kvsight.PackedCache(plan("llama", "sight", bits=4.0, options=LAYOUT), tiles=True)
    with torch.no_grad(), kvsight.enable(subject):
        subject(tokens(2, 124), past_key_values=cache, use_cache=True)
    cache.layers[1].crop(20)
    with pytest.raises(KVSightError, match="layer 1 has no tiles"):
        cache.reserve(200)
    assert not cache.layers[0].tiles.reserved


def test_what_graphs_refuse(model, plan):
    subject, ids = model("llama-1layer"), tokens(2, 80)
    fitted = plan("llama-1layer", "sight", bits=4.0, options=LAYOUT)
    cache = kvsight.PackedCache(fitted, tiles=True)
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad(), kvsight.enable(subject):
        subject(ids[:, :10], past_key_values=cache, use_cache=True)
        with pytest.raises(KVSightError, match="it has 10 tokens"):
            cache.reserve(100)
        with pytest.raises((KVSightError, TorchDynamoException), match="wants a cache in tiles"):
            run(ids[:, :1], past_key_values=cache, use_cache=True)
        subject(ids[:, 10:70], past_key_values=cache, use_cache=True)
        cache.reserve(100)
        masks = torch.ones(2, 71, dtype=torch.long)
        with pytest.raises((KVSightError, TorchDynamoException), match="no attention_mask"):
            run(ids[:, :1], past_key_values=cache, use_cache=True, attention_mask=masks)


def test_a_later_layer_cannot_tell_a_graph_its_length(subject, fed, monkeypatch):
    ids, said = tokens(2, 140), []
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")

    def ask(*_):
        said.append(fed.get_seq_length(1))

    asking = subject.model.layers[1].register_forward_pre_hook(ask)
    try:
        with kvsight.enable(subject):
            with pytest.raises((KVSightError, TorchDynamoException), match="only the first layer"):
                stepper(run, fed, ids)(124)
            # captured: what is queued counts when it is replayed, here at once
            with monkeypatch.context() as patch:
                patch.setattr(Counter, "recording", True)
                for i in (124, 125):
                    stepper(subject, fed, ids)(i)
    finally:
        asking.remove()
    assert [int(length) for length in said] == [124, 125]


def test_a_failed_reserve_leaves_no_layer_behind(subject, fed, monkeypatch):
    """Layers of unequal room would be written past the end of some, as only the first looks."""
    first, last = (layer.tiles for layer in fed.layers)
    ids, grow = tokens(2, 240), tiles.Tiles._grow

    def limited(self, room):
        if self is last:
            raise torch.OutOfMemoryError("no memory")
        grow(self, room)

    with monkeypatch.context() as patch:
        patch.setattr(tiles.Tiles, "_grow", limited)
        with pytest.raises(torch.OutOfMemoryError):
            fed.reserve(640)
    assert (first.room, last.room) == (640, 192)
    fed.reserve(190)
    assert {layer.tiles.reserved for layer in fed.layers} == {192}
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with kvsight.enable(subject):
        step = stepper(run, fed, ids)
        for i in range(124, 192 + first.first):
            step(i)
        with pytest.raises(RuntimeError, match="past the room"):
            step(192 + first.first)


def test_layers_that_left_tiles_hold_nobody_back(subject, fed):
    """Tracing keeps what it saw until memory is tidied up."""
    ids, gone = tokens(2, 240), [layer.tiles for layer in fed.layers]
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with kvsight.enable(subject):
        stepper(run, fed, ids)(124)
        fed.crop(-1)
        for i in range(124, 230):
            stepper(subject, fed, ids)(i)
    assert fed.get_seq_length() == 230 and all(layer.tiles not in gone for layer in fed.layers)


def test_a_cache_can_be_pickled(subject, fed):
    ids = tokens(2, 140)
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    with kvsight.enable(subject):
        stepper(run, fed, ids)(124)
        other = pickle.loads(pickle.dumps(fed))
        for i in range(125, 130):
            assert torch.equal(*(stepper(subject, cache, ids)(i) for cache in (fed, other)))
        assert torch.equal(*(stepper(run, cache, ids)(130) for cache in (fed, other)))
    held = other.layers[0].tiles.counter.others
    assert list(held) == [other.layers[1].tiles] and not other.layers[0].tiles._reader


def test_graphs_go_on_where_other_steps_made_room(subject, fed):
    ids, kept = tokens(2, 340), copy.deepcopy(fed)
    run = torch.compile(subject, fullgraph=True, dynamic=False, backend="eager")
    fed.layers[0].tiles.make_room(400)
    with kvsight.enable(subject):
        found, wanted = stepper(run, fed, ids), stepper(subject, kept, ids)
        for i in (124, 125):
            assert torch.equal(found(i), wanted(i))
        for cache in (fed, kept):
            with torch.no_grad():
                subject(ids[:, 126:216], past_key_values=cache, use_cache=True)
        room = {layer.tiles.reserved for layer in fed.layers}
        assert len(room) == 1 and 216 < min(room) < 330
        for i in range(216, min(room) + fed.layers[0].tiles.first):
            torch.testing.assert_close(found(i), wanted(i), atol=1e-5, rtol=1e-5)

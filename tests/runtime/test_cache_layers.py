"""What a cache stores: bytes that never change, in the amount that the plan says, whatever the order."""

import copy
import functools

import plans
import pytest
import torch
from transformers import DynamicCache

import kvsight
from kvsight.cache import side as sides
from kvsight.cache.packed import PackedKV
from kvsight.errors import KVSightError

CASES = {
    "identity": ("identity", {}),
    "sight-3": ("sight", {"bits": 3.0}),
    "sight-4-window": ("sight", {"bits": 8.0, "sinks": 4, "window": 16}),
    "turboquant-4": ("turboquant", {"bits": 5.0, "sinks": 3}),
    "turboquant-hadamard": ("turboquant", {"bits": 5.0, "rotation": "hadamard", "centre": True}),
    "turboquant-prod": ("turboquant-prod", {"bits": 5.0, "outliers": 6, "centre": True}),
    "rank-int8": ("rank-int8", {"bits": 3.0, "centre": True}),
    "int-4": ("int", {"bits": 6.0, "window": 7}),
    "int-channel": ("int", {"bits": 8.0, "axis": "channel", "group": 16, "window": 5}),
    "kivi-3": ("kivi", {"bits": 5.0}),
    "kivi-window-below-block": ("kivi", {"bits": 8.0, "window": 5, "sinks": 2}),
    "kivi-window-above-block": ("kivi", {"bits": 9.0, "window": 50}),
}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def plan_of(case, sliding):
    method, settings = CASES[case]
    if sliding:
        # a short window leaves room for small blocks and few exact tokens only
        settings = {**settings, "bits": 16.0, "window": min(5, settings.get("window", 0))}
        settings |= {"group": 8} if method == "kivi" else {}
    return plans.plan(method, sliding=sliding, **settings)


def new(case, sliding=False, **arguments):
    return kvsight.PackedCache(plan_of(case, sliding), plans.config(sliding), **arguments)


def feed(cache, tokens, seed=0, chunks=None, batch=2):
    """Append ``tokens`` drawn tokens to every layer; the same ones however they are cut."""
    handles = None
    for i in range(plans.LAYERS):
        kv = [plans.vectors(batch, tokens, 100 * seed + 2 * i + side) for side in range(2)]
        start = 0
        for size in chunks or (tokens,):
            part = [x[:, :, start : start + size] for x in kv]
            handles = cache.update(*part, i)
            start += size
        assert start == tokens
    return handles


def stored(cache):
    """Every stored tensor by place."""
    return {
        (i, side, name): tensor
        for i, layer in enumerate(cache.layers)
        for side, state in (("k", layer.key_state), ("v", layer.value_state))
        for name, tensor in (sides.tensors(state) if state else {}).items()
    }


def assert_same(a, b):
    left, right = stored(a), stored(b)
    assert left.keys() == right.keys()
    for place, tensor in left.items():
        assert torch.equal(tensor, right[place]), place


@every_case
@pytest.mark.parametrize("prefill", ["packed", "raw"])
def test_chunks_do_not_change_a_byte(case, prefill):
    one = new(case, prefill=prefill)
    feed(one, 90)
    for chunks in ([1] * 50 + [40], [7] * 12 + [6], [31, 33, 26], [89, 1]):
        other = new(case, prefill=prefill)
        feed(other, 90, chunks=chunks)
        assert_same(one, other)


@every_case
def test_committed_bytes_are_never_rewritten(case):
    cache = new(case)
    before = {}
    for step, tokens in enumerate((1, 40, 1, 1, 33, 64, 5)):
        feed(cache, tokens, seed=step)
        after = {place: t for place, t in stored(cache).items() if place[2] != "tail"}
        for place, old in before.items():
            assert torch.equal(after[place][:, :, : old.shape[2]], old), place
        before = after


@every_case
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "hybrid"])
def test_bytes_are_those_of_the_plan(case, sliding):
    cache = new(case, sliding)
    total = 0
    for step, tokens in enumerate((1, 2, 30, 1, 31, 1, 64, 130)):
        feed(cache, tokens, seed=step, batch=3)
        total += tokens
        assert cache.nbytes == cache.plan.nbytes(total, 3)
        assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in stored(cache).values())


@every_case
def test_batch_operations_keep_the_bytes_of_the_plan(case):
    cache = new(case)
    feed(cache, 75)
    plan = cache.plan
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.nbytes == plan.nbytes(75, 2)
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == plan.nbytes(75, 6)
    cache.batch_select_indices(torch.tensor([5, 0, 3, 3]))
    assert cache.nbytes == plan.nbytes(75, 4)
    cache.reset()
    assert cache.nbytes == plan.nbytes(0) == 0
    assert cache.get_seq_length() == 0
    feed(cache, 20, batch=1)
    assert cache.nbytes == plan.nbytes(20, 1)


def test_batch_operations_choose_sequences():
    cache = new("sight-4-window")
    feed(cache, 40)
    whole = stored(cache)
    cache.batch_repeat_interleave(2)
    for place, tensor in stored(cache).items():
        assert torch.equal(tensor, whole[place].repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    for place, tensor in stored(cache).items():
        assert torch.equal(tensor, whole[place].flip(0))
    cache.reorder_cache(torch.tensor([0, 0]))
    for place, tensor in stored(cache).items():
        assert torch.equal(tensor, whole[place][1:].expand_as(tensor))


@pytest.mark.parametrize("case", ["identity", "sight-3", "turboquant-4", "kivi-3"])
@pytest.mark.parametrize("remove", [0, 1, 15, 33, 64, 77, 200])
def test_crop_keeps_the_bytes_of_the_plan(case, remove):
    cache = new(case)
    feed(cache, 77)
    cache.crop(-remove)
    left = max(0, 77 - remove)
    assert cache.get_seq_length() == left
    assert cache.nbytes == cache.plan.nbytes(left, 2)


@pytest.mark.parametrize("case", ["sight-4-window", "kivi-window-above-block", "int-channel"])
def test_crop_of_an_exact_window_stores_no_more_than_the_plan(case):
    """Cropping takes tokens from the window; it fills again, and codes are not made exact for it."""
    cache = new(case)
    feed(cache, 130)
    codes = {place: tensor for place, tensor in stored(cache).items() if place[2].endswith("codes")}
    cache.crop(-4)
    assert cache.nbytes <= cache.plan.nbytes(126, 2)
    for place, tensor in codes.items():
        assert torch.equal(stored(cache)[place], tensor)
    feed(cache, 70, seed=1)
    assert cache.nbytes == cache.plan.nbytes(196, 2)


@pytest.mark.parametrize("case", ["identity", "sight-3", "turboquant-4", "int-4"])
def test_crop_then_append_is_appending_less(case):
    cropped, fresh = new(case), new(case)
    feed(cropped, 50)
    feed(cropped, 12, seed=1)
    cropped.crop(-12)
    feed(fresh, 50)
    feed(cropped, 30, seed=2)
    feed(fresh, 30, seed=2)
    if CASES[case][1].get("window", 0) == 0:
        assert_same(cropped, fresh)
    assert cropped.nbytes == fresh.nbytes


def test_crop_takes_a_length_or_a_number_to_remove():
    a, b = new("kivi-3"), new("kivi-3")
    for cache in (a, b):
        feed(cache, 70)
    a.crop(41)
    b.crop(-29)
    assert_same(a, b)
    a.crop(500)
    assert_same(a, b)


def test_sliding_layers_free_what_left_the_window():
    for case in CASES:
        cache = new(case, sliding=True)
        sizes = []
        for step in range(6):
            feed(cache, 64, seed=step)
            sizes.append(cache.layers[1].nbytes)
            assert cache.layers[0].key_state.visible == 64 * (step + 1)
            assert cache.layers[1].key_state.visible == plans.SLIDING - 1
        assert len(set(sizes[1:])) == 1, case


def test_sliding_layers_need_a_record_to_crop():
    cache = new("sight-3", sliding=True)
    feed(cache, 10)
    cache.crop(-3)
    assert cache.get_seq_length(1) == 7
    feed(cache, 30, seed=1)
    with pytest.raises(KVSightError, match=r"call cache.activate_past_recording\(\) first"):
        cache.layers[1].crop(-3)
    with_record, without = new("sight-3", sliding=True), new("sight-3", sliding=True)
    for each in (with_record, without):
        feed(each, 30)
    with_record.activate_past_recording()
    feed(with_record, 9, seed=1)
    with_record.crop(-9)
    assert_same(with_record, without)
    assert with_record.nbytes == with_record.plan.nbytes(30, 2)


@every_case
@pytest.mark.parametrize("remove", [0, 1, 30])
def test_a_crop_ends_what_recording_kept(case, remove):
    """Assisted decoding records for good and crops after each guess: the record must not grow."""
    cache = new(case, sliding=True)
    cache.activate_past_recording()
    for step in range(3):
        feed(cache, 45, seed=step)
        cache.crop(-remove)
        left = (45 - remove) * (step + 1)
        layer = cache.layers[1]
        assert layer.key_state.visible == min(left, plans.SLIDING - 1)
        exact = cache.plan.retention(layer.layer).exact_last
        if exact == 0 or remove == 0:
            assert cache.nbytes == cache.plan.nbytes(left, 2)
        assert cache.nbytes <= cache.plan.nbytes(left, 2)


def test_sizes_agree_with_the_stock_cache_at_every_step():
    config = plans.config(sliding=True)
    for case in CASES:
        ours, stock = new(case, sliding=True), DynamicCache(config=config)
        for step, tokens in enumerate((3, 1, 17, 1, 40, 1)):
            for i in range(plans.LAYERS):
                assert ours.get_mask_sizes(tokens, i) == stock.get_mask_sizes(tokens, i)
            shapes = [[x.shape for x in feed(cache, tokens, seed=step)] for cache in (ours, stock)]
            assert shapes[0] == shapes[1]
            assert ours.get_seq_length() == stock.get_seq_length()
            assert ours.get_max_length() == stock.get_max_length()


@every_case
def test_copies_are_independent(case):
    cache = new(case, sliding=True)
    feed(cache, 50)
    before = {place: tensor.clone() for place, tensor in stored(cache).items()}
    other = copy.deepcopy(cache)
    assert other.plan is cache.plan
    assert_same(cache, other)
    feed(other, 40, seed=1)
    other.reset()
    feed(other, 3, seed=2, batch=1)
    for place, tensor in stored(cache).items():
        assert torch.equal(tensor, before[place])
    assert cache.get_seq_length() == 50
    feed(cache, 40, seed=1)
    assert cache.nbytes == cache.plan.nbytes(90, 2)


@every_case
@pytest.mark.parametrize("tokens", [0, 1, 90])
def test_save_and_load_continue_alike(case, tokens, tmp_path):
    cache = new(case, sliding=True, prefill="raw")
    if tokens:
        feed(cache, tokens)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    loaded = kvsight.PackedCache.load(path, cache.plan, plans.config(sliding=True))
    assert loaded.prefill == "raw"
    for step in (1, 2):
        assert_same(cache, loaded)
        assert loaded.get_seq_length() == cache.get_seq_length()
        assert loaded.nbytes == cache.nbytes
        for each in (cache, loaded):
            feed(each, 37, seed=step)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_saved_cache_is_checked(tmp_path):
    cache = new("sight-3")
    feed(cache, 40)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    config = plans.config()

    def message(plan, name="cache.safetensors"):
        with pytest.raises(KVSightError) as caught:
            kvsight.PackedCache.load(tmp_path / name, plan, config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    other = plans.plan("sight", bits=3.0, shrink=0.5)
    assert f"{path} was saved under another plan; load that plan first." in message(other)
    assert "the file does not exist" in message(cache.plan, "nothing")
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert f"{path} is not a readable cache file" in message(cache.plan)
    plan_path = tmp_path / "plan"
    cache.plan.save(plan_path)
    name = "plan/tensors.safetensors"
    assert "was not written by PackedCache.save" in message(cache.plan, name)


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    cache = new("sight-3")
    feed(cache, 40)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("kvsight.integrations.saved.save_file", fail)
    feed(cache, 40, seed=1)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_none_are_refused_where_they_enter(case, bad, side):
    """Also in tokens that stay exact for now; and the cache is as it was."""
    cache = new(case)
    for position in (0, 60, 139):
        kv = [plans.vectors(2, 140, seed) for seed in range(2)]
        kv[side][1, 2, position, 5] = bad
        with pytest.raises(
            KVSightError, match=r"keys and values must be finite; got NaN or inf\. Check the"
        ):
            cache.update(*kv, 0)
        assert cache.nbytes == 0
        assert cache.get_seq_length() == 0
    feed(cache, 140)
    before = {place: tensor.clone() for place, tensor in stored(cache).items()}
    kv = [plans.vectors(2, 1, seed) for seed in range(2)]
    kv[side][0, 0, 0, 0] = bad
    with pytest.raises(KVSightError, match="must be finite"):
        cache.update(*kv, 0)
    assert all(torch.equal(tensor, before[place]) for place, tensor in stored(cache).items())
    assert cache.get_seq_length() == 140


def test_misfitting_tensors_are_refused():
    cache = new("sight-3")
    good = plans.vectors(2, 5, 0)
    with pytest.raises(
        KVSightError, match="the plan expects 3 KV heads of dimension 24; the model gives 2 of 24"
    ):
        cache.update(good[:, :2], good[:, :2], 0)
    cache = new("sight-3")
    with pytest.raises(
        KVSightError, match="the plan expects 3 KV heads of dimension 24; the model gives 3 of 16"
    ):
        cache.update(good[..., :16], good[..., :16], 0)
    cache = new("sight-3")
    cache.update(good, good, 0)
    with pytest.raises(KVSightError, match=r"the cache holds a batch of 2; got 1\. Reset it, or repeat"):
        cache.update(good[:1], good[:1], 0)


def test_prefill_is_packed_or_raw():
    with pytest.raises(KVSightError, match="prefill is 'packed' or 'raw'; got 'exact'"):
        new("sight-3", prefill="exact")


def read(handle):
    with pytest.warns(UserWarning, match="attention decodes this cache"):
        return handle.decode()


def test_raw_prefill_shows_new_tokens_as_they_are():
    raw, packed = new("sight-3", prefill="raw"), new("sight-3")
    first, second = plans.vectors(2, 40, 0), plans.vectors(2, 10, 1)
    coded = read(packed.update(first, first, 0)[0])
    assert not torch.equal(coded, first)
    assert torch.equal(read(raw.update(first, first, 0)[0]), first)
    raw.reads.decoded = 0
    seen = read(raw.update(second, second, 0)[0])
    assert torch.equal(seen, torch.cat([coded, second], dim=2))
    one = plans.vectors(2, 1, 2)
    seen = raw.update(one, one, 0)[0].decode()
    assert torch.equal(seen, packed_after(packed, second, one))


def packed_after(cache, *more):
    for x in more:
        handle, _ = cache.update(x, x, 0)
    return handle.decode()


def test_handles_describe_themselves_without_decoding():
    cache = new("sight-3")
    key, value = feed(cache, 40)
    assert isinstance(key, PackedKV)
    assert (key.shape, value.dtype, key.device.type) == ((2, 3, 40, 24), torch.float32, "cpu")
    assert repr(key) == "PackedKV(shape=(2, 3, 40, 24), dtype=torch.float32)"
    assert cache.reads.decoded == 0
    with pytest.warns(UserWarning, match="attention decodes this cache on every read"):
        total = key.sum()
    assert total == key.decode().sum()
    assert cache.reads.decoded == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_handles_that_stay_where_they_are_are_not_decoded(mode):
    with mode():
        key, _ = feed(new("sight-3"), 40)
        for same in (key.to("cpu"), key.to(torch.float32), key.to(key), key.contiguous(), key.detach()):
            assert isinstance(same, PackedKV)
            assert same.segments is key.segments
        assert key.reads.decoded == 0
        with pytest.warns(UserWarning, match="attention decodes this cache"):
            other = key.to(torch.float64)
        assert not isinstance(other, PackedKV)
        assert torch.equal(other, key.decode().double())
    assert key.reads.decoded == 1


def test_no_autograd_graph_is_kept():
    cache = new("kivi-window-below-block")
    x = plans.vectors(2, 70, 0).requires_grad_(True)
    cache.update(x * 2, x * 3, 0)
    assert not any(tensor.requires_grad for tensor in stored(cache).values())


def test_the_caller_may_reuse_its_tensors():
    for case in CASES:
        cache = new(case)
        kv = plans.vectors(2, 3, 0), plans.vectors(2, 3, 1)
        for i in range(plans.LAYERS):
            cache.update(*kv, i)
        before = {place: tensor.clone() for place, tensor in stored(cache).items()}
        for x in kv:
            x.fill_(9)
        assert all(torch.equal(tensor, before[place]) for place, tensor in stored(cache).items()), case


def test_offload_and_prefetch_keep_the_tokens():
    cache = new("sight-4-window")
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    feed(cache, 40)
    other = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_same(cache, other)


def test_a_config_of_another_model_is_refused():
    config = plans.config()
    config.num_hidden_layers = 1
    config.layer_types = ["full_attention"]
    with pytest.raises(
        KVSightError, match=r"the plan has 2 cached layers, the config 1\. Pass the config of"
    ):
        kvsight.PackedCache(plans.plan("int", bits=6.0), config)

"""``kvsight.enable`` and ``capture`` change what they must and put it back."""

import pytest
import torch
import zoo
from transformers import DynamicCache
from zoo import KINDS, tokens

import kvsight
from kvsight.errors import KVSightError
from kvsight.integrations.attention import implementations
from kvsight.trace import capture

PADDED = torch.ones(2, 12, dtype=torch.int64)
PADDED[0, :5] = 0


def logits(model, cache=None, mask=None):
    with torch.no_grad():
        out = model(tokens(2, 12), past_key_values=cache, attention_mask=mask, use_cache=cache is not None)
    return out.logits


@pytest.mark.parametrize("mask", [None, PADDED], ids=["plain", "padded"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("mistral", "eager"),
        ("mistral", "sdpa"),
        ("gemma2", "eager"),
        ("gpt-oss", "eager"),
        ("gemma3", "sdpa"),
        ("gpt2", "eager"),
        ("opt", "sdpa"),
    ],
)
def test_other_caches_are_untouched(name, attention, mask, model):
    subject = model(name, attention)
    without = logits(subject, None, mask), logits(subject, DynamicCache(config=subject.config), mask)
    with kvsight.enable(subject):
        inside = logits(subject, None, mask), logits(subject, DynamicCache(config=subject.config), mask)
    assert torch.equal(without[0], inside[0])
    assert torch.equal(without[1], inside[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_implementation_comes_back(attention, model):
    subject = model("llama", attention)
    assert implementations(subject) == {"": attention}
    with kvsight.enable(subject):
        assert subject.config._attn_implementation.startswith("kvsight")
    assert implementations(subject) == {"": attention}
    with pytest.raises(ZeroDivisionError), kvsight.enable(subject):
        raise ZeroDivisionError
    assert implementations(subject) == {"": attention}
    with pytest.raises(ZeroDivisionError), capture(subject, lambda *_: 1 / 0):
        logits(subject)
    assert implementations(subject) == {"": attention}


def test_two_models_are_enabled_at_once(model, plan):
    first, second = model("llama"), model("gemma2")
    caches = [kvsight.PackedCache(plan(name)) for name in ("llama", "gemma2", "llama")]
    expected = logits(first), logits(second)
    with kvsight.enable(first):
        with kvsight.enable(second):
            torch.testing.assert_close(logits(first, caches[0]), expected[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(logits(second, caches[1]), expected[1], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(first, caches[2]), expected[0], atol=1e-4, rtol=0)
    assert all(cache.reads.packed > 0 == cache.reads.decoded for cache in caches)


def test_enabling_twice_is_enabling_once(model, plan):
    subject = model("llama")
    outside = logits(subject)
    caches = [kvsight.PackedCache(plan("llama")) for _ in range(2)]
    with kvsight.enable(subject):
        with kvsight.enable(subject):
            logits(subject, caches[0])
            assert torch.equal(logits(subject), outside)
        logits(subject, caches[1])
    assert implementations(subject) == {"": "sdpa"}
    assert [cache.reads.decoded for cache in caches] == [0, 0]


def test_a_plan_for_another_model_is_refused_before_it_is_read(model, plan):
    subject = model("llama")
    other = kvsight.PackedCache(plan("qwen2"))
    message = r"the plan was made for another model \(qwen2, 2 layers, 2 KV heads, 64 wide, 64 tokens\); "
    with (
        kvsight.enable(subject),
        pytest.raises(KVSightError, match=message + "this one is llama, 2 layers"),
    ):
        logits(subject, other)


def test_gradients_flow_through_other_caches(model):
    subject = zoo.build("llama").requires_grad_(True)
    with kvsight.enable(subject):
        subject(tokens(1, 8)).logits.sum().backward()
    assert all(p.grad is not None for p in subject.parameters())


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.interface])
def test_models_without_fused_attention_decode_and_say_so_once(name, model, plan):
    subject = model(name)
    cache = kvsight.PackedCache(plan(name))
    with kvsight.enable(subject):
        with pytest.warns(UserWarning, match="attention decodes this cache on every read"):
            packed = logits(subject, cache)
        logits(subject, cache)  # a second warning would be an error
    assert cache.reads.packed == 0
    torch.testing.assert_close(packed, logits(subject), atol=1e-5, rtol=0)

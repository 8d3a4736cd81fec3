"""The identity plan is token for token what transformers' own cache gives."""

import copy
from contextlib import nullcontext

import pytest
import torch
import zoo
from transformers import DynamicCache
from zoo import KINDS, tokens

import kvsight

NEW = 10
PROMPT = 20


def generate(model, ids, cache, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(ids, past_key_values=cache, **settings).tolist()


def greedy(model, make):
    return generate(model, tokens(2, PROMPT), make())


def beams(model, make):
    return generate(model, tokens(2, PROMPT), make(), num_beams=3, num_return_sequences=2)


def samples(model, make):
    torch.manual_seed(0)
    return generate(model, tokens(1, PROMPT), make(), do_sample=True, num_return_sequences=3)


def prompt_lookup(model, make):
    ids = tokens(1, 5).repeat(1, 4)
    return generate(model, ids, make(), prompt_lookup_num_tokens=3)


def assisted(model, make):
    draft = zoo.build("llama", seed=1)
    return generate(model, tokens(1, PROMPT), make(), assistant_model=draft)


def left_padding(model, make):
    ids, mask = tokens(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 13)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return generate(model, ids, make(), attention_mask=mask)


def second_turn(model, make):
    cache = make()
    first = model.generate(tokens(1, PROMPT), past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    longer = torch.cat([first, tokens(1, 7, seed=1)], dim=1)
    return generate(model, longer, cache)


def chunked_prefill(model, make):
    return generate(model, tokens(1, PROMPT + 2), make(), prefill_chunk_size=8)


def copied(model, make):
    ids = tokens(1, PROMPT)
    cache = make()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    other = copy.deepcopy(cache)
    left = generate(model, torch.cat([ids, tokens(1, 3, seed=1)], dim=1), cache)
    return left, generate(model, torch.cat([ids, tokens(1, 5, seed=2)], dim=1), other)


EVERYWHERE = [greedy, left_padding]
MODES = [beams, samples, second_turn, chunked_prefill, copied]
ROLLBACK = [prompt_lookup, assisted]
# full attention, a window in every layer, both, and linear layers: every mode
CORE = ("llama", "mistral", "gemma3", "qwen3-next")


def modes(place, name):
    """Every mode for the core; for others two in turn, so that each meets several architectures."""
    able = MODES if KINDS[name].stateful else MODES + ROLLBACK
    return EVERYWHERE + (able if name in CORE else [able[(2 * place + i) % len(able)] for i in range(2)])


EVERY = [
    pytest.param(name, mode, id=f"{name}-{mode.__name__}")
    for place, name in enumerate(KINDS)
    for mode in modes(place, name)
]


def test_every_mode_meets_architectures_beyond_the_core():
    beyond = [mode for place, name in enumerate(KINDS) if name not in CORE for mode in modes(place, name)]
    assert all(beyond.count(mode) >= 2 for mode in EVERYWHERE + MODES + ROLLBACK)


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_identity_equals_the_stock_cache(name, mode, model, plan):
    subject = model(name)
    expected = mode(subject, lambda: DynamicCache(config=subject.config))
    caches = []

    def make():
        caches.append(kvsight.PackedCache(plan(name)))
        return caches[-1]

    with pytest.warns(UserWarning, match="attention decodes this cache on every read"):
        assert mode(subject, make) == expected
    assert caches[0].reads.packed == 0 < caches[0].reads.decoded
    fused = KINDS[name].interface
    warned = nullcontext() if fused else pytest.warns(UserWarning, match="attention decodes this cache")
    with kvsight.enable(subject), warned:
        assert mode(subject, make) == expected
    reads = caches[1].reads
    assert (reads.packed > 0, reads.decoded > 0) == (fused, not fused)

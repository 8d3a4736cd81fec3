"""A plan made under one transformers is accepted under another: fingerprints are pinned."""

import pytest
import zoo

from kvsight.errors import KVSightError
from kvsight.fingerprint import check_model, fingerprint

# written by transformers 5.23; all supported versions must agree
PINNED = {
    "llama": "df9382c866778d10",
    "qwen2": "1069a83142f725cf",
    "qwen3": "06ab25696717d33b",
    "mistral": "d994344cdc0c261d",
    "gemma2": "03767a6398084578",
    "gemma3": "fe95fe339aea6105",
    "gpt-oss": "1f3d51ba998c7874",
    "phi3": "c71b0960be8f6de5",
    "gpt2": "a2f610899b36c416",
    "gpt-neox": "6100317a17d99bb3",
    "opt": "851bab8661ce1818",
    "bloom": "ed3741bc3a47c6f7",
    "falcon": "964ac075b3a167ad",
    "deepseek-v3": "64966c05a6b002f1",
    "qwen3-next": "6735814a9a3015c5",
    "gemma3n": "063e941256e3744c",
    "gemma4": "267961f9dc781af2",
}


@pytest.mark.parametrize("name", zoo.KINDS)
def test_fingerprints_do_not_depend_on_the_version(name, model):
    assert fingerprint(model(name))[:16] == PINNED[name]


def test_weights_do_not_matter_but_structure_does(model, plan):
    made = plan("llama")
    check_model(made, zoo.build("llama", seed=5))
    check_model(made, zoo.build("llama", attention="eager"))
    for change in ({"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"intermediate_size": 64}):
        with pytest.raises(KVSightError, match="the plan was made for another model"):
            check_model(made, zoo.build("llama", **change))


def test_a_sliding_window_is_structure(plan):
    with pytest.raises(KVSightError, match="the plan was made for another model"):
        check_model(plan("mistral"), zoo.build("mistral", sliding_window=16))

"""The doctor over architectures: what it finds, and that its figures are those of the model's attention."""

import copy
import json

import pytest
import torch
import zoo
from zoo import batches, tokens

from kvsight.doctor import examine
from kvsight.doctor.window import FIRST, read
from kvsight.errors import KVSightError
from kvsight.integrations.attention import implementations
from kvsight.trace import observe

# what random weights of these architectures are sure to show
EXPECTED = {
    "llama": {"GQA"},
    "qwen2": {"GQA", "key bias"},
    "qwen3": {"GQA", "QK-norm"},
    "mistral": {"GQA", "sliding layers"},
    "gemma2": {"GQA", "sliding layers", "softcap"},
    "gpt-oss": {"GQA", "sliding layers", "sink logits"},
    "gpt2": set(),
    "deepseek-v3": {"MLA"},
    "qwen3-next": {"GQA", "QK-norm", "unpacked layers"},
    "gemma3n": {"GQA", "QK-norm", "sliding layers", "shared layers"},
    "gemma4": {"GQA", "QK-norm", "sliding layers", "shared layers"},
    "falcon": {"hidden queries"},
}
# these depend on the numbers of random weights, and are tested on crafted ones
NUMBERS = {
    "short text",
    "key mean",
    "outlier channels",
    "heavy tails",
    "sinks",
    "unequal directions",
    "head_dim",
}


def biased(subject):
    """A copy whose key projections add much of what the keys are."""
    subject = copy.deepcopy(subject)
    for layer in subject.model.layers:
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, 3.0)
    return subject


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found_is_what_the_architecture_has(name, model):
    subject = biased(model(name)) if name == "qwen2" else model(name)
    diagnosis = examine(subject, batches(1))
    found = {finding.name for finding in diagnosis.findings if finding.status == "found"}
    assert found - NUMBERS == EXPECTED[name]
    unknown = {finding.name for finding in diagnosis.findings if finding.status == "unknown"} - {"sinks"}
    hidden = {"MLA", "sink logits", "softcap", "GQA", "shared layers"}
    assert unknown == (hidden if name == "falcon" else set())
    json.dumps(diagnosis.to_json(), allow_nan=False)


def test_layers_are_described_as_they_are(model):
    gemma4 = examine(model("gemma4"), batches(1)).figures
    assert [(layer.window, layer.key_dim, layer.readers) for layer in gemma4.layers] == [
        (8, 16, (0, 2)),
        (None, 32, (1, 3)),
    ]
    assert [layer.first_mass is None for layer in gemma4.layers] == [True, False]
    gemma2 = examine(model("gemma2"), batches(1)).figures
    assert {layer.softcap for layer in gemma2.layers} == {5.0}
    latent = examine(model("deepseek-v3"), batches(1))
    assert all(layer.latent and layer.kv_heads == 1 for layer in latent.figures.layers)
    assert latent.finding("MLA").evidence == "1 x (32 + 16) numbers per token for 4 heads"
    hybrid = examine(model("qwen3-next"), batches(1))
    assert [layer.index for layer in hybrid.figures.layers] == [1, 3]
    assert hybrid.finding("unpacked layers").summary == "layers 0, 2 of the kind LinearAttentionLayer"


def test_a_key_bias_is_measured(model):
    diagnosis = examine(biased(model("qwen2")), batches())
    figures = diagnosis.figures
    assert figures.key_bias == ("k_proj",)
    assert diagnosis.finding("key mean").status == "found"
    trace = observe(biased(model("qwen2")), batches())
    for layer in figures.layers:
        energy = trace.layers[layer.index].key.second.diagonal(dim1=-2, dim2=-1).sum(-1)
        assert layer.bias_share == pytest.approx((9 * 16 / energy).tolist())
    assert examine(model("qwen2"), batches()).figures.key_bias == ()


def test_normalised_keys_all_have_one_length(model):
    for name, most in (("qwen3", 1e-5), ("llama", 1.0)):
        figures = examine(model(name), batches()).figures
        assert all(head.norm_variation < most for head in figures.heads("k"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "deepseek-v3", "qwen3-next"])
def test_first_mass_is_that_of_the_models_own_attention(name, model):
    subject = model(name, "eager")
    ids = tokens(2, 40)
    with torch.no_grad():
        weights = subject(ids, output_attentions=True).attentions
    figures = examine(subject, [ids]).figures
    # hybrid models list the attention of their attention layers only
    weights = [w for w in weights if w is not None]
    for i, layer in enumerate(figures.layers):
        if layer.window is None:
            own = weights[layer.index if len(weights) > len(figures.layers) else i][:, :, 20:, :].double()
            torch.testing.assert_close(
                torch.tensor(layer.first_mass).double(),
                own.mean(dim=(0, 1, 2))[:FIRST],
                rtol=1e-4,
                atol=1e-6,
            )
            if layer.logit_mass is not None:
                assert layer.logit_mass == pytest.approx(1 - float(own.sum(-1).mean()), rel=1e-3)
    assert (figures.layers[-1].logit_mass is None) == (name != "gpt-oss")


def test_the_model_is_left_alone(model):
    subject = model("llama")
    ids = tokens(1, 20)
    with torch.no_grad():
        before = subject(ids).logits
        read(subject, ids)
        assert implementations(subject) == {"": "sdpa"}
        assert torch.equal(subject(ids).logits, before)


def test_batches_may_be_a_generator_and_progress_is_told(model):
    calls = []
    inputs = [tokens(1, 30, seed=i) for i in range(3)]
    diagnosis = examine(model("llama"), iter(inputs), progress=lambda *call: calls.append(call))
    assert calls == [("observe", n, 3) for n in (1, 2, 3)]
    assert (diagnosis.figures.tokens, diagnosis.figures.length) == (90, 30)


def test_short_windows_leave_sinks_unknown(model):
    diagnosis = examine(model("llama"), [tokens(1, 6)])
    assert diagnosis.finding("sinks").summary == "windows of 6 tokens are too short"
    assert diagnosis.finding("short text").status == "found"


def test_what_cannot_be_examined_is_refused(model):
    with pytest.raises(KVSightError, match="this model caches no keys and values that kvsight can pack"):
        examine(zoo.build("falcon-h1"), batches(1))
    with pytest.raises(KVSightError, match="got none"):
        examine(model("llama"), [])

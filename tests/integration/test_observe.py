"""What observation sees, against brute force; and what it leaves alone."""

import copy

import pytest
import torch
import zoo
from transformers import AutoConfig, DynamicCache, T5ForConditionalGeneration
from transformers.models.llama import modeling_llama
from zoo import KINDS, batches, tokens

import kvsight
from kvsight.errors import KVSightError
from kvsight.integrations.attention import implementations
from kvsight.trace import capture, observe, summarise

FUSED = [name for name, kind in KINDS.items() if kind.interface or name == "deepseek-v3"]
# softcap and sinks exist in the eager function only
ATTENTION = [
    (name, attention)
    for name in FUSED
    for attention in (("eager",) if KINDS[name].attention == "eager" else ("eager", "sdpa"))
]
OUTPUT = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "gemma3": "model.layers.{}.self_attn.o_proj",
    "gpt-oss": "model.layers.{}.self_attn.o_proj",
    "phi3": "model.layers.{}.self_attn.o_proj",
    "qwen3-next": "model.layers.{}.self_attn.o_proj",
    "gpt-neox": "gpt_neox.layers.{}.attention.dense",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
}
NO_QUERIES = "the model has no attention interface: queries were not seen, keys use storage error"
LATENTS = "some layers cache something else than attention reads (MLA latents): their keys and values use"


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_logits_are_untouched_while_capturing(name, attention, model):
    subject = model(name, attention)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    calls = []
    before = logits(subject, ids), logits(subject, ids, mask)
    with capture(
        subject, lambda module, layer, q, k, out: calls.append((layer, q.shape, k.shape))
    ) as listens:
        assert listens
        inside = logits(subject, ids), logits(subject, ids, mask)
    assert torch.equal(before[0], inside[0])
    assert torch.equal(before[1], inside[1])
    assert implementations(subject) == {"": attention}
    layers = [layer for layer, *_ in calls]
    assert layers == sorted(set(layers)) * 2
    for _, q, k in calls:
        assert (q[0], q[2], k[0], k[2]) == (2, 20, 2, 20)
        assert q[1] % k[1] == 0 and q[3] == k[3]


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_models_without_the_interface_are_not_heard(name, model):
    calls = []
    with capture(model(name), lambda *call: calls.append(call)) as listens:
        logits(model(name), tokens(1, 8))
    assert (listens, calls) == (False, [])


def whole_cache(subject, inputs):
    """Every key and value of every batch per layer, [B, H, T, d], from transformers' own cache."""
    seen = {}
    for ids in inputs:
        cache = DynamicCache(config=subject.config)
        with torch.no_grad():
            subject(ids, past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            if getattr(layer, "keys", None) is not None:
                seen.setdefault(i, []).append((layer.keys, layer.values))
    return seen


def assert_moments(moments, vectors):
    """``vectors``: [H, n, d]."""
    x = vectors.double()
    assert moments.count == x.shape[1]
    torch.testing.assert_close(moments.mean, x.mean(1))
    torch.testing.assert_close(moments.second, torch.einsum("hnd,hne->hde", x, x) / x.shape[1])
    torch.testing.assert_close(moments.covariance, torch.stack([torch.cov(h.T, correction=0) for h in x]))
    assert torch.equal(moments.peak, x.abs().amax(1))


@pytest.mark.parametrize("name", KINDS)
def test_key_and_value_moments_are_those_of_the_cache(name, model):
    # shorter than any sliding window, so that the cache still holds everything
    inputs = [tokens(2, 7, seed=i) for i in range(3)]
    trace = observe(model(name), inputs)
    seen = whole_cache(model(name), inputs)
    assert list(trace.layers) == list(seen)
    assert trace.tokens == 42
    for i, layer in trace.layers.items():
        for moments, pick in ((layer.key, 0), (layer.value, 1)):
            every = torch.cat([kv[pick].transpose(0, 1).flatten(1, 2) for kv in seen[i]], dim=1)
            assert_moments(moments, every)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_what_attention_reads_is_the_mean_over_the_heads_that_share_values(name, model):
    subject, ids = model(name, "eager"), tokens(2, 20)
    trace = observe(subject, [ids])
    cache = DynamicCache()
    with torch.no_grad():
        seen = subject(ids, past_key_values=cache, use_cache=True, output_attentions=True).attentions
    for i, layer in trace.layers.items():
        values, alpha = cache.layers[i].values.double(), seen[i].double()
        shared = alpha.unflatten(1, (values.shape[1], -1))
        read = (shared.mean(2) @ values).transpose(0, 1)
        torch.testing.assert_close(layer.read.second, moments_of(read), rtol=1e-4, atol=1e-7)
        entropy = -(shared * shared.clamp_min(1e-300).log()).sum(-1).mean(2).transpose(0, 1)
        focused = read * torch.exp(-entropy / 2).unsqueeze(-1)
        torch.testing.assert_close(layer.focus.second, moments_of(focused), rtol=1e-4, atol=1e-7)


def moments_of(x):
    x = x.flatten(1, 2)
    return x.mT @ x / x.shape[1]


@pytest.mark.parametrize("name", KINDS)
def test_sliding_windows_are_those_of_the_model(name, model):
    trace = observe(model(name), [tokens(1, 20)])
    stock = DynamicCache(config=model(name).config)
    for i, layer in trace.layers.items():
        sliding = stock.layers[i].is_sliding
        assert layer.window == (KINDS[name].sliding if sliding else None)


def test_queries_are_pooled_over_the_heads_that_share_keys(model, monkeypatch):
    subject = model("llama")
    rotated = []
    real = modeling_llama.apply_rotary_pos_emb

    def record(*args, **kwargs):
        q, k = real(*args, **kwargs)
        rotated.append(q)
        return q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", record)
    trace = observe(subject, batches(2))
    for i, layer in trace.layers.items():
        # what comes later asks for the rotation
        mine = rotated[i : 2 * len(trace.layers) : len(trace.layers)]
        for head in range(2):
            # [B, 4, T, d]: query heads 2h and 2h + 1 read KV head h
            pooled = torch.cat([q[:, 2 * head : 2 * head + 2].flatten(0, 2) for q in mine]).double()
            assert layer.query.count == len(pooled)
            expected = pooled.T @ pooled / len(pooled)
            torch.testing.assert_close(layer.query.second[head], expected)
    metric = summarise(trace).layers[0].key.metric
    assert torch.equal(metric, trace.layers[0].query.second)


@pytest.mark.parametrize("name", OUTPUT)
def test_output_metric_is_what_the_projection_does(name, model):
    trace = observe(model(name), batches(1))
    for i, layer in trace.layers.items():
        projection = model(name).get_submodule(OUTPUT[name].format(i))
        weight = projection.weight.double()
        # Linear keeps [out, in], Conv1D [in, out]
        weight = weight.T if name == "gpt2" else weight
        heads, dim = layer.value.total.shape
        groups = weight.shape[1] // (heads * dim)
        for head in range(heads):
            blocks = weight[:, head * groups * dim : (head + 1) * groups * dim].split(dim, dim=1)
            expected = sum(block.T @ block for block in blocks)
            torch.testing.assert_close(layer.output_metric[head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_output_metric_of_half_precision_models(name, dtype, model):
    subject = copy.deepcopy(model(name))
    projection = subject.get_submodule(OUTPUT[name].format(0))
    if projection.bias is not None:
        projection.bias.data.fill_(3.0)
    half, whole = observe(subject.to(dtype), batches(1)), observe(model(name), batches(1))
    for i, layer in whole.layers.items():
        difference = half.layers[i].output_metric - layer.output_metric
        assert difference.norm() < 0.02 * layer.output_metric.norm()


def test_a_norm_before_the_projection_is_no_output_metric():
    subject = zoo.build("bitnet")
    assert all(layer.output_metric is None for layer in observe(subject, batches(1)).layers.values())


def test_layers_that_share_keys_add_their_queries(model):
    """gemma3n: the last two layers read the keys of the last own layer of their kind."""
    trace = observe(model("gemma3n"), [tokens(2, 20)])
    assert list(trace.layers) == [0, 1, 2]
    groups = 4 // 2
    assert [layer.query.count for layer in trace.layers.values()] == [
        2 * 20 * groups,
        2 * 20 * groups * 2,
        2 * 20 * groups * 2,
    ]


def test_linear_layers_are_left_out(model):
    assert list(observe(model("qwen3-next"), batches(1)).layers) == [1, 3]


def held(trace):
    """Shapes of every tensor that a trace keeps."""
    found = []
    for layer in trace.layers.values():
        for value in vars(layer).values():
            parts = vars(value).values() if hasattr(value, "outer") else [value]
            found += [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor)]
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
def test_memory_does_not_grow_with_the_text(name, model):
    few, many = (observe(model(name), batches(n), sample_tokens=64) for n in (2, 20))
    assert many.tokens == 10 * few.tokens
    assert held(few) == held(many)


def test_samples_are_the_same_tokens_in_every_layer(model):
    subject = model("llama")
    inputs = batches(3)
    seen = whole_cache(subject, inputs)
    trace = observe(subject, inputs, sample_tokens=50, seed=3)

    def join(tensors):
        """Everything about a token side by side: [tokens, layers * sides * H * d]."""
        return torch.cat([x.transpose(0, 1).flatten(1) for x in tensors], dim=1).double()

    sampled = join(x for layer in trace.layers.values() for x in (layer.key_sample, layer.value_sample))
    every = join(
        torch.cat([kv[side].transpose(0, 1).flatten(1, 2) for kv in seen[i]], dim=1)
        for i in seen
        for side in (0, 1)
    )
    found = torch.cdist(sampled, every).argmin(1)
    assert torch.equal(every[found], sampled)
    assert len(sampled) == 50
    again = observe(subject, inputs, sample_tokens=50, seed=3)
    assert torch.equal(again.layers[1].key_sample, trace.layers[1].key_sample)
    other = observe(subject, inputs, sample_tokens=50, seed=4)
    assert not torch.equal(other.layers[1].key_sample, trace.layers[1].key_sample)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "deepseek-v3", "falcon"])
def test_merging_is_observing_both(name, model):
    a, b = batches(4)[:2], batches(4)[2:]
    left, right = observe(model(name), a), observe(model(name), b)
    merged, both = left.merge(right), observe(model(name), a + b)
    assert merged.tokens == both.tokens
    assert merged.notes == both.notes
    for i, layer in both.layers.items():
        mine = merged.layers[i]
        for side in ("key", "value", "query"):
            x, y = getattr(mine, side), getattr(layer, side)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.count == y.count
                assert torch.equal(x.peak, y.peak)
                torch.testing.assert_close(x.second, y.second, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(x.mean, y.mean, rtol=1e-12, atol=1e-12)
        assert mine.key_sample.shape == layer.key_sample.shape
    backwards = right.merge(left)
    torch.testing.assert_close(backwards.layers[0].key.second, merged.layers[0].key.second)


def test_traces_of_different_models_do_not_merge(model):
    a, b = observe(model("llama"), batches(1)), observe(model("qwen3-next"), batches(1))
    with pytest.raises(KVSightError, match="cannot merge traces of models with different cached layers"):
        a.merge(b)
    c = observe(model("qwen3"), batches(1))
    with pytest.raises(KVSightError, match=r"cannot merge moments of shapes \(2, 16\) and \(2, 24\)"):
        a.merge(c)


def test_observing_leaves_the_model_alone(model):
    subject = model("llama")
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in subject.modules())
    before = logits(subject, tokens(1, 9))
    observe(subject, batches(1))
    with pytest.raises(KVSightError, match="token ids must be in"):
        observe(subject, [tokens(1, 9), tokens(1, 9) + 60])
    assert implementations(subject) == {"": "sdpa"}
    assert torch.equal(logits(subject, tokens(1, 9)), before)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in subject.modules()) == hooks
    assert not subject.training


@pytest.mark.parametrize(
    ("name", "note"), [("bloom", NO_QUERIES), ("falcon", NO_QUERIES), ("deepseek-v3", LATENTS)]
)
@pytest.mark.parametrize("method", ["sight", "kivi", "turboquant", "int"])
def test_models_that_hide_their_queries_are_fitted_and_it_is_noted(name, note, method, model, plan):
    fitted = plan(name, method, bits=5.0)
    assert fitted.provenance["note_0"].startswith(note)
    assert fitted.true_bits <= 5.0
    assert "note_0" not in plan("llama", method, bits=5.0).provenance


def test_broken_weights_are_named(model):
    subject = copy.deepcopy(model("llama"))
    subject.model.layers[1].self_attn.k_proj.weight.data[3, 3] = float("nan")
    message = (
        "the model produced NaN or inf in attention; statistics need finite numbers. Check the weights"
    )
    with pytest.raises(KVSightError, match=message):
        kvsight.fit(subject, batches(1), bits=4)
    assert implementations(subject) == {"": "sdpa"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros(2, 0, dtype=torch.int64),
            r"non-empty LongTensors \[B, T\]; got \(2, 0\) of torch.int64",
        ),
        (torch.zeros(8, dtype=torch.int64), r"LongTensors \[B, T\]; got \(8,\) of torch.int64"),
        (torch.zeros(2, 8), r"LongTensors \[B, T\]; got \(2, 8\) of torch.float32"),
        (
            torch.full((1, 8), 64),
            r"token ids must be in 0\.\.63; got 64\.\.64\. Use the model's own tokenizer",
        ),
        (torch.tensor([[3, -1]]), r"token ids must be in 0\.\.63; got -1\.\.3"),
    ],
)
def test_batches_are_checked(ids, message, model):
    with pytest.raises(KVSightError, match=message):
        observe(model("llama"), [ids])


@pytest.mark.parametrize("use", [kvsight.fit, kvsight.evaluate], ids=["fit", "evaluate"])
def test_batches_are_tensors(use, model, plan):
    arguments = {"bits": 4} if use is kvsight.fit else {"plan": plan("llama")}
    with pytest.raises(KVSightError, match=r"batches must be non-empty LongTensors \[B, T\]; got a list"):
        use(model("llama"), batches=[[1, 2]], **arguments)


def test_encoder_decoders_are_refused():
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4
    )
    with pytest.raises(
        KVSightError, match="T5ForConditionalGeneration is an encoder-decoder; kvsight packs"
    ):
        kvsight.fit(T5ForConditionalGeneration(config), batches(1), bits=4)


def test_no_text_is_an_error(model):
    with pytest.raises(KVSightError, match="calibration needs at least one batch of token ids; got none"):
        kvsight.fit(model("llama"), [], bits=4)


@pytest.mark.parametrize("name", ["falcon-h1", "mamba"])
def test_models_without_packable_layers_are_refused(name):
    with pytest.raises(KVSightError, match="this model caches no keys and values that kvsight can pack"):
        kvsight.fit(zoo.build(name), batches(1), bits=4)


def test_batches_may_be_a_generator_and_progress_is_told(model):
    inputs = batches(3)
    for given in (iter(inputs), inputs):
        calls = []
        kvsight.fit(model("llama"), given, bits=4, progress=lambda *call, to=calls: to.append(call))
        assert calls[:3] == [("observe", n, 3) for n in (1, 2, 3)]
        sides = (1, 2, 3, 4)
        assert [c for c in calls if c[0] == "curves"] == [("curves", n, 4) for n in sides]
        assert [c for c in calls if c[0] == "try sinks"] == [("try sinks", n, 2) for n in (1, 2)]
        assert calls[-4:] == [("fit", n, 4) for n in sides]

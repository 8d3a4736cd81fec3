"""Masks, modes and models that nobody expects, but that exist."""

import pytest
import torch
from transformers import (
    DynamicCache,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from zoo import batches, build, near, tokens

import kvsight
from kvsight.errors import KVSightError
from kvsight.trace import capture, observe

LAYOUT = (("layout", "tiles"),)


def logits(subject, cache, *pieces, mask=None):
    """Of pieces of text, one after another, on codes."""
    out, seen = [], 0
    with torch.no_grad(), kvsight.enable(subject):
        for ids in pieces:
            at = torch.arange(seen, seen + ids.shape[1]).expand_as(ids)
            more = {} if mask is None or not seen else {"attention_mask": mask}
            out.append(subject(ids, past_key_values=cache, use_cache=True, position_ids=at, **more).logits)
            seen += ids.shape[1]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("new", [3, 17])
def test_one_mask_serves_all_sequences(model, plan, new):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT)
    ids = tokens(3, 80 + new)
    mask = torch.ones(new, 80 + new, dtype=torch.bool).tril(80)[None, None]
    mask[..., :5] = False
    rows, tiled = (
        logits(subject, kvsight.PackedCache(fitted, tiles=tiles), ids[:, :80], ids[:, 80:], mask=mask)
        for tiles in (False, True)
    )
    assert all(near(a, b) for a, b in zip(rows, tiled, strict=True))


@pytest.mark.parametrize("tiles", [False, True])
def test_masks_of_another_length_are_refused(model, plan, tiles):
    subject, fitted = model("llama"), plan("llama", "sight", bits=4.0, options=LAYOUT)
    ids = tokens(2, 85)
    for shape in ((1, 1, 5, 105), (1, 1, 5, 5), (1, 1, 3, 85)):
        cache = kvsight.PackedCache(fitted, tiles=tiles)
        with pytest.raises(KVSightError, match=r"queries and .* tokens; this layer has 5 and shows 85"):
            logits(subject, cache, ids[:, :80], ids[:, 80:], mask=torch.ones(shape, dtype=torch.bool))
    cache = kvsight.PackedCache(fitted, tiles=tiles)
    with pytest.raises(KVSightError, match=r"boolean, or added to scores; got torch\.int64"):
        logits(subject, cache, ids[:, :80], ids[:, 80:], mask=torch.ones(1, 1, 5, 85, dtype=torch.int64))


@pytest.mark.parametrize("tiles", [False, True])
def test_a_mask_for_all_queries_at_once_is_not_causal(model, plan, tiles):
    subject, fitted = model("llama"), plan("llama", "identity")
    ids, mask = tokens(2, 85), torch.ones(1, 1, 1, 85, dtype=torch.bool)
    stock = DynamicCache(config=subject.config)
    at = torch.arange(85).expand(2, -1)
    with torch.no_grad():
        subject(ids[:, :80], past_key_values=stock, position_ids=at[:, :80])
        more = {"attention_mask": mask, "position_ids": at[:, 80:]}
        wanted = subject(ids[:, 80:], past_key_values=stock, **more).logits
    fitted = plan("llama", "sight", bits=12.0, options=LAYOUT) if tiles else fitted
    found = logits(subject, kvsight.PackedCache(fitted, tiles=tiles), ids[:, :80], ids[:, 80:], mask=mask)
    assert float((found[:, 80:] - wanted).abs().median()) < (0.1 if tiles else 1e-3)


@pytest.mark.parametrize("tiles", [False, True])
def test_autocast_changes_no_code(model, plan, tiles):
    subject, fitted = model("llama"), plan("llama", "sight", bits=6.0, options=LAYOUT)
    ids = tokens(2, 82)
    plain = logits(
        subject, kvsight.PackedCache(fitted, tiles=tiles), ids[:, :80], ids[:, 80:81], ids[:, 81:]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = kvsight.PackedCache(fitted, tiles=tiles)
        found = logits(subject, cache, ids[:, :80], ids[:, 80:81], ids[:, 81:])
    assert float((found.float() - plain).abs().median()) < 0.1
    assert (cache.layers[0].tiles is not None) == tiles


def test_no_attention_weights_are_said_once(plan):
    subject = build("llama", attention="eager")
    cache = kvsight.PackedCache(plan("llama"))
    with torch.no_grad(), kvsight.enable(subject), pytest.warns(UserWarning, match="gives no weights"):
        subject(tokens(1, 8), past_key_values=cache, use_cache=True, output_attentions=True)


def test_sliding_layers_cannot_go_back_behind_what_they_hold(model, plan):
    subject, ids = model("mistral"), tokens(1, 60)
    cache = kvsight.PackedCache(plan("mistral"))
    cache.activate_past_recording()
    logits(subject, cache, ids)
    cache.crop(-5)
    with pytest.raises(
        KVSightError, match="holds its tokens from 48 on, which is too few to forget the last 9"
    ):
        cache.crop(-9)
    assert cache.get_seq_length() == 55


def test_models_that_stop_half_way_with_gradients_are_observed_without(model):
    """One layer's hook refuses them, after others were seen."""
    subject = build("llama")

    def refuse(module, inputs):
        if torch.is_grad_enabled() and inputs[0].requires_grad:
            raise RuntimeError("no gradients here")

    plain = observe(subject, batches()[:1], gradient_tokens=0)
    hook = subject.model.layers[1].post_attention_layernorm.register_forward_pre_hook(refuse)
    try:
        found = observe(subject, batches()[:1], gradient_tokens=10**6)
    finally:
        hook.remove()
    assert found.tokens == plain.tokens and list(found.layers) == list(plain.layers)
    for layer, other in zip(found.layers.values(), plain.layers.values(), strict=True):
        assert layer.key.count == other.key.count
        torch.testing.assert_close(layer.key.second, other.key.second)
        torch.testing.assert_close(layer.output_metric, other.output_metric)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}


def paligemma():
    """Its text attends eagerly, the rest as torch does."""
    text = {"model_type": "gemma2", **SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96}
    vision = {"model_type": "siglip_vision_model", **SIZES, "image_size": 28, "patch_size": 14}
    parts = {"text_config": text, "vision_config": vision}
    config = PaliGemmaConfig(**parts, projection_dim=64, image_token_index=90)
    torch.manual_seed(0)
    out = PaliGemmaForConditionalGeneration._from_config(config).eval()
    out.set_attn_implementation({"": "sdpa", "vision_config": "sdpa", "text_config": "eager"})
    return out


def test_parts_of_a_model_keep_implementations_of_their_own():
    subject = paligemma()
    ids = torch.randint(2, 90, (2, 40))
    with torch.no_grad():
        wanted = subject(ids).logits
        with capture(subject, lambda *_: None):
            assert torch.equal(subject(ids).logits, wanted)
        with kvsight.enable(subject):
            assert torch.equal(subject(ids).logits, wanted)
    used = {
        name: getattr(subject.config, name)._attn_implementation
        for name in ("text_config", "vision_config")
    }
    assert used == {"text_config": "eager", "vision_config": "sdpa"}


def test_tiles_take_whole_chunks():
    with pytest.raises(
        KVSightError, match="layout=tiles' takes a head_dim that is a multiple of 16; got 24"
    ):
        kvsight.fit(build("llama", head_dim=24), batches(), bits=4.0, options=dict(LAYOUT))


def test_another_part_of_the_model_is_named(model, plan):
    subject = model("llama")
    with (
        kvsight.enable(subject.model),
        pytest.raises(KVSightError, match="weights of other names or shapes"),
    ):
        subject.model(tokens(1, 8), past_key_values=kvsight.PackedCache(plan("llama")), use_cache=True)


def test_parts_of_parts_keep_theirs_too():
    class Around(PreTrainedConfig):
        sub_configs = {"inner": PaliGemmaConfig}  # noqa: RUF012

    class Whole(PreTrainedModel):
        config_class = Around

        def __init__(self, config, inner):
            super().__init__(config)
            self.inner = inner

    around, subject = Around(), paligemma()
    around.inner = config = subject.config
    whole = Whole(around, subject)
    places = around, config, config.vision_config, config.text_config
    for part, name in zip(places, ("sdpa", "sdpa", "sdpa", "eager"), strict=True):
        part._attn_implementation_internal = name
    with capture(whole, lambda *_: None):
        inside = [part._attn_implementation for part in places]
        assert len(set(inside[:3])) == 1 and inside[3] not in (inside[0], "eager")
    assert [part._attn_implementation for part in places] == ["sdpa", "sdpa", "sdpa", "eager"]

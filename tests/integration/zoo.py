"""Tiny random causal LMs built from config: one per way of talking to a cache. No downloads."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvsight

VOCAB = 64
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_OLD = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
# untied, or a random model repeats its last token for ever
_SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Kind:
    """How to build an architecture, and what kvsight does with it.

    ``interface``: attention can run on codes. ``eager``: only the eager attention of the oldest
    transformers is right. ``stateful``: linear layers, which cannot roll back.
    """

    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    interface: bool = True
    attention: str = "sdpa"
    stateful: bool = False
    sliding: int | None = None
    base: dict[str, Any] = field(default_factory=lambda: dict(_SMALL))


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

KINDS: dict[str, Kind] = {
    "llama": Kind("llama"),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3", {"head_dim": 24}),
    "mistral": Kind("mistral", {"sliding_window": 8}, sliding=8),
    "gemma2": Kind(
        "gemma2",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        attention="eager",
        sliding=8,
    ),
    "gemma3": Kind(
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 3, "layer_types": _ALTERNATING},
        sliding=8,
    ),
    "gpt-oss": Kind(
        "gpt_oss",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,
        },
        attention="eager",
        sliding=8,
    ),
    "phi3": Kind("phi3"),
    "gpt2": Kind(
        "gpt2",
        base={"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "gpt-neox": Kind("gpt_neox", {"rotary_pct": 0.25}, base=_OLD),
    "opt": Kind("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}, base=_OLD),
    "bloom": Kind(
        "bloom",
        {"n_layer": 2, "n_head": 4},
        interface=False,
        attention="eager",
        base={"vocab_size": VOCAB, "hidden_size": 64},
    ),
    "falcon": Kind("falcon", {"new_decoder_architecture": False}, interface=False, base=_OLD),
    "deepseek-v3": Kind(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        interface=False,
    ),
    "qwen3-next": Kind(
        "qwen3_next",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
            **_MOE,
        },
        stateful=True,
    ),
    "gemma3n": Kind(
        "gemma3n_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "layer_types": [*_ALTERNATING, "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "intermediate_size": [96] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
        },
        sliding=8,
    ),
    "gemma4": Kind(
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        sliding=8,
    ),
}


# built for one purpose each, and in no list of tests
OTHERS: dict[str, Kind] = {
    "bitnet": Kind("bitnet"),
    "mamba": Kind(
        "mamba",
        attention="eager",
        base={"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2},
    ),
    "falcon-h1": Kind(
        "falcon_h1",
        {
            "eos_token_id": 1,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
            "mamba_expand": 1,
        },
    ),
}

# one cached layer: nothing that attention rounds reaches a code
SINGLE: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "qwen3": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "gemma3": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    "qwen3-next": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}


def build(name: str, seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """A model in eval mode, its weights large enough that its next tokens differ.

    ``name`` may end in ``-1layer``.
    """
    if name.endswith("-1layer"):
        name = name.removesuffix("-1layer")
        changes = {**SINGLE[name], **changes}
    kind = {**KINDS, **OTHERS}[name]
    config = AutoConfig.for_model(kind.family, **{**_SPECIAL, **kind.base, **kind.sizes, **changes})
    torch.manual_seed(seed)
    config._attn_implementation = attention or kind.attention
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3) -> list[torch.Tensor]:
    """Calibration for plans whose quality does not matter."""
    return [tokens(2, 48, seed=100 + i) for i in range(count)]


def read(subject, cache, ids, sizes, start=0, mask=None):
    """Logits of ids [B, T] from ``start`` on, so many at a time; a mask [B, T] says which are real."""
    parts = []
    with torch.no_grad(), kvsight.enable(subject):
        for size in sizes:
            more = {}
            if mask is not None:
                at = (mask.cumsum(1) - 1).clamp_min(0)
                more = {
                    "attention_mask": mask[:, : start + size],
                    "position_ids": at[:, start : start + size],
                }
            piece = ids[:, start : start + size]
            parts.append(subject(piece, past_key_values=cache, use_cache=True, **more).logits)
            start += size
    return torch.cat(parts, dim=1)


def near(a, b):
    """Whether logits are of the same codes, all but a few."""
    # encoders round differently, so once in a while a code differs
    return float((a - b).abs().median()) < 1e-4

"""Tell models apart: a hash of what shapes the cache, the same on every transformers version."""

from typing import Any

from kvsight.errors import KVSightError
from kvsight.plan import Plan, digest

_STRUCTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "sliding_window",
    "layer_types",
)


def fingerprint(model: Any) -> str:
    """sha256 over the structural part of the config and the names and shapes of the weights."""
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    structure = {key: _read(text, key) for key in _STRUCTURE}
    weights = sorted((name, list(p.shape)) for name, p in model.named_parameters())
    return digest({"config": structure, "weights": weights})


def _read(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except RuntimeError:
        # a config whose layers differ refuses to name one value; the layers' own are in the weights' shapes
        return config.to_dict().get(key)


def check_model(plan: Plan, model: Any) -> None:
    """Raise unless the plan was fitted to a model of this structure."""
    if fingerprint(model) == plan.fingerprint:
        return
    made = _describe(plan.config)
    here = _describe(model.config.to_dict())
    if made == here:
        raise KVSightError(
            f"the plan was made for another model: this one ({here}) has weights of other names or shapes. "
            "Pass the model that the plan was fitted to, as it was, or fit a plan to this one."
        )
    raise KVSightError(
        f"the plan was made for another model ({made}); this one is {here}. "
        "Fit a plan to this model: kvsight fit MODEL."
    )


def _describe(config: Any) -> str:
    text = config.get("text_config") or config
    keys = ("num_hidden_layers", "num_key_value_heads", "hidden_size", "vocab_size")
    labels = ("layers", "KV heads", "wide", "tokens")
    parts = [f"{text[k]} {label}" for k, label in zip(keys, labels, strict=True) if k in text]
    return ", ".join([str(config.get("model_type", "unknown")), *parts])

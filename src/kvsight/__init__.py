"""kvsight compresses the KV cache of transformer language models by what attention sees."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsight.eval.quality import evaluate as evaluate
    from kvsight.fit import fit as fit
    from kvsight.integrations.hf import PackedCache as PackedCache
    from kvsight.integrations.hf import enable as enable
    from kvsight.methods import names as methods
    from kvsight.plan import Plan as Plan

__version__ = "0.1.0"

# loaded on first use: importing kvsight must not import torch or transformers
_PUBLIC = {
    "Plan": ("kvsight.plan", "Plan"),
    "PackedCache": ("kvsight.integrations.hf", "PackedCache"),
    "enable": ("kvsight.integrations.hf", "enable"),
    "evaluate": ("kvsight.eval.quality", "evaluate"),
    "fit": ("kvsight.fit", "fit"),
    "methods": ("kvsight.methods", "names"),
    "method_info": ("kvsight.methods", "get"),
}

__all__ = ["PackedCache", "Plan", "enable", "evaluate", "fit", "method_info", "methods"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvsight' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

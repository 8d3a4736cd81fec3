"""kvsight compresses the KV cache of transformer language models by what attention sees."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsight.eval.quality import evaluate as evaluate
    from kvsight.fit import fit as fit
    from kvsight.integrations.enable import enable as enable
    from kvsight.integrations.hf import PackedCache as PackedCache
    from kvsight.methods import get as method_info
    from kvsight.methods import names as methods
    from kvsight.plan import Plan as Plan
    from kvsight.request import Constraints as Constraints

__version__ = "0.1.0"
__all__ = ["Constraints", "PackedCache", "Plan", "enable", "evaluate", "fit", "method_info", "methods"]

_PUBLIC = {
    "Plan": ("kvsight.plan", "Plan"),
    "PackedCache": ("kvsight.integrations.hf", "PackedCache"),
    "enable": ("kvsight.integrations.enable", "enable"),
    "evaluate": ("kvsight.eval.quality", "evaluate"),
    "fit": ("kvsight.fit", "fit"),
    "methods": ("kvsight.methods", "names"),
    "Constraints": ("kvsight.request", "Constraints"),
    "method_info": ("kvsight.methods", "get"),
}


class _Package(ModuleType):
    """Loads public names on first use: importing kvsight must not import torch or transformers."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PUBLIC})


def _loaded(module: str, attribute: str) -> property:
    def load(package: ModuleType) -> Any:
        return getattr(import_module(module), attribute)

    # importing kvsight.fit or kvsight.methods would put the module where the function of that name is
    return property(load, lambda package, module: None)


for _name, _place in _PUBLIC.items():
    setattr(_Package, _name, _loaded(*_place))
sys.modules[__name__].__class__ = _Package

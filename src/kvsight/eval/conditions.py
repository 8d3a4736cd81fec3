"""What must be the same for measurements to share a file of records."""

from importlib.metadata import version

from transformers import PreTrainedModel

import kvsight
from kvsight.fingerprint import fingerprint


def shared_conditions(model: PreTrainedModel, name: str) -> dict[str, str]:
    """``Conditions.shared`` of every command that measures ``model``, known to its user as ``name``."""
    return {
        "model": name,
        "fingerprint": fingerprint(model),
        "kvsight": kvsight.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }

"""The embedded model and texts, so that everything works without a network."""

from importlib import resources
from pathlib import Path
from typing import Literal

TextName = Literal["calibration", "validation", "evaluation"]


def model_path() -> Path:
    """Directory of the embedded model pico-8m, as transformers reads it."""
    return Path(str(resources.files(__name__))) / "pico-8m"


def text(name: TextName) -> str:
    """An embedded text: calibrate on the first, tune on the second, report on the third."""
    return (resources.files(__name__) / "text" / f"{name}.txt").read_bytes().decode()

"""Load a causal language model and its tokenizer, from a directory, the hub or the package."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvsight import assets
from kvsight.errors import KVSightError
from kvsight.formats import dtype_from_name

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_model(
    path: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """(model, tokenizer) of a transformers directory or hub name; None is the embedded pico-8m.

    ``dtype="auto"`` keeps the checkpoint's own. The model is in eval mode and its parameters take no
    gradient. Raises KVSightError for a path that does not exist and for anything transformers cannot
    load as a causal LM.
    """
    source = assets.model_path() if path is None else _resolve(path)
    with _quiet_loading():
        try:
            tokenizer = _load_tokenizer(source)
            model = _load_causal_lm(source, dtype)
        # transformers, safetensors and json share no base class for a broken or foreign model.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")[:300] or type(error).__name__
            raise KVSightError(
                f"Model {source} cannot be loaded: {reason} "
                "Give a directory or hub name of a transformers causal LM."
            ) from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def placed(device: str | None, dtype: str | None) -> tuple[torch.dtype | str, torch.device]:
    """What a command line means: by default the GPU where there is one, and fp32 on the CPU."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise KVSightError(f"unknown device {device!r}; give cpu, cuda or cuda:N.") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise KVSightError(f"device {device} is not available here; give --device cpu.")
    if dtype is None:
        return (torch.float32 if where.type == "cpu" else "auto"), where
    return dtype_from_name(dtype), where


def _resolve(path: str | Path) -> Path | str:
    """The directory, or the hub name if no directory of that name exists."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise KVSightError(
                f"Model directory {path} holds no config.json; give a transformers directory."
            )
        return directory
    if directory.exists():
        raise KVSightError(f"Model {path} is a file; give the directory that holds config.json.")
    if isinstance(path, str) and _HUB_NAME.fullmatch(path):
        return path
    raise KVSightError(
        f"Model directory {path} does not exist; give a transformers directory or a hub name."
    )


def _load_tokenizer(source: Path | str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if isinstance(source, Path):
        bare = source / "tokenizer.json"
        # Without its own settings, the class of the model's family could override the file.
        if bare.is_file() and not (source / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(bare))
    return AutoTokenizer.from_pretrained(source)


def _load_causal_lm(source: Path | str, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would fill them with random numbers and go on.
        raise KVSightError(f"its files lack {len(missing)} weights, {missing[0]} among them.")
    return model


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' own progress bars, which would mix with ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""The uncompressed model's logits: read once per window, then kept for every plan, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsight.probe import read

# bytes of logits that stay in memory; what goes beyond waits in temporary files
_KEPT = 1 << 30


class References:
    """Logits [B, T, V] of batch i, on the CPU and in the model's own type."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor], scratch: Path) -> None:
        self._model, self._batches, self._scratch = model, batches, scratch
        self._known: dict[int, Tensor | Path] = {}
        self._held = 0

    def __call__(self, index: int) -> Tensor:
        if index not in self._known:
            logits = read(self._model, self._batches[index].to(self._model.device), None).cpu()
            self._known[index] = self._keep(index, logits)
        known = self._known[index]
        return torch.load(known) if isinstance(known, Path) else known

    def _keep(self, index: int, logits: Tensor) -> Tensor | Path:
        if self._held + logits.nbytes <= _KEPT:
            self._held += logits.nbytes
            return logits
        path = self._scratch / f"{index}.pt"
        torch.save(logits, path)
        return path


@contextmanager
def references(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[References]:
    """``References`` whose temporary files are gone at the end."""
    with TemporaryDirectory(prefix="kvsight-") as scratch:
        yield References(model, batches, Path(scratch))

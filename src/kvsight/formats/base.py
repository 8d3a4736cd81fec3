"""What every format says of itself: its fields, and with them its bytes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsight.errors import KVSightError


@dataclass(frozen=True)
class Field:
    """One stored tensor: ``width`` items of ``dtype`` for every ``every`` tokens of one head."""

    name: str
    dtype: torch.dtype
    width: int
    every: int = 1
    meta: bool = False


class Format(ABC):
    """Byte layout of one head's keys or values. ``block`` tokens are committed together.

    ``dim`` is how many coordinates a token has, those without bits included: head_dim, unless the codec's
    transform gives fewer or more.
    """

    dim: int

    @property
    @abstractmethod
    def fields(self) -> tuple[Field, ...]: ...

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def spec(self) -> dict[str, object]:
        """JSON-ready description; ``format_from_spec`` is its inverse."""

    @abstractmethod
    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """The numbers that the bytes mean: [..., H, n, stored], fp32 unless dense.

        ``tables`` are the static tensors that the format needs (levels and starts for rows).
        """

    @property
    def table_names(self) -> tuple[str, ...]:
        """What ``read`` wants as ``tables``, in order."""
        return ()

    @property
    def stored(self) -> int:
        """Coordinates per token that have any bits."""
        return self.dim

    def of_stored(self, rows: Tensor) -> Tensor:
        """Of rows [..., dim, n], one for each coordinate, those that have any bits [..., stored, n]."""
        return rows[..., : self.stored, :]

    @cached_property
    def block(self) -> int:
        return max(field.every for field in self.fields)

    def nbytes(self, tokens: int) -> int:
        """Stored bytes of one head for ``tokens`` tokens, metadata and padding included."""
        if tokens % self.block:
            raise KVSightError(
                f"{self.name} stores whole blocks of {self.block} tokens; got {tokens}. "
                "Keep the remainder in the dense tail."
            )
        return sum(_field_bytes(field, tokens) for field in self.fields)

    def meta_nbytes(self, tokens: int) -> int:
        """The part of ``nbytes`` that is scales, zero points and norms rather than codes."""
        return sum(_field_bytes(field, tokens) for field in self.fields if field.meta)


def _field_bytes(field: Field, tokens: int) -> int:
    return tokens // field.every * field.width * field.dtype.itemsize

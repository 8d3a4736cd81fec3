"""Evenly spaced levels over groups of numbers: integers of 1 to 8 bits, or three levels."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats.base import Field, Format
from kvsight.packing import (
    MAX_WIDTH,
    pack_row,
    pack_trits,
    packed_trits,
    packed_width,
    unpack_row,
    unpack_trits,
)

Along = Literal["channel", "token"]


class Affine(Format):
    """x = code · scale + zero, with one scale and zero for each group.

    ``along="channel"``: a group is ``group`` neighbouring channels of one token.
    ``along="token"``: a group is one channel over a block of ``group`` tokens.
    """

    group: int
    along: Along

    @property
    @abstractmethod
    def levels(self) -> int:
        """Codes are 0 to ``levels`` - 1."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """uint8 codes [..., d] to the bytes of their rows."""

    @abstractmethod
    def unpack(self, rows: Tensor) -> Tensor:
        """Inverse of ``pack``."""

    @abstractmethod
    def lattice(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Scale and zero in fp32 from the stored parameters, of their shape."""

    @property
    def groups(self) -> int:
        """Groups per stored parameter row."""
        return -(-self.dim // self.group) if self.along == "channel" else self.dim

    def read(self, tensors: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
        """code · scale + zero."""
        rows, *parameters = tensors
        codes = self.unpack(rows).float()
        scale, zero = self.lattice(tuple(parameters))
        if self.along == "token":
            blocks: Tensor = codes.unflatten(-2, (-1, self.group))
            return (blocks * scale.unsqueeze(-2) + zero.unsqueeze(-2)).flatten(-3, -2)
        if self.dim % self.group == 0:
            cells: Tensor = codes.unflatten(-1, (-1, self.group))
            return (cells * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(-2)
        per_channel = torch.arange(self.dim, device=rows.device) // self.group
        return codes * scale[..., per_channel] + zero[..., per_channel]

    def _check_group(self) -> None:
        if self.group < 1 or (self.along == "channel" and self.group > self.dim):
            raise KVSightError(f"group {self.group} does not fit {self.dim} channels.")

    def _parameters(self, *names: str) -> tuple[Field, ...]:
        every = 1 if self.along == "channel" else self.group
        return tuple(Field(name, torch.float16, self.groups, every, meta=True) for name in names)

    def _spec(self, kind: str) -> dict[str, object]:
        return {"kind": kind, "dim": self.dim, "group": self.group, "along": self.along}


class _OfBits(Affine):
    """Codes of ``bits`` bits each."""

    bits: int

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    @property
    def _codes(self) -> Field:
        return Field("codes", torch.uint8, packed_width((self.bits,) * self.dim))

    def pack(self, codes: Tensor) -> Tensor:
        return pack_row(codes, (self.bits,) * self.dim)

    def unpack(self, rows: Tensor) -> Tensor:
        return unpack_row(rows, (self.bits,) * self.dim)


@dataclass(frozen=True)
class Grouped(_OfBits):
    """Asymmetric integers with an fp16 scale and zero point for each group."""

    dim: int
    bits: int
    group: int
    along: Along

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_WIDTH:
            raise KVSightError(f"grouped codes have 1 to {MAX_WIDTH} bits; got {self.bits}.")
        self._check_group()

    @property
    def name(self) -> str:
        return f"grouped-{self.bits}b-{self.along}{self.group}"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return (self._codes, *self._parameters("scale", "zero"))

    def lattice(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        scale, zero = parameters
        return scale.float(), zero.float()

    def spec(self) -> dict[str, object]:
        return {
            "kind": "grouped",
            "dim": self.dim,
            "bits": self.bits,
            "group": self.group,
            "along": self.along,
        }


@dataclass(frozen=True)
class Symmetric(_OfBits):
    """Signed integers around zero: x = (code - 2^(b-1)) · scale, with one fp16 number for each group."""

    dim: int
    bits: int
    group: int
    along: Along

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MAX_WIDTH:
            raise KVSightError(f"symmetric codes have 2 to {MAX_WIDTH} bits; got {self.bits}.")
        self._check_group()

    @property
    def name(self) -> str:
        return f"symmetric-{self.bits}b-{self.along}{self.group}"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return (self._codes, *self._parameters("scale"))

    def lattice(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        scale = parameters[0].float()
        return scale, scale * -(2 ** (self.bits - 1))

    def spec(self) -> dict[str, object]:
        return {**self._spec("symmetric"), "bits": self.bits}


@dataclass(frozen=True)
class Ternary(Affine):
    """Three levels, five codes in a byte, with an fp16 scale and zero point for each group."""

    dim: int
    group: int
    along: Along

    def __post_init__(self) -> None:
        self._check_group()

    @property
    def name(self) -> str:
        return f"ternary-{self.along}{self.group}"

    @property
    def levels(self) -> int:
        return 3

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return (Field("codes", torch.uint8, packed_trits(self.dim)), *self._parameters("scale", "zero"))

    def pack(self, codes: Tensor) -> Tensor:
        return pack_trits(codes)

    def unpack(self, rows: Tensor) -> Tensor:
        return unpack_trits(rows, self.dim)

    def lattice(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        scale, zero = parameters
        return scale.float(), zero.float()

    def spec(self) -> dict[str, object]:
        return self._spec("ternary")

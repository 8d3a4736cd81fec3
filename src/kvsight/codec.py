"""A fitted transform and quantizer for some heads of one layer's keys or values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from kvsight.drift import Assumed
from kvsight.errors import KVSightError
from kvsight.formats import Format, Packed
from kvsight.ops.attend.ref import Coded, Folded
from kvsight.ops.encode import Rounding, encode
from kvsight.retention import NOTHING, Hold
from kvsight.transforms import Transform


def check_finite(x: Tensor) -> None:
    """Raise ``KVSightError`` for NaN and inf."""
    if not bool(torch.isfinite(x).all()):
        raise KVSightError(
            "keys and values must be finite; got NaN or inf. "
            "Check the model's output (fp16 overflow?) before caching it."
        )


class Quantizer(Protocol):
    """Reals in transform coordinates to codes in one format, and back."""

    @property
    def format(self) -> Format: ...

    @property
    def tables(self) -> tuple[Tensor, ...]: ...

    @property
    def rounding(self) -> Rounding | None:
        """Boundaries of a row, which is encoded in one pass; None where ``encode`` takes coordinates."""

    def encode(self, y: Tensor) -> Packed: ...

    def decode(self, packed: Packed) -> Tensor: ...

    def to(self, device: torch.device | str) -> Self: ...

    def heads(self, index: Sequence[int]) -> Self: ...


@dataclass(frozen=True, eq=False)
class Codec:
    """encode: [..., H, n, d] to ``Packed``; decode: back. ``name`` is the method that fitted it."""

    name: str
    transform: Transform
    quantizer: Quantizer

    @property
    def format(self) -> Format:
        return self.quantizer.format

    @cached_property
    def heads(self) -> int | None:
        """KV heads that it was fitted to; None when all heads share its tensors."""
        tensors = (self.transform.shift, self.transform.matrix, *self.quantizer.tables)
        counts = {t.shape[0] for t in tensors if t is not None and t.dim() > 1} - {1}
        return max(counts, default=None)

    def encode(self, x: Tensor) -> Packed:
        """Code whole blocks of tokens. NaN, inf and misfits raise ``KVSightError``."""
        if x.shape[-1] != self.format.dim:
            raise KVSightError(
                f"this codec takes head_dim {self.format.dim}; got {x.shape[-1]}. "
                "Use the plan that was fitted to this model."
            )
        if self.heads is not None and (x.dim() < 3 or x.shape[-3] != self.heads):
            raise KVSightError(
                f"this codec was fitted to {self.heads} KV heads; got a tensor of shape {tuple(x.shape)}. "
                "Pass [..., heads, tokens, head_dim] with the heads of its placement."
            )
        if x.shape[-2] % self.format.block:
            raise KVSightError(
                f"encode takes whole blocks of {self.format.block} tokens; got {x.shape[-2]}. "
                "Keep the remainder in the dense tail."
            )
        check_finite(x)
        return self.encode_checked(x)

    def encode_checked(self, x: Tensor) -> Packed:
        """``encode`` for callers that have checked x themselves."""
        rule = self.quantizer.rounding
        if rule is None:
            return self.quantizer.encode(self.transform.forward(self._compute(x)))
        return Packed(self.format, encode(x, self.transform.shift, self.transform.matrix, rule))

    def decode(self, packed: Packed) -> Tensor:
        """[..., H, n, d]; fp32 unless the format is dense."""
        return self.folded.decode(self.quantizer.decode(packed))

    def _compute(self, x: Tensor) -> Tensor:
        plain = self.transform.shift is None and self.transform.matrix is None
        # products of a few or of many tokens round differently; in fp64 that does not reach the codes
        return x if plain else x.double()

    @cached_property
    def folded(self) -> Folded:
        """The transform as attention uses it: only coordinates that have bits."""
        stored, dim = self.format.stored, self.format.dim
        inverse = self.transform.inverse_matrix
        if inverse is None and stored < dim:
            inverse = torch.eye(dim).unsqueeze(0)
        if inverse is not None:
            inverse = inverse[:, :stored].contiguous()
        return Folded(inverse, self.transform.shift)

    def coded(self, heads: tuple[int, ...], packed: Packed) -> Coded:
        """What ``ops.attend`` reads: bytes, their tables and the folded transform."""
        return Coded(heads, packed, self.quantizer.tables, self.folded)

    def to(self, device: torch.device | str) -> "Codec":
        """The codec with its tensors on ``device``."""
        return replace(
            self,
            transform=self.transform.to(device, torch.float32),
            quantizer=self.quantizer.to(device),
        )

    def of_heads(self, index: Sequence[int]) -> "Codec":
        """The codec of some of its heads, by their place among them."""
        return replace(
            self, transform=self.transform.heads(list(index)), quantizer=self.quantizer.heads(index)
        )

    @property
    def static_nbytes(self) -> int:
        """Bytes of calibration tensors: codebooks, matrices and means (inverses are derived)."""
        tensors = (self.transform.shift, self.transform.matrix, *self.quantizer.tables)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __deepcopy__(self, memo: dict[int, object]) -> "Codec":
        # fitted tensors never change, so copies of a cache share them
        return self


@dataclass(frozen=True)
class Placement:
    """A codec for these KV heads of one side of one layer; its tensors lead with ``len(heads)`` or 1.

    ``assumed`` is what calibration saw in the codec's coordinates, for telling drift. ``hold`` is what the
    method keeps exact.
    """

    heads: tuple[int, ...]
    codec: Codec
    assumed: Assumed | None = None
    hold: Hold = NOTHING

    @property
    def block(self) -> int:
        """Tokens committed together."""
        return max(self.codec.format.block, self.hold.commit)

    def to(self, device: torch.device | str) -> "Placement":
        assumed = None if self.assumed is None else self.assumed.to(device)
        return replace(self, codec=self.codec.to(device), assumed=assumed)

    @property
    def static_nbytes(self) -> int:
        """Bytes of calibration tensors, paid once."""
        return self.codec.static_nbytes + (0 if self.assumed is None else self.assumed.nbytes)

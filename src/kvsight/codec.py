"""A fitted transform and quantizer for some heads of one layer's keys or values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvsight.drift import Assumed
from kvsight.errors import KVSightError
from kvsight.formats import Format, Packed
from kvsight.ops.attend.ref import Coded, Folded
from kvsight.ops.encode import encode
from kvsight.quantizers.base import Quantizer
from kvsight.quantizers.joined import JoinedQuantizer
from kvsight.retention import NOTHING, Hold
from kvsight.rope import Rope
from kvsight.transforms import Transform


def check_finite(x: Tensor) -> None:
    """Raise ``KVSightError`` for NaN and inf."""
    if not bool(torch.isfinite(x).all()):
        raise KVSightError(
            "keys and values must be finite; got NaN or inf. "
            "Check the model's output (fp16 overflow?) before caching it."
        )


@dataclass(frozen=True, eq=False)
class Codec:
    """encode: [..., H, n, d] to ``Packed``; decode: back. ``name`` is the method that fitted it.

    ``transform.dim`` is head_dim; ``format.dim`` counts the coordinates that it is coded in.
    With a ``rope`` keys are turned back by their index in the cache before they are coded, and forth again
    when they are read; ``first`` is the index of the first token that a call is given.
    """

    name: str
    transform: Transform
    quantizer: Quantizer
    rope: Rope | None = None

    @property
    def format(self) -> Format:
        return self.quantizer.format

    @property
    def dim(self) -> int:
        """head_dim."""
        return self.transform.dim

    @cached_property
    def heads(self) -> int | None:
        """KV heads that it was fitted to; None when all heads share its tensors."""
        counts = {t.shape[0] for t in self.tensors.values() if t.dim() > 1} - {1}
        return max(counts, default=None)

    def encode(self, x: Tensor, first: int = 0) -> Packed:
        """Code whole blocks of tokens. NaN, inf and misfits raise ``KVSightError``."""
        if x.shape[-1] != self.dim:
            raise KVSightError(
                f"this codec takes head_dim {self.dim}; got {x.shape[-1]}. "
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
        return self.encode_checked(x, first)

    def encode_checked(self, x: Tensor, first: int = 0) -> Packed:
        """``encode`` for callers that have checked x themselves."""
        x = self._unturned(x, first)
        rule = self.quantizer.rounding
        if rule is None:
            return self.quantizer.encode(self.transform.forward(self._compute(x)))
        return Packed(self.format, encode(x, self.transform.shift, self.transform.matrix, rule))

    def coordinates(self, x: Tensor, first: int = 0) -> Tensor:
        """[..., H, n, d] as the quantizer is given them."""
        return self.transform.forward(self._compute(self._unturned(x, first)))

    def decode(self, packed: Packed, first: int = 0) -> Tensor:
        """[..., H, n, d]; fp32 unless the format is dense."""
        x = self.folded.decode(self.quantizer.decode(packed))
        return x if self.rope is None else self.rope.forth(x, first)

    def _unturned(self, x: Tensor, first: int) -> Tensor:
        return x if self.rope is None else self.rope.back(x.double(), first)

    def _compute(self, x: Tensor) -> Tensor:
        plain = self.transform.shift is None and self.transform.matrix is None
        # products of a few or of many tokens round differently; in fp64 that does not reach the codes
        return x if plain else x.double()

    @cached_property
    def folded(self) -> Folded:
        """The transform as attention uses it: only coordinates that have bits."""
        inverse = self.transform.inverse_matrix
        # plans outlive inference mode
        with torch.inference_mode(False):
            if inverse is None and self.format.stored < self.dim:
                inverse = torch.eye(self.dim).unsqueeze(0)
            if inverse is not None:
                inverse = self.format.of_stored(inverse).contiguous()
        return Folded(inverse, self.transform.shift)

    def coded(self, heads: tuple[int, ...], packed: Packed, first: int = 0) -> Coded:
        """What ``ops.attend`` reads: bytes, their tables and the folded transform."""
        return Coded(heads, packed, self.quantizer.tables, self.folded, self.rope, first)

    def to(self, device: torch.device | str) -> "Codec":
        """The codec with its tensors on ``device``."""
        with torch.inference_mode(False):
            return replace(
                self,
                transform=self.transform.to(device, torch.float32),
                quantizer=self.quantizer.to(device),
                rope=None if self.rope is None else self.rope.to(device),
            )

    def of_heads(self, index: Sequence[int]) -> "Codec":
        """The codec of some of its heads, by their place among them."""
        return replace(
            self, transform=self.transform.heads(list(index)), quantizer=self.quantizer.heads(index)
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a plan file holds of it, by name: means, matrices and codebooks, and nothing derived."""
        tables = zip(self.format.table_names, self.quantizer.tables, strict=True)
        turning = {} if self.rope is None else self.rope.tensors
        return {**self.transform.tensors, **dict(tables), **self.quantizer.guides, **turning}

    @property
    def static_nbytes(self) -> int:
        """Bytes of calibration tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __deepcopy__(self, memo: dict[int, object]) -> "Codec":
        # fitted tensors never change, so copies of a cache share them
        return self


def joined(name: str, *parts: Codec) -> Codec:
    """The sum of codes: each part codes what the ones before it left of a vector.

    x̂ = shift + Σ_i ŷ_i @ inverse_i, so attention reads it as one codec with more coordinates. Only the
    first part may centre.
    """
    if any(part.transform.shift is not None for part in parts[1:]):
        raise KVSightError("only the first of joined codecs may centre; give the others no shift.")
    maps = [part.transform.stored() for part in parts]
    if len({part.dim for part in maps}) > 1:
        raise KVSightError(f"joined codecs must share a head_dim; got {[part.dim for part in maps]}.")
    eye = torch.eye(maps[0].dim).unsqueeze(0)
    matrix = _side_by_side([eye if t.matrix is None else t.matrix for t in maps], -1)
    inverse = _side_by_side([eye if t.inverse_matrix is None else t.inverse_matrix for t in maps], -2)
    transform = Transform(maps[0].dim, maps[0].shift, matrix, inverse, kept=True)
    quantizer = JoinedQuantizer.of([part.quantizer for part in parts], matrix, inverse)
    return Codec(name, transform, quantizer)


def _side_by_side(matrices: Sequence[Tensor], dim: int) -> Tensor:
    heads = max(matrix.shape[0] for matrix in matrices)
    return torch.cat([matrix.expand(heads, -1, -1) for matrix in matrices], dim=dim)


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

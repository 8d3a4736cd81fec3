"""The tensor that carries codes through attention: decodes itself for whoever does not know it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvsight.ops.attend.ref import Segment
from kvsight.plan import Plan

_KEEPING = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.contiguous, torch.ops.aten.detach)


class Reads:
    """How often attention ran on codes, and how often a consumer made us decode the history."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.packed = 0
        self.decoded = 0

    def on_decode(self) -> None:
        """Count; warn the first time."""
        self.decoded += 1
        if self.decoded == 1:
            warnings.warn(
                "kvsight: attention decodes this cache on every read (correct, but slower and with more "
                "memory). If the model has the attention interface, run it inside kvsight.enable(model).",
                stacklevel=2,
            )

    def __deepcopy__(self, memo: dict[int, object]) -> "Reads":
        fresh = Reads(self.plan)
        # a copy of a cache that already warned does not warn again
        fresh.packed, fresh.decoded = self.packed, self.decoded
        return fresh


class PackedKV(Tensor):
    """[B, H, S, d] of one layer's keys or values, held as segments.

    Our attention function reads ``segments``; any other operation gets the decoded tensor, made once
    per update and counted in ``reads``.
    """

    segments: tuple[Segment, ...]
    reads: Reads

    @staticmethod
    def __new__(cls, segments: tuple[Segment, ...], like: Tensor, reads: Reads) -> "PackedKV":
        tokens = sum(segment.tokens for segment in segments)
        shape = (like.shape[0], like.shape[1], tokens, like.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, segments: tuple[Segment, ...], like: Tensor, reads: Reads) -> None:
        self.segments = segments
        self.reads = reads
        self._decoded: Tensor | None = None

    def decode(self) -> Tensor:
        """The decoded tensor, contiguous."""
        if self._decoded is None:
            self.reads.on_decode()
            parts = [segment.decode(self.dtype) for segment in self.segments]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            self._decoded = joined.contiguous()
        return self._decoded

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"PackedKV(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "overloadpacket", None) in _KEEPING and isinstance(args[0], PackedKV):
            # some models move shared keys to the device that they are on already
            probe = func(torch.empty(0, dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs)
            if (probe.dtype, probe.device) == (args[0].dtype, args[0].device):
                return args[0]
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def _plain(x: Any) -> Any:
    return x.decode() if isinstance(x, PackedKV) else x

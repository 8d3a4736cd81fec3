"""The tensor that carries codes through attention: decodes itself for whoever does not know it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvsight.cache.outside import outside_autocast, outside_graphs
from kvsight.cache.side import segments as segments_of
from kvsight.cache.tiles import Fresh, Tiles
from kvsight.errors import KVSightError
from kvsight.ops.attend.ref import Segment
from kvsight.plan import Plan

_MASK = 1 << 26
# what is added to scores hides a token from here on, and is a bias above
_HIDES = -1e4
_KEEPING = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.contiguous, torch.ops.aten.detach)


class Reads:
    """How often attention ran on codes, and how often a consumer made us decode the history.

    Steps in graphs are not counted.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.packed = 0
        self.decoded = 0
        self._said: set[str] = set()
        self._paddings: dict[tuple[int, int | None], tuple[Tensor, Tensor | None]] = {}

    def on_decode(self) -> None:
        """Count; warn the first time."""
        self.decoded += 1
        if self.decoded == 1:
            warnings.warn(
                "kvsight: attention decodes this cache on every read (correct, but slower and with more "
                "memory). If the model has the attention interface, run it inside kvsight.enable(model).",
                stacklevel=2,
            )

    def on_rows(self) -> None:
        """Say the first time that a GPU decodes from rows where it could from tiles."""
        self._say_once(
            "attention on this plan's rows is much slower on this GPU than on BF16. Plans of `sight` "
            "fitted with options={'layout': 'tiles'} are read faster than BF16."
        )

    def on_weights(self) -> None:
        """Say the first time that attention weights are asked for."""
        self._say_once(
            "attention on codes gives no weights, so output_attentions has none. Run the model outside of "
            "kvsight.enable(model), with eager attention, to get them."
        )

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"kvsight: {what}", stacklevel=3)

    def padding(self, mask: Tensor, window: int | None = None) -> Tensor | None:
        """As ``left_padding``. Layers of one step share a mask, so it is looked at once."""
        key = id(mask), window
        if key not in self._paddings:
            self._paddings[key] = mask, left_padding(mask, window)
        return self._paddings[key][1]

    def begin_step(self) -> None:
        """Forget the last step's masks: their owner may change them for the next."""
        self._paddings.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> "Reads":
        fresh = Reads(self.plan)
        # a copy of a cache that already warned does not warn again
        fresh.packed, fresh.decoded = self.packed, self.decoded
        fresh._said = set(self._said)
        return fresh


def left_padding(mask: Tensor, window: int | None = None) -> Tensor | None:
    """How many first tokens of each sequence, [B] on the CPU, a causal mask [B, 1, Q, S] hides.

    With a ``window`` queries see so many tokens at most. None where the mask does anything else.
    """
    if mask.shape[1] != 1:
        return None
    queries, tokens = mask.shape[2:]
    at = torch.arange(tokens, device=mask.device)
    hidden = (~_shown(mask[:, 0, -1])).sum(-1)
    if window is not None:
        # what the last query does not see may have left its window
        before = (~_shown(mask[:, 0, 0, : tokens - queries + 1])).sum(-1)
        hidden = torch.where(hidden > tokens - window, hidden, before)
    newest = tokens - queries + torch.arange(queries, device=mask.device)
    # some queries at a time: a mask of a long prefill is large
    step = max(1, _MASK // (len(mask) * tokens))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        part = mask[:, 0, rows]
        last = newest[rows].unsqueeze(-1)
        plain = (at >= hidden.view(-1, 1, 1)) & (at <= last)
        if window is not None:
            plain &= at > last - window
        fits = (_shown(part) == plain) & (plain | _hides(part))
        if not bool(fits.all()):
            return None
    return hidden.cpu()


def _shown(mask: Tensor) -> Tensor:
    """Where a mask leaves scores as they are: true, or nothing added."""
    return mask if mask.dtype == torch.bool else mask == 0


def _hides(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask <= _HIDES


@dataclass(frozen=True, eq=False)
class Held:
    """What a handle stands for: segments, or one side of tiles as they are until the next update."""

    tokens: int
    segments: Callable[[], tuple[Segment, ...]]
    tiles: Tiles | None = None
    fresh: Fresh | None = None

    @classmethod
    def in_segments(cls, segments: tuple[Segment, ...]) -> "Held":
        return cls(sum(segment.tokens for segment in segments), lambda: segments)

    @classmethod
    def in_tiles(cls, tiles: Tiles, side: int, fresh: Fresh | None = None) -> "Held":
        shown = tiles.shown

        def segments() -> tuple[Segment, ...]:
            before = tiles.states(fresh)[side]
            if fresh is None:
                return segments_of(before, shown)
            new = (fresh.keys, fresh.values)[side]
            codes = (segment for segment in segments_of(before) if segment.tokens)
            return (*codes, Segment(new.shape[2], dense=new))

        return cls(shown, segments, tiles, fresh)


class TracedKV:
    """What stands for handles while ``torch.compile`` traces: no tensor, only our attention reads it."""

    def __init__(self, tiles: Tiles, reads: Reads) -> None:
        self.tiles, self.reads = tiles, reads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise KVSightError(
            "a compiled step reads a PackedCache through kvsight.enable(model) only, in models that have "
            f"the attention interface; the model's own attention asked for its {name}."
        )


class PackedKV(Tensor):
    """[B, H, S, d] of one layer's keys or values, held packed.

    Our attention function reads what is ``held``; any other operation gets the decoded tensor, made
    once per update and counted in ``reads``.
    """

    held: Held
    reads: Reads

    @staticmethod
    def __new__(cls, held: Held, like: Tensor, reads: Reads) -> "PackedKV":
        shape = (like.shape[0], like.shape[1], held.tokens, like.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, held: Held, like: Tensor, reads: Reads) -> None:
        self.held = held
        self.reads = reads
        self._decoded: Tensor | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The tokens in order; made from tiles where they are held so."""
        return self.held.segments()

    @outside_graphs
    @outside_autocast
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

"""Keys or values of one layer while a model runs: an immutable state, and pure functions on it.

Order in time: exact sinks, coded tokens, exact tail. A token is coded alone or with its block, once;
appending copies committed bytes unchanged. ``skip`` leading tokens (sliding layers) are held but no
longer visible.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsight.codec import Codec, Placement, check_finite
from kvsight.errors import KVSightError
from kvsight.formats import Packed, concat, empty, room
from kvsight.ops.attend.ref import Coded, Segment, merge_heads
from kvsight.plan import side_block, side_retention
from kvsight.retention import Retention

_ENCODE = 1 << 17


@dataclass(frozen=True, eq=False)
class SideState:
    """``sinks`` and ``tail`` [B, H, n, d] in ``dense_dtype``; ``coded`` one ``Packed`` per placement.

    ``freed`` tokens came before the first one that is held.
    """

    placements: tuple[Placement, ...]
    retention: Retention
    dense_dtype: torch.dtype
    sinks: Tensor
    coded: tuple[Packed, ...]
    tail: Tensor
    skip: int = 0
    freed: int = 0

    @property
    def first(self) -> int:
        """Index in the sequence of the first coded token."""
        return self.freed + int(self.sinks.shape[2])

    @property
    def held(self) -> int:
        return int(self.sinks.shape[2] + self.coded[0].tokens + self.tail.shape[2])

    @property
    def block(self) -> int:
        return side_block(self.placements)

    @property
    def visible(self) -> int:
        return self.held - self.skip

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as allocated."""
        dense = sum(t.numel() * t.element_size() for t in (self.sinks, self.tail))
        return dense + sum(packed.nbytes for packed in self.coded)

    @property
    def batch(self) -> int:
        return int(self.tail.shape[0])


def start(
    placements: tuple[Placement, ...], retention: Retention, dense_dtype: torch.dtype, like: Tensor
) -> SideState:
    """An empty state for tokens shaped as ``like`` [B, H, n, d]."""
    heads = sum(len(p.heads) for p in placements)
    dim = placements[0].codec.dim
    if like.shape[1] != heads or like.shape[3] != dim:
        raise KVSightError(
            f"the plan expects {heads} KV heads of dimension {dim}; the model gives "
            f"{like.shape[1]} of {like.shape[3]}. Use the plan that was fitted to this model."
        )
    if like.device.type != "cpu":
        placements = tuple(p.to(like.device) for p in placements)
    none = torch.empty(like.shape[0], heads, 0, dim, dtype=dense_dtype, device=like.device)
    coded = tuple(empty(p.codec.format, (like.shape[0], len(p.heads)), like.device) for p in placements)
    kept = side_retention(retention, placements)
    return SideState(placements, kept, dense_dtype, none, coded, none)


def append(state: SideState, x: Tensor) -> SideState:
    """Add tokens [B, H, n, d], committing every block that is complete and out of the exact window."""
    check_batch(state, x)
    x = x.detach()
    last = state.retention.exact_last
    missing = state.retention.exact_first - state.sinks.shape[2]
    check_finite(x)
    if state.block > 1 or last > 0:
        # tokens may wait in the tail first: rounding all of them keeps codes independent of chunking
        x = x.to(state.dense_dtype)
    sinks = state.sinks
    if missing > 0:
        sinks = torch.cat([sinks, x[:, :, :missing].to(state.dense_dtype)], dim=2)
        x = x[:, :, missing:]
    pool = torch.cat([state.tail, x], dim=2) if state.tail.shape[2] else x
    commit = max(0, pool.shape[2] - last) // state.block * state.block
    coded = state.coded
    first = state.freed + sinks.shape[2] + coded[0].tokens
    if commit:
        coded = tuple(
            _grown(old, p.codec, _of_heads(pool[:, :, :commit], p.heads), first)
            for old, p in zip(state.coded, state.placements, strict=True)
        )
    tail = pool[:, :, commit:].to(state.dense_dtype)
    return replace(state, sinks=sinks, coded=coded, tail=_owned(tail, pool))


def check_batch(state: SideState, x: Tensor) -> None:
    """Raise ``KVSightError`` where new tokens are of another number of sequences."""
    if x.shape[0] != state.batch:
        raise KVSightError(
            f"the cache holds a batch of {state.batch}; got {x.shape[0]}. "
            "Reset it, or repeat or select its batch first."
        )


def _grown(old: Packed, codec: Codec, x: Tensor, first: int) -> Packed:
    """``old`` with x, whose indices begin at ``first``, coded behind it.

    A long x goes in pieces, so that scratch memory stays bounded.
    """
    block = codec.format.block
    per_token = x.shape[0] * x.shape[1] * x.shape[3]
    step = max(1, _ENCODE // (per_token * block)) * block
    if x.shape[2] <= step:
        return concat([old, codec.encode_checked(x, first)])
    grown = room(old, x.shape[2])
    for start in range(0, x.shape[2], step):
        piece = codec.encode_checked(x[:, :, start : start + step], first + start)
        grown.narrow(old.tokens + start, old.tokens + start + piece.tokens).copy_(piece)
    return grown


def _of_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    if heads == tuple(range(x.shape[1])):
        return x
    return x[:, heads[0] : heads[0] + 1] if len(heads) == 1 else x[:, list(heads)]


def _owned(view: Tensor, whole: Tensor) -> Tensor:
    """A copy where ``view`` would keep a larger tensor, or the caller's, alive."""
    return view.clone() if view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() else view


def hide(state: SideState, visible: int) -> SideState:
    """Keep the last ``visible`` tokens in sight and free coded blocks that are wholly out of it."""
    skip = state.skip + max(0, state.visible - visible)
    if skip == state.skip:
        return state
    freed = min(skip // state.block * state.block, state.coded[0].tokens)
    if not freed:
        return replace(state, skip=skip)
    coded = tuple(packed.narrow(freed, packed.tokens).contiguous() for packed in state.coded)
    return replace(state, coded=coded, skip=skip - freed, freed=state.freed + freed)


def crop(state: SideState, remove: int) -> SideState:
    """Forget the last ``remove`` tokens.

    A cut inside a coded block leaves the block's first tokens as decoded numbers in the tail.
    """
    if remove <= 0:
        return state
    seen = max(0, state.freed + state.held - remove)
    tail = state.tail.shape[2]
    if remove <= tail:
        return replace(state, tail=state.tail[:, :, : tail - remove].clone())
    remove -= tail
    held = state.coded[0].tokens
    keep = max(0, held - remove)
    whole = keep // state.block * state.block
    coded = tuple(packed.narrow(0, whole).contiguous() for packed in state.coded)
    rest = state.tail[:, :, :0]
    if keep > whole:
        cut = [packed.narrow(whole, whole + state.block) for packed in state.coded]
        at = state.first + whole
        parts = [p.codec.decode(packed, at) for p, packed in zip(state.placements, cut, strict=True)]
        rest = merge_heads(parts, [p.heads for p in state.placements])[:, :, : keep - whole]
    sinks = state.sinks
    if remove > held:
        sinks = sinks[:, :, : max(0, sinks.shape[2] - (remove - held))].clone()
    return replace(
        state,
        sinks=sinks,
        coded=coded,
        tail=rest.to(state.dense_dtype).clone(),
        skip=min(state.skip, keep),
        freed=min(state.freed, seen),
    )


def select(state: SideState, batch: Tensor) -> SideState:
    """The sequences ``batch`` (int64), repeats allowed."""
    index = batch.to(state.tail.device)
    return replace(
        state,
        sinks=state.sinks.index_select(0, index),
        coded=tuple(packed.select(index) for packed in state.coded),
        tail=state.tail.index_select(0, index),
    )


def move(state: SideState, device: torch.device | str) -> SideState:
    return replace(
        state,
        sinks=state.sinks.to(device),
        coded=tuple(packed.to(device) for packed in state.coded),
        tail=state.tail.to(device),
    )


def segments(state: SideState, last: int | None = None) -> tuple[Segment, ...]:
    """The visible tokens in order, or the ``last`` of them, for ``ops.attend``."""
    hidden = state.skip if last is None else state.skip + max(0, state.visible - last)
    out: list[Segment] = []
    sinks = state.sinks[:, :, min(hidden, state.sinks.shape[2]) :]
    hidden -= state.sinks.shape[2] - sinks.shape[2]
    if sinks.shape[2]:
        out.append(Segment(sinks.shape[2], dense=sinks))
    held = state.coded[0].tokens
    skip = min(hidden, held)
    if held > skip:
        out.append(Segment(held - skip, coded=_coded(state), skip=skip))
    tail = state.tail[:, :, hidden - skip :]
    if tail.shape[2] or not out:
        out.append(Segment(tail.shape[2], dense=tail))
    return tuple(out)


def _coded(state: SideState) -> tuple[Coded, ...]:
    pairs = zip(state.placements, state.coded, strict=True)
    return tuple(p.codec.coded(p.heads, packed, state.first) for p, packed in pairs)


def tensors(state: SideState) -> dict[str, Tensor]:
    """Every stored tensor by name, for a file."""
    out = {"sinks": state.sinks, "tail": state.tail}
    for i, packed in enumerate(state.coded):
        pairs = zip(packed.format.fields, packed.tensors, strict=True)
        out.update({f"{i}.{stored.name}": tensor for stored, tensor in pairs})
    return {name: tensor.contiguous() for name, tensor in out.items()}


def restore(state: SideState, stored: Mapping[str, Tensor], skip: int, seen: int) -> SideState:
    """The state after ``seen`` tokens whose ``tensors`` were ``stored``; ``state`` is an empty one."""
    coded = tuple(
        Packed(packed.format, tuple(stored[f"{i}.{f.name}"] for f in packed.format.fields))
        for i, packed in enumerate(state.coded)
    )
    full = replace(state, sinks=stored["sinks"], coded=coded, tail=stored["tail"], skip=skip)
    return replace(full, freed=seen - full.held)

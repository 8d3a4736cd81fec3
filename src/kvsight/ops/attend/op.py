"""``kvsight::attend``, the operator that compiled graphs hold: segments as tensors and numbers.

A graph cannot hold our classes. Eager calls skip it, and with it the dispatcher's cost.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from kvsight.formats import Dense, Format, Grouped, Indexed, Packed, Polar, Row
from kvsight.ops.attend import dispatch
from kvsight.ops.attend.ref import Coded, Folded, Segment
from kvsight.packing import MAX_WIDTH

_T = TypeVar("_T")
_ALONG: tuple[Literal["channel", "token"], ...] = ("channel", "token")
_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.library.custom_op("kvsight::attend", mutates_args=())
def attend_op(  # noqa: PLR0913
    q: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    dim: int,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sink_logits: Tensor | None,
    backend: str | None,
) -> Tensor:
    """``dispatch.attend`` on flattened segments; ``dim`` is the values' head_dim."""
    numbers, stored = iter(layout), iter(tensors)
    keys, values = ([_segment(numbers, stored) for _ in range(next(numbers))] for _ in range(2))
    return dispatch.attend(
        q,
        keys,
        values,
        scaling=scaling,
        mask=mask,
        causal=causal,
        softcap=softcap,
        sink_logits=sink_logits,
        backend=backend,
    )


@attend_op.register_fake
def _(  # noqa: PLR0913
    q: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    dim: int,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sink_logits: Tensor | None,
    backend: str | None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dim)


def flatten(sides: Sequence[Sequence[Segment]]) -> tuple[list[Tensor], list[int]]:
    """The tensors of keys and values in order, and the numbers that say how to put them together."""
    tensors: list[Tensor] = []
    layout: list[int] = []
    for side in sides:
        layout.append(len(side))
        for segment in side:
            layout += [segment.skip, len(segment.coded)]
            if segment.dense is not None:
                tensors.append(segment.dense)
            for coded in segment.coded:
                layout += [len(coded.heads), *coded.heads, *_numbers(coded.packed.format)]
                optional = (coded.folded.inverse, coded.folded.shift)
                layout += [len(coded.packed.tensors), len(coded.tables)]
                layout += [int(tensor is not None) for tensor in optional]
                tensors += [*coded.packed.tensors, *coded.tables]
                tensors += [tensor for tensor in optional if tensor is not None]
    return tensors, layout


def _segment(numbers: Iterator[int], tensors: Iterator[Tensor]) -> Segment:
    skip, groups = next(numbers), next(numbers)
    if not groups:
        dense = next(tensors)
        return Segment(dense.shape[2], dense=dense)
    coded = tuple(_coded(numbers, tensors) for _ in range(groups))
    return Segment(coded[0].packed.tokens - skip, coded=coded, skip=skip)


def _coded(numbers: Iterator[int], tensors: Iterator[Tensor]) -> Coded:
    heads = tuple(_take(numbers, next(numbers)))
    form = _format(numbers)
    stored, tables, inverse, shift = _take(numbers, 4)
    packed = Packed(form, tuple(_take(tensors, stored)))
    static = tuple(_take(tensors, tables))
    folded = Folded(next(tensors) if inverse else None, next(tensors) if shift else None)
    return Coded(heads, packed, static, folded)


def _take(items: Iterator[_T], count: int) -> list[_T]:
    return [next(items) for _ in range(count)]


def _numbers(form: Format) -> list[int]:
    """A format as a few numbers; widths fall, so that their counts say all."""
    if isinstance(form, Row):
        return [0, int(form.norm), *(form.widths.count(width) for width in range(MAX_WIDTH, -1, -1))]
    if isinstance(form, Grouped):
        return [1, form.dim, form.bits, form.group, _ALONG.index(form.along)]
    if isinstance(form, Indexed):
        return [3, form.dim, form.span, form.bits, form.stages, int(form.strided), int(form.norm)]
    if isinstance(form, Polar):
        return [4, form.dim, len(form.widths), *form.widths]
    assert isinstance(form, Dense)
    return [2, form.dim, _TYPES.index(form.dtype)]


def _format(numbers: Iterator[int]) -> Format:
    match next(numbers):
        case 0:
            norm = bool(next(numbers))
            counts = zip(range(MAX_WIDTH, -1, -1), _take(numbers, MAX_WIDTH + 1), strict=True)
            return Row(tuple(width for width, count in counts for _ in range(count)), norm)
        case 1:
            dim, bits, group, along = _take(numbers, 4)
            return Grouped(dim, bits, group, _ALONG[along])
        case 3:
            dim, span, bits, stages = _take(numbers, 4)
            return Indexed(dim, span, bits, stages, bool(next(numbers)), bool(next(numbers)))
        case 4:
            dim, levels = _take(numbers, 2)
            return Polar(dim, tuple(_take(numbers, levels)))
        case _:
            dim, dtype = _take(numbers, 2)
            return Dense(dim, _TYPES[dtype])

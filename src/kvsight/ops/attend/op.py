"""``kvsight::attend``, the operator that compiled graphs hold: segments as tensors and numbers.

A graph cannot hold our classes. Eager calls skip it, and with it the dispatcher's cost.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from kvsight.errors import KVSightError
from kvsight.formats import Format, Packed, format_from_spec
from kvsight.ops.attend import dispatch
from kvsight.ops.attend.ref import Coded, Folded, Segment
from kvsight.rope import Rope

_T = TypeVar("_T")
# what comes next in a spelled specification
_FALSE, _TRUE, _NUMBER, _TEXT, _LIST, _MAPPING = range(6)


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
                layout += [int(coded.rope is not None), coded.first]
                if coded.rope is not None:
                    tensors += [coded.rope.frequencies, coded.rope.partners]
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
    turns, first = _take(numbers, 2)
    rope = Rope(next(tensors), next(tensors)) if turns else None
    return Coded(heads, packed, static, folded, rope, first)


def _take(items: Iterator[_T], count: int) -> list[_T]:
    return [next(items) for _ in range(count)]


def _numbers(form: Format) -> list[int]:
    """A format as numbers: how many follow, and its specification, spelled."""
    spelled = _spell(form.spec())
    return [len(spelled), *spelled]


def _spell(item: object) -> list[int]:
    match item:
        case bool():
            return [_TRUE if item else _FALSE]
        case int():
            return [_NUMBER, item]
        case str():
            return [_TEXT, len(item), *(ord(letter) for letter in item)]
        case list():
            # widths fall, so that runs of equal ones are few
            runs: list[tuple[object, int]] = []
            for each in item:
                count = runs.pop()[1] if runs and runs[-1][0] == each else 0
                runs.append((each, count + 1))
            return [_LIST, len(runs), *(n for each, count in runs for n in (count, *_spell(each)))]
        case dict():
            return [
                _MAPPING,
                len(item),
                *(n for pair in item.items() for part in pair for n in _spell(part)),
            ]
    raise KVSightError(f"compiled graphs cannot hold {item!r} of a format; do not compile this model.")


def _format(numbers: Iterator[int]) -> Format:
    """Inverse of ``_numbers``."""
    return _spelled(tuple(_take(numbers, next(numbers))))


@cache
def _spelled(numbers: tuple[int, ...]) -> Format:
    spec = _read(iter(numbers))
    assert isinstance(spec, dict)
    return format_from_spec(spec)


def _read(numbers: Iterator[int]) -> object:
    """Inverse of ``_spell``."""
    kind = next(numbers)
    if kind in (_FALSE, _TRUE):
        return kind == _TRUE
    if kind == _NUMBER:
        return next(numbers)
    if kind == _TEXT:
        return "".join(map(chr, _take(numbers, next(numbers))))
    if kind == _LIST:
        out: list[object] = []
        for _ in range(next(numbers)):
            count = next(numbers)
            out += [_read(numbers)] * count
        return out
    return {_read(numbers): _read(numbers) for _ in range(next(numbers))}

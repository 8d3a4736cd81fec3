"""Laws of codecs."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor

from kvsight.codec import Codec
from kvsight.errors import KVSightError
from kvsight.formats import (
    Affine,
    Dense,
    Indexed,
    Joined,
    Packed,
    Patched,
    Polar,
    Row,
    Scaled,
    Sketch,
    Tiered,
    concat,
    format_from_spec,
)
from kvsight.ops.attend.ref import Segment
from kvsight.packing import pack_row, unpack_row
from kvsight.quantizers.base import Quantizer
from kvsight.testing.laws import LawBroken, generator, hold, refused
from kvsight.transforms import Transform

_BATCH = 2
_SHARED_HEADS = 2
_HUGE = 6e4


@dataclass(frozen=True)
class _Case:
    """A codec, numbers that suit it [B, H, n, d], and their codes."""

    codec: Codec
    x: Tensor
    packed: Packed

    def encode(self, x: Tensor, first: int = 0) -> Packed:
        return self.codec.encode(x, first)


def check_codec(codec: Codec, *, tokens: int | None = None, seed: int = 0) -> None:
    """All codec laws, on unit Gaussians in the codec's own coordinates.

    ``tokens`` is rounded up to whole blocks; by default at least four blocks and a dozen tokens.
    """
    case = _case(codec, tokens, seed)
    for law in _CODEC_LAWS:
        law(case)


def check_compresses(codec: Codec, *, dense_dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """The codec's memory, buffers behind views included, is what it says and less than dense."""
    case = _case(codec, None, seed)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in case.packed.tensors}
    held = sum(storage.nbytes() for storage in storages.values())
    hold("owned bytes", held == case.packed.nbytes, f"{case.packed.nbytes} bytes hold {held} alive")
    bits = 8 * held / case.x.numel()
    dense = 8 * dense_dtype.itemsize
    hold("compresses", bits < dense, f"{bits:.4g} bits per element, {dense_dtype} has {dense}")


def _case(codec: Codec, tokens: int | None, seed: int) -> _Case:
    block = codec.format.block
    wanted = max(4 * block, 12) if tokens is None else tokens
    heads = _SHARED_HEADS if codec.heads is None else codec.heads
    x = _draw(codec.transform, heads, -(-wanted // block) * block, seed)
    return _Case(codec, x, codec.encode(x))


def _draw(transform: Transform, heads: int, tokens: int, seed: int) -> Tensor:
    shape = (_BATCH, heads, tokens, transform.coordinates)
    y = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return transform.inverse(y).float()


def _same(a: Packed, b: Packed) -> bool:
    return a.format == b.format and all(map(torch.equal, a.tensors, b.tensors))


def _shape(case: _Case) -> None:
    codec, x, packed = case.codec, case.x, case.packed
    hold("shape", packed.format == codec.format, f"codes are {packed.format}, not {codec.format}")
    fields = codec.format.fields
    hold("shape", len(packed.tensors) == len(fields), f"{len(packed.tensors)} tensors, not {len(fields)}")
    for field, tensor in zip(fields, packed.tensors, strict=True):
        wanted = (*x.shape[:-2], x.shape[-2] // field.every, field.width)
        hold("shape", tensor.shape == wanted, f"{field.name} is {tuple(tensor.shape)}, not {wanted}")
        hold("shape", tensor.dtype == field.dtype, f"{field.name} is {tensor.dtype}, not {field.dtype}")
    hold("shape", packed.tokens == x.shape[-2], f"{packed.tokens} tokens, not {x.shape[-2]}")
    decoded = codec.decode(packed)
    hold("shape", decoded.shape == x.shape, f"decoded is {tuple(decoded.shape)}, not {tuple(x.shape)}")
    none = codec.encode(x[..., :0, :])
    hold("shape", codec.decode(none).shape == x[..., :0, :].shape, "no tokens decode to some")


def _exact_bytes(case: _Case) -> None:
    form, x = case.codec.format, case.x
    for tokens in (0, form.block, x.shape[-2]):
        stored = case.encode(x[..., :tokens, :]).nbytes
        wanted = x.shape[0] * x.shape[1] * form.nbytes(tokens)
        hold("exact bytes", stored == wanted, f"{stored} bytes for {tokens} tokens, format says {wanted}")
    pairs = zip(form.fields, case.packed.tensors, strict=True)
    meta = sum(tensor.nbytes for field, tensor in pairs if field.meta)
    said = x.shape[0] * x.shape[1] * form.meta_nbytes(x.shape[-2])
    hold("exact bytes", meta == said, f"{meta} bytes of metadata, format says {said}")


def _storable(case: _Case) -> None:
    spec = json.loads(json.dumps(case.codec.format.spec()))
    try:
        same = format_from_spec(spec) == case.codec.format
    except KVSightError as error:
        raise LawBroken(f"storable: a plan file cannot hold this format: {error}") from error
    hold("storable", same, f"{spec} reads back as another format")


def _blocks_are_local(case: _Case) -> None:
    block, tokens = case.codec.format.block, case.x.shape[-2]
    for step in (block, 3 * block):
        parts = concat([case.encode(part, i * step) for i, part in enumerate(case.x.split(step, dim=-2))])
        hold("blocks are local", _same(parts, case.packed), f"steps of {step} tokens give other bytes")
    later = case.packed.narrow(tokens - block, tokens)
    alone = case.encode(case.x[..., tokens - block :, :], tokens - block)
    hold("blocks are local", _same(later, alone), "the last block alone gives other bytes")


def _deterministic(case: _Case) -> None:
    before = case.x.clone()
    once = case.encode(case.x)
    hold("input kept", torch.equal(before, case.x), "encode changes its input")
    hold("deterministic", _same(once, case.encode(case.x)), "the same input gives other bytes")
    case.encode(case.x.flip(-2) * 2 + 1)
    hold("history-free", _same(case.encode(case.x), case.packed), "what came before changes the bytes")
    decoded = case.codec.decode(case.packed)
    hold("deterministic", torch.equal(case.codec.decode(case.packed), decoded), "decode differs")


def _strides(case: _Case) -> None:
    x, packed = case.x, case.packed
    layouts = {
        "tokens before heads": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": x.mT.contiguous().mT,
        "every second number": torch.stack((x, x), dim=-1).flatten(-2)[..., ::2],
    }
    for name, strided in layouts.items():
        hold("strides", _same(case.encode(strided), packed), f"{name}: other bytes")
    repeated = x[:1].expand(3, -1, -1, -1)
    hold("strides", _same(case.encode(repeated), case.encode(repeated.clone())), "expanded: other bytes")
    turned = Packed(packed.format, tuple(t.mT.contiguous().mT for t in packed.tensors))
    decoded = case.codec.decode(turned)
    hold("strides", torch.equal(decoded, case.codec.decode(packed)), "decode reads storage order")


def _input_types(case: _Case) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = case.x.clamp(-_HUGE, _HUGE).to(dtype)
        same = _same(case.encode(x), case.encode(x.float()))
        hold("input types", same, f"{dtype} gives other bytes than the same numbers in fp32")


def _independent(case: _Case) -> None:
    x, packed = case.x, case.packed
    alone = Packed(packed.format, tuple(t[1:] for t in packed.tensors))
    hold("independent", _same(case.encode(x[1:]), alone), "sequences of a batch change each other")
    changed = x.clone()
    changed[:, 0] = changed[:, 0] * 3 + 1
    others = zip(case.encode(changed).tensors, packed.tensors, strict=True)
    same = all(torch.equal(a[:, 1:], b[:, 1:]) for a, b in others)
    hold("independent", same, "heads change each other")


def _nearest(case: _Case) -> None:
    """The code chosen is the best that the stored parameters allow."""
    codec, form = case.codec, case.codec.format
    y = codec.coordinates(case.x.double())[..., : form.stored]
    decoded = codec.quantizer.decode(case.packed).double()
    match form:
        case Dense():
            wanted = codec.coordinates(case.x).to(form.dtype).double()
            hold("nearest", torch.equal(decoded, wanted), "numbers are not the rounded input")
            return
        case Affine():
            best, step = _best_affine(form, case.packed.tensors, y)
        case Tiered():
            best, step = _best_of_tier(form, case.packed.tensors, y)
        case Patched():
            best, step = _best_patched(form, case.packed.tensors, y)
        case Row():
            best, step = _best_level(form, codec.quantizer.tables, case.packed, y)
        case Scaled():
            best, step = _best_scaled(form, codec.quantizer.tables, case.packed, y)
        case Indexed():
            excess, scale = _excess_of_indices(form, codec.quantizer, case.packed, y)
            sound = bool((excess <= 1e-6 * scale).all())
            hold("nearest", sound, "a centroid is farther than the nearest")
            wanted = _sums_of_centroids(form, codec.quantizer.tables, case.packed)
            close = torch.allclose(decoded, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
            hold("nearest", close, "decoded is not the sum of its centroids")
            return
        case Polar():
            farther, wanted = _polar(form, codec.quantizer.tables, case.packed, y)
            hold("nearest", farther <= 1e-5, f"an angle is {farther:.3g} farther than the nearest")
            close = torch.allclose(decoded, wanted, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
            hold("nearest", close, "decoded is not radius times cosines and sines of the angles")
            return
        case _:
            return
    slack = 1e-4 * step + 1e-6 * y.abs()
    excess = (y - decoded).abs() - (y - best).abs()
    hold("nearest", bool((excess <= slack).all()), "an error is larger than that of the best code")


def _best_affine(form: Affine, tensors: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor]:
    def at(code: int) -> Tensor:
        codes = torch.full(y.shape, code, dtype=torch.uint8)
        return form.read((form.pack(codes), *tensors[1:]), ()).double()

    zero, step = at(0), at(1) - at(0)
    return _on_lattice(y, zero, step, form.levels - 1), step


def _best_of_tier(form: Tiered, tensors: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor]:
    tags = form.tags(tensors)
    step, zero = (
        t.double().expand(*tags.shape, form.dim).flatten(-3, -2) for t in form.lattice(tensors, tags)
    )
    top = 2 ** torch.tensor(form.widths)[tags].flatten(-2).unsqueeze(-1) - 1
    return _on_lattice(y, zero, step, top), step


def _best_patched(form: Patched, tensors: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor]:
    """The base at its best, plus the repairs as stored; outliers are the input in fp16."""
    best, step = _best_affine(form.base, tensors[:3], y)
    marks = form.restore(torch.full_like(y, torch.nan), tensors)
    best = torch.where(marks.isnan(), best + form.low_rank(tensors), y.half().double())
    return best, torch.where(marks.isnan(), step, 0.0)


def _on_lattice(y: Tensor, zero: Tensor, step: Tensor, top: int | Tensor) -> Tensor:
    """The nearest of zero, zero + step, ..., zero + top · step."""
    safe = torch.where(step > 0, step, 1.0)
    codes = ((y - zero) / safe).round().clamp_min(0)
    return zero + step * torch.minimum(codes, torch.as_tensor(top).to(codes))


def _best_level(form: Row, tables: tuple[Tensor, ...], packed: Packed, y: Tensor) -> tuple[Tensor, Tensor]:
    levels, starts = tables
    norm = packed.tensors[1].double() if form.norm else torch.ones_like(y[..., :1])
    best, step = torch.empty_like(y), torch.empty_like(y)
    for head in range(y.shape[1]):
        own = starts[min(head, starts.shape[0] - 1)]
        for i in range(form.stored):
            first = int(own[i])
            book = levels[first : first + 2 ** form.widths[i]].double()
            scaled = book * norm[:, head]
            at = (y[:, head, :, i, None] - scaled).abs().argmin(dim=-1, keepdim=True)
            best[:, head, :, i] = scaled.gather(-1, at)[..., 0]
            step[:, head, :, i] = norm[:, head, :, 0] * book.diff().min()
    return best, step


def _best_scaled(
    form: Scaled, tables: tuple[Tensor, ...], packed: Packed, y: Tensor
) -> tuple[Tensor, Tensor]:
    scale, zero = (tensor.double() for tensor in packed.tensors[1:])
    every = tables[0].double() * scale.unsqueeze(-1) + zero.unsqueeze(-1)
    at = (y.unsqueeze(-1) - every).abs().argmin(dim=-1, keepdim=True)
    return every.expand(*y.shape, -1).gather(-1, at)[..., 0], scale


def _excess_of_indices(
    form: Indexed, quantizer: Quantizer, packed: Packed, y: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much each chosen centroid is farther than the nearest to what its stage got, and from what."""
    centroids, metrics = quantizer.tables[0].double(), quantizer.guides.get("metric")
    index, cells = form.unpack(packed.tensors[0]), _unit_cells(form, packed, y)
    excess, scale = torch.zeros(2, *index.shape, dtype=torch.float64)
    for head, cell in product(range(y.shape[1]), range(form.cells)):
        book = _own(centroids, head, cell)
        white = torch.eye(form.span, dtype=torch.float64)
        metric = white if metrics is None else _own(metrics.double(), head, cell)
        left = cells[:, head, :, cell]
        for stage in range(form.stages):
            away = left.unsqueeze(-2) - book[stage]
            distance = ((away @ metric) * away).sum(-1)
            chosen = index[:, head, :, stage, cell].unsqueeze(-1)
            excess[:, head, :, stage, cell] = (
                distance.gather(-1, chosen) - distance.amin(-1, keepdim=True)
            )[..., 0]
            scale[:, head, :, stage, cell] = distance.amax(-1)
            left = left - book[stage][chosen[..., 0]]
    return excess, scale


def _sums_of_centroids(form: Indexed, tables: tuple[Tensor, ...], packed: Packed) -> Tensor:
    index = form.unpack(packed.tensors[0])
    cells = torch.zeros(*index.shape[:3], form.cells, form.span, dtype=torch.float64)
    for head, cell in product(range(index.shape[1]), range(form.cells)):
        book = _own(tables[0].double(), head, cell)
        for stage in range(form.stages):
            cells[:, head, :, cell] += book[stage][index[:, head, :, stage, cell]]
    y = form.join(cells)
    return y * packed.tensors[1].double() if form.norm else y


def _unit_cells(form: Indexed, packed: Packed, y: Tensor) -> Tensor:
    if form.norm:
        norm = packed.tensors[1].double()
        y = torch.where(norm > 0, y / torch.where(norm > 0, norm, 1.0), 0.0)
    return form.cut(y)


def _polar(form: Polar, tables: tuple[Tensor, ...], packed: Packed, y: Tensor) -> tuple[float, Tensor]:
    """By how much an angle is farther than the nearest, and what the codes mean at the exact radii."""
    by_level = unpack_row(packed.tensors[0], form.columns).long().split(form.counts, dim=-1)
    angles = tables[0].double().split([1 << width for width in form.widths])
    radius, excess = y, 0.0
    place = torch.arange(form.dim)
    directions = torch.ones_like(y)
    for level, (code, table) in enumerate(zip(by_level, angles, strict=True)):
        first, second = radius[..., ::2], radius[..., 1::2]
        exact = torch.atan2(second, first).remainder(2 * math.pi)
        off = (exact.unsqueeze(-1) - table).abs()
        chosen = off.gather(-1, code.unsqueeze(-1)).squeeze(-1)
        excess = max(excess, float((chosen - off.amin(-1)).max()))
        own = table[code][..., place >> (level + 1)]
        directions = directions * torch.where((place >> level) % 2 == 0, own.cos(), own.sin())
        radius = torch.hypot(first, second)
    return excess, directions * radius.repeat_interleave(form.span, dim=-1)


def _own(table: Tensor, head: int, cell: int) -> Tensor:
    """What a table [H or 1, cells or 1, ...] holds for one cell of one head."""
    return table[min(head, table.shape[0] - 1), min(cell, table.shape[1] - 1)]


def _attention_agrees(case: _Case) -> None:
    x, packed = case.x, case.packed
    heads = tuple(range(x.shape[1]))
    seen = Segment(x.shape[-2], coded=(case.codec.coded(heads, packed),)).decode(torch.float64)
    decoded = case.codec.decode(packed).double()
    close = torch.allclose(seen, decoded, rtol=1e-5, atol=1e-6 * float(decoded.abs().max()))
    hold("attention agrees", close, "attention reads other numbers than decode gives")


def _codes_in_range(case: _Case) -> None:
    if isinstance(case.codec.format, Row):
        levels, starts = case.codec.quantizer.tables
        sizes = torch.tensor([2**w for w in case.codec.format.widths if w > 0])
        inside = bool((starts >= 0).all()) and bool((starts + sizes <= len(levels)).all())
        hold("codes in range", inside, "a code can point behind the end of the codebooks")
    if isinstance(case.codec.format, Polar):
        count = sum(1 << width for width in case.codec.format.widths)
        hold("codes in range", case.codec.quantizer.tables[0].shape == (count,), "angles are missing")
    if isinstance(case.codec.format, Indexed):
        form, centroids = case.codec.format, case.codec.quantizer.tables[0]
        whole = centroids.shape[2:] == (form.stages, 2**form.bits, form.span)
        hold("codes in range", whole, f"codebooks of {tuple(centroids.shape)} do not suit {form}")


def _degenerate(case: _Case) -> None:
    like = case.x
    outlier = torch.zeros_like(like)
    outlier[..., 0, 0] = _HUGE
    inputs = {
        "zeros": torch.zeros_like(like),
        "ones": torch.ones_like(like),
        "one outlier": outlier,
        "±6e4": like.sign() * _HUGE,
        "constant 6e4": torch.full_like(like, _HUGE),
        "1e-30": like * 1e-30,
        "subnormal": like * 1e-40,
    }
    for name, x in inputs.items():
        packed = case.encode(x)
        real = [t for t in packed.tensors if t.is_floating_point()]
        finite = all(bool(torch.isfinite(t).all()) for t in (*real, case.codec.decode(packed)))
        hold("degenerate", finite, f"{name}: NaN or inf")
        hold("degenerate", packed.nbytes == case.packed.nbytes, f"{name}: other size")
        hold("degenerate", _clean(packed), f"{name}: padding bits are set")


def _clean(packed: Packed) -> bool:
    """Whether codes that are read and packed again are the same bytes."""
    form, rows = packed.format, packed.tensors[0]
    match form:
        case Row():
            return _repacked(rows, form.widths)
        case Indexed():
            return _repacked(rows, form.widths)
        case Polar():
            return _repacked(rows, form.columns)
        case Scaled():
            return _repacked(rows, (form.bits,) * form.dim)
        case Sketch():
            return _repacked(rows, (1,) * form.dim)
        case Affine():
            return torch.equal(form.pack(form.unpack(rows)), rows)
        case Patched():
            return torch.equal(form.base.pack(form.base.unpack(rows)), rows)
        case Tiered():
            return all(map(torch.equal, form.pack(*form.unpack(packed.tensors)), packed.tensors[:2]))
        case Joined():
            stored = iter(packed.tensors)
            parts = [Packed(part, tuple(islice(stored, len(part.fields)))) for part in form.parts]
            return all(map(_clean, parts))
    return True


def _repacked(rows: Tensor, widths: tuple[int, ...]) -> bool:
    return torch.equal(pack_row(unpack_row(rows, widths), widths), rows)


def _refusals(case: _Case) -> None:
    x, codec = case.x, case.codec
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = x.clone()
        bad[0, -1, -1, -1] = value
        refused(partial(codec.encode, bad), f"{value} in the input", "finite")
    wide = torch.cat((x, x[..., :1]), dim=-1)
    refused(partial(codec.encode, wide), "a head_dim too many", f"{x.shape[-1] + 1}")
    if codec.format.block > 1:
        part = x[..., : codec.format.block - 1, :]
        refused(partial(codec.encode, part), "a partial block", f"{codec.format.block - 1}")
    if codec.heads is not None:
        more = torch.cat((x, x[:, :1]), dim=1)
        refused(partial(codec.encode, more), "a head too many", f"{codec.heads}")


_CODEC_LAWS: tuple[Callable[[_Case], None], ...] = (
    _codes_in_range,
    _shape,
    _exact_bytes,
    _storable,
    _deterministic,
    _blocks_are_local,
    _strides,
    _input_types,
    _independent,
    _nearest,
    _attention_agrees,
    _degenerate,
    _refusals,
)

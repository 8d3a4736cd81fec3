"""Seeded defects, each of which somebody has shipped: the suite must raise on every one of them."""

from dataclasses import dataclass, field, replace
from itertools import count

import pytest
import torch
from torch import Tensor

from kvsight.codec import Codec, Placement
from kvsight.formats import Dense, Grouped, Indexed, Packed, Polar, Row
from kvsight.methods import get
from kvsight.methods.base import Method
from kvsight.packing import pack_row, unpack_row
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import RowQuantizer, gaussian, row_quantizer
from kvsight.quantizers.polar import PolarQuantizer, polar_quantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.quantizers.vector import VectorQuantizer
from kvsight.testing import LawBroken, check_codec, check_compresses, check_method, check_transform
from kvsight.transforms import Transform, haar, identity, linear

TOKENS = GroupedQuantizer(Grouped(8, 4, 8, "channel"))
BLOCKS = GroupedQuantizer(Grouped(8, 4, 4, "token"))


@dataclass(frozen=True)
class Wrapped:
    """A sound quantizer, for defects to override."""

    sound: GroupedQuantizer | RowQuantizer | VectorQuantizer | PolarQuantizer = TOKENS

    @property
    def format(self):
        return self.sound.format

    @property
    def tables(self):
        return self.sound.tables

    @property
    def guides(self):
        return self.sound.guides

    @property
    def rounding(self):
        return None

    def encode(self, y: Tensor) -> Packed:
        return self.sound.encode(y)

    def decode(self, packed: Packed) -> Tensor:
        return self.sound.decode(packed)


class OneCodePerByte(Wrapped):
    def encode(self, y):
        rows, *meta = self.sound.encode(y).tensors
        return Packed(self.format, (unpack_row(rows, (4,) * 8), *meta))

    def decode(self, packed):
        rows, *meta = packed.tensors
        return self.sound.decode(Packed(self.format, (pack_row(rows, (4,) * 8), *meta)))


class SwappedNibbles(Wrapped):
    def encode(self, y):
        rows, *meta = self.sound.encode(y).tensors
        return Packed(self.format, (rows << 4 | rows >> 4, *meta))


class SwappedNibblesOnRead(Wrapped):
    def decode(self, packed):
        rows, *meta = packed.tensors
        return self.sound.decode(Packed(self.format, (rows << 4 | rows >> 4, *meta)))


class ThreefoldDecode(Wrapped):
    """Passes every cosine test."""

    def decode(self, packed):
        return 3 * self.sound.decode(packed)


class ThreefoldScale(Wrapped):
    def encode(self, y):
        rows, scale, zero = self.sound.encode(y).tensors
        return Packed(self.format, (rows, 3 * scale, 3 * zero))


class HalfStepDecode(Wrapped):
    def decode(self, packed):
        scale = packed.tensors[1].float()
        return self.sound.decode(packed) + scale / 2


class HalfStepEncode(Wrapped):
    """Rounds down, which is half a step off on average."""

    def encode(self, y):
        _, scale, zero = self.sound.encode(y).tensors
        codes = ((y.float() - zero.float()) / scale.float()).clamp(0, 15).nan_to_num().to(torch.uint8)
        return Packed(self.format, (pack_row(codes, (4,) * 8), scale, zero))


class GroupsOfWhateverComes(Wrapped):
    """Ranges over all tokens of the call instead of those of the block."""

    def encode(self, y):
        if y.shape[-2] == 0:
            return self.sound.encode(y)
        low, high = y.amin(-2, keepdim=True), y.amax(-2, keepdim=True)
        ends = torch.cat((low, high, low, high), dim=-2)
        blocks = y.shape[-2] // 4
        scale, zero = (t.repeat_interleave(blocks, -2) for t in self.sound.encode(ends).tensors[1:])
        step = scale.float().repeat_interleave(4, -2).clamp_min(1e-8)
        codes = ((y - zero.float().repeat_interleave(4, -2)) / step).round().clamp(0, 15)
        return Packed(self.format, (pack_row(codes.to(torch.uint8), (4,) * 8), scale, zero))


@dataclass(frozen=True)
class RunningRange(Wrapped):
    """Remembers the largest number it has seen."""

    seen: list[float] = field(default_factory=list)

    def encode(self, y):
        self.seen.append(float(y.abs().amax()) if y.numel() else 0.0)
        return self.sound.encode(y.clamp(-max(self.seen) / 2, max(self.seen) / 2))


class Dithered(Wrapped):
    """Stochastic rounding from the global generator."""

    def encode(self, y):
        return self.sound.encode(y + 0.01 * torch.randn_like(y))


class ReadsStorageOrder(Wrapped):
    def encode(self, y):
        flat = torch.as_strided(y, y.shape, torch.empty(y.shape).stride())
        return self.sound.encode(flat)


class ChangesItsInput(Wrapped):
    def encode(self, y):
        packed = self.sound.encode(y)
        y.mul_(0.5)
        return packed


class RangeOverHeads(Wrapped):
    def encode(self, y):
        return self.sound.encode(y.minimum(y[:, :1].amax(-1, keepdim=True)))


class NoFloorUnderTheScale(Wrapped):
    """0 / 0 in constant groups; the stored parameter shows it."""

    def encode(self, y):
        rows, scale, zero = self.sound.encode(y).tensors
        return Packed(self.format, (rows, scale / scale * scale, zero))


class WrongCodebook(Wrapped):
    """Attention reads other tables than encode used."""

    @property
    def tables(self):
        levels, starts = self.sound.tables
        return (levels * 1.1, starts)


class TooShortCodebook(Wrapped):
    @property
    def tables(self):
        levels, starts = self.sound.tables
        return (levels, starts + 1)


class DirtyPadding(Wrapped):
    def encode(self, y):
        (rows,) = self.sound.encode(y).tensors
        rows = rows.clone()
        rows[..., -1] |= 0x80
        return Packed(self.format, (rows,))


class IgnoresTheMetric(Wrapped):
    """Encodes by plain distance, though the plan says by another."""

    def encode(self, y):
        return replace(self.sound, metric=None).encode(y)


class SecondStageFromTheStart(Wrapped):
    """Every stage codes the vector itself, not what the one before has left."""

    def encode(self, y):
        first = self.sound.format.unpack(self.sound.encode(y).tensors[0])
        return Packed(self.format, (self.format.pack(first[..., :1, :].expand_as(first)),))


class ForgetsAStage(Wrapped):
    def decode(self, packed):
        centroids = self.sound.centroids.clone()
        centroids[:, :, 1] = 0
        return packed.read((centroids,))


class SinesForCosines(Wrapped):
    def decode(self, packed):
        return self.sound.decode(packed).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class OtherAngles(Wrapped):
    """Codes a vector of the same norm."""

    def encode(self, y):
        turned = y.double() @ torch.tensor([[0.9, 0.436], [-0.436, 0.9]], dtype=torch.float64).kron(
            torch.eye(4, dtype=torch.float64)
        )
        return self.sound.encode(turned)


@dataclass(frozen=True)
class Private(Row):
    """A format that no plan file knows."""

    def spec(self):
        return {"kind": "private", "widths": list(self.widths)}


@dataclass(frozen=True)
class Understated(Grouped):
    """Does not count its zero points."""

    @property
    def fields(self):
        return (*super().fields[:2], replace(super().fields[2], width=0))


class Lax(Codec):
    """Takes NaN, inf and anything else."""

    def encode(self, x, first=0):
        blocks = x[..., : x.shape[-2] // self.format.block * self.format.block, : self.format.dim]
        return self.quantizer.encode(blocks.nan_to_num(0, 0, 0))


class Rude(Codec):
    """Leaves it to torch to complain."""

    def encode(self, x, first=0):
        if x.shape[-2] % self.format.block == 0 and not torch.isfinite(x).all():
            raise RuntimeError("bad input")
        return super().encode(x, first)


ROW = row_quantizer((4,) * 8, gaussian)
ODD = row_quantizer((3,) * 5, gaussian)
BOOKS = torch.randn(1, 4, 2, 16, 2, generator=torch.Generator().manual_seed(4))
ANGLES = polar_quantizer(Polar(8, (4, 2, 2)))
CELLS = VectorQuantizer(
    Indexed(8, 2, 4, stages=2), BOOKS, torch.diag(torch.tensor([9.0, 1])).expand(1, 4, 2, 2)
)
DEFECTS = {
    "codes one per byte": (OneCodePerByte(), "shape"),
    "swapped nibbles": (SwappedNibbles(), "nearest"),
    "swapped nibbles on read": (SwappedNibblesOnRead(), "nearest"),
    "decode 3x wrong": (ThreefoldDecode(), "nearest"),
    "scale 3x wrong": (ThreefoldScale(), "nearest"),
    "half-step bias on decode": (HalfStepDecode(), "nearest"),
    "half-step bias on encode": (HalfStepEncode(), "nearest"),
    "groups of the whole call": (GroupsOfWhateverComes(BLOCKS), "blocks are local"),
    "history-dependent range": (RunningRange(), "history-free"),
    "random rounding": (Dithered(), "deterministic"),
    "storage order": (ReadsStorageOrder(), "blocks are local"),
    "input overwritten": (ChangesItsInput(), "input kept"),
    "heads share a range": (RangeOverHeads(), "independent"),
    "no floor under the scale": (NoFloorUnderTheScale(), "degenerate"),
    "other tables for attention": (WrongCodebook(ROW), "nearest"),
    "codes behind the tables": (TooShortCodebook(ROW), "codes in range"),
    "metric ignored": (IgnoresTheMetric(CELLS), "nearest"),
    "no residual": (SecondStageFromTheStart(CELLS), "nearest"),
    "a stage forgotten": (ForgetsAStage(CELLS), "nearest"),
    "codebooks too small": (replace(CELLS, centroids=BOOKS[..., :9, :]), "codes in range"),
    "sine and cosine swapped": (SinesForCosines(ANGLES), "nearest"),
    "other angles": (OtherAngles(ANGLES), "nearest"),
    "dirty padding": (DirtyPadding(ODD), "degenerate"),
    "private format": (replace(ODD, format=Private((3,) * 5)), "storable"),
    "metadata not counted": (replace(TOKENS, format=Understated(8, 4, 8, "channel")), "shape"),
}


@pytest.mark.parametrize(("quantizer", "law"), DEFECTS.values(), ids=DEFECTS)
def test_defect_is_caught(quantizer, law):
    codec = Codec("defect", identity(quantizer.format.dim), quantizer)
    with pytest.raises(LawBroken, match=f"^{law}:"):
        check_codec(codec, tokens=24, seed=1)


@pytest.mark.parametrize("sound", [TOKENS, BLOCKS, ROW, ODD, CELLS, ANGLES], ids=lambda q: q.format.name)
def test_the_same_wrapping_without_a_defect_passes(sound):
    check_codec(Codec("sound", identity(sound.format.dim), Wrapped(sound)), tokens=24, seed=1)


@pytest.mark.parametrize("kind", [Lax, Rude])
def test_codecs_that_do_not_refuse_are_caught(kind):
    with pytest.raises(LawBroken, match=r"^refusals:"):
        check_codec(kind("defect", identity(8), TOKENS))


def test_a_codec_that_compressed_nothing_is_caught():
    dense = Codec("identity", identity(8), DenseQuantizer(Dense(8)))
    with pytest.raises(LawBroken, match=r"compresses: 16 bits per element, torch\.bfloat16 has 16"):
        check_compresses(dense)
    # 8-bit codes, and a scale and a zero for every four channels
    padded = Codec("padded", identity(8), GroupedQuantizer(Grouped(8, 8, 4, "channel")))
    with pytest.raises(LawBroken, match=r"compresses: 16 bits"):
        check_compresses(padded)


def test_memory_hidden_behind_a_view_is_caught():
    class Hoarder(Wrapped):
        def encode(self, y):
            rows, *meta = self.sound.encode(y).tensors
            return Packed(self.format, (torch.cat((rows, rows), dim=-1)[..., : rows.shape[-1]], *meta))

    with pytest.raises(LawBroken, match=r"^owned bytes:"):
        check_compresses(Codec("hoarder", identity(8), Hoarder()))


class WrongDual(Transform):
    def dual(self, q):
        return q @ self.matrix


class ForgottenOffset(Transform):
    def offset(self, q):
        return q.new_zeros(*q.shape[:-1], 1)


class TransposedInverse(Transform):
    def inverse(self, y):
        return y @ self.inverse_matrix.mT


class WrongHeads(Transform):
    def heads(self, index):
        return Transform(self.dim, self.shift, self.matrix[:1], self.inverse_matrix[:1])


class WrongProduct(Transform):
    """Composes in the wrong order, which is again a map with a sound dual and inverse."""

    def then(self, after):
        return Transform.then(after, Transform(self.dim, self.shift, self.matrix, self.inverse_matrix))


SKEW = linear(torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
SHIFT = torch.ones(3, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("transform", "law"),
    [
        (WrongDual(5, None, SKEW.matrix, SKEW.inverse_matrix), "dual"),
        (ForgottenOffset(5, SHIFT, SKEW.matrix, SKEW.inverse_matrix), "dual"),
        (TransposedInverse(5, None, SKEW.matrix, SKEW.inverse_matrix), "inverse"),
        (Transform(5, None, SKEW.matrix, haar(5).matrix), "dual"),
        (WrongHeads(5, None, SKEW.matrix, SKEW.inverse_matrix), "head subset"),
        (WrongProduct(5, None, SKEW.matrix, SKEW.inverse_matrix), "composition"),
    ],
    ids=["dual", "offset", "inverse", "not the inverse", "heads", "composition"],
)
def test_defective_transform_is_caught(transform, law):
    with pytest.raises(LawBroken, match=f"^{law}:"):
        check_transform(transform, seed=3)


def defective(build) -> Method:
    sound = get("int")
    return Method("int", sound.summary, "", lambda *args: build(sound.build(*args), *args), sound.options)


def overspent(placements, side, stats, budget, options):
    return get("int").build(side, stats, replace(budget, bits=budget.bits + 4), options)


def head_forgotten(placements, *args):
    return tuple(Placement(p.heads[1:], p.codec) for p in placements)


def random_fit(placements, side, stats, budget, options):
    return (
        Placement(
            placements[0].heads, Codec("int", haar(stats.dim, next(RUNS)), placements[0].codec.quantizer)
        ),
    )


RUNS = count()


def misnamed(placements, *args):
    return tuple(Placement(p.heads, replace(p.codec, name="other")) for p in placements)


def fewer_bits_when_rich(placements, side, stats, budget, options):
    quantizer = GroupedQuantizer(Grouped(stats.dim, 1 + (budget.bits == 3), stats.dim, "channel"))
    return (Placement(placements[0].heads, Codec("int", identity(stats.dim), quantizer)),)


@pytest.mark.parametrize(
    ("build", "law"),
    [
        (overspent, "budget"),
        (head_forgotten, "heads"),
        (random_fit, "repeatable"),
        (misnamed, "name"),
        (fewer_bits_when_rich, "more bits, less error"),
    ],
)
def test_defective_method_is_caught(build, law):
    with pytest.raises(LawBroken, match=f"^{law}:"):
        check_method(defective(build), heads=2, dim=64)

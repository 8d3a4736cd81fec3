"""One block of every format, byte by byte, from inputs small enough to check by hand.

These bytes lie in users' files: a change here is a change of the format version.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvsight.codec import Codec, joined
from kvsight.formats import (
    Dense,
    Format,
    Grouped,
    Indexed,
    Packed,
    Patched,
    Polar,
    Row,
    Scaled,
    Sparse,
    Symmetric,
    Ternary,
    Tiered,
)
from kvsight.quantizers.base import Quantizer
from kvsight.quantizers.dense import DenseQuantizer
from kvsight.quantizers.lloyd_max import RowQuantizer
from kvsight.quantizers.patched import PatchedQuantizer
from kvsight.quantizers.polar import PolarQuantizer
from kvsight.quantizers.scaled import ScaledQuantizer
from kvsight.quantizers.sketch import SketchQuantizer
from kvsight.quantizers.sparse import SparseQuantizer
from kvsight.quantizers.tiered import TieredQuantizer
from kvsight.quantizers.uniform import GroupedQuantizer
from kvsight.quantizers.vector import VectorQuantizer
from kvsight.transforms import identity

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


@dataclass(frozen=True)
class Golden:
    """``block`` [tokens, dim] is stored as ``stored`` (hex per field) and reads back as ``read``."""

    quantizer: Quantizer
    block: list[list[float]]
    stored: dict[str, str]
    read: list[list[float]] | None = None

    @property
    def format(self) -> Format:
        return self.quantizer.format


def rows(widths, levels, starts, norm=False):
    return RowQuantizer(Row(widths, norm), torch.tensor(levels), torch.tensor([starts], dtype=torch.int32))


def tiered(form, linear):
    """Tiers by a dot product."""
    return TieredQuantizer(form, torch.tensor([linear]), torch.zeros(1, 0, form.dim), torch.zeros(1))


CODES_AS_LEVELS = [float(i) for i in range(256)]


def counting(bits, span):
    """Centroids of equal coordinates: index i stands for (i, i, ...)."""
    return torch.arange(2.0**bits).view(1, 1, 1, -1, 1).expand(1, 1, 1, -1, span).contiguous()


GOLDEN = {
    "row": Golden(
        rows((8, 5, 3, 2, 1, 0), CODES_AS_LEVELS, [0, 0, 0, 0, 0]),
        [[0xA6, 0b10111, 0b101, 0b11, 0b1, 9]],
        {"codes": "ba e6 07"},
        read=[[166, 23, 5, 3, 1]],
    ),
    "row, every width": Golden(
        rows((8, 7, 6, 5, 4, 3, 2, 1), CODES_AS_LEVELS, [0] * 8),
        [[0x12, 0b0011_01_0, 0b0100_11, 0b0101_1, 0x6, 0b10_1, 0b01, 1]],
        {"codes": "31 54 26 6d 0e"},
    ),
    "row with a norm": Golden(
        rows((2, 1, 1, 0), [-1.0, 1.0, -3.0, -1.0, 1.0, 3.0], [2, 0, 0], norm=True),
        [[2, -2, 2, 2]],
        {"codes": "0a", "norm": "00 40"},
        read=[[2, -2, 2]],
    ),
    "grouped along channels": Golden(
        GroupedQuantizer(Grouped(5, 3, 4, "channel")),
        [[0, 1, 2, 7, 5]],
        {"codes": "d0 28", "scale": "00 3c 00 00", "zero": "00 00 00 45"},
    ),
    "grouped along tokens": Golden(
        GroupedQuantizer(Grouped(2, 2, 4, "token")),
        [[0, 2], [1, 1], [2, 0], [3, -1]],
        {"codes": "0c 09 06 03", "scale": "00 3c 00 3c", "zero": "00 00 00 bc"},
    ),
    "sketch": Golden(
        SketchQuantizer.of(torch.eye(2)), [[3, -4]], {"signs": "01", "norm": "00 45"}, read=[[5, -5]]
    ),
    "scaled": Golden(
        ScaledQuantizer(Scaled(4, 2, trimmed=1), torch.tensor([-1.0, -0.5, 0.5, 1.0])),
        [[0, 1, 3, 50]],
        {"codes": "f4", "scale": "00 3e", "zero": "00 3e"},
        read=[[0, 0.75, 3, 3]],
    ),
    "sparse": Golden(
        SparseQuantizer(Sparse(4, 2)),
        [[0, -5, 1, 2]],
        {"index": "01 03", "values": "00 c5 00 40"},
        read=[[0, -5, 0, 2]],
    ),
    "joined": Golden(
        joined(
            "",
            Codec("", identity(2), rows((1, 1), [-4.0, 4.0], [0, 0])),
            Codec("", identity(2), rows((2, 0), [-3.0, -1.0, 1.0, 3.0], [0])),
        ).quantizer,
        [[5, -4, 5, -4]],
        {"0.codes": "01", "1.codes": "02"},
        read=[[4, -4, 1]],
    ),
    "symmetric": Golden(
        GroupedQuantizer(Symmetric(4, 3, 4, "channel")),
        [[-3, 1, 2, 0]],
        {"codes": "b8 03", "scale": "00 3c"},
    ),
    "ternary": Golden(
        GroupedQuantizer(Ternary(7, 7, "channel")),
        [[0, 1, 2, 2, 1, 0, 2]],
        {"codes": "9c 06", "scale": "00 3c", "zero": "00 00"},
    ),
    "tiered along tokens": Golden(
        tiered(Tiered(2, 4, (2, 1), 6, "token"), [0.0, 1.0]),
        [[0, 0], [0, 3], [1, 2], [3, 6]],
        {
            "codes": "00 00 00 03 0f 00",
            "tags": "05",
            "scale": "00 3c 00 3c 00 3c 00 40",
            "zero": "00 00 00 42 00 00 00 00",
        },
    ),
    "tiered along channels": Golden(
        tiered(Tiered(2, 2, (2, 1), 3, "channel", scaled=True), [1.0, 0.0]),
        [[4, -3], [2, 9]],
        {
            "codes": "03 00 02",
            "tags": "02",
            "scale": "00 3c 00 40",
            "zero": "00 bc 00 3c",
            "channel": "00 40 00 42",
        },
    ),
    "patched along channels": Golden(
        PatchedQuantizer(Patched(Grouped(4, 1, 4, "channel"), 2, 1, 1)),
        [[0, 4, 1, 9], [0, 4, 0, 8]],
        {
            "codes": "0a 0a",
            "scale": "00 44 00 44",
            "zero": "00 00 00 00",
            "index": "03 03",
            "outlier": "80 48 00 48",
            "left": "00 3c 00 00",
            "right": "00 00 00 00 00 3c 00 00",
        },
    ),
    "patched along tokens": Golden(
        PatchedQuantizer(Patched(Grouped(2, 1, 4, "token"), 4, 1, 1)),
        [[0, 0], [4, 0], [1, 4], [9, 8]],
        {
            "codes": "00 01 02 03",
            "scale": "00 44 00 44",
            "zero": "00 00 00 00",
            "index": "0f",
            "outlier": "80 48 00 48",
            "left": "00 00 00 00 00 3c 00 00",
            "right": "00 3c 00 00",
        },
    ),
    "indexed": Golden(
        VectorQuantizer(Indexed(6, 2, 3), counting(3, 2)),
        [[5, 5, 1, 1, 6, 6], [0, 0, 7, 7, 2, 2]],
        {"codes": "f2 00 9c 00"},
    ),
    "indexed, strided, with a norm": Golden(
        VectorQuantizer(
            Indexed(4, 2, 2, stages=2, strided=True, norm=True),
            torch.tensor(
                [[[[-2, 0], [0, 2], [0.75, -1], [1, 0.5]], [[0, 0], [0.25, 0], [0, 0.5], [1, 1]]]]
            ).view(1, 1, 2, 4, 2),
        ),
        [[2, 2, -2, 2]],
        {"codes": "9e", "norm": "00 40"},
    ),
    "indexed, 11 bits": Golden(
        VectorQuantizer(Indexed(4, 2, 11), counting(11, 2)),
        [[0x5A3, 0x5A3, 0x207, 0x207]],
        {"codes": "0a 73 16"},
    ),
    "polar": Golden(
        PolarQuantizer(
            Polar(4, (2, 1)), torch.tensor([0, math.pi / 2, math.pi, 3 * math.pi / 2, 0, math.pi / 2])
        ),
        [[0, 0, 0, -3], [-2, 0, 0, 0]],
        {"codes": "1c 02", "radius": "00 42 00 40"},
    ),
    "dense bfloat16": Golden(
        DenseQuantizer(Dense(2, torch.bfloat16)), [[1, -2]], {"values": "80 3f 00 c0"}
    ),
    "dense float16": Golden(DenseQuantizer(Dense(2, torch.float16)), [[1, -2]], {"values": "00 3c 00 c0"}),
    "dense float32": Golden(
        DenseQuantizer(Dense(2, torch.float32)), [[1, -2]], {"values": "00 00 80 3f 00 00 00 c0"}
    ),
}


def hexadecimal(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()).hex(" ")


def from_hex(golden):
    tensors = []
    for field in golden.format.fields:
        raw = torch.tensor(list(bytes.fromhex(golden.stored[field.name])), dtype=torch.uint8)
        tensors.append(raw.view(field.dtype).view(1, 1, -1, field.width))
    return Packed(golden.format, tuple(tensors))


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_block_is_stored_as(golden):
    packed = golden.quantizer.encode(torch.tensor([[golden.block]], dtype=torch.float32))
    names = [field.name for field in golden.format.fields]
    stored = dict(zip(names, map(hexadecimal, packed.tensors), strict=True))
    assert stored == golden.stored
    assert packed.nbytes == golden.format.nbytes(len(golden.block))


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_bytes_are_read_as(golden):
    wanted = golden.block if golden.read is None else golden.read
    decoded = golden.quantizer.decode(from_hex(golden))[0, 0].tolist()
    # the sine of a rounded half turn is not quite zero
    exact = not isinstance(golden.format, Polar)
    assert decoded == wanted if exact else decoded == [pytest.approx(row, abs=1e-6) for row in wanted]


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_the_documentation_shows_these_bytes(golden):
    text = DOCS.read_text(encoding="utf-8")
    for stored in golden.stored.values():
        assert f"`{stored}`" in text

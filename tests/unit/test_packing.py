"""Packing against an oracle that puts down one bit at a time, over every width and every byte."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsight.packing import (
    MAX_WIDTH,
    pack_row,
    pack_trits,
    packed_trits,
    packed_width,
    unpack_row,
    unpack_trits,
)


def oracle(codes, widths):
    """The row as docs/formats.md describes it: pieces from the top, one plane after the other."""
    high, low, crumbs, bits = [], [], [], []
    for code, width in zip(codes, widths, strict=True):
        left = width
        if left >= 4:
            left -= 4
            high.append((4, code >> left & 15))
        if left >= 4:
            left -= 4
            low.append((4, code >> left & 15))
        if left >= 2:
            left -= 2
            crumbs.append((2, code >> left & 3))
        if left:
            bits.append((1, code & 1))
    row = position = 0
    for size, piece in high + low + crumbs + bits:
        row |= piece << position
        position += size
    return list(row.to_bytes(-(-position // 8), "little"))


@st.composite
def rows(draw):
    widths = draw(st.lists(st.integers(0, MAX_WIDTH), min_size=1, max_size=70))
    widths = tuple(sorted(widths, reverse=True))
    codes = [draw(st.integers(0, 2**w - 1)) for w in widths if w]
    return widths, codes


@given(rows())
def test_any_mix_of_widths_matches_the_oracle(row):
    widths, codes = row
    stored = [w for w in widths if w]
    packed = pack_row(torch.tensor([codes], dtype=torch.uint8), widths)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [oracle(codes, stored)]
    assert packed.shape[-1] == packed_width(widths) == -(-sum(widths) // 8)
    assert unpack_row(packed, widths).tolist() == [codes]


@pytest.mark.parametrize("width", range(1, MAX_WIDTH + 1))
def test_every_code_in_every_place(width):
    # 11 is odd and no multiple of a byte's pieces: each code visits each position of each plane
    codes = torch.stack([torch.arange(2**width).roll(i) for i in range(11)], dim=-1).to(torch.uint8)
    widths = (width,) * 11
    packed = pack_row(codes, widths)
    assert packed.tolist() == [oracle(row, widths) for row in codes.tolist()]
    assert torch.equal(unpack_row(packed, widths), codes)


@pytest.mark.parametrize("width", range(1, MAX_WIDTH + 1))
def test_every_byte_value_is_a_row_and_packs_back(width):
    # eight codes fill whole bytes, so every byte value is reached and none is padding
    rows = torch.arange(256, dtype=torch.uint8).unsqueeze(-1) ^ torch.arange(width, dtype=torch.uint8) * 37
    codes = unpack_row(rows, (width,) * 8)
    assert codes.shape == (256, 8)
    assert int(codes.max()) < 2**width
    assert torch.equal(pack_row(codes, (width,) * 8), rows)


@given(rows())
def test_padding_is_zero_and_ignored(row):
    widths, codes = row
    spare = -sum(widths) % 8
    packed = pack_row(torch.tensor([codes], dtype=torch.uint8), widths)
    if not spare:
        return
    keep = 0xFF >> spare
    assert int(packed[0, -1]) <= keep
    dirty = packed.clone()
    dirty[0, -1] |= 0xFF & ~keep
    assert unpack_row(dirty, widths).tolist() == [codes]


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 5)])
def test_leading_dimensions_are_kept(lead):
    widths = (8, 5, 3, 2, 1, 0)
    sizes = torch.tensor([2**w for w in widths[:-1]])
    generator = torch.Generator().manual_seed(1)
    codes = (torch.rand(*lead, 5, generator=generator) * sizes).to(torch.uint8)
    packed = pack_row(codes, widths)
    assert packed.shape == (*lead, 3)
    assert torch.equal(unpack_row(packed, widths), codes)


def test_strided_rows_and_codes():
    widths = (7, 4, 4, 1)
    codes = torch.tensor([[97, 3, 12, 1], [5, 15, 0, 0], [127, 8, 9, 1]], dtype=torch.uint8)
    packed = pack_row(codes, widths)
    assert torch.equal(pack_row(codes.T.contiguous().T, widths), packed)
    assert torch.equal(unpack_row(packed.T.contiguous().T, widths), codes)
    assert torch.equal(unpack_row(packed[::2], widths), codes[::2])


def test_a_score_is_linear_in_the_pieces():
    # what kernels rely on: code = Σ 2^low · piece
    codes = torch.arange(128, dtype=torch.uint8)
    high, crumb, bit = codes >> 3, codes >> 1 & 3, codes & 1
    assert torch.equal(8 * high + 2 * crumb + bit, codes)
    row = pack_row(codes[77:78].unsqueeze(0), (7,))
    assert row.tolist() == [[int(high[77] | crumb[77] << 4 | bit[77] << 6)]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_trits_are_base_three_digits(digits):
    packed = pack_trits(torch.tensor([digits], dtype=torch.uint8))
    assert packed.dtype == torch.uint8
    number = sum(digit * 3**i for i, digit in enumerate(digits))
    assert packed.tolist() == [[number // 243**i % 243 for i in range(packed_trits(len(digits)))]]
    assert unpack_trits(packed, len(digits)).tolist() == [digits]


def test_five_trits_fit_a_byte_and_six_do_not():
    assert [packed_trits(n) for n in (0, 1, 5, 6, 64, 80)] == [0, 1, 1, 2, 13, 16]
    assert pack_trits(torch.full((5,), 2, dtype=torch.uint8)).tolist() == [242]

"""Tiles against an independent reading of their layout, code by code."""

import itertools

import pytest
import torch

from kvsight.tiling import TOKENS, WIDTHS, Tiling

MIXES = [
    (),
    (0,),
    *((w,) for w in WIDTHS[1:]),
    *itertools.combinations_with_replacement((8, 6, 5, 3, 2, 1), 2),
    (4, 4, 4, 4, 3, 2, 1, 0),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2),
    (8, 6, 5, 4, 3, 2, 1, 0),
]


def codes_of(widths, tokens, lead=()):
    generator = torch.Generator().manual_seed(sum(widths) + tokens)
    columns = [
        torch.randint(0, 2**w, (*lead, tokens, 16), generator=generator, dtype=torch.uint8)
        for w in widths
        if w
    ]
    return torch.cat(columns, dim=-1) if columns else torch.zeros(*lead, tokens, 0, dtype=torch.uint8)


def place(tiling, token, coordinate):
    """(byte, lowest bit, size, low) of every piece of one code, by the words of docs/formats.md."""
    found = []
    chunk, column = divmod(coordinate, 16)
    group, inner = divmod(token, 16)
    if tiling.rows == "tokens":
        row, lane, byte = inner // 8, 4 * (inner % 8) + column // 4, column % 4
    else:
        half, pair = divmod(inner, 8)
        row, lane, byte = column // 8, 4 * (column % 8) + pair // 2, 2 * (pair % 2) + half
    wide = {4: [], 2: [], 1: []}
    for width_chunk, width in enumerate(tiling.widths):
        sizes = {8: [(4, 4), (4, 0)]}.get(width) or [(s, width & (s - 1)) for s in (4, 2, 1) if width & s]
        for size, low in sizes:
            wide[size].append((width_chunk, low))
    at = 0
    for size in (4, 2, 1):
        share = 4 // size
        whole = len(wide[size]) // share * share
        for i, (owner, low) in enumerate(wide[size][:whole]):
            if owner == chunk:
                start = at + 512 * (i // share) + 16 * lane + 4 * group + byte
                found.append((start, 4 * row + size * (i % share), size, low))
        at += 512 * (whole // share)
    for size in (2, 1):
        share = 4 // size
        for owner, low in wide[size][len(wide[size]) // share * share :]:
            if owner == chunk:
                start = at + 4 * size * lane + 4 * (group // share) + byte
                found.append((start, 4 * row + size * (group % share), size, low))
            at += 128 * size
    assert at == tiling.nbytes
    return found


@pytest.mark.parametrize("rows", ["tokens", "coordinates"])
@pytest.mark.parametrize("widths", MIXES, ids=str)
def test_every_piece_lies_where_the_layout_says(widths, rows):
    tiling = Tiling(tuple(widths), rows)
    codes = codes_of(widths, TOKENS)
    tile = tiling.pack(codes)[0].tolist()
    assert len(tile) == tiling.nbytes == 128 * sum(widths)
    used = 0
    for token, coordinate in itertools.product(range(TOKENS), range(tiling.stored)):
        code = 0
        for byte, bit, size, low in place(tiling, token, coordinate):
            code |= (tile[byte] >> bit & (2**size - 1)) << low
            used += size
        assert code == codes[token, coordinate]
    assert used == 8 * tiling.nbytes


@pytest.mark.parametrize("rows", ["tokens", "coordinates"])
@pytest.mark.parametrize("widths", MIXES, ids=str)
def test_unpacking_is_the_inverse(widths, rows):
    tiling = Tiling(tuple(widths), rows)
    codes = codes_of(widths, 3 * TOKENS, (2, 1))
    tiles = tiling.pack(codes)
    assert tiles.shape == (2, 1, 3, tiling.nbytes)
    assert torch.equal(tiling.unpack(tiles), codes)
    assert torch.equal(tiling.pack(codes[..., TOKENS : 2 * TOKENS, :]), tiles[..., 1:2, :])


def test_a_tile_of_known_bytes():
    """One chunk of 4 bits: token t holds code t % 16 in coordinate 0 and zero elsewhere."""
    codes = torch.zeros(TOKENS, 16, dtype=torch.uint8)
    codes[:, 0] = torch.arange(TOKENS) % 16
    tile = Tiling((4,), "tokens").pack(codes)[0]
    # lane 4g holds tokens g and g + 8 of all four groups in its bytes 0, 4, 8 and 12
    wanted = torch.zeros(32, 4, 4, dtype=torch.uint8)
    wanted[::4, :, 0] = torch.arange(8, dtype=torch.uint8).unsqueeze(-1) * 17 + 128
    assert torch.equal(tile, wanted.flatten())

"""Triton kernel that encodes rows in one pass: centre, map, norm, nearest level, pack."""

import triton
import triton.language as tl


# what changes with every call must not compile anew
@triton.jit(do_not_specialize=["tokens", "x_batch", "x_head"])
def encode_rows(
    x,
    shift,
    matrix,
    first,
    inverse_step,
    edges,
    pieces,
    rows,
    norms,
    x_batch,
    x_head,
    x_token,
    shift_head,
    matrix_head,
    line_head,
    edge_head,
    edge_coordinate,
    tokens,
    dim,
    stored,
    octets,
    SHIFT: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEST: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: a block of tokens of one head of one sequence.

    ``EVEN``: boundaries are first + k / inverse_step; else ``edges`` are searched, 2^WIDEST - 1 of each
    coordinate. ``pieces`` is ``packing.piece_table`` of BLOCK_D columns.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = token < tokens
    column = tl.arange(0, BLOCK_D)
    lines = x + batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + token.to(tl.int64) * x_token
    if MAP:
        y = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for start in range(0, dim, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            part = tl.load(lines[:, None] + k[None, :], mask=live[:, None] & (k < dim)[None, :], other=0.0)
            part = part.to(tl.float32)
            if SHIFT:
                part -= tl.load(shift + head * shift_head + k, mask=k < dim, other=0.0)[None, :]
            tile = matrix + head * matrix_head + k[:, None] * dim + column[None, :]
            tile = tl.load(tile, mask=(k < dim)[:, None] & (column < dim)[None, :], other=0.0)
            y = tl.dot(part, tile, y, input_precision=PRECISION)
    else:
        inside = live[:, None] & (column < dim)[None, :]
        y = tl.load(lines[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            y -= tl.load(shift + head * shift_head + column, mask=column < dim, other=0.0)[None, :]
    out = (batch * tl.num_programs(1) + head).to(tl.int64) * tokens + token
    if NORM:
        size = tl.sqrt(tl.sum(y * y, axis=1) / dim)
        size = tl.minimum(size, 65504.0).to(tl.float16)
        tl.store(norms + out, size, mask=live)
        size = size.to(tl.float32)
        y = tl.where((size > 0)[:, None], y / tl.where(size > 0, size, 1.0)[:, None], 0.0)
    have = column < stored
    if EVEN:
        start = tl.load(first + head * line_head + column, mask=have, other=0.0)
        scale = tl.load(inverse_step + head * line_head + column, mask=have, other=0.0)
        # a coordinate's codes end where its pieces do
        most = tl.zeros([BLOCK_D], dtype=tl.int32)
        for i in tl.static_range(PIECES):
            piece = pieces + 4 * i * BLOCK_D + column
            most += tl.load(piece + 2 * BLOCK_D) << tl.load(piece + 3 * BLOCK_D)
        place = tl.ceil((y - start[None, :]) * scale[None, :])
        code = tl.minimum(tl.maximum(place, 0.0), most.to(tl.float32)[None, :]).to(tl.int32)
    else:
        code = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.int32)
        table = edges + head * edge_head + column * edge_coordinate
        for i in tl.static_range(WIDEST):
            half = 1 << (WIDEST - 1 - i)
            edge = tl.load(table[None, :] + code + (half - 1), mask=have[None, :], other=float("inf"))
            code += tl.where(y > edge, half, 0)
    # every byte is a sum of pieces times powers of two: a product that fp16 takes exactly
    octet = tl.arange(0, BLOCK_R)
    row = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        piece = pieces + 4 * i * BLOCK_D + column
        at, down = tl.load(piece), tl.load(piece + BLOCK_D)
        mask, up = tl.load(piece + 2 * BLOCK_D), tl.load(piece + 3 * BLOCK_D)
        value = ((code >> up[None, :]) & mask[None, :]).to(tl.float16)
        place = (at[:, None] == octet[None, :]) & (mask > 0)[:, None]
        weight = tl.where(place, 1 << down[:, None], 0).to(tl.float16)
        row = tl.dot(value, weight, row)
    target = rows + out[:, None] * octets + octet[None, :]
    tl.store(target, row.to(tl.int32).to(tl.uint8), mask=live[:, None] & (octet < octets)[None, :])

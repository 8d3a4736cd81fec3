"""Triton kernels of attention over packed segments; README.md has the mathematics and the byte picture.

How a token is read is its *kind*: 0 dense, 1 planes (bytes masked in place, affine rows), 2 levels
(codes looked up), 3 grouped (code · scale + zero), 4 levels times a norm. Each work item reads keys of one
kind and values of one kind, so a layer whose heads and segments differ still is a single launch.

A source is 18 int64 numbers, one row for each segment and KV head:
 0 kind, 1 query group, 2 first token, 3 data pointer, 4 batch stride, 5 row stride,
 6 norm or scale pointer, 7 batch stride, 8 row stride, 9 zero pointer, 10 batch stride, 11 row stride,
 12 tokens per parameter row, 13 nibble bytes (planes) or coordinates, 14 crumb bytes, 15 bit bytes,
 16 pointer to the piece table, 17 pointer to the levels, or to those of every byte.
"""

import struct

import triton
import triton.language as tl


@triton.jit
def _bytes(rows, live, start, count, BLOCK: tl.constexpr):
    """Bytes start .. start + count of every row, [N, BLOCK]; zero elsewhere."""
    columns = tl.arange(0, BLOCK)
    inside = live[:, None] & (columns < count)[None, :]
    return tl.load(rows[:, None] + start + columns[None, :], mask=inside, other=0)


@triton.jit
def _plane(octets, MASK: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes masked in place and centred, so that sums do not grow where numbers cancel."""
    return (octets & MASK).to(DTYPE) - 0.5 * MASK


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a bᵀ of a [M, K], b [N, K]; fp32 is summed in pieces of 16: one long sum errs twice as much."""
    if tl.float32 == a.dtype and PRECISION == "ieee" and a.shape[1] > 16:
        COUNT: tl.constexpr = a.shape[1] // 16
        left = tl.permute(tl.reshape(a, [a.shape[0], COUNT, 16]), [1, 0, 2])
        right = tl.permute(tl.reshape(b, [b.shape[0], COUNT, 16]), [1, 2, 0])
        out = tl.sum(tl.dot(left, right, input_precision=PRECISION), axis=0)
    else:
        out = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return out


@triton.jit
def _add(acc, decay, p, x, PRECISION: tl.constexpr):
    """acc · decay + p x of p [M, N], x [N, K]; in fp32 a block of tokens is summed before it is added."""
    if tl.float32 == p.dtype and PRECISION == "ieee":
        out = acc * decay[:, None] + _dot(p, tl.trans(x), PRECISION)
    else:
        out = tl.dot(p, x, acc * decay[:, None], input_precision=PRECISION)
    return out


@triton.jit
def _score(s, q, octets, MASK: tl.constexpr, DTYPE: tl.constexpr):
    """s + q · planeᵀ; in half precision the query is split in two, since folding gave it more digits."""
    plane = _plane(octets, MASK, DTYPE)
    if tl.float16 == DTYPE:
        high = q.to(DTYPE)
        s = tl.dot(high, tl.trans(plane), s)
        s = tl.dot((q - high.to(tl.float32)).to(DTYPE), tl.trans(plane), s)
    else:
        s += _dot(q, plane, "ieee")
    return s


@triton.jit
def _mix(acc, decay, p, octets, MASK: tl.constexpr):
    """acc · decay + p · plane."""
    return _add(acc, decay, p, _plane(octets, MASK, p.dtype), "ieee")


@triton.jit
def _query(q, lines, inside, column, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Columns column .. column + BLOCK of the folded query, [M, BLOCK]."""
    at = q + lines[:, None] + column + tl.arange(0, BLOCK)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0).to(DTYPE)


@triton.jit
def _put(acc, lines, inside, column, x, BLOCK: tl.constexpr):
    at = acc + lines[:, None] + column + tl.arange(0, BLOCK)[None, :]
    tl.store(at, x, mask=inside[:, None])


@triton.jit
def _address(source, field, batch, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of this batch begin; the stride between batches is in bytes."""
    start = tl.load(source + field) + batch * tl.load(source + field + 1)
    return tl.multiple_of(start.to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _dense(source, batch, tokens, live, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """[N, BLOCK] in the stored dtype."""
    start = _address(source, 3, batch, DTYPE, ALIGN)
    items: tl.constexpr = (ALIGN * 8 + DTYPE.primitive_bitwidth - 1) // DTYPE.primitive_bitwidth
    rows = (tokens - tl.load(source + 2)) * tl.multiple_of(tl.load(source + 5), items)
    columns = tl.arange(0, BLOCK)
    inside = live[:, None] & (columns < tl.multiple_of(tl.load(source + 13), items))[None, :]
    return tl.load(start + rows[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _coordinates(
    source, batch, tokens, live, KIND: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr
):
    """What the codes of N tokens mean, [N, BLOCK] in fp32; columns past the stored ones are zero."""
    row = tokens - tl.load(source + 2)
    columns = tl.arange(0, BLOCK)
    inside = live[:, None] & (columns < tl.load(source + 13))[None, :]
    data = _address(source, 3, batch, tl.uint8, 1)
    rows = data + row * tl.load(source + 5)
    table = tl.load(source + 16).to(tl.pointer_type(tl.int32)) + columns
    code = tl.zeros([tokens.shape[0], BLOCK], dtype=tl.int32)
    for i in tl.static_range(PIECES):
        piece = table + 4 * i * BLOCK
        octet, down = tl.load(piece), tl.load(piece + BLOCK)
        mask, up = tl.load(piece + 2 * BLOCK), tl.load(piece + 3 * BLOCK)
        found = tl.load(rows[:, None] + octet[None, :], mask=inside, other=0).to(tl.int32)
        code = code | (((found >> down[None, :]) & mask[None, :]) << up[None, :])
    column = tl.load(table + 12 * BLOCK)
    line = row // tl.load(source + 12)
    first = _address(source, 6, batch, tl.float16, 1) + line * tl.load(source + 8)
    if KIND == 3:
        second = _address(source, 9, batch, tl.float16, 1) + line * tl.load(source + 11)
        scale = tl.load(first[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(second[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = code.to(tl.float32) * scale + zero
    else:
        levels = tl.load(source + 17).to(tl.pointer_type(tl.float32))
        x = tl.load(levels + column[None, :] + code, mask=inside, other=0.0)
        if KIND == 4:
            x = x * tl.load(first, mask=live, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def _spread(octets, SIZE: tl.constexpr):
    """The pieces of SIZE bits in bytes [N, B], in order: [N, B · 8 / SIZE]."""
    if SIZE == 4:
        out = tl.join(octets & 15, octets >> 4)
    elif SIZE == 2:
        even = tl.join(octets & 3, (octets >> 4) & 3)
        out = tl.join(even, tl.join((octets >> 2) & 3, octets >> 6))
    else:
        even = tl.join(
            tl.join(octets & 1, (octets >> 4) & 1), tl.join((octets >> 2) & 1, (octets >> 6) & 1)
        )
        odd = tl.join(
            tl.join((octets >> 1) & 1, (octets >> 5) & 1), tl.join((octets >> 3) & 1, octets >> 7)
        )
        out = tl.join(even, odd)
    return tl.reshape(out, [octets.shape[0], octets.shape[1] * (8 // SIZE)])


@triton.jit
def _codes(rows, live, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """uint8 codes [N, BLOCK] of rows whose ``count`` codes have WIDTH bits each, zero elsewhere."""
    code = tl.zeros([rows.shape[0], BLOCK], dtype=tl.uint8)
    start = 0
    if WIDTH >= 4:
        code = _spread(_bytes(rows, live, start, count // 2, BLOCK // 2), 4)
        start += count // 2
    if WIDTH == 8:
        code = (code << 4) | _spread(_bytes(rows, live, start, count // 2, BLOCK // 2), 4)
    if WIDTH & 2:
        code = (code << 2) | _spread(_bytes(rows, live, start, count // 4, BLOCK // 4), 2)
        start += count // 4
    if WIDTH & 1:
        code = (code << 1) | _spread(_bytes(rows, live, start, count // 8, BLOCK // 8), 1)
    return code


def _widening(size):
    """PTX from four bytes to the pieces of ``size`` bits in them as fp16, a slot of all four at a time.

    A piece put into the last bits of 1024 is 1024 + piece · 2^shift; conversions would take longer.
    """
    slots = 8 // size
    lines = [".reg .b32 t, a, b, unit, lift;"]
    for slot in range(slots):
        mask = (((1 << size) - 1) << slot * size) * 0x01010101
        unit, lift = (_pair(x * 0.5 ** (slot * size)) for x in (1, -1024))
        lines += [
            f"mov.b32 unit, {unit}; mov.b32 lift, {lift};",
            f"and.b32 t, ${2 * slots}, {mask};",
            "prmt.b32 a, t, 0x64646464, 0x4140;",
            "prmt.b32 b, t, 0x64646464, 0x4342;",
            f"fma.rn.f16x2 ${2 * slot}, a, unit, lift;",
            f"fma.rn.f16x2 ${2 * slot + 1}, b, unit, lift;",
        ]
    return "{" + " ".join(lines) + "}"


def _pair(x):
    """The bits of a number in both halves of a register, as PTX writes it."""
    return hex(int.from_bytes(2 * struct.pack("<e", x), "little"))


_NIBBLES = tl.constexpr(_widening(4))
_CRUMBS = tl.constexpr(_widening(2))
_BITS = tl.constexpr(_widening(1))
_FOUR, _EIGHT, _SIXTEEN = (tl.constexpr(count * "=&r," + "r") for count in (4, 8, 16))


@triton.jit
def _halves(octets, SIZE: tl.constexpr):
    """As ``_spread``, in fp16."""
    if SIZE == 4:
        a, b = tl.inline_asm_elementwise(
            _NIBBLES, _FOUR, [octets], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
        out = tl.join(a, b)
    elif SIZE == 2:
        a, b, c, d = tl.inline_asm_elementwise(
            _CRUMBS,
            _EIGHT,
            [octets],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
        out = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _BITS,
            _SIXTEEN,
            [octets],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=4,
        )
        even = tl.join(tl.join(a, e), tl.join(c, g))
        out = tl.join(even, tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(out, [octets.shape[0], octets.shape[1] * (8 // SIZE)])


@triton.jit
def _half_codes(rows, live, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """As ``_codes`` in fp16, which holds them exactly."""
    code = tl.zeros([rows.shape[0], BLOCK], dtype=tl.float16)
    start = 0
    if WIDTH >= 4:
        code = _halves(_bytes(rows, live, start, count // 2, BLOCK // 2), 4)
        start += count // 2
    if WIDTH == 8:
        code = code * 16 + _halves(_bytes(rows, live, start, count // 2, BLOCK // 2), 4)
    if WIDTH & 2:
        code = code * 4 + _halves(_bytes(rows, live, start, count // 4, BLOCK // 4), 2)
        start += count // 4
    if WIDTH & 1:
        code = code * 2 + _halves(_bytes(rows, live, start, count // 8, BLOCK // 8), 1)
    return code


@triton.jit
def _upper(words, AT: tl.constexpr):
    """Bits AT to AT + 16 as fp16."""
    return (words >> AT).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _looked_up(source, octets, WIDTH: tl.constexpr):
    """Levels of all codes of a byte at once, in fp16: [N, B] to [N, B · 8 / WIDTH]."""
    if WIDTH == 4:
        book = tl.load(source + 17).to(tl.pointer_type(tl.uint32))
        pairs = tl.load(book + octets.to(tl.int32))
        out = tl.join(_upper(pairs, 0), _upper(pairs, 16))
    else:
        book = tl.load(source + 17).to(tl.pointer_type(tl.uint64))
        fours = tl.load(book + octets.to(tl.int32))
        even = tl.join(_upper(fours, 0), _upper(fours, 32))
        out = tl.join(even, tl.join(_upper(fours, 16), _upper(fours, 48)))
    return tl.reshape(out, [octets.shape[0], octets.shape[1] * (8 // WIDTH)])


@triton.jit
def _norms(source, batch, token, live):
    """What each token's levels are multiplied by, [N]."""
    rows = _address(source, 6, batch, tl.float16, 1) + (token - tl.load(source + 2)) * tl.load(source + 8)
    return tl.load(rows, mask=live, other=0.0)


@triton.jit
def _uniform(
    source,
    batch,
    start,
    hi,
    live,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    CELL: tl.constexpr,
    SPAN: tl.constexpr,
    BOOK: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``_coordinates`` of the tokens from ``start`` on, where all codes have one width; without norms.

    A group is CELL coordinates of SPAN tokens, and the first token is at a multiple of SPAN or of N.
    """
    N: tl.constexpr = live.shape[0]
    above = start - tl.load(source + 2)
    row = above + tl.arange(0, N)
    count = tl.multiple_of(tl.load(source + 13), 16)
    rows = _address(source, 3, batch, tl.uint8, ALIGN) + row * tl.multiple_of(tl.load(source + 5), ALIGN)
    scales = _address(source, 6, batch, tl.float16, 1)
    if KIND == 3:
        zeros = _address(source, 9, batch, tl.float16, 1)
        if tl.float16 == DTYPE:
            code = _half_codes(rows, live, count, WIDTH, BLOCK)
        else:
            code = _codes(rows, live, count, WIDTH, BLOCK).to(DTYPE)
        LINES: tl.constexpr = N if SPAN == 1 else (N // SPAN if SPAN < N else 1)
        GROUPS: tl.constexpr = BLOCK // CELL
        line = above // SPAN + tl.arange(0, LINES)
        group = tl.arange(0, GROUPS)
        given = (line * SPAN < hi - start + above)[:, None] & (group * CELL < count)[None, :]
        at = line[:, None] * tl.load(source + 8) + group[None, :]
        scale = tl.load(scales + at, mask=given, other=0.0).to(DTYPE)
        at = line[:, None] * tl.load(source + 11) + group[None, :]
        zero = tl.load(zeros + at, mask=given, other=0.0).to(DTYPE)
        cells = tl.reshape(code, [LINES, N // LINES, GROUPS, CELL])
        # all three are exact in fp16, so that one rounding is left there
        cells = tl.fma(cells, scale[:, None, :, None], zero[:, None, :, None])
        x = tl.reshape(cells, [N, BLOCK])
    elif BOOK:
        x = _looked_up(source, _bytes(rows, live, 0, count * WIDTH // 8, BLOCK * WIDTH // 8), WIDTH)
    else:
        code = _codes(rows, live, count, WIDTH, BLOCK)
        columns = tl.arange(0, BLOCK)
        first = tl.load(tl.load(source + 16).to(tl.pointer_type(tl.int32)) + 12 * BLOCK + columns)
        levels = tl.load(source + 17).to(tl.pointer_type(tl.float32))
        # codes are zero where there are none, and no weight falls on what is found for them
        x = tl.load(levels + first[None, :] + code)
    return x


@triton.jit
def _tanh(x):
    # near zero 1 - exp(-2x) cancels; there the series is exact to fp32
    y = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1 - y) / (1 + y)
    z = x * x
    near = 21844 / 6081075
    near = near * z - 1382 / 155925
    near = near * z + 62 / 2835
    near = near * z - 17 / 315
    near = near * z + 2 / 15
    near = near * z - 1 / 3
    near = tl.abs(x) * (near * z + 1)
    size = tl.where(tl.abs(x) < 0.4, near, far)
    return tl.where(x < 0, -size, size)


@triton.jit
def _work(
    source_k,
    source_v,
    begin,
    lo,
    hi,
    part,
    q,
    scales,
    offsets,
    tops,
    sums,
    acc,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    softcap,
    queries,
    tokens,
    rows,
    KV_HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    NIBBLES_K: tl.constexpr,
    CRUMBS_K: tl.constexpr,
    BITS_K: tl.constexpr,
    NIBBLES_V: tl.constexpr,
    CRUMBS_V: tl.constexpr,
    BITS_V: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    PIECES_K: tl.constexpr,
    PIECES_V: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    CELL_K: tl.constexpr,
    CELL_V: tl.constexpr,
    SPAN_K: tl.constexpr,
    SPAN_V: tl.constexpr,
    BOOK_K: tl.constexpr,
    BOOK_V: tl.constexpr,
    CODE_ALIGN_K: tl.constexpr,
    CODE_ALIGN_V: tl.constexpr,
    FOLDED: tl.constexpr,
    FINE: tl.constexpr,
    CELLS: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    DENSE_ALIGN_K: tl.constexpr,
    DENSE_ALIGN_V: tl.constexpr,
    STORED_K: tl.constexpr,
    STORED_V: tl.constexpr,
    DENSE_K: tl.constexpr,
    DENSE_V: tl.constexpr,
    CODES: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADROOM: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries of one block against tokens lo .. hi of one KV head: maxima, masses and weighted sums."""
    head = tl.program_id(0) % KV_HEADS
    batch = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    line = ((tl.load(source_k + 1) * tl.num_programs(2) + batch) * KV_HEADS + head) * rows + row
    line = line.to(tl.int64)
    scale = tl.load(scales + line, mask=inside, other=0.0)
    offset = tl.load(offsets + line, mask=inside, other=0.0)
    lines = line * Q_WIDTH
    if KEYS == 1:
        count_n, count_c, count_b = tl.load(source_k + 13), tl.load(source_k + 14), tl.load(source_k + 15)
        start_k = _address(source_k, 3, batch, tl.uint8, ALIGN_K)
        stride_k = tl.multiple_of(tl.load(source_k + 5), ALIGN_K)
        count_n = tl.multiple_of(count_n, ALIGN_K)
        count_c = tl.multiple_of(count_c, ALIGN_K)
        if NIBBLES_K:
            qn0 = _query(q, lines, inside, 0, NIBBLES_K, tl.float32)
            qn1 = _query(q, lines, inside, NIBBLES_K, NIBBLES_K, tl.float32)
        if CRUMBS_K:
            at_c: tl.constexpr = 2 * NIBBLES_K
            qc0 = _query(q, lines, inside, at_c, CRUMBS_K, tl.float32)
            qc1 = _query(q, lines, inside, at_c + CRUMBS_K, CRUMBS_K, tl.float32)
            qc2 = _query(q, lines, inside, at_c + 2 * CRUMBS_K, CRUMBS_K, tl.float32)
            qc3 = _query(q, lines, inside, at_c + 3 * CRUMBS_K, CRUMBS_K, tl.float32)
        if BITS_K:
            at_b: tl.constexpr = 2 * NIBBLES_K + 4 * CRUMBS_K
            qb0 = _query(q, lines, inside, at_b, BITS_K, tl.float32)
            qb1 = _query(q, lines, inside, at_b + BITS_K, BITS_K, tl.float32)
            qb2 = _query(q, lines, inside, at_b + 2 * BITS_K, BITS_K, tl.float32)
            qb3 = _query(q, lines, inside, at_b + 3 * BITS_K, BITS_K, tl.float32)
            qb4 = _query(q, lines, inside, at_b + 4 * BITS_K, BITS_K, tl.float32)
            qb5 = _query(q, lines, inside, at_b + 5 * BITS_K, BITS_K, tl.float32)
            qb6 = _query(q, lines, inside, at_b + 6 * BITS_K, BITS_K, tl.float32)
            qb7 = _query(q, lines, inside, at_b + 7 * BITS_K, BITS_K, tl.float32)
    elif KEYS == 0:
        qd = _query(q, lines, inside, 0, DIM_K, DENSE_K)
    else:
        qd = _query(q, lines, inside, 0, DIM_K, tl.float32)

    if VALUES == 1:
        mass_n, mass_c, mass_b = tl.load(source_v + 13), tl.load(source_v + 14), tl.load(source_v + 15)
        start_v = _address(source_v, 3, batch, tl.uint8, ALIGN_V)
        stride_v = tl.multiple_of(tl.load(source_v + 5), ALIGN_V)
        mass_n = tl.multiple_of(mass_n, ALIGN_V)
        mass_c = tl.multiple_of(mass_c, ALIGN_V)
        if NIBBLES_V:
            an0 = tl.zeros([BLOCK_M, NIBBLES_V], dtype=tl.float32)
            an1 = tl.zeros([BLOCK_M, NIBBLES_V], dtype=tl.float32)
        if CRUMBS_V:
            ac0 = tl.zeros([BLOCK_M, CRUMBS_V], dtype=tl.float32)
            ac1 = tl.zeros([BLOCK_M, CRUMBS_V], dtype=tl.float32)
            ac2 = tl.zeros([BLOCK_M, CRUMBS_V], dtype=tl.float32)
            ac3 = tl.zeros([BLOCK_M, CRUMBS_V], dtype=tl.float32)
        if BITS_V:
            ab0 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab1 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab2 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab3 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab4 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab5 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab6 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
            ab7 = tl.zeros([BLOCK_M, BITS_V], dtype=tl.float32)
    else:
        ad = tl.zeros([BLOCK_M, DIM_V], dtype=tl.float32)

    query = row % queries
    limit = query + (tokens - queries)
    stop = hi
    if CAUSAL:
        stop = tl.minimum(hi, tl.max(tl.where(inside, limit, 0), axis=0) + 1)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(begin, stop, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        live = (token >= lo) & (token < hi)
        if KEYS == 1:
            keys = start_k + (token - tl.load(source_k + 2)) * stride_k
            s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            # the smallest parts first: what is rounded then are small sums
            if BITS_K:
                octets = _bytes(keys, live, count_n + count_c, count_b, BITS_K)
                s = _score(s, qb0, octets, 1, CODES)
                s = _score(s, qb1, octets, 2, CODES)
                s = _score(s, qb2, octets, 4, CODES)
                s = _score(s, qb3, octets, 8, CODES)
                s = _score(s, qb4, octets, 16, CODES)
                s = _score(s, qb5, octets, 32, CODES)
                s = _score(s, qb6, octets, 64, CODES)
                s = _score(s, qb7, octets, 128, CODES)
            if CRUMBS_K:
                octets = _bytes(keys, live, count_n, count_c, CRUMBS_K)
                s = _score(s, qc0, octets, 3, CODES)
                s = _score(s, qc1, octets, 12, CODES)
                s = _score(s, qc2, octets, 48, CODES)
                s = _score(s, qc3, octets, 192, CODES)
            if NIBBLES_K:
                octets = _bytes(keys, live, 0, count_n, NIBBLES_K)
                s = _score(s, qn0, octets, 15, CODES)
                s = _score(s, qn1, octets, 240, CODES)
        elif KEYS == 0:
            x = _dense(source_k, batch, token, live, STORED_K, DIM_K, DENSE_ALIGN_K)
            s = _dot(qd, x.to(DENSE_K), "ieee")
        elif WIDTH_K:
            x = _uniform(
                source_k,
                batch,
                start,
                hi,
                live,
                KEYS,
                WIDTH_K,
                CELL_K,
                SPAN_K,
                BOOK_K,
                CODE_ALIGN_K,
                CELLS,
                DIM_K,
            )
            near = x.to(CODES)
            high = qd.to(CODES)
            s = tl.dot(high, tl.trans(near))
            if FOLDED:
                s = tl.dot((qd - high.to(tl.float32)).to(CODES), tl.trans(near), s)
            if FINE:
                s = tl.dot(high, tl.trans((x - near.to(tl.float32)).to(CODES)), s)
            if KEYS == 4:
                s = s * _norms(source_k, batch, token, live).to(tl.float32)[None, :]
        else:
            x = _coordinates(source_k, batch, token, live, KEYS, DIM_K, PIECES_K)
            s = _dot(qd, x, PRECISION)
        s = s * scale[:, None] + offset[:, None]
        if SOFTCAP:
            s = _tanh(s / softcap) * (softcap * 1.4426950408889634)
        seen = live[None, :]
        if MASK:
            at = (head * (rows // queries) + row // queries).to(tl.int64) * mask_head
            at = at + query * mask_query + batch.to(tl.int64) * mask_batch
            at = mask + at[:, None] + token[None, :] * mask_key
            given = tl.load(at, mask=inside[:, None] & seen, other=0)
            if MASK == 1:
                s = tl.where(given != 0, s, -3.4028234663852886e38)
            else:
                # half the lowest number survives the change of base
                added = tl.maximum(given.to(tl.float32), -1.7014117331926443e38)
                s = tl.maximum(s + added * 1.4426950408889634, -3.4028234663852886e38)
        if CAUSAL:
            s = tl.where(token[None, :] <= limit[:, None], s, -3.4028234663852886e38)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        decay = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None] + HEADROOM)
        # what is summed is what is multiplied: weights then sum to one exactly
        if (VALUES == 1) or (VALUES > 1 and WIDTH_V > 0):
            p = p.to(CODES).to(tl.float32)
        elif VALUES == 0:
            p = p.to(DENSE_V).to(tl.float32)
        total = total * decay + tl.sum(p, axis=1)
        top = higher
        if VALUES == 1:
            values = start_v + (token - tl.load(source_v + 2)) * stride_v
            w = p.to(CODES)
            if NIBBLES_V:
                octets = _bytes(values, live, 0, mass_n, NIBBLES_V)
                an0 = _mix(an0, decay, w, octets, 15)
                an1 = _mix(an1, decay, w, octets, 240)
            if CRUMBS_V:
                octets = _bytes(values, live, mass_n, mass_c, CRUMBS_V)
                ac0 = _mix(ac0, decay, w, octets, 3)
                ac1 = _mix(ac1, decay, w, octets, 12)
                ac2 = _mix(ac2, decay, w, octets, 48)
                ac3 = _mix(ac3, decay, w, octets, 192)
            if BITS_V:
                octets = _bytes(values, live, mass_n + mass_c, mass_b, BITS_V)
                ab0 = _mix(ab0, decay, w, octets, 1)
                ab1 = _mix(ab1, decay, w, octets, 2)
                ab2 = _mix(ab2, decay, w, octets, 4)
                ab3 = _mix(ab3, decay, w, octets, 8)
                ab4 = _mix(ab4, decay, w, octets, 16)
                ab5 = _mix(ab5, decay, w, octets, 32)
                ab6 = _mix(ab6, decay, w, octets, 64)
                ab7 = _mix(ab7, decay, w, octets, 128)
        elif VALUES == 0:
            x = _dense(source_v, batch, token, live, STORED_V, DIM_V, DENSE_ALIGN_V)
            ad = _add(ad, decay, p.to(DENSE_V), x.to(DENSE_V), "ieee")
        elif WIDTH_V:
            x = _uniform(
                source_v,
                batch,
                start,
                hi,
                live,
                VALUES,
                WIDTH_V,
                CELL_V,
                SPAN_V,
                BOOK_V,
                CODE_ALIGN_V,
                CELLS,
                DIM_V,
            )
            if VALUES == 4:
                x = x * _norms(source_v, batch, token, live).to(x.dtype)[:, None]
            near = x.to(CODES)
            ad = tl.dot(p.to(CODES), near, ad * decay[:, None])
            if FINE:
                ad = tl.dot(p.to(CODES), (x - near.to(tl.float32)).to(CODES), ad)
        else:
            x = _coordinates(source_v, batch, token, live, VALUES, DIM_V, PIECES_V)
            ad = _add(ad, decay, p, x, PRECISION)

    out = part * rows + row
    tl.store(tops + out, top - HEADROOM, mask=inside)
    tl.store(sums + out, total, mask=inside)
    lines = out * V_WIDTH
    if VALUES == 1:
        if NIBBLES_V:
            _put(acc, lines, inside, 0, an0, NIBBLES_V)
            _put(acc, lines, inside, NIBBLES_V, an1, NIBBLES_V)
        if CRUMBS_V:
            to_c: tl.constexpr = 2 * NIBBLES_V
            _put(acc, lines, inside, to_c, ac0, CRUMBS_V)
            _put(acc, lines, inside, to_c + CRUMBS_V, ac1, CRUMBS_V)
            _put(acc, lines, inside, to_c + 2 * CRUMBS_V, ac2, CRUMBS_V)
            _put(acc, lines, inside, to_c + 3 * CRUMBS_V, ac3, CRUMBS_V)
        if BITS_V:
            to_b: tl.constexpr = 2 * NIBBLES_V + 4 * CRUMBS_V
            _put(acc, lines, inside, to_b, ab0, BITS_V)
            _put(acc, lines, inside, to_b + BITS_V, ab1, BITS_V)
            _put(acc, lines, inside, to_b + 2 * BITS_V, ab2, BITS_V)
            _put(acc, lines, inside, to_b + 3 * BITS_V, ab3, BITS_V)
            _put(acc, lines, inside, to_b + 4 * BITS_V, ab4, BITS_V)
            _put(acc, lines, inside, to_b + 5 * BITS_V, ab5, BITS_V)
            _put(acc, lines, inside, to_b + 6 * BITS_V, ab6, BITS_V)
            _put(acc, lines, inside, to_b + 7 * BITS_V, ab7, BITS_V)
    else:
        _put(acc, lines, inside, 0, ad, DIM_V)


# what changes with every token must not compile anew
@triton.jit(do_not_specialize=["queries", "tokens", "rows", "key_sources", "value_sources", "mask_query"])
def attend_splits(
    table,
    q,
    scales,
    offsets,
    tops,
    sums,
    acc,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    softcap,
    queries,
    tokens,
    rows,
    key_sources,
    value_sources,
    KV_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_COUNT: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    NIBBLES_K: tl.constexpr,
    CRUMBS_K: tl.constexpr,
    BITS_K: tl.constexpr,
    NIBBLES_V: tl.constexpr,
    CRUMBS_V: tl.constexpr,
    BITS_V: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    PIECES_K: tl.constexpr,
    PIECES_V: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    CELL_K: tl.constexpr,
    CELL_V: tl.constexpr,
    SPAN_K: tl.constexpr,
    SPAN_V: tl.constexpr,
    BOOK_K: tl.constexpr,
    BOOK_V: tl.constexpr,
    CODE_ALIGN_K: tl.constexpr,
    CODE_ALIGN_V: tl.constexpr,
    FOLDED: tl.constexpr,
    FINE: tl.constexpr,
    CELLS: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    DENSE_ALIGN_K: tl.constexpr,
    DENSE_ALIGN_V: tl.constexpr,
    STORED_K: tl.constexpr,
    STORED_V: tl.constexpr,
    DENSE_K: tl.constexpr,
    DENSE_V: tl.constexpr,
    CODES: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADROOM: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a split of the context, a KV head, a block of queries, a sequence.

    A split is five numbers in ``table``: first and last token, key segment, value segment, and where blocks
    of tokens begin, at or before the first. ``PAIRS`` lists the pairs of kinds that occur, six bits each:
    key kind · 8 + value kind.
    """
    split = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    lo = tl.load(table + 5 * split).to(tl.int32)
    hi = tl.load(table + 5 * split + 1).to(tl.int32)
    begin = tl.load(table + 5 * split + 4).to(tl.int32)
    source_k = table + key_sources + 18 * (tl.load(table + 5 * split + 2) * KV_HEADS + head)
    source_v = table + value_sources + 18 * (tl.load(table + 5 * split + 3) * KV_HEADS + head)
    pair = tl.load(source_k) * 8 + tl.load(source_v)
    part = (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    for i in tl.static_range(PAIR_COUNT):
        if pair == (PAIRS >> (6 * i)) & 63:
            _work(
                source_k,
                source_v,
                begin,
                lo,
                hi,
                part,
                q,
                scales,
                offsets,
                tops,
                sums,
                acc,
                mask,
                mask_batch,
                mask_head,
                mask_query,
                mask_key,
                softcap,
                queries,
                tokens,
                rows,
                KV_HEADS,
                (PAIRS >> (6 * i + 3)) & 7,
                (PAIRS >> (6 * i)) & 7,
                Q_WIDTH,
                V_WIDTH,
                NIBBLES_K,
                CRUMBS_K,
                BITS_K,
                NIBBLES_V,
                CRUMBS_V,
                BITS_V,
                DIM_K,
                DIM_V,
                PIECES_K,
                PIECES_V,
                WIDTH_K,
                WIDTH_V,
                CELL_K,
                CELL_V,
                SPAN_K,
                SPAN_V,
                BOOK_K,
                BOOK_V,
                CODE_ALIGN_K,
                CODE_ALIGN_V,
                FOLDED,
                FINE,
                CELLS,
                ALIGN_K,
                ALIGN_V,
                DENSE_ALIGN_K,
                DENSE_ALIGN_V,
                STORED_K,
                STORED_V,
                DENSE_K,
                DENSE_V,
                CODES,
                PRECISION,
                HEADROOM,
                MASK,
                CAUSAL,
                SOFTCAP,
                BLOCK_M,
                BLOCK_N,
            )


@triton.jit(do_not_specialize=["splits", "queries", "rows"])
def merge_splits(
    bounds,
    widths,
    tops,
    sums,
    acc,
    sinks,
    mixed,
    mass,
    splits,
    queries,
    rows,
    KV_HEADS: tl.constexpr,
    V_WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Splits of one value segment joined under the whole context's maximum and mass.

    ``bounds`` [segments, 2] are the splits of each segment, ``widths`` [segments, heads] the columns
    that its splits have written. The mass of a sink logit counts below and adds nothing above.
    """
    place = tl.program_id(0)
    head = place // (tl.num_programs(0) // KV_HEADS)
    segment = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    step = tl.num_programs(0) * rows
    line = (place * rows + row).to(tl.int64)
    for i in range(splits):
        top = tl.maximum(top, tl.load(tops + i * step + line, mask=inside, other=0.0))
    if SINKS:
        group = rows // queries
        sink = tl.load(sinks + head * group + row // queries, mask=inside, other=0.0)
        sink = sink.to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(splits):
        weight = tl.exp2(tl.load(tops + i * step + line, mask=inside, other=0.0) - top)
        total += weight * tl.load(sums + i * step + line, mask=inside, other=1.0)
    if SINKS:
        total += tl.exp2(sink - top)
    columns = tl.arange(0, BLOCK_F)
    written = columns < tl.load(widths + segment * KV_HEADS + head)
    out = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    share = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(tl.load(bounds + 2 * segment), tl.load(bounds + 2 * segment + 1)):
        at = i * step + line
        weight = tl.exp2(tl.load(tops + at, mask=inside, other=0.0) - top)
        share += weight * tl.load(sums + at, mask=inside, other=0.0)
        part = acc + at[:, None] * V_WIDTH + columns[None, :]
        part = tl.load(part, mask=inside[:, None] & written[None, :], other=0.0)
        out += weight[:, None] * part
    line += segment * step
    tl.store(mass + line, share / total, mask=inside)
    target = mixed + line[:, None] * V_WIDTH + columns[None, :]
    tl.store(target, out / total[:, None], mask=inside[:, None] & (columns < V_WIDTH)[None, :])

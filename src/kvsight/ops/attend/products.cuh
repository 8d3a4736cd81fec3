// Products of tiles: codes are the first operand as they lie (src/kvsight/tiling.py), after a mask and nothing else.
// Each kind of head has straight-line products of its own.

struct Scores {
    int sum[ROW_TILES][GROUPS][4];
};

__device__ __forceinline__ void score(Scores &s, int group, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                      const uint2 *b) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) mma_signed(s.sum[n][group], a0, a1, a2, a3, b[n]);
}

// Second operands of the next product.
__device__ __forceinline__ void load(uint2 *b, const uint2 *&fragments) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) b[n] = fragments[n * LANES];
    fragments += ROW_TILES * LANES;
}

constexpr uint32_t NIBBLE = 0x0f0f0f0fu, PAIR = 0x03030303u, BIT = 0x01010101u;

__device__ __forceinline__ uint32_t word(const uint4 &x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// Half of a first operand: rows g and g + 8 of a block.
struct Half {
    uint32_t low, high;
};

// Scores of 64 tokens: rows g of a group of 16 once, rows g + 8 sixteen times. Where the second operand of a product
// has zeros, its first one may hold anything.
template <int N4, int N2, int N1>
__device__ __forceinline__ void score_tile(Scores &s, const uint8_t *tile, const uint2 *fragments, int lane) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int j = 0; j < GROUPS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s.sum[n][j][e] = 0;
    // blocks left over of 4 bits, 2 bits and 1 bit, which are not in words with others
    constexpr int ODD4 = N4 % 2, ODD2 = N2 % 2, ODD1 = N1 % 4, ODD = ODD4 + ODD2 + ODD1;
    const uint4 *wide = (const uint4 *)tile + lane;
    const uint4 odd4 = wide[ODD4 ? (N4 - 1) * 32 : 0];
    uint2 b[ROW_TILES];
#pragma unroll
    for (int i = 1; i < N4; i += 2) {
        load(b, fragments);
        const uint4 x = wide[i * 32 - 32], y = wide[i * 32];
        // rows g + 8 get both nibbles: what the low one adds is in rows g, too
#pragma unroll
        for (int j = 0; j < GROUPS; j++) score(s, j, word(x, j) & NIBBLE, word(x, j), word(y, j) & NIBBLE, word(y, j), b);
    }
    if (N4 > 1)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                s.sum[n][j][2] -= s.sum[n][j][0];
                s.sum[n][j][3] -= s.sum[n][j][1];
            }
    wide += N4 * 32;
#pragma unroll
    for (int i = 1; i < N2; i += 2) {
        load(b, fragments);
        const uint4 x = wide[i / 2 * 32];
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            const uint32_t y = word(x, j);
            score(s, j, y & PAIR, y & PAIR << 4, y & PAIR << 2, y & PAIR << 6, b);
        }
    }
    wide += N2 / 2 * 32;
#pragma unroll
    for (int i = 0; i < N1 / 4; i++) {
        const uint4 x = wide[i * 32];
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            load(b, fragments);
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                const uint32_t y = word(x, j);
                score(s, j, y & BIT << k, y & BIT << (k + 4), y & BIT << (k + 1), y & BIT << (k + 5), b);
            }
        }
    }
    const uint8_t *rest = tile + (N4 + N2 / 2 + N1 / 4) * 512;
    const uint2 odd2 = ODD2 ? *((const uint2 *)rest + lane) : make_uint2(0, 0);
    uint32_t odd1[3];
#pragma unroll
    for (int i = 0; i < ODD1; i++) odd1[i] = *((const uint32_t *)(rest + ODD2 * 256 + i * 128) + lane);
    auto half = [&](int i, int j) -> Half {
        if (i < ODD4) return {word(odd4, j) & NIBBLE, word(odd4, j) & NIBBLE << 4};
        if (i < ODD4 + ODD2) {
            const uint32_t y = (j < 2 ? odd2.x : odd2.y) >> j % 2 * 2;
            return {y & PAIR, y & PAIR << 4};
        }
        const uint32_t y = odd1[i - ODD4 - ODD2] >> j;
        return {y & BIT, y & BIT << 4};
    };
#pragma unroll
    for (int i = 0; i < ODD; i += 2) {
        load(b, fragments);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            const Half x = half(i, j), y = i + 1 < ODD ? half(i + 1, j) : x;
            score(s, j, x.low, x.high, y.low, y.high, b);
        }
    }
}

// Weighted sums of values by block. Of 4 bits, rows g + 8 count both nibbles.
struct Sums {
    int sum[ROW_TILES][VALUE_BLOCKS][4];
};
typedef uint32_t Weights[ROW_TILES][GROUPS];

__device__ __forceinline__ void mix(Sums &o, int block, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    const Weights &p, int pair) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
        mma_unsigned(o.sum[n][block], a0, a1, a2, a3, p[n][2 * pair], p[n][2 * pair + 1]);
}

template <int N4, int N2, int N1>
__device__ __forceinline__ void mix_tile(Sums &o, const uint8_t *tile, const Weights &p, int lane) {
    const uint4 *wide = (const uint4 *)tile + lane;
    // products that add to the same sums are kept apart
#pragma unroll
    for (int i = 0; i < N4; i += 2) {
        uint4 x[2];
#pragma unroll
        for (int k = 0; k < 2; k++)
            if (i + k < N4) x[k] = wide[(i + k) * 32];
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int k = 0; k < 2; k++)
                if (i + k < N4) {
                    const uint32_t y = word(x[k], 2 * pair), z = word(x[k], 2 * pair + 1);
                    mix(o, i + k, y & NIBBLE, y, z & NIBBLE, z, p, pair);
                }
    }
    wide += N4 * 32;
#pragma unroll
    for (int i = 1; i < N2; i += 2) {
        const uint4 x = wide[i / 2 * 32];
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const uint32_t y = word(x, 2 * pair), z = word(x, 2 * pair + 1);
            mix(o, N4 + i - 1, y & PAIR, y & PAIR << 4, z & PAIR, z & PAIR << 4, p, pair);
            mix(o, N4 + i, y & PAIR << 2, y & PAIR << 6, z & PAIR << 2, z & PAIR << 6, p, pair);
        }
    }
    wide += N2 / 2 * 32;
    const uint8_t *rest = tile + (N4 + N2 / 2 + N1 / 4) * 512;
    if (N2 % 2) {
        const uint2 x = *((const uint2 *)rest + lane);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const uint32_t y = pair ? x.y : x.x, z = y >> 2;
            mix(o, N4 + N2 - 1, y & PAIR, y & PAIR << 4, z & PAIR, z & PAIR << 4, p, pair);
        }
        rest += 256;
    }
#pragma unroll
    for (int i = 0; i < N1 / 4; i++) {
        const uint4 x = wide[i * 32];
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint32_t y = word(x, 2 * pair), z = word(x, 2 * pair + 1);
                mix(o, N4 + N2 + 4 * i + k, y & BIT << k, y & BIT << (k + 4), z & BIT << k, z & BIT << (k + 4), p,
                    pair);
            }
    }
    uint32_t x[3];
#pragma unroll
    for (int i = 0; i < N1 % 4; i++) x[i] = *((const uint32_t *)(rest + i * 128) + lane);
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int i = 0; i < N1 % 4; i++) {
            const uint32_t y = x[i] >> 2 * pair, z = x[i] >> (2 * pair + 1);
            mix(o, N4 + N2 + N1 / 4 * 4 + i, y & BIT, y & BIT << 4, z & BIT, z & BIT << 4, p, pair);
        }
}

// A warp reads tiles of one head for long, so it always takes the same way.
__device__ __forceinline__ void score_kind(int kind, Scores &s, const uint8_t *tile, const uint2 *fragments, int lane) {
    switch (kind) {
#define KIND(i, n4, n2, n1) \
    case i: score_tile<n4, n2, n1>(s, tile, fragments, lane); break;
        KEY_KINDS
#undef KIND
    }
}
__device__ __forceinline__ void mix_kind(int kind, Sums &o, const uint8_t *tile, const Weights &p, int lane) {
    switch (kind) {
#define KIND(i, n4, n2, n1) \
    case i: mix_tile<n4, n2, n1>(o, tile, p, lane); break;
        VALUE_KINDS
#undef KIND
    }
}

__device__ __forceinline__ void clear(int (&sums)[VALUE_BLOCKS][4]) {
#pragma unroll
    for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[b][e] = 0;
}

// Pairs of numbers are high and low bytes of one sum.
__device__ __forceinline__ void shrink_sums(int (&sums)[VALUE_BLOCKS][4], float shrink) {
#pragma unroll
    for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const float high = (float)sums[b][e] * shrink;
            const int whole = __float2int_rn(high);
            sums[b][e] = whole;
            sums[b][e + 1] = __float2int_rn((float)sums[b][e + 1] * shrink + (high - (float)whole) * 256.f);
        }
}

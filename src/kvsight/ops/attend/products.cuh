// Products of tiles: codes are the first operand as they lie (src/kvsight/tiling.py), after a mask and nothing else.
// Each kind of head has straight-line products of its own. A byte has row g in its low nibble and row g + 8 in its high
// one; the latter is multiplied with both, and what the low one adds, which is in row g, is taken off at the end.

struct Scores {
    int sum[ROW_TILES][GROUPS][4];
};

// Second operands of the next product.
__device__ __forceinline__ void load(uint2 *b, const uint2 *&fragments) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) b[n] = fragments[n * LANES];
    fragments += ROW_TILES * LANES;
}

constexpr uint32_t NIBBLE = 0x0f0f0f0fu, PAIR = 0x03030303u, BIT = 0x01010101u;

__device__ __forceinline__ uint32_t word(const uint4 &x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// Half of a first operand: rows g of a block, and rows g + 8 with them.
struct Half {
    uint32_t low, both;
};
__device__ __forceinline__ Half half(uint32_t word, uint32_t mask) { return {word & mask, word & (mask | mask << 4)}; }

// Scores of 64 tokens: rows g of a group of 16 once, rows g + 8 sixteen times and rows g. Where the second operand of a
// product has zeros, its first one may hold anything.
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
    auto score = [&](int group, Half x, Half y) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) mma_signed(s.sum[n][group], x.low, x.both, y.low, y.both, b[n]);
    };
#pragma unroll
    for (int i = 1; i < N4; i += 2) {
        load(b, fragments);
        const uint4 x = wide[i * 32 - 32], y = wide[i * 32];
#pragma unroll
        for (int j = 0; j < GROUPS; j++) score(j, half(word(x, j), NIBBLE), half(word(y, j), NIBBLE));
    }
    wide += N4 * 32;
#pragma unroll
    for (int i = 1; i < N2; i += 2) {
        load(b, fragments);
        const uint4 x = wide[i / 2 * 32];
#pragma unroll
        for (int j = 0; j < GROUPS; j++) score(j, half(word(x, j), PAIR), half(word(x, j), PAIR << 2));
    }
    wide += N2 / 2 * 32;
#pragma unroll
    for (int i = 0; i < N1 / 4; i++) {
        const uint4 x = wide[i * 32];
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            load(b, fragments);
#pragma unroll
            for (int j = 0; j < GROUPS; j++) score(j, half(word(x, j), BIT << k), half(word(x, j), BIT << (k + 1)));
        }
    }
    const uint8_t *rest = tile + (N4 + N2 / 2 + N1 / 4) * 512;
    const uint2 odd2 = ODD2 ? *((const uint2 *)rest + lane) : make_uint2(0, 0);
    uint32_t odd1[3];
#pragma unroll
    for (int i = 0; i < ODD1; i++) odd1[i] = *((const uint32_t *)(rest + ODD2 * 256 + i * 128) + lane);
    auto left = [&](int i, int j) {
        if (i < ODD4) return half(word(odd4, j), NIBBLE);
        if (i < ODD4 + ODD2) return half((j < 2 ? odd2.x : odd2.y) >> j % 2 * 2, PAIR);
        return half(odd1[i - ODD4 - ODD2] >> j, BIT);
    };
#pragma unroll
    for (int i = 0; i < ODD; i += 2) {
        load(b, fragments);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            const Half x = left(i, j);
            score(j, x, i + 1 < ODD ? left(i + 1, j) : x);
        }
    }
}

// Weighted sums of values by block: coordinates g once, coordinates g + 8 sixteen times and coordinates g.
struct Sums {
    int sum[ROW_TILES][VALUE_BLOCKS][4];
};
typedef uint32_t Weights[ROW_TILES][GROUPS];

template <int N4, int N2, int N1>
__device__ __forceinline__ void mix_tile(Sums &o, const uint8_t *tile, const Weights &p, int lane) {
    auto mix = [&](int block, int pair, Half x, Half y) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
            mma_unsigned(o.sum[n][block], x.low, x.both, y.low, y.both, p[n][2 * pair], p[n][2 * pair + 1]);
    };
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
                if (i + k < N4)
                    mix(i + k, pair, half(word(x[k], 2 * pair), NIBBLE), half(word(x[k], 2 * pair + 1), NIBBLE));
    }
    wide += N4 * 32;
#pragma unroll
    for (int i = 1; i < N2; i += 2) {
        const uint4 x = wide[i / 2 * 32];
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const uint32_t y = word(x, 2 * pair), z = word(x, 2 * pair + 1);
            mix(N4 + i - 1, pair, half(y, PAIR), half(z, PAIR));
            mix(N4 + i, pair, half(y, PAIR << 2), half(z, PAIR << 2));
        }
    }
    wide += N2 / 2 * 32;
    const uint8_t *rest = tile + (N4 + N2 / 2 + N1 / 4) * 512;
    if (N2 % 2) {
        const uint2 x = *((const uint2 *)rest + lane);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const uint32_t y = pair ? x.y : x.x;
            mix(N4 + N2 - 1, pair, half(y, PAIR), half(y >> 2, PAIR));
        }
        rest += 256;
    }
#pragma unroll
    for (int i = 0; i < N1 / 4; i++) {
        const uint4 x = wide[i * 32];
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                mix(N4 + N2 + 4 * i + k, pair, half(word(x, 2 * pair), BIT << k),
                    half(word(x, 2 * pair + 1), BIT << k));
    }
    uint32_t x[3];
#pragma unroll
    for (int i = 0; i < N1 % 4; i++) x[i] = *((const uint32_t *)(rest + i * 128) + lane);
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int i = 0; i < N1 % 4; i++)
            mix(N4 + N2 + N1 / 4 * 4 + i, pair, half(x[i] >> 2 * pair, BIT), half(x[i] >> (2 * pair + 1), BIT));
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

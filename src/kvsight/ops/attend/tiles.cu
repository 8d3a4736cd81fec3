// Decode attention on tiles: softmax(q kT) v for one KV head's query rows, straight on the codes.
//
// A block of threads reads one split of one sequence's KV head. Each warp streams tiles of 64 tokens through a
// ring of its own in shared memory; a lane reads back only the bytes that it copied itself, so the loop has no
// barrier. Codes are the first operand of 8-bit integer products as they lie (src/kvsight/tiling.py). Queries
// and weights are 16-bit fixed point, split into two bytes: four rows fill the eight columns of a product.
// All of a plan's scales are folded into the query before the loop and into the output after it.
//
// Compiled at run time with these macros:
//   HEAD_DIM          d
//   KEY_BLOCKS        most blocks of any head's keys;  VALUE_BLOCKS  of its values
//   ROW_TILES         query rows of a KV head in fours
//   WARPS, RING       warps of a block, and bytes of shared memory that each of them streams through
//   BLOCKS            blocks of threads that should fit one multiprocessor
//   NUMBER            0 bf16, 1 fp16, 2 fp32: type of queries, exact tokens and output

#ifndef EMULATED
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void mma_signed(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void mma_unsigned(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
template <int BYTES> __device__ __forceinline__ void copy_async(void *to, const void *from) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ float from_bits(uint16_t bits) {
#if NUMBER == 0
    return __uint_as_float((uint32_t)bits << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
#endif
}
__device__ __forceinline__ uint16_t to_bits(float x) {
    uint16_t y;
#if NUMBER == 0
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}
#endif

#if NUMBER == 2
typedef float Number;
__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float rounded(float x) { return x; }
#else
typedef uint16_t Number;
__device__ __forceinline__ float number(uint16_t x) { return from_bits(x); }
__device__ __forceinline__ uint16_t rounded(float x) { return to_bits(x); }
#endif

constexpr int LANES = 32, TOKENS = 64, GROUPS = 4, THREADS = WARPS * LANES;
constexpr int ROWS = 4 * ROW_TILES;
constexpr int KEYS = KEY_BLOCKS * 16, VALUES = VALUE_BLOCKS * 16;
constexpr int PER_LANE = (HEAD_DIM + LANES - 1) / LANES;
constexpr int MOST_STAGES = 8;
constexpr float NOTHING = -1e30f;
// 16-bit fixed point of the query; with more than 256 columns an int32 sum would not hold it
constexpr float QUERY_RANGE = KEYS > 256 ? 32500.f * 256 / KEYS : 32500.f;
// weights are kept below 2^16; a new reference puts the greatest at 2^13
constexpr float HEADROOM = 15.98f, TARGET = 13.f;

// One KV head. Counts of blocks are of 4, 2 and 1 bits; tiles of a sequence lie one after another.
struct Head {
    const uint8_t *keys, *values;
    long long key_batch, value_batch;  // bytes from one sequence to the next
    int key4, key2, key1;
    int value4, value2, value1;
};
// What one block of threads does: split `split` of `coded` of a head's coded tokens, or, where split == coded,
// its exact ones. `slot` is where the head's first partial result lies.
struct Item {
    int head, split, coded, slot;
};
// Visible tokens of one query token: exact first ones, coded ones, exact last ones; each from, to. Later queries
// see from and to no less.
struct Range {
    int first0, first1, coded0, coded1, last0, last1;
};
struct Arguments {
    const Number *query;         // [B, heads, rows, HEAD_DIM]
    const Head *heads;           // [heads]
    const float *fold;           // [heads, HEAD_DIM, KEYS]: a query's factor of every column, in log2 units
    const float *fold_shift;     // [heads, HEAD_DIM]: what codes of zero score
    const float *unfold;         // [heads, VALUES, HEAD_DIM]
    const float *unfold_shift;   // [heads, HEAD_DIM]: what codes of zero weigh
    const Item *items;           // [items]
    const Range *ranges;         // [B, queries], or null: all tokens up to a query's own are visible
    const int *seen;             // [1] where there are no ranges: tokens of a sequence, the queries' own included
    const Number *first_keys, *first_values;  // [B, heads, first, HEAD_DIM]
    const Number *last_keys, *last_values;    // [B, heads, last, HEAD_DIM]
    const float *sink_logits;    // [heads, rows / queries] or null
    Number *out;                 // [B, queries, heads · rows / queries, HEAD_DIM]
    float *partial;              // [B, items, ROWS, WIDTH]
    float2 *masses;              // [B, items, ROWS]: reference, sum
    unsigned *done;              // [B, heads], zero
    float scaling, softcap;      // of natural scores; softcap 0 is none
    int head_count, item_count, rows, queries, first, last;
    int after;                   // newer query tokens than this launch has
};
constexpr int WIDTH = VALUES > HEAD_DIM ? VALUES : HEAD_DIM;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ Range visible(const Arguments &a, int sequence, int query) {
    if (a.ranges) return a.ranges[sequence * a.queries + query];
    const int total = *a.seen, coded = total - a.first - a.last;
    const int upto = total - a.after - (a.queries - 1 - query);
    return {0, min(upto, a.first), 0, max(0, min(upto - a.first, coded)), 0, max(0, upto - a.first - coded)};
}

__device__ __forceinline__ int key_words(const Head &h) { return 4 * h.key4 + 2 * h.key2 + h.key1; }
__device__ __forceinline__ int value_words(const Head &h) { return 4 * h.value4 + 2 * h.value2 + h.value1; }

// Copy a tile of `words` words a lane; left-over blocks lie behind the whole 16-byte groups.
__device__ __forceinline__ void copy_tile(uint8_t *to, const uint8_t *from, int n4, int n2, int n1, int lane) {
    int groups = n4 + n2 / 2 + n1 / 4;
    for (int i = 0; i < groups; i++) copy_async<16>(to + i * 512 + lane * 16, from + i * 512 + lane * 16);
    to += groups * 512, from += groups * 512;
    if (n2 & 1) {
        copy_async<8>(to + lane * 8, from + lane * 8);
        to += 256, from += 256;
    }
    for (int i = 0; i < (n1 & 3); i++) copy_async<4>(to + i * 128 + lane * 4, from + i * 128 + lane * 4);
}

__device__ __forceinline__ void wait_for_oldest(int stages) {
    switch (stages) {
        case 1: wait_all_but<0>(); break;
        case 2: wait_all_but<1>(); break;
        case 3: wait_all_but<2>(); break;
        case 4: wait_all_but<3>(); break;
        case 5: wait_all_but<4>(); break;
        case 6: wait_all_but<5>(); break;
        case 7: wait_all_but<6>(); break;
        default: wait_all_but<7>();
    }
}

// Which product and which of its halves a block of keys goes to.
__device__ __forceinline__ int half_of(int block, const Head &h) {
    if (block < h.key4) return block;
    int at = (h.key4 + 1) / 2, i = block - h.key4;
    if (i < h.key2) return i < (h.key2 & ~1) ? 2 * at + i : 2 * (at + h.key2 / 2);
    at += (h.key2 + 1) / 2, i -= h.key2;
    return i < (h.key1 & ~3) ? 2 * at + i : 2 * (at + (h.key1 & ~3) / 2 + (i & 3));
}

// Sixteen columns of x @ m for all rows, by one warp: x [ROWS, n] in shared memory, m [n, stride] from its first
// column. Eight lanes share a column, so that many loads are under way; lane 4p + c ends with columns 4c to 4c + 3.
__device__ __forceinline__ void multiply(float (*sum)[4], const float *x, int x_stride, const float *m, int n,
                                         int stride, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[r][e] = 0.f;
#pragma unroll 8
    for (int j = lane / 4; j < n; j += 8) {
        const float4 f = *(const float4 *)(m + (long long)j * stride + lane % 4 * 4);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float y = x[r * x_stride + j];
            sum[r][0] = fmaf(y, f.x, sum[r][0]), sum[r][1] = fmaf(y, f.y, sum[r][1]);
            sum[r][2] = fmaf(y, f.z, sum[r][2]), sum[r][3] = fmaf(y, f.w, sum[r][3]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int step = 4; step < LANES; step *= 2) sum[r][e] += __shfl_xor_sync(~0u, sum[r][e], step);
}

// The query in the coordinates of the codes, as second operands in shared memory, and a scale for each row.
__device__ void fold_query(const Arguments &a, const Head &h, int head, const Number *query, float *work,
                           uint32_t *fragments, float *scale, float *offset) {
    float *raw = work, *folded = work + ROWS * HEAD_DIM;
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS)
        raw[i] = i < a.rows * HEAD_DIM ? number(query[i]) : 0.f;
    __syncthreads();
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int blocks = h.key4 + h.key2 + h.key1, columns = 16 * blocks;
    const float *fold = a.fold + (long long)head * HEAD_DIM * KEYS;
    for (int b = warp; b < blocks; b += WARPS) {
        float sum[ROWS][4];
        multiply(sum, raw, HEAD_DIM, fold + 16 * b, HEAD_DIM, KEYS, lane);
        if (lane < 4)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int e = 0; e < 4; e++) folded[r * KEYS + 16 * b + 4 * lane + e] = sum[r][e];
    }
    __syncthreads();
    for (int r = warp; r < ROWS; r += WARPS) {
        float most = 0.f, shift = 0.f;
        for (int i = lane; i < columns; i += LANES) most = fmaxf(most, fabsf(folded[r * KEYS + i]));
        for (int j = lane; j < HEAD_DIM; j += LANES)
            shift = fmaf(raw[r * HEAD_DIM + j], a.fold_shift[head * HEAD_DIM + j], shift);
#pragma unroll
        for (int step = 16; step; step /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            shift += __shfl_xor_sync(~0u, shift, step);
        }
        if (lane == 0) scale[r] = most / QUERY_RANGE, offset[r] = shift;
    }
    __syncthreads();
    // a word holds four columns of one row's high or low bytes
    for (int i = threadIdx.x; i < columns / 4 * ROWS * 2; i += THREADS) {
        int part = i & 1, r = i / 2 % ROWS, quad = i / (2 * ROWS);
        int block = quad / 4, t = quad % 4, half = half_of(block, h);
        float inverse = scale[r] > 0.f ? 1.f / scale[r] : 0.f;
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int x = __float2int_rn(folded[r * KEYS + 4 * quad + e] * inverse);
            int high = (x + 128) >> 8;
            word |= (uint32_t)((part ? x - 256 * high : high) & 255) << 8 * e;
        }
        int lane_of = 4 * (2 * (r & 3) + part) + t;
        fragments[(((half / 2) * ROW_TILES + r / 4) * LANES + lane_of) * 2 + (half & 1)] = word;
    }
    __syncthreads();
}

struct Scores {
    int sum[ROW_TILES][GROUPS][4];
};

__device__ __forceinline__ void score(Scores &s, int group, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                      const uint2 *b) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) mma_signed(s.sum[n][group], a0, a1, a2, a3, b[n]);
}

__device__ __forceinline__ const uint2 *load(uint2 *b, const uint2 *fragments, int product, int lane) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) b[n] = fragments[(product * ROW_TILES + n) * LANES + lane];
    return b;
}

// Scores of 64 tokens: rows g of a group of 16 once, rows g + 8 sixteen times.
__device__ __forceinline__ void score_tile(Scores &s, const uint8_t *tile, const Head &h, const uint2 *fragments,
                                           int lane) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int j = 0; j < GROUPS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s.sum[n][j][e] = 0;
    const uint4 *wide = (const uint4 *)tile + lane;
    uint2 b[ROW_TILES];
    int product = 0;
    for (int i = 0; i < h.key4; i += 2, product++, wide += 64) {
        load(b, fragments, product, lane);
        uint4 x = wide[0];
        uint4 y = i + 1 < h.key4 ? wide[32] : uint4{0, 0, 0, 0};
        score(s, 0, x.x & 0x0f0f0f0fu, x.x & 0xf0f0f0f0u, y.x & 0x0f0f0f0fu, y.x & 0xf0f0f0f0u, b);
        score(s, 1, x.y & 0x0f0f0f0fu, x.y & 0xf0f0f0f0u, y.y & 0x0f0f0f0fu, y.y & 0xf0f0f0f0u, b);
        score(s, 2, x.z & 0x0f0f0f0fu, x.z & 0xf0f0f0f0u, y.z & 0x0f0f0f0fu, y.z & 0xf0f0f0f0u, b);
        score(s, 3, x.w & 0x0f0f0f0fu, x.w & 0xf0f0f0f0u, y.w & 0x0f0f0f0fu, y.w & 0xf0f0f0f0u, b);
    }
    wide = (const uint4 *)tile + h.key4 * 32 + lane;
    for (int i = 0; i < h.key2 / 2; i++, product++, wide += 32) {
        load(b, fragments, product, lane);
        uint4 x = *wide;
        score(s, 0, x.x & 0x03030303u, x.x & 0x30303030u, x.x & 0x0c0c0c0cu, x.x & 0xc0c0c0c0u, b);
        score(s, 1, x.y & 0x03030303u, x.y & 0x30303030u, x.y & 0x0c0c0c0cu, x.y & 0xc0c0c0c0u, b);
        score(s, 2, x.z & 0x03030303u, x.z & 0x30303030u, x.z & 0x0c0c0c0cu, x.z & 0xc0c0c0c0u, b);
        score(s, 3, x.w & 0x03030303u, x.w & 0x30303030u, x.w & 0x0c0c0c0cu, x.w & 0xc0c0c0c0u, b);
    }
    const uint8_t *rest = tile + (h.key4 + h.key2 / 2 + h.key1 / 4) * 512;
    if (h.key2 & 1) {
        load(b, fragments, product++, lane);
        uint2 x = *((const uint2 *)rest + lane);
        rest += 256;
        score(s, 0, x.x & 0x03030303u, x.x & 0x30303030u, 0, 0, b);
        score(s, 1, x.x >> 2 & 0x03030303u, x.x >> 2 & 0x30303030u, 0, 0, b);
        score(s, 2, x.y & 0x03030303u, x.y & 0x30303030u, 0, 0, b);
        score(s, 3, x.y >> 2 & 0x03030303u, x.y >> 2 & 0x30303030u, 0, 0, b);
    }
    for (int i = 0; i < h.key1 / 4; i++, wide += 32) {
        uint4 x = *wide;
        load(b, fragments, product++, lane);
        score(s, 0, x.x & 0x01010101u, x.x & 0x10101010u, x.x & 0x02020202u, x.x & 0x20202020u, b);
        score(s, 1, x.y & 0x01010101u, x.y & 0x10101010u, x.y & 0x02020202u, x.y & 0x20202020u, b);
        score(s, 2, x.z & 0x01010101u, x.z & 0x10101010u, x.z & 0x02020202u, x.z & 0x20202020u, b);
        score(s, 3, x.w & 0x01010101u, x.w & 0x10101010u, x.w & 0x02020202u, x.w & 0x20202020u, b);
        load(b, fragments, product++, lane);
        score(s, 0, x.x & 0x04040404u, x.x & 0x40404040u, x.x & 0x08080808u, x.x & 0x80808080u, b);
        score(s, 1, x.y & 0x04040404u, x.y & 0x40404040u, x.y & 0x08080808u, x.y & 0x80808080u, b);
        score(s, 2, x.z & 0x04040404u, x.z & 0x40404040u, x.z & 0x08080808u, x.z & 0x80808080u, b);
        score(s, 3, x.w & 0x04040404u, x.w & 0x40404040u, x.w & 0x08080808u, x.w & 0x80808080u, b);
    }
    for (int i = 0; i < (h.key1 & 3); i++) {
        load(b, fragments, product++, lane);
        uint32_t x = *((const uint32_t *)(rest + i * 128) + lane);
        score(s, 0, x & 0x01010101u, x & 0x10101010u, 0, 0, b);
        score(s, 1, x >> 1 & 0x01010101u, x >> 1 & 0x10101010u, 0, 0, b);
        score(s, 2, x >> 2 & 0x01010101u, x >> 2 & 0x10101010u, 0, 0, b);
        score(s, 3, x >> 3 & 0x01010101u, x >> 3 & 0x10101010u, 0, 0, b);
    }
}

struct Sums {
    int sum[ROW_TILES][VALUE_BLOCKS][4];
};

__device__ __forceinline__ void mix(Sums &o, int block, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    const uint32_t (*p)[GROUPS], int pair) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
        mma_unsigned(o.sum[n][block], a0, a1, a2, a3, p[n][2 * pair], p[n][2 * pair + 1]);
}

// Blocks of 4 bits add to the first sums, of 2 bits to the last ones backwards, of 1 bit behind the first:
// registers must be named at compile time.
__device__ __forceinline__ void mix_tile(Sums &o, const uint8_t *tile, const Head &h, const uint32_t (*p)[GROUPS],
                                         int lane) {
    const uint4 *wide = (const uint4 *)tile + lane;
#pragma unroll
    for (int i = 0; i < VALUE_BLOCKS; i++)
        if (i < h.value4) {
            uint4 x = wide[i * 32];
            mix(o, i, x.x & 0x0f0f0f0fu, x.x & 0xf0f0f0f0u, x.y & 0x0f0f0f0fu, x.y & 0xf0f0f0f0u, p, 0);
            mix(o, i, x.z & 0x0f0f0f0fu, x.z & 0xf0f0f0f0u, x.w & 0x0f0f0f0fu, x.w & 0xf0f0f0f0u, p, 1);
        }
    wide += h.value4 * 32;
    const uint8_t *rest = tile + (h.value4 + h.value2 / 2 + h.value1 / 4) * 512;
#pragma unroll
    for (int i = 0; i < VALUE_BLOCKS; i += 2) {
        const int last = VALUE_BLOCKS - 1 - i;
        if (i + 1 < VALUE_BLOCKS && i + 1 < h.value2) {
            const int before = last > 0 ? last - 1 : 0;
            uint4 x = wide[i * 16];
            mix(o, last, x.x & 0x03030303u, x.x & 0x30303030u, x.y & 0x03030303u, x.y & 0x30303030u, p, 0);
            mix(o, before, x.x & 0x0c0c0c0cu, x.x & 0xc0c0c0c0u, x.y & 0x0c0c0c0cu, x.y & 0xc0c0c0c0u, p, 0);
            mix(o, last, x.z & 0x03030303u, x.z & 0x30303030u, x.w & 0x03030303u, x.w & 0x30303030u, p, 1);
            mix(o, before, x.z & 0x0c0c0c0cu, x.z & 0xc0c0c0c0u, x.w & 0x0c0c0c0cu, x.w & 0xc0c0c0c0u, p, 1);
        } else if (i + 1 == h.value2) {
            uint2 x = *((const uint2 *)rest + lane);
            mix(o, last, x.x & 0x03030303u, x.x & 0x30303030u, x.x >> 2 & 0x03030303u, x.x >> 2 & 0x30303030u, p, 0);
            mix(o, last, x.y & 0x03030303u, x.y & 0x30303030u, x.y >> 2 & 0x03030303u, x.y >> 2 & 0x30303030u, p, 1);
        }
    }
    if (h.value1 == 0) return;
    wide += h.value2 / 2 * 32;
    rest += (h.value2 & 1) * 256;
#pragma unroll
    for (int b = 0; b < VALUE_BLOCKS; b++) {
        int i = b - h.value4;
        if (i < 0 || i >= h.value1) continue;
        if (i < (h.value1 & ~3)) {
            uint4 x = wide[i / 4 * 32];
            uint32_t a = 0x01010101u << (i & 3), c = a << 4;
            mix(o, b, x.x & a, x.x & c, x.y & a, x.y & c, p, 0);
            mix(o, b, x.z & a, x.z & c, x.w & a, x.w & c, p, 1);
        } else {
            uint32_t x = *((const uint32_t *)(rest + (i & 3) * 128) + lane);
            mix(o, b, x & 0x01010101u, x & 0x10101010u, x >> 1 & 0x01010101u, x >> 1 & 0x10101010u, p, 0);
            mix(o, b, x >> 2 & 0x01010101u, x >> 2 & 0x10101010u, x >> 3 & 0x01010101u, x >> 3 & 0x10101010u, p, 1);
        }
    }
}

// Where the sums of `mix_tile` belong in the order of blocks, or -1.
__device__ __forceinline__ int block_of(int at, const Head &h) {
    if (at < h.value4) return at;
    if (at < h.value4 + h.value1) return h.value2 + at;
    return VALUE_BLOCKS - 1 - at < h.value2 ? h.value4 + VALUE_BLOCKS - 1 - at : -1;
}

__device__ __forceinline__ float capped(float score, float cap) {
    // cap · tanh(score / cap), all in log2 units
    float e = exp2_fast(2.f * LOG2E * fabsf(score) / cap);
    return copysignf(cap * (1.f - 2.f / (e + 1.f)), score);
}

// Coded tokens of one split: weighted sums of codes [ROWS, VALUES] and masses, merged over the block's warps.
__device__ void attend_codes(const Arguments &a, int sequence, const Item &item, float *part, float2 *masses,
                             unsigned char *memory) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int head = item.head;
    const Head h = a.heads[head];
    int from = visible(a, sequence, 0).coded0, to = visible(a, sequence, a.queries - 1).coded1;
    const int tile0 = from / TOKENS, tiles = max(0, (to + TOKENS - 1) / TOKENS - tile0);
    const int begin = tile0 + (int)((long long)tiles * item.split / item.coded);
    const int end = tile0 + (int)((long long)tiles * (item.split + 1) / item.coded);
    const int key_bytes = 128 * key_words(h), value_bytes = 128 * value_words(h);
    const int stage_bytes = key_bytes + value_bytes;
    const int stages = max(1, min(MOST_STAGES, RING / max(stage_bytes, 1)));
    unsigned char *ring = memory + warp * RING;
    const int mine = max(0, (end - begin - warp + WARPS - 1) / WARPS);
    const uint8_t *keys = h.keys + sequence * h.key_batch + (long long)(begin + warp) * key_bytes;
    const uint8_t *values = h.values + sequence * h.value_batch + (long long)(begin + warp) * value_bytes;
    for (int n = 0; n < stages; n++) {
        if (n < mine) {
            uint8_t *to_stage = ring + n * stage_bytes;
            copy_tile(to_stage, keys + (long long)n * WARPS * key_bytes, h.key4, h.key2, h.key1, lane);
            copy_tile(to_stage + key_bytes, values + (long long)n * WARPS * value_bytes, h.value4, h.value2,
                      h.value1, lane);
        }
        commit();
    }

    // behind the rings: the folded query
    float *scale = (float *)(memory + WARPS * RING), *offset = scale + ROWS;
    uint32_t *fragments = (uint32_t *)(offset + ROWS);
    float *work = (float *)(fragments + (KEY_BLOCKS + 1) * ROW_TILES * LANES * 2);
    const Number *query = a.query + ((long long)sequence * a.head_count + head) * a.rows * HEAD_DIM;
    fold_query(a, h, head, query, work, fragments, scale, offset);

    float row_scale[ROW_TILES], row_offset[ROW_TILES], reference[ROW_TILES], mass[ROW_TILES];
    int row_from[ROW_TILES], row_to[ROW_TILES];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        int row = 4 * n + t;
        const Range range = visible(a, sequence, row < a.rows ? row % a.queries : 0);
        row_scale[n] = scale[row], row_offset[n] = offset[row];
        row_from[n] = range.coded0, row_to[n] = range.coded1;
        reference[n] = NOTHING, mass[n] = 0.f;
    }
    Sums o;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) o.sum[n][b][e] = 0;

    int stage = 0;
    for (int n = 0; n < mine; n++) {
        wait_for_oldest(stages);
        uint8_t *tile = ring + stage * stage_bytes;
        Scores s;
        score_tile(s, tile, h, (const uint2 *)fragments, lane);
        const int token = (begin + warp + n * WARPS) * TOKENS;
        uint32_t p[ROW_TILES][GROUPS];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            float x[GROUPS][2], most = -INF;
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                const int *c = s.sum[r][j];
                x[j][0] = fmaf((float)(c[0] * 256 + c[1]), row_scale[r], row_offset[r]);
                x[j][1] = fmaf((float)(c[2] * 256 + c[3]) * 0.0625f, row_scale[r], row_offset[r]);
            }
            if (a.softcap > 0.f)
#pragma unroll
                for (int j = 0; j < GROUPS; j++)
                    x[j][0] = capped(x[j][0], a.softcap * LOG2E), x[j][1] = capped(x[j][1], a.softcap * LOG2E);
            if (token < row_from[r] || token + TOKENS > row_to[r])
#pragma unroll
                for (int j = 0; j < GROUPS; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int at = token + 16 * j + 8 * i + g;
                        if (at < row_from[r] || at >= row_to[r]) x[j][i] = -INF;
                    }
#pragma unroll
            for (int j = 0; j < GROUPS; j++) most = fmaxf(most, fmaxf(x[j][0], x[j][1]));
            if (__any_sync(~0u, most - reference[r] > HEADROOM)) {
#pragma unroll
                for (int step = 4; step < LANES; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
                float next = most - reference[r] > HEADROOM ? most - TARGET : reference[r];
                float shrink = exp2_fast(reference[r] - next);
                reference[r] = next;
                mass[r] *= shrink;
#pragma unroll
                for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
                    for (int e = 0; e < 4; e += 2) {
                        float high = (float)o.sum[r][b][e] * shrink;
                        int whole = __float2int_rn(high);
                        o.sum[r][b][e] = whole;
                        o.sum[r][b][e + 1] =
                            __float2int_rn((float)o.sum[r][b][e + 1] * shrink + (high - (float)whole) * 256.f);
                    }
            }
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                // adding 2^23 leaves the rounded weight in the lowest two bytes
                float y0 = exp2_fast(x[j][0] - reference[r]) + 8388608.f;
                float y1 = exp2_fast(x[j][1] - reference[r]) + 8388608.f;
                mass[r] += (y0 - 8388608.f) + (y1 - 8388608.f);
                p[r][j] = transpose8x8(__byte_perm(__float_as_uint(y0), __float_as_uint(y1), 0x4051));
            }
        }
        mix_tile(o, tile + key_bytes, h, p, lane);
        if (n + stages < mine) {
            long long ahead = (long long)(n + stages) * WARPS;
            copy_tile(tile, keys + ahead * key_bytes, h.key4, h.key2, h.key1, lane);
            copy_tile(tile + key_bytes, values + ahead * value_bytes, h.value4, h.value2, h.value1, lane);
        }
        commit();
        stage = stage + 1 == stages ? 0 : stage + 1;
    }
    wait_all_but<0>();
    __syncthreads();

    // merge the warps; the rings are free now
    float *sums = (float *)memory;                 // [WARPS, ROWS, VALUES]
    float *warp_mass = work;        // [2, WARPS, ROWS]: masses, references
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int step = 4; step < LANES; step *= 2) mass[n] += __shfl_xor_sync(~0u, mass[n], step);
        if (g == 0) {
            warp_mass[warp * ROWS + 4 * n + t] = mass[n];
            warp_mass[(WARPS + warp) * ROWS + 4 * n + t] = reference[n];
        }
#pragma unroll
        for (int at = 0; at < VALUE_BLOCKS; at++) {
            int block = block_of(at, h);
            if (block < 0) continue;
            const int *c = o.sum[n][at];
            float *row = sums + ((long long)warp * ROWS + 4 * n + t) * VALUES + 16 * block + g;
            row[0] = (float)c[0] * 256.f + (float)c[1];
            row[8] = (float)c[2] * 256.f + (float)c[3];
        }
    }
    __syncthreads();
    const int columns = 16 * (h.value4 + h.value2 + h.value1);
    for (int i = threadIdx.x; i < ROWS * VALUES; i += THREADS) {
        int row = i / VALUES, column = i % VALUES;
        float top = NOTHING, total = 0.f, sum = 0.f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_mass[(WARPS + w) * ROWS + row]);
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2_fast(warp_mass[(WARPS + w) * ROWS + row] - top);
            total = fmaf(warp_mass[w * ROWS + row], weight, total);
            if (column < columns) sum = fmaf(sums[(w * ROWS + row) * VALUES + column], weight, sum);
        }
        part[row * WIDTH + column] = sum;
        if (column == 0) masses[row] = make_float2(top, total);
    }
}

// Exact tokens of all kinds: weighted sums [ROWS, HEAD_DIM] and masses.
__device__ void attend_exact(const Arguments &a, int sequence, int head, float *part, float2 *masses,
                             unsigned char *memory) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const long long owner = (long long)sequence * a.head_count + head;
    float *query = (float *)memory, *sums = query + ROWS * HEAD_DIM, *warp_mass = sums + WARPS * ROWS * HEAD_DIM;
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS)
        query[i] = i < a.rows * HEAD_DIM ? number(a.query[owner * a.rows * HEAD_DIM + i]) * a.scaling * LOG2E : 0.f;
    __syncthreads();
    float sum[ROWS][PER_LANE], reference[ROWS], mass[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        reference[r] = NOTHING, mass[r] = 0.f;
#pragma unroll
        for (int e = 0; e < PER_LANE; e++) sum[r][e] = 0.f;
    }
    for (int i = warp; i < a.first + a.last; i += WARPS) {
        const bool early = i < a.first;
        const int at = early ? i : i - a.first;
        const long long row = early ? (owner * a.first + at) * HEAD_DIM : (owner * a.last + at) * HEAD_DIM;
        const Number *key = (early ? a.first_keys : a.last_keys) + row;
        const Number *value = (early ? a.first_values : a.last_values) + row;
        float k[PER_LANE], v[PER_LANE];
#pragma unroll
        for (int e = 0; e < PER_LANE; e++) {
            int column = lane + e * LANES;
            k[e] = column < HEAD_DIM ? number(key[column]) : 0.f;
            v[e] = column < HEAD_DIM ? number(value[column]) : 0.f;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x = 0.f;
#pragma unroll
            for (int e = 0; e < PER_LANE; e++)
                if (lane + e * LANES < HEAD_DIM) x = fmaf(k[e], query[r * HEAD_DIM + lane + e * LANES], x);
#pragma unroll
            for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
            if (a.softcap > 0.f) x = capped(x, a.softcap * LOG2E);
            const Range range = visible(a, sequence, r < a.rows ? r % a.queries : 0);
            const bool seen = early ? at >= range.first0 && at < range.first1 : at >= range.last0 && at < range.last1;
            if (!seen) continue;
            float next = fmaxf(reference[r], x), shrink = exp2_fast(reference[r] - next), p = exp2_fast(x - next);
            reference[r] = next;
            mass[r] = fmaf(mass[r], shrink, p);
#pragma unroll
            for (int e = 0; e < PER_LANE; e++) sum[r][e] = fmaf(sum[r][e], shrink, p * v[e]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int e = 0; e < PER_LANE; e++)
            if (lane + e * LANES < HEAD_DIM) sums[(warp * ROWS + r) * HEAD_DIM + lane + e * LANES] = sum[r][e];
        if (lane == 0) warp_mass[warp * ROWS + r] = mass[r], warp_mass[(WARPS + warp) * ROWS + r] = reference[r];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS) {
        int row = i / HEAD_DIM, column = i % HEAD_DIM;
        float top = NOTHING, total = 0.f, all = 0.f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_mass[(WARPS + w) * ROWS + row]);
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2_fast(warp_mass[(WARPS + w) * ROWS + row] - top);
            total = fmaf(warp_mass[w * ROWS + row], weight, total);
            all = fmaf(sums[(w * ROWS + row) * HEAD_DIM + column], weight, all);
        }
        part[row * WIDTH + column] = all;
        if (column == 0) masses[row] = make_float2(top, total);
    }
}

// The last block of a KV head adds up all splits and maps the sums of codes to head_dim.
__device__ void merge_splits(const Arguments &a, int sequence, const Item &item, int splits, float *memory) {
    const int head = item.head, coded = item.coded;
    const long long slot = (long long)sequence * a.item_count + item.slot;
    const float2 *masses = a.masses + slot * ROWS;
    const float *parts = a.partial + slot * ROWS * WIDTH;
    const Head h = a.heads[head];
    const int columns = 16 * (h.value4 + h.value2 + h.value1), group = a.rows / a.queries;
    float *sums = memory, *weights = sums + ROWS * VALUES, *share = weights + splits * ROWS;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (int row = warp; row < ROWS; row += WARPS) {
        const bool real = row < a.rows, has_sink = real && a.sink_logits;
        const float sink = has_sink ? a.sink_logits[head * group + row / a.queries] * LOG2E : NOTHING;
        float top = sink, total = 0.f, codes = 0.f;
        for (int s = lane; s < splits; s += LANES) top = fmaxf(top, __ldcg(&masses[s * ROWS + row]).x);
#pragma unroll
        for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        for (int s = lane; s < splits; s += LANES) {
            const float2 m = __ldcg(&masses[s * ROWS + row]);
            const float weight = exp2_fast(m.x - top);
            weights[s * ROWS + row] = weight;
            total = fmaf(m.y, weight, total);
            if (s < coded) codes = fmaf(m.y, weight, codes);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) {
            total += __shfl_xor_sync(~0u, total, step);
            codes += __shfl_xor_sync(~0u, codes, step);
        }
        if (has_sink) total += exp2_fast(sink - top);
        const float inverse = total > 0.f && real ? 1.f / total : 0.f;
        for (int s = lane; s < splits; s += LANES) weights[s * ROWS + row] *= inverse;
        if (lane == 0) share[row] = codes * inverse;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * columns / 4; i += THREADS) {
        const int row = i / (columns / 4), column = i % (columns / 4) * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (int s = 0; s < coded; s++) {
            const float4 x = __ldcg((const float4 *)&parts[((long long)s * ROWS + row) * WIDTH + column]);
            const float weight = weights[s * ROWS + row];
            sum.x = fmaf(x.x, weight, sum.x), sum.y = fmaf(x.y, weight, sum.y);
            sum.z = fmaf(x.z, weight, sum.z), sum.w = fmaf(x.w, weight, sum.w);
        }
        *(float4 *)&sums[row * VALUES + column] = sum;
    }
    __syncthreads();
    const float *unfold = a.unfold + (long long)head * VALUES * HEAD_DIM;
    for (int b = warp; b < HEAD_DIM / 16; b += WARPS) {
        float sum[ROWS][4];
        multiply(sum, sums, VALUES, unfold + 16 * b, columns, HEAD_DIM, lane);
        if (lane >= 4) continue;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (row >= a.rows) break;
            const long long query_head = head * group + row / a.queries;
            const long long token = (long long)sequence * a.queries + row % a.queries;
            Number *out = a.out + (token * a.head_count * group + query_head) * HEAD_DIM;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int column = 16 * b + 4 * lane + e;
                float y = fmaf(share[row], a.unfold_shift[head * HEAD_DIM + column], sum[row][e]);
                for (int s = coded; s < splits; s++)
                    y = fmaf(__ldcg(&parts[((long long)s * ROWS + row) * WIDTH + column]),
                             weights[s * ROWS + row], y);
                out[column] = rounded(y);
            }
        }
    }
}

__device__ void attend_block(const Arguments &a, unsigned char *memory) {
    const int sequence = blockIdx.y;
    const Item item = a.items[blockIdx.x];
    const int splits = item.coded + (a.first + a.last > 0);
    const long long slot = (long long)sequence * a.item_count + item.slot + item.split;
    float *part = a.partial + slot * ROWS * WIDTH;
    float2 *masses = a.masses + slot * ROWS;
    if (item.split < item.coded)
        attend_codes(a, sequence, item, part, masses, memory);
    else
        attend_exact(a, sequence, item.head, part, masses, memory);
    __threadfence();
    __syncthreads();
    unsigned *last = (unsigned *)memory, *done = a.done + (long long)sequence * a.head_count + item.head;
    if (threadIdx.x == 0) {
        *last = atomicAdd(done, 1u) + 1 == (unsigned)splits;
        if (*last) *done = 0;
    }
    __syncthreads();
    const bool merges = *last;
    __threadfence();
    __syncthreads();
    if (merges) merge_splits(a, sequence, item, splits, (float *)memory);
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_tiles(const Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    attend_block(a, memory);
}
#endif

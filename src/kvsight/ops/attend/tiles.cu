// Decode attention on tiles: softmax(q kT) v for one KV head's query rows, straight on the codes.
//
// A block of threads works through its items (tiles.cuh), parts of heads of equal cost. Each warp streams tiles of
// 64 tokens through a ring of its own in shared memory, keys and values apart, filled by bulk copies. Codes are the
// first operand of 8-bit integer products as they lie (src/kvsight/tiling.py). Queries and weights are 16-bit
// fixed point, split into two bytes: four rows fill the eight columns of a product. All of a plan's scales are
// folded into the query before the loop (fold.cu) and into the output after it.

#ifndef EMULATED
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void mma_signed(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint2 b) {
    asm(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void mma_unsigned(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint64_t *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// what ordinary stores left in shared memory may be overwritten by bulk copies from here on
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wait_for_fold() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#endif

constexpr int PER_LANE = (HEAD_DIM + LANES - 1) / LANES;
constexpr int MOST_STAGES = 8;
// rows of sums of warps lie so that lanes write to banks of their own
constexpr int SPREAD = VALUES + 8;
// partial results that are read at once
constexpr int MERGED = 8;
// weights are kept below 2^16; a new reference puts the greatest at 2^13
constexpr float HEADROOM = 15.98f, TARGET = 13.f;

__device__ __forceinline__ int key_words(const Head &h) { return 4 * h.key4 + 2 * h.key2 + h.key1; }
__device__ __forceinline__ int value_words(const Head &h) { return 4 * h.value4 + 2 * h.value2 + h.value1; }

// A slot of a ring: where it lies, and the barrier that its copies complete on.
__device__ __forceinline__ void fill(void *slot, const uint8_t *from, int bytes, uint64_t *barrier) {
    barrier_expect(barrier, bytes);
    if (bytes) copy_bulk(slot, from, bytes, barrier);
}

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
    const uint4 *wide = (const uint4 *)tile + lane;
    uint2 b[ROW_TILES];
#pragma unroll
    for (int i = 0; i < N4; i += 2) {
        load(b, fragments);
        const uint4 x = wide[i * 32], y = i + 1 < N4 ? wide[i * 32 + 32] : x;
        // rows g + 8 get both nibbles: what the low one adds is in rows g, too
#pragma unroll
        for (int j = 0; j < GROUPS; j++) score(s, j, word(x, j) & NIBBLE, word(x, j), word(y, j) & NIBBLE, word(y, j), b);
    }
    if (N4 > 0)
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
    const uint8_t *rest = tile + (N4 + N2 / 2 + N1 / 4) * 512;
    if (N2 % 2) {
        load(b, fragments);
        const uint2 x = *((const uint2 *)rest + lane);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            const uint32_t y = (j < 2 ? x.x : x.y) >> j % 2 * 2;
            score(s, j, y & PAIR, y & PAIR << 4, y, y, b);
        }
        rest += 256;
    }
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
#pragma unroll
    for (int i = 0; i < N1 % 4; i++) {
        load(b, fragments);
        const uint32_t x = *((const uint32_t *)(rest + i * 128) + lane);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) score(s, j, x >> j & BIT, x >> j & BIT << 4, x, x, b);
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

// A block's sums to a row, from column g.
__device__ __forceinline__ void store_sums(float *row, const int *c, bool both) {
    row[0] = (float)c[0] * 256.f + (float)c[1];
    row[8] = both ? (float)(c[2] - c[0]) * 256.f + (float)(c[3] - c[1]) : (float)c[2] * 256.f + (float)c[3];
}

__device__ __forceinline__ float capped(float score, float cap) {
    // cap · tanh(score / cap), all in log2 units
    float e = exp2_fast(2.f * LOG2E * fabsf(score) / cap);
    return copysignf(cap * (1.f - 2.f / (e + 1.f)), score);
}

// What a warp has in shared memory, and what all of a block's share, but for `all`: the rings, which merges use, too.
struct Memory {
    unsigned char *all, *ring;
    uint64_t *barriers;        // of the warp: MOST_STAGES for keys, as many for values
    uint32_t *folded;          // [2, FOLDED]: of this item and of the next
    float *work;               // [2, WARPS, ROWS]
    Item *items;               // [3]: this one and the next two
    uint64_t *folded_barriers; // [2]
    const uint8_t **tiles;     // [2]: where the sequence's keys and values begin, for the warp's first lane
    int total;                 // as in `visible`
};

__device__ __forceinline__ const Item &item_at(const Memory &m, int n) { return m.items[n % 3]; }
// Item n to shared memory, by the block's first threads.
__device__ __forceinline__ void fetch_item(const Arguments &a, const Memory &m, int n) {
    constexpr int PARTS = sizeof(Item) / 16;
    if (n >= a.item_count || threadIdx.x >= PARTS) return;
    const int4 *from = (const int4 *)(a.items + (long long)blockIdx.x * a.item_count + n);
    ((int4 *)&m.items[n % 3])[threadIdx.x] = from[threadIdx.x];
}
// The folded query of item n, once the kernel ahead has ended.
__device__ __forceinline__ void fetch_query(const Arguments &a, const Memory &m, int n) {
    const Item &item = item_at(m, n);
    const long long owner = (long long)item.sequence * a.head_count + item.head;
    fill(m.folded + n % 2 * FOLDED, (const uint8_t *)(a.folded + owner * FOLDED), 4 * FOLDED,
         m.folded_barriers + n % 2);
}

// Bring a part of the matrix that a head's last block will need closer.
__device__ __forceinline__ void prefetch_unfold(const Arguments &a, const Item &item) {
    const int bytes = 4 * 16 * (item.h.value4 + item.h.value2 + item.h.value1) * HEAD_DIM;
    const char *matrix = (const char *)(a.unfold + (long long)item.head * VALUES * HEAD_DIM);
    for (int i = 128 * (threadIdx.x + THREADS * item.split); i < bytes; i += 128 * THREADS * item.coded)
        prefetch(matrix + i);
}

// What all items begin with, after a warp's first tiles are under way. Returns the item's folded query.
__device__ __forceinline__ const uint32_t *begin_item(const Arguments &a, const Memory &m, int n) {
    if (threadIdx.x == 0) {
        if (n == 0) wait_for_fold(), fetch_query(a, m, 0);
        if (n + 1 < a.item_count && item_at(m, n + 1).head >= 0) fetch_query(a, m, n + 1);
    }
    fetch_item(a, m, n + 2);
    prefetch_unfold(a, item_at(m, n));
    barrier_wait(m.folded_barriers + n % 2, n / 2 & 1);
    return m.folded + n % 2 * FOLDED;
}

// Coded tokens of one item: weighted sums of codes [ROWS, VALUES] and masses, merged over the block's warps.
// `phases` are the parities that the warp's barriers complete with next.
__device__ void attend_codes(const Arguments &a, int place, float *part, float2 *masses, const Memory &m,
                             uint32_t &phases) {
    const Item &item = item_at(m, place);
    const Head &h = item.h;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int sequence = item.sequence;
    const int from = visible(a, m.total, sequence, 0).coded0;
    const int to = visible(a, m.total, sequence, a.queries - 1).coded1;
    const int tile0 = from / TOKENS, tiles = max(0, (to + TOKENS - 1) / TOKENS - tile0);
    const int begin = tile0 + (int)((long long)tiles * item.from >> 20);
    const int end = tile0 + (int)((long long)tiles * item.to >> 20);
    const int key_bytes = 128 * key_words(h), value_bytes = 128 * value_words(h);
    const int stage_bytes = key_bytes + value_bytes;
    const int stages = max(1, min(MOST_STAGES, RING / max(stage_bytes, 1)));
    const int mine = max(0, (end - begin - warp + WARPS - 1) / WARPS);
    if (lane == 0) {
        const uint8_t *keys = h.keys + sequence * h.key_batch, *values = h.values + sequence * h.value_batch;
        m.tiles[0] = keys, m.tiles[1] = values;
#pragma unroll 1
        for (int n = 0; n < min(stages, mine); n++) {
            const long long tile = begin + warp + n * WARPS;
            fill(m.ring + n * stage_bytes, keys + tile * key_bytes, key_bytes, m.barriers + n);
            fill(m.ring + n * stage_bytes + key_bytes, values + tile * value_bytes, value_bytes,
                 m.barriers + MOST_STAGES + n);
        }
    }
    const uint32_t *folded = begin_item(a, m, place);
    const Row *rows = (const Row *)(folded + FRAGMENTS) + t;
    const int kinds = h.key_kind | h.value_kind << 16;
    float reference[ROW_TILES], mass[ROW_TILES];
    Sums o;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        reference[n] = NOTHING, mass[n] = 0.f;
        clear(o.sum[n]);
    }

    int stage = 0, token = (begin + warp) * TOKENS;
    for (int n = 0; n < mine; n++, token += WARPS * TOKENS) {
        unsigned char *tile = m.ring + stage * stage_bytes;
        const bool more = lane == 0 && n + stages < mine;
        Scores s;
        barrier_wait(m.barriers + stage, phases >> stage & 1);
        score_kind(kinds & 0xffff, s, tile, (const uint2 *)folded + lane, lane);
        __syncwarp();
        const int next = token / TOKENS + stages * WARPS;
        if (more) fill(tile, m.tiles[0] + (long long)next * key_bytes, key_bytes, m.barriers + stage);
        Weights p;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const Row row = rows[4 * r];
            float x[GROUPS][2], most = -INF;
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                const int *c = s.sum[r][j];
                x[j][0] = fmaf((float)(c[0] * 256 + c[1]), row.factor, row.offset);
                x[j][1] = fmaf((float)(c[2] * 256 + c[3]) * 0.0625f, row.factor, row.offset);
            }
            if (a.softcap > 0.f)
#pragma unroll
                for (int j = 0; j < GROUPS; j++)
                    x[j][0] = capped(x[j][0], a.softcap * LOG2E), x[j][1] = capped(x[j][1], a.softcap * LOG2E);
            if (token < row.from || token + TOKENS > row.to)
#pragma unroll
                for (int j = 0; j < GROUPS; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int at = token + 16 * j + 8 * i + g;
                        if (at < row.from || at >= row.to) x[j][i] = -INF;
                    }
#pragma unroll
            for (int j = 0; j < GROUPS; j++) most = fmaxf(most, fmaxf(x[j][0], x[j][1]));
            if (__any_sync(~0u, most - reference[r] > HEADROOM)) {
#pragma unroll
                for (int step = 4; step < LANES; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
                const float next = most - reference[r] > HEADROOM ? most - TARGET : reference[r];
                const float shrink = exp2_fast(reference[r] - next);
                reference[r] = next;
                mass[r] *= shrink;
                shrink_sums(o.sum[r], shrink);
            }
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                // adding 2^23 leaves the rounded weight in the lowest two bytes
                const float y0 = exp2_fast(x[j][0] - reference[r]) + 8388608.f;
                const float y1 = exp2_fast(x[j][1] - reference[r]) + 8388608.f;
                mass[r] += (y0 - 8388608.f) + (y1 - 8388608.f);
                p[r][j] = transpose8x8(__byte_perm(__float_as_uint(y0), __float_as_uint(y1), 0x4051));
            }
        }
        barrier_wait(m.barriers + MOST_STAGES + stage, phases >> stage & 1);
        mix_kind(kinds >> 16, o, tile + key_bytes, p, lane);
        __syncwarp();
        if (more)
            fill(tile + key_bytes, m.tiles[1] + (long long)next * value_bytes, value_bytes,
                 m.barriers + MOST_STAGES + stage);
        phases ^= 1u << stage;
        stage = stage + 1 == stages ? 0 : stage + 1;
    }
    __syncthreads();

    // merge the warps; the rings are free now
    float *sums = (float *)m.all;                  // [WARPS, ROWS, SPREAD]
    float *warp_mass = m.work;                     // [2, WARPS, ROWS]: masses, references
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int step = 4; step < LANES; step *= 2) mass[n] += __shfl_xor_sync(~0u, mass[n], step);
        if (g == 0) {
            warp_mass[warp * ROWS + 4 * n + t] = mass[n];
            warp_mass[(WARPS + warp) * ROWS + 4 * n + t] = reference[n];
        }
        float *row = sums + (warp * ROWS + 4 * n + t) * SPREAD + g;
#pragma unroll
        for (int b = 0; b < VALUE_BLOCKS; b++) store_sums(row + 16 * b, o.sum[n][b], b < h.value4);
    }
    __syncthreads();
    const int columns = 16 * (h.value4 + h.value2 + h.value1);
    for (int row = warp; row < ROWS; row += WARPS) {
        float top = NOTHING, total = 0.f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_mass[(WARPS + w) * ROWS + row]);
        float weight[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            weight[w] = exp2_fast(warp_mass[(WARPS + w) * ROWS + row] - top);
            total = fmaf(warp_mass[w * ROWS + row], weight[w], total);
        }
        if (lane == 0) masses[row] = make_float2(top, total);
        for (int column = 4 * lane; column < columns; column += 4 * LANES) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float4 x = *(const float4 *)&sums[(w * ROWS + row) * SPREAD + column];
                sum.x = fmaf(x.x, weight[w], sum.x), sum.y = fmaf(x.y, weight[w], sum.y);
                sum.z = fmaf(x.z, weight[w], sum.z), sum.w = fmaf(x.w, weight[w], sum.w);
            }
            *(float4 *)&part[row * WIDTH + column] = sum;
        }
    }
}

// Exact tokens of all kinds: weighted sums [ROWS, HEAD_DIM] and masses.
__device__ void attend_exact(const Arguments &a, int sequence, int head, float *part, float2 *masses,
                             const Memory &m) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const long long owner = (long long)sequence * a.head_count + head;
    float *query = (float *)m.all, *sums = query + ROWS * HEAD_DIM, *warp_mass = sums + WARPS * ROWS * HEAD_DIM;
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
            const Range range = visible(a, m.total, sequence, r < a.rows ? r % a.queries : 0);
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

// Four columns of partial results `from` and behind.
__device__ __forceinline__ void load_parts(float4 (&x)[MERGED], const float *parts, int quad, int columns, int from,
                                           int coded) {
    const int row = quad / (columns / 4), column = quad % (columns / 4) * 4;
#pragma unroll
    for (int k = 0; k < MERGED; k++) {
        const int s = min(from + k, coded - 1);
        x[k] = __ldcg((const float4 *)&parts[((long long)s * ROWS + row) * WIDTH + column]);
    }
}

// The last block of a KV head adds up all splits and maps the sums of codes to head_dim.
__device__ void merge_splits(const Arguments &a, const Item &item, const Head &h, int splits, float *memory) {
    const int head = item.head, coded = item.coded, sequence = item.sequence;
    const float2 *masses = a.masses + (long long)item.slot * ROWS;
    const float *parts = a.partial + (long long)item.slot * ROWS * WIDTH;
    const int columns = 16 * (h.value4 + h.value2 + h.value1), group = a.rows / a.queries;
    float *sums = memory, *share = sums + ROWS * VALUES, *scratch = share + ROWS, *weights = scratch + WARPS * 512;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    // its loads depend on nothing before them
    Product<16> product(a.unfold + (long long)head * VALUES * HEAD_DIM, columns, HEAD_DIM, HEAD_DIM, WARPS);
    const int quads = ROWS * columns / 4;

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
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        const int row = i / (columns / 4), column = i % (columns / 4) * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int from = 0; from < coded; from += MERGED) {
            float4 x[MERGED];
            load_parts(x, parts, i, columns, from, coded);
#pragma unroll
            for (int k = 0; k < MERGED; k++) {
                const float weight = from + k < coded ? weights[(from + k) * ROWS + row] : 0.f;
                sum.x = fmaf(x[k].x, weight, sum.x), sum.y = fmaf(x[k].y, weight, sum.y);
                sum.z = fmaf(x[k].z, weight, sum.z), sum.w = fmaf(x[k].w, weight, sum.w);
            }
        }
        *(float4 *)&sums[row * VALUES + column] = sum;
    }
    __syncthreads();
    for (int n = 0; n < ROW_TILES; n++) {
        if (n > 0) product.load(product.first);
        product.times(sums + 4 * n * VALUES, VALUES, scratch);
        __syncthreads();
        for (int i = threadIdx.x; i < min(4, a.rows - 4 * n) * HEAD_DIM; i += THREADS) {
            const int row = 4 * n + i / HEAD_DIM, column = i % HEAD_DIM;
            float y = product_at(scratch, i / HEAD_DIM, column, HEAD_DIM, WARPS);
            y = fmaf(share[row], a.unfold_shift[head * HEAD_DIM + column], y);
            for (int s = coded; s < splits; s++)
                y = fmaf(__ldcg(&parts[((long long)s * ROWS + row) * WIDTH + column]), weights[s * ROWS + row], y);
            const long long token = (long long)sequence * a.queries + row % a.queries;
            a.out[(token * a.head_count * group + head * group + row / a.queries) * HEAD_DIM + column] = rounded(y);
        }
        __syncthreads();
    }
}

__device__ void attend_block(const Arguments &a, unsigned char *memory) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    uint64_t *barriers = (uint64_t *)(memory + WARPS * RING), *folded_barriers = barriers + WARPS * 2 * MOST_STAGES;
    Item *items = (Item *)(folded_barriers + 2);
    uint32_t *folded = (uint32_t *)(items + 3);
    const Memory m = {memory, memory + warp * RING, barriers + warp * 2 * MOST_STAGES, folded,
                      (float *)(folded + 2 * FOLDED), items, folded_barriers,
                      (const uint8_t **)(folded + 2 * FOLDED) + WARPS * ROWS + 2 * warp, a.ranges ? 0 : *a.seen};
    fetch_item(a, m, 0), fetch_item(a, m, 1);
    if (lane < 2 * MOST_STAGES) barrier_init(m.barriers + lane);
    if (threadIdx.x < 2) barrier_init(folded_barriers + threadIdx.x);
    barrier_init_done();
    __syncthreads();
    uint32_t phases = 0;
    for (int n = 0; n < a.item_count; n++) {
        const Item &item = item_at(m, n);
        if (item.head < 0) break;
        const int splits = item.coded + (a.first + a.last > 0);
        const long long slot = item.slot + item.split;
        float *part = a.partial + slot * ROWS * WIDTH;
        float2 *masses = a.masses + slot * ROWS;
        if (item.split < item.coded)
            attend_codes(a, n, part, masses, m, phases);
        else
            begin_item(a, m, n), attend_exact(a, item.sequence, item.head, part, masses, m);
        __syncthreads();
        unsigned *last = (unsigned *)m.work;
        if (threadIdx.x == 0) {
            unsigned *done = a.done + (long long)item.sequence * a.head_count + item.head;
            __threadfence();
            *last = atomicAdd(done, 1u) + 1 == (unsigned)splits;
            if (*last) *done = 0;
            __threadfence();
        }
        __syncthreads();
        if (*last) merge_splits(a, item, item.h, splits, (float *)memory);
        fence_copies();
        __syncthreads();
    }
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_tiles(const Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    attend_block(a, memory);
}
#endif

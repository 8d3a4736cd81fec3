// How a warp streams its tiles: through a ring of its own in shared memory, keys and values apart, filled by bulk copies.

constexpr int MOST_STAGES = 8;
// with more tiles than this for a warp others' lines have to leave the L2 cache anyway, and had better do so at once
constexpr int PASSING = 32;
// weights are kept below 2^16; a new reference puts the greatest at 2^14.5
constexpr float HEADROOM = 15.98f, TARGET = 14.5f;
// rows of sums of warps lie so that lanes write to banks of their own
constexpr int SPREAD = VALUES + 8;
// threads that add up parts for the same four numbers of a row
constexpr int QUADS = ROWS * HEAD_DIM / 4, SHARES = QUADS < THREADS ? THREADS / QUADS : 1;

__device__ __forceinline__ int key_words(const Head &h) { return 4 * h.key4 + 2 * h.key2 + h.key1; }
__device__ __forceinline__ int value_words(const Head &h) { return 4 * h.value4 + 2 * h.value2 + h.value1; }

// A part of a head's tokens as the warps of a block read it: each takes every WARPS-th tile. Its ring has slots for
// keys, then slots for values.
struct Stream {
    int begin, end, key_bytes, value_bytes, key_stages, value_stages;
};
__device__ __forceinline__ Stream stream_of(const Arguments &a, const Item &item, int total) {
    const int from = visible(a, total, item.sequence, 0).coded0;
    const int to = visible(a, total, item.sequence, a.queries - 1).coded1;
    const int tile0 = from / TOKENS, tiles = max(0, (to + TOKENS - 1) / TOKENS - tile0);
    const int begin = tile0 + (int)((long long)tiles * item.from >> 20);
    const int end = tile0 + (int)((long long)tiles * item.to >> 20);
    return {begin, end, 128 * key_words(item.h), 128 * value_words(item.h), item.key_stages, item.value_stages};
}

// What one side of the rings is filled from: tiles of a sequence, so many ahead of the one that is read.
struct alignas(16) Feed {
    const uint8_t *from;
    int bytes, ahead;
    uint64_t policy;
    // Begins to fill a slot with tile `next`, if the part has it. All lanes call it.
    __device__ __forceinline__ void fill(int next, int end, void *slot, uint64_t *barrier) const {
        if (next < end) copy_bulk(slot, from + (long long)next * bytes, bytes, barrier, policy);
    }
};

// Shared memory of a block. Rings are free before the first tile and behind the last.
struct Memory {
    unsigned char *rings, *ring;  // of all warps, and of this one
    uint64_t *barriers;           // of the warp: MOST_STAGES for keys, as many for values
    uint8_t *fragments;           // folded query: second operands of the products of scores
    Row *rows;                    // [ROWS]
    uint16_t *halves;             // what is mapped before the loop, and behind it (maps.cuh)
    float *work;                  // [2, WARPS, ROWS]
    Feed *feeds;                  // [2]: keys, values
    Stream *stream;
    int total;                    // as in `visible`

    // after the loop
    __device__ __forceinline__ float *sums() const { return (float *)rings; }  // [WARPS, ROWS, SPREAD]
    // [SHARES + 1, ROWS, HEAD_DIM]: parts added up by each share, exact tokens; their masses [SHARES + 1, ROWS]
    __device__ __forceinline__ float *merged() const { return sums() + WARPS * ROWS * SPREAD; }
    __device__ __forceinline__ float2 *tops() const { return (float2 *)(merged() + (SHARES + 1) * ROWS * HEAD_DIM); }
};

__device__ __forceinline__ void fill_slots(unsigned char *slots, const Feed &feed, int tile, int end,
                                           int stages, uint64_t *barriers) {
#pragma unroll 1
    for (int n = 0; n < stages; n++, tile += WARPS) feed.fill(tile, end, slots + n * feed.bytes, barriers + n);
}

#if SOFTCAP
__device__ __forceinline__ float capped(float score, float cap) {
    // cap · tanh(score / cap), all in log2 units
    float e = exp2_fast(2.f * LOG2E * fabsf(score) / cap);
    return copysignf(cap * (1.f - 2.f / (e + 1.f)), score);
}
#endif

// A row's scores of a tile's tokens in log2 units, the first of them `token`: of tokens g and g + 8 of each group, -INF
// where they are not visible. Returns the greatest.
__device__ __forceinline__ float scores_of(const Arguments &a, const int (&sums)[GROUPS][4], const Row &row, int token,
                                           float (&x)[GROUPS][2]) {
    const int g = threadIdx.x % LANES / 4;
    const float factor = row.factor * 0.0625f;  // of rows g + 8
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const int *c = sums[j];
        const int low = c[0] * 256 + c[1], high = c[2] * 256 + c[3] - low;
        x[j][0] = fmaf((float)low, row.factor, row.offset);
        x[j][1] = fmaf((float)high, factor, row.offset);
    }
#if SOFTCAP
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
        x[j][0] = capped(x[j][0], a.softcap * LOG2E), x[j][1] = capped(x[j][1], a.softcap * LOG2E);
#endif
    if (__builtin_expect(token < row.from || token + TOKENS > row.to, 0))
#pragma unroll
        for (int j = 0; j < GROUPS; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = token + 16 * j + 8 * i + g;
                if (at < row.from || at >= row.to) x[j][i] = -INF;
            }
    float most = fmaxf(x[0][0], x[0][1]);
#pragma unroll
    for (int j = 1; j < GROUPS; j++) most = fmaxf(most, fmaxf(x[j][0], x[j][1]));
    return most;
}

// Where between two whole numbers a lane's weights are cut, for tokens g and for tokens g + 8: from 1 to 2, both ends
// excluded. Lanes of a tile and tiles of a row have all places between them about equally often, so that many weights
// below one add up to what they are: rounded to the nearest, all would be lost beside one that is far greater.
__device__ __forceinline__ float2 places_to_cut(int tile) {
    const uint32_t place = tile * 0x9e3779b1u + ((uint32_t)(threadIdx.x % LANES / 4) << 29);
    const float at = __uint_as_float(place >> 9 | 0x3f800001);
    return make_float2(at, 3.f - at);
}

// What a row's tokens weigh, as second operands; adds it to `mass`.
__device__ __forceinline__ void weigh(const float (&x)[GROUPS][2], float reference, float2 cut, uint32_t (&p)[GROUPS],
                                      float &mass) {
    // adding 2^23 leaves the whole number in the lowest bits; `cut` has one too many
    constexpr float ADDED = 8388608.f;
    uint32_t sum = 0;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const uint32_t y0 = __float_as_uint(__fadd_rz(exp2_fast(x[j][0] - reference) + cut.x, ADDED - 1.f));
        const uint32_t y1 = __float_as_uint(__fadd_rz(exp2_fast(x[j][1] - reference) + cut.y, ADDED - 1.f));
        sum += y0 + y1;
        p[j] = transpose8x8(__byte_perm(y0, y1, 0x4051));
    }
    mass += (float)(int)(sum - 2 * GROUPS * __float_as_uint(ADDED));
}

// Moves a row's reference if its greatest score is too far above, and what was summed up with it.
__device__ __forceinline__ void move_reference(float most, float &reference, float &mass, int (&sums)[VALUE_BLOCKS][4]) {
#pragma unroll
    for (int step = 4; step < LANES; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    const float next = most - reference > HEADROOM ? most - TARGET : reference;
    const float shrink = exp2_fast(reference - next);
    reference = next;
    mass *= shrink;
    shrink_sums(sums, shrink);
}

// The warp's tiles: adds to sums of values and masses, relative to references. `rows` are those of its lane.
__device__ __forceinline__ void stream_tiles(const Arguments &a, const Head &h, const Memory &m, const Row *rows,
                                             float (&reference)[ROW_TILES], float (&mass)[ROW_TILES], Sums &o) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const Stream &stream = *m.stream;  // in shared memory: the loop has no registers left
    const int end = stream.end, kinds = h.key_kind | h.value_kind << 16;
    uint32_t phases = 0;
    int key_stage = 0, value_stage = 0;
    for (int tile = stream.begin + warp; tile < end; tile += WARPS) {
        unsigned char *keys = m.ring + key_stage * stream.key_bytes;
        Scores s;
        barrier_wait(m.barriers + key_stage, phases >> key_stage & 1);
        score_kind(kinds & 0xffff, s, keys, (const uint2 *)m.fragments + lane, lane);
        const Feed key_feed = m.feeds[0];
        __syncwarp();
        key_feed.fill(tile + key_feed.ahead, end, keys, m.barriers + key_stage);
        phases ^= 1u << key_stage;
        key_stage = key_stage + 1 == stream.key_stages ? 0 : key_stage + 1;
        Weights p;
        const float2 cut = places_to_cut(tile);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            float x[GROUPS][2];
            const float most = scores_of(a, s.sum[r], rows[4 * r], tile * TOKENS, x);
            if (__builtin_expect(__any_sync(~0u, most - reference[r] > HEADROOM), 0))
                move_reference(most, reference[r], mass[r], o.sum[r]);
            weigh(x, reference[r], cut, p[r], mass[r]);
        }
        unsigned char *values = m.ring + stream.key_stages * stream.key_bytes + value_stage * stream.value_bytes;
        barrier_wait(m.barriers + MOST_STAGES + value_stage, phases >> (MOST_STAGES + value_stage) & 1);
        mix_kind(kinds >> 16, o, values, p, lane);
        const Feed value_feed = m.feeds[1];
        __syncwarp();
        value_feed.fill(tile + value_feed.ahead, end, values, m.barriers + MOST_STAGES + value_stage);
        phases ^= 1u << (MOST_STAGES + value_stage);
        value_stage = value_stage + 1 == stream.value_stages ? 0 : value_stage + 1;
    }
}

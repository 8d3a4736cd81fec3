// What both kernels of decode attention on tiles share. Compiled at run time with these macros:
//   HEAD_DIM          d
//   KEY_BLOCKS        most blocks of any head's keys (src/kvsight/tiling.py);  VALUE_BLOCKS  of its values
//   KEY_PRODUCTS      most matrix products that a tile of any head's keys takes for 16 tokens
//   KEY_KINDS, VALUE_KINDS   KIND(i, n4, n2, n1) for each i: counts of blocks that heads have
//   ROW_TILES         query rows of a KV head in fours
//   WARPS, RING       warps of a block, and bytes of shared memory that each of them streams through
//   BLOCKS            blocks of threads that should fit one multiprocessor
//   NUMBER            type of queries, exact tokens and output (numbers.cuh)

constexpr int LANES = 32, TOKENS = 64, GROUPS = 4, THREADS = WARPS * LANES;
constexpr int ROWS = 4 * ROW_TILES;
constexpr int KEYS = KEY_BLOCKS * 16, VALUES = VALUE_BLOCKS * 16;
constexpr int WIDTH = VALUES > HEAD_DIM ? VALUES : HEAD_DIM;
// words of a folded query: second operands, then a `Row` for each row
constexpr int FRAGMENTS = KEY_PRODUCTS * ROW_TILES * LANES * 2, FOLDED = FRAGMENTS + 4 * ROWS;
// 16-bit fixed point of the query; with more than 256 columns an int32 sum would not hold it
constexpr float QUERY_RANGE = KEYS > 256 ? 32500.f * 256 / KEYS : 32500.f;
constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;

// One KV head. Counts of blocks are of 4, 2 and 1 bits; tiles of a sequence lie one after another.
struct Head {
    const uint8_t *keys, *values;
    long long key_batch, value_batch;  // bytes from one sequence to the next
    int key4, key2, key1;
    int value4, value2, value1;
    int key_kind, value_kind;
};
// Part of a KV head's tokens: its coded tiles from `from` to `to` in units of 2^-20 of them all, or, where
// split == coded, its exact tokens. Partial results of a head lie behind one another from `slot`.
struct Item {
    int sequence, head, split, coded, slot, from, to, unused;
    Head h;
};
// Visible tokens of one query token: exact first ones, coded ones, exact last ones; each from, to. Later queries
// see from and to no less.
struct Range {
    int first0, first1, coded0, coded1, last0, last1;
};
// What turns a query row's integer scores into scores in log2 units, and the coded tokens that it sees.
struct alignas(16) Row {
    float factor, offset;
    int from, to;
};
struct Arguments {
    const Number *query;         // [B, heads, rows, HEAD_DIM]
    const Head *heads;           // [heads]
    const float *fold;           // [heads, HEAD_DIM, KEYS]: a query's factor of every column, in log2 units
    const float *fold_shift;     // [heads, HEAD_DIM]: what codes of zero score
    const float *unfold;         // [heads, VALUES, HEAD_DIM]
    const float *unfold_shift;   // [heads, HEAD_DIM]: what codes of zero weigh
    uint32_t *folded;            // [B, heads, FOLDED]
    const Item *items;           // [blocks of threads, item_count]; a head of -1 is none
    const Range *ranges;         // [B, queries], or null: all tokens up to a query's own are visible
    const int *seen;             // [1] where there are no ranges: tokens of a sequence, the queries' own included
    const Number *first_keys, *first_values;  // [B, heads, first, HEAD_DIM]
    const Number *last_keys, *last_values;    // [B, heads, last, HEAD_DIM]
    const float *sink_logits;    // [heads, rows / queries] or null
    Number *out;                 // [B, queries, heads · rows / queries, HEAD_DIM]
    float *partial;              // [slots, ROWS, WIDTH]
    float2 *masses;              // [slots, ROWS]: reference, sum
    unsigned *done;              // [B, heads], zero
    float scaling, softcap;      // of natural scores; softcap 0 is none
    int head_count, item_count, rows, queries, first, last;
    int after;                   // newer query tokens than this launch has
};

// x [4, n] @ m [n, columns] by the `warps` of a block, which share columns and the n rows of m. A lane takes four
// columns of every share-th row, AT_ONCE rows at a time, so that their loads are under way at once: the first of them
// before x is there.
template <int AT_ONCE> struct Product {
    const float *m;
    int n, stride, share, first, column;
    float4 rows[AT_ONCE], sum[4];

    __device__ __forceinline__ Product(const float *m, int n, int columns, int stride, int warps)
        : m(m), n(n), stride(stride), share(warps / ((columns + 127) / 128)) {
        const int warp = threadIdx.x / LANES;
        first = warp % share, column = warp / share * 128 + threadIdx.x % LANES * 4;
        if (column >= columns) this->n = 0;
        load(first);
    }
    __device__ __forceinline__ void load(int from) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int j = from + k * share;
            rows[k] = j < n ? *(const float4 *)(m + (long long)j * stride + column) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    }
    // `scratch` [warps, 4, 128] takes the sums of each warp.
    __device__ __forceinline__ void times(const float *x, int x_stride, float *scratch) {
#pragma unroll
        for (int r = 0; r < 4; r++) sum[r] = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int from = first; from < n; from += AT_ONCE * share) {
            if (from > first) load(from);
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int j = min(from + k * share, n - 1);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float y = x[r * x_stride + j];
                    sum[r].x = fmaf(y, rows[k].x, sum[r].x), sum[r].y = fmaf(y, rows[k].y, sum[r].y);
                    sum[r].z = fmaf(y, rows[k].z, sum[r].z), sum[r].w = fmaf(y, rows[k].w, sum[r].w);
                }
            }
        }
        float4 *out = (float4 *)scratch + threadIdx.x / LANES * 128 + threadIdx.x % LANES;
#pragma unroll
        for (int r = 0; r < 4; r++) out[r * 32] = sum[r];
    }
};
// Column `column` of row r of such a product.
__device__ __forceinline__ float product_at(const float *scratch, int r, int column, int columns, int warps) {
    const int share = warps / ((columns + 127) / 128), first = column / 128 * share;
    float sum = 0.f;
    for (int w = first; w < first + share; w++) sum += scratch[(w * 4 + r) * 128 + column % 128];
    return sum;
}

// `total` tokens of a sequence, where there are no ranges.
__device__ __forceinline__ Range visible(const Arguments &a, int total, int sequence, int query) {
    if (a.ranges) return a.ranges[sequence * a.queries + query];
    const int coded = total - a.first - a.last;
    const int upto = total - a.after - (a.queries - 1 - query);
    return {0, min(upto, a.first), 0, max(0, min(upto - a.first, coded)), 0, max(0, upto - a.first - coded)};
}

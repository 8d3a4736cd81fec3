// What decode attention on tiles works with. Compiled at run time with these macros:
//   HEAD_DIM          d
//   KEY_BLOCKS        most blocks of any head's keys (src/kvsight/tiling.py);  VALUE_BLOCKS  of its values
//   KEY_PRODUCTS      most matrix products that a tile of any head's keys takes for 16 tokens
//   KEY_KINDS, VALUE_KINDS   KIND(i, n4, n2, n1) for each i: counts of blocks that heads have
//   ROW_TILES         query rows of an item in fours
//   WARPS, RING       warps of a block, and bytes of shared memory that each of them streams through
//   BLOCKS            blocks of threads that should fit one multiprocessor
//   SOFTCAP           whether scores are capped (0, 1)
//   NUMBER            type of queries, exact tokens and output (numbers.cuh)

constexpr int LANES = 32, TOKENS = 64, GROUPS = 4, THREADS = WARPS * LANES;
constexpr int ROWS = 4 * ROW_TILES, CHUNKS = HEAD_DIM / 16, VALUES = VALUE_BLOCKS * 16;
// second operands of a folded query, in words
constexpr int FRAGMENTS = KEY_PRODUCTS * ROW_TILES * LANES * 2;
// 16-bit fixed point of the query; with more than 256 columns an int32 sum would not hold it
constexpr float QUERY_RANGE = KEY_BLOCKS > 16 ? 32500.f * 16 / KEY_BLOCKS : 32500.f;
constexpr float NOTHING = -1e30f, LOG2E = 1.4426950408889634f;

// The blocks of a chunk of 16 coordinates, or -1: where products have them, and what a unit of them is worth in codes.
// Its codes are at most twice `middle`.
struct Chunk {
    short block0, block1;
    float factor0, factor1, middle;
};
// One KV head. Counts of blocks are of 4, 2 and 1 bits; tiles of a sequence lie one after another.
struct Head {
    const uint8_t *keys, *values;
    long long key_batch, value_batch;  // bytes from one sequence to the next
    int key4, key2, key1;
    int value4, value2, value1;
    int key_kind, value_kind;
    Chunk key_chunks[CHUNKS], value_chunks[CHUNKS];
};
// What one block of threads does, part of a KV head's tokens: its coded tiles from `from` to `to` in units of 2^-20
// of them all, or, where split == coded, its exact tokens. Partial results of a head lie behind one another from
// `slot`. It is for ROWS query rows at most, from `row`. Rings hold so many stages of keys and of values.
struct Item {
    int sequence, head, split, coded, slot, from, to;
    uint8_t key_stages, value_stages;
    uint16_t row;
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
    const uint8_t *key_maps;     // [heads, MAP_BYTES] (maps.cuh): query to factors of codes, in log2 units
    const uint8_t *value_maps;   // [heads, MAP_BYTES]: weighted sums of codes from their middles to output
    const Item *items;           // [blocks of threads]
    const Range *ranges;         // [B, queries], or null: all tokens up to a query's own are visible
    const int *seen;             // [1] where there are no ranges: tokens of a sequence, the queries' own included
    const Number *first_keys, *first_values;  // [B, heads, first, HEAD_DIM]
    const Number *last_keys, *last_values;    // [B, heads, last, HEAD_DIM]
    const float *sink_logits;    // [heads, rows / queries] or null
    Number *out;                 // [B, queries, heads · rows / queries, HEAD_DIM]
    float *partial;              // [slots, ROWS, HEAD_DIM]
    float2 *masses;              // [slots, ROWS]: reference, sum
    unsigned *done;              // [B, heads, ceil(rows / ROWS)], zero
    float scaling, softcap;      // of natural scores
    int head_count, rows, queries, first, last;
    int after;                   // newer query tokens than this launch has
};

// `total` tokens of a sequence, where there are no ranges.
__device__ __forceinline__ Range visible(const Arguments &a, int total, int sequence, int query) {
    if (a.ranges) return a.ranges[sequence * a.queries + query];
    const int coded = total - a.first - a.last;
    const int upto = total - a.after - (a.queries - 1 - query);
    return {0, min(upto, a.first), 0, max(0, min(upto - a.first, coded)), 0, max(0, upto - a.first - coded)};
}

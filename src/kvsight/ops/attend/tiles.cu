// Decode attention on tiles: softmax(q kT) v for one KV head's query rows, straight on the codes.
//
// A block of threads does one item (tiles.cuh), part of a head. Each of its warps streams tiles of 64 tokens
// (stream.cuh). Codes are the first operand of 8-bit integer products as they lie (products.cuh). Queries and weights
// are 16-bit fixed point, split into two bytes: four rows fill the eight columns of a product. All of a plan's scales
// are folded into the query before the loop and into the output after it (maps.cuh). The last block of a head to finish
// adds up its parts.

constexpr int PER_LANE = (HEAD_DIM + LANES - 1) / LANES;
// parts that a thread reads at once
constexpr int AT_ONCE = 8;
// numbers of a row that a lane has, in fours
constexpr int PIECES = (HEAD_DIM + 127) / 128;

// What a warp has of one query row: four numbers a lane of every 128, and what codes of zero decode to.
struct Query {
    Quad x[PIECES];
    float4 shift[PIECES];
    __device__ __forceinline__ void load(const Number *query, const float *shifts, int row, int rows) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int column = 128 * i + threadIdx.x % LANES * 4;
            const bool real = row < rows && column < HEAD_DIM;
            x[i] = real ? *(const Quad *)(query + row * HEAD_DIM + column) : Quad{};
            shift[i] = column < HEAD_DIM ? *(const float4 *)(shifts + column) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    }
    // Stores the row, scaled to range by a power of two, and leaves what was scaled away and what codes of zero score.
    __device__ __forceinline__ void store(const Memory &m, int row) const {
        float most = 0.f, offset = 0.f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const float4 y = numbers(x[i]);
            most = fmaxf(most, fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w))));
            offset = fmaf(y.x, shift[i].x, fmaf(y.y, shift[i].y, fmaf(y.z, shift[i].z, fmaf(y.w, shift[i].w, offset))));
        }
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            offset += __shfl_xor_sync(~0u, offset, step);
        }
        const uint32_t exponent = min(max(__float_as_uint(most) >> 23, 1u), 252u);
        const float up = __uint_as_float((253 - exponent) << 23);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int column = 128 * i + threadIdx.x % LANES * 4;
            float4 y = numbers(x[i]);
            y.x *= up, y.y *= up, y.z *= up, y.w *= up;
            if (column < HEAD_DIM) store_halves(m.halves, row, column, y);
        }
        m.rows[row].factor = __uint_as_float((exponent + 1) << 23), m.rows[row].offset = offset;
    }
};

// Factors of a block's columns g and g + 8 for row 4n + t, high and low bytes, where products of scores want them.
__device__ __forceinline__ void store_factors(uint8_t *fragments, int block, int n, float low, float high) {
    const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    uint8_t *at = fragments + ((block / 2 * ROW_TILES + n) * LANES + t * 8 + g / 4) * 8 + block % 2 * 4 + g % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int x = __float2int_rn(half ? high : low), top = (x + 128) >> 8;
        at[16 * half] = (uint8_t)top, at[16 * half + 32] = (uint8_t)(x - 256 * top);
    }
}

// The queries in the coordinates of the codes: 16-bit fixed point, split into two bytes, in the order in which tensor
// cores read second operands. `operand` belongs to the warp's first chunk.
__device__ __forceinline__ void fold_queries(const Arguments &a, const Item &item, const Memory &m, Map map,
                                             Operand &operand) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const Chunk *chunks = item.h.key_chunks + warp;
    const int left = a.rows - item.row;
    float2 x[MINE][ROW_TILES];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        const float down = m.rows[4 * n + t].factor;
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int chunk = warp + i * WARPS;
            if (chunk >= CHUNKS) continue;
            if (MINE > 1 && (i > 0 || n > 0)) operand.load(map, chunk, 0);
            const float2 y = multiply(map, chunk, operand, m.halves, n);
            x[i][n] = make_float2(y.x * down, y.y * down);
            const float worth = fmaxf(chunks[i * WARPS].factor0, chunks[i * WARPS].factor1);
            most = fmaxf(most, fmaxf(fabsf(x[i][n].x), fabsf(x[i][n].y)) * worth);
        }
#pragma unroll
        for (int step = 4; step < LANES; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        if (g == 0) m.work[warp * ROWS + 4 * n + t] = most;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        float most = 1e-30f;
#pragma unroll 2
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, m.work[w * ROWS + 4 * n + t]);
        const float inverse = QUERY_RANGE * reciprocal(most);
        if (warp == 0 && g == 0) {
            const int row = 4 * n + t;
            const Range range = visible(a, m.total, item.sequence, row < left ? (item.row + row) % a.queries : 0);
            m.rows[row] = {most / QUERY_RANGE, m.rows[row].offset, range.coded0, range.coded1};
        }
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if (warp + i * WARPS >= CHUNKS) continue;
            const float low = x[i][n].x * inverse, high = x[i][n].y * inverse;
            const Chunk &c = chunks[i * WARPS];
#pragma unroll 1
            for (int b = 0; b < 2; b++) {
                const int block = b ? c.block1 : c.block0;
                const float factor = b ? c.factor1 : c.factor0;
                if (block >= 0) store_factors(m.fragments, block, n, low * factor, high * factor);
            }
        }
    }
    __syncthreads();
}

// What comes before the first tile. Not inlined, so that the loop gets registers of its own.
__device__ __noinline__ void begin(const Arguments &a, const Item &item, const Memory m) {
    const int warp = threadIdx.x / LANES;
    const Map map = {a.key_maps + (long long)item.head * MAP_BYTES};
    const long long before = ((long long)item.sequence * a.head_count + item.head) * a.rows + item.row;
    const Number *rows = a.query + before * HEAD_DIM;
    const int left = a.rows - item.row;
    Query query;
    Operand operand;
    query.load(rows, map.shift(), warp, left);
    operand.load(map, min(warp, CHUNKS - 1), 0);
    const Stream stream = stream_of(a, item, m.total);
    const Head &h = item.h;
    const uint64_t policy = cache_policy(stream.end - stream.begin <= PASSING * WARPS);
    const Feed feeds[2] = {
        {h.keys + item.sequence * h.key_batch, stream.key_bytes, stream.key_stages * WARPS, policy},
        {h.values + item.sequence * h.value_batch, stream.value_bytes, stream.value_stages * WARPS, policy}};
    if (threadIdx.x == 0) *m.stream = stream, m.feeds[0] = feeds[0], m.feeds[1] = feeds[1];
    for (int i = threadIdx.x; i < FRAGMENTS / 4; i += THREADS) ((int4 *)m.fragments)[i] = {};
    for (int row = warp; row < ROWS; row += WARPS) {
        if (row > warp) query.load(rows, map.shift(), row, left);
        query.store(m, row);
    }
    // the query is here, and the map on its way: they would have waited behind tiles
    const int first = stream.begin + warp;
    fill_slots(m.ring, feeds[0], first, stream.end, stream.key_stages, m.barriers);
    fill_slots(m.ring + stream.key_stages * stream.key_bytes, feeds[1], first, stream.end, stream.value_stages,
               m.barriers + MOST_STAGES);
    __syncthreads();
    fold_queries(a, item, m, map, operand);
}

__device__ __forceinline__ void add(float4 &sum, float weight, const float4 &x) {
    sum.x = fmaf(x.x, weight, sum.x), sum.y = fmaf(x.y, weight, sum.y);
    sum.z = fmaf(x.z, weight, sum.z), sum.w = fmaf(x.w, weight, sum.w);
}

// Sums of a block of values to a row, from column g.
__device__ __forceinline__ void store_sums(float *row, const int *c) {
    row[0] = (float)c[0] * 256.f + (float)c[1];
    row[8] = (float)(c[2] - c[0]) * 256.f + (float)(c[3] - c[1]);
}

// Coded tokens of one item: weighted sums of codes [ROWS, HEAD_DIM] and masses, merged over the block's warps.
__device__ void attend_codes(const Arguments &a, const Item &item, const Memory &m, float *part, float2 *masses) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const Head &h = item.h;
    begin(a, item, m);
    const Row *rows = m.rows + t;
    float reference[ROW_TILES], mass[ROW_TILES];
    Sums o;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        reference[n] = NOTHING, mass[n] = 0.f;
        clear(o.sum[n]);
    }
    stream_tiles(a, h, m, rows, reference, mass, o);
    // integers lose what is not a number
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) mass[n] += 0.f * rows[4 * n].offset;
    __syncthreads();

    // merge the warps; the rings are free now
    float *sums = m.sums(), *warp_mass = m.work;  // [2, WARPS, ROWS]: masses, references
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
        for (int b = 0; b < VALUE_BLOCKS; b++) store_sums(row + 16 * b, o.sum[n][b]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < QUADS; i += THREADS) {
        const int row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        const Chunk chunk = h.value_chunks[column / 16];
        float top = NOTHING, total = 0.f;
#pragma unroll 2
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_mass[(WARPS + w) * ROWS + row]);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 2
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2_fast(warp_mass[(WARPS + w) * ROWS + row] - top);
            total = fmaf(warp_mass[w * ROWS + row], weight, total);
            const float *from = sums + (w * ROWS + row) * SPREAD + column % 16;
            if (chunk.block0 >= 0) add(sum, weight * chunk.factor0, *(const float4 *)(from + 16 * chunk.block0));
            if (chunk.block1 >= 0) add(sum, weight * chunk.factor1, *(const float4 *)(from + 16 * chunk.block1));
        }
        // columns from 8 were sixteen times
        const float worth = column % 16 < 8 ? 1.f : 0.0625f;
        sum.x *= worth, sum.y *= worth, sum.z *= worth, sum.w *= worth;
        *(float4 *)&part[row * HEAD_DIM + column] = sum;
        if (column == 0) masses[row] = make_float2(top, total);
    }
}

// Exact tokens of all kinds: weighted sums [ROWS, HEAD_DIM] and masses.
__device__ void attend_exact(const Arguments &a, const Item &item, const Memory &m, float *part, float2 *masses) {
    const int sequence = item.sequence, head = item.head;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const long long owner = (long long)sequence * a.head_count + head;
    float *query = (float *)m.rings, *sums = query + ROWS * HEAD_DIM, *warp_mass = sums + WARPS * ROWS * HEAD_DIM;
    const int left = a.rows - item.row;
    const Number *rows = a.query + (owner * a.rows + item.row) * HEAD_DIM;
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS)
        query[i] = i < left * HEAD_DIM ? number(rows[i]) * a.scaling * LOG2E : 0.f;
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
#if SOFTCAP
            x = capped(x, a.softcap * LOG2E);
#endif
            const Range range = visible(a, m.total, sequence, r < left ? (item.row + r) % a.queries : 0);
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
        part[row * HEAD_DIM + column] = all;
        if (column == 0) masses[row] = make_float2(top, total);
    }
}

// Coded parts of a head, added up by shares of the block's threads, and its exact part.
__device__ __forceinline__ void gather(const Arguments &a, const Item &item, const Memory &m, bool exact) {
    const float2 *masses = a.masses + (long long)item.slot * ROWS;
    const float *parts = a.partial + (long long)item.slot * ROWS * HEAD_DIM;
    float *merged = m.merged();
    float2 *tops = m.tops();
    for (int i = threadIdx.x; i < QUADS * SHARES; i += THREADS) {
        const int share = i / QUADS, row = i % QUADS / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f), kept = sum;
        float top = NOTHING, total = 0.f;
        const bool keeps = exact && share == 0;
        if (keeps) kept = __ldcg((const float4 *)&parts[((long long)item.coded * ROWS + row) * HEAD_DIM + column]);
        for (int from = share; from < item.coded; from += SHARES * AT_ONCE) {
            float4 x[AT_ONCE];
            float2 mass[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int s = from + k * SHARES;
                if (s >= item.coded) break;
                mass[k] = __ldcg(&masses[s * ROWS + row]);
                x[k] = __ldcg((const float4 *)&parts[((long long)s * ROWS + row) * HEAD_DIM + column]);
            }
            float next = top;
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                if (from + k * SHARES < item.coded) next = fmaxf(next, mass[k].x);
            const float shrink = exp2_fast(top - next);
            sum.x *= shrink, sum.y *= shrink, sum.z *= shrink, sum.w *= shrink;
            total *= shrink, top = next;
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                if (from + k * SHARES >= item.coded) break;
                const float weight = exp2_fast(mass[k].x - top);
                add(sum, weight, x[k]);
                total = fmaf(mass[k].y, weight, total);
            }
        }
        *(float4 *)&merged[(share * ROWS + row) * HEAD_DIM + column] = sum;
        if (column == 0) tops[share * ROWS + row] = make_float2(top, total);
        if (!keeps) continue;
        *(float4 *)&merged[(SHARES * ROWS + row) * HEAD_DIM + column] = kept;
        if (column == 0) tops[SHARES * ROWS + row] = __ldcg(&masses[item.coded * ROWS + row]);
    }
}

// Sums of codes of `shares` of threads, and exact tokens: normalised, as second operands.
__device__ __forceinline__ void normalise(const Arguments &a, const Item &item, const Memory &m, int shares,
                                          bool exact) {
    const float *merged = m.merged();
    const float2 *tops = m.tops();
    const int group = a.rows / a.queries;
#pragma unroll 1
    for (int i = threadIdx.x; i < QUADS; i += THREADS) {
        const int row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        const bool real = item.row + row < a.rows, has_sink = real && a.sink_logits;
        const int head = item.head * group + (item.row + row) / a.queries;
        const float sink = has_sink ? a.sink_logits[head] * LOG2E : NOTHING;
        const float2 kept = exact ? tops[SHARES * ROWS + row] : make_float2(NOTHING, 0.f);
        float top = fmaxf(sink, kept.x), codes = 0.f;
#pragma unroll 1
        for (int s = 0; s < shares; s++) top = fmaxf(top, tops[s * ROWS + row].x);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
        for (int s = 0; s < shares; s++) {
            const float weight = exp2_fast(tops[s * ROWS + row].x - top);
            codes = fmaf(tops[s * ROWS + row].y, weight, codes);
            add(sum, weight, *(const float4 *)&merged[(s * ROWS + row) * HEAD_DIM + column]);
        }
        const float exact_weight = exact ? exp2_fast(kept.x - top) : 0.f;
        const float total = fmaf(kept.y, exact_weight, codes) + (has_sink ? exp2_fast(sink - top) : 0.f);
        const float inverse = total > 0.f && real ? 1.f / total : 0.f;
        // a mean of many tokens is near the middle of its codes: what is left of it is rounded
        const float middle = item.h.value_chunks[column / 16].middle * codes;
        sum.x = (sum.x - middle) * inverse, sum.y = (sum.y - middle) * inverse;
        sum.z = (sum.z - middle) * inverse, sum.w = (sum.w - middle) * inverse;
        store_halves(m.halves, row, column, sum);
        // what coded and exact tokens weigh
        if (column == 0) m.rows[row].factor = codes * inverse, m.rows[row].offset = exact_weight * inverse;
    }
}

// Normalised sums of codes, mapped to head_dim. `operand` belongs to the warp's first chunk.
__device__ __forceinline__ void unfold(const Arguments &a, const Item &item, const Memory &m, bool exact, Map map,
                                       Operand &operand) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const int group = a.rows / a.queries;
#pragma unroll 1
    for (int n = 0; n < ROW_TILES; n++) {
        const int row = 4 * n + t;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int chunk = warp + i * WARPS;
            if (chunk >= CHUNKS) continue;
            if (MINE > 1 && (i > 0 || n > 0)) operand.load(map, chunk, 0);
            const float2 product = multiply(map, chunk, operand, m.halves, n);
            const int at = item.row + row;
            if (at >= a.rows) continue;
            const long long token = (long long)item.sequence * a.queries + at % a.queries;
            Number *to = a.out + (token * a.head_count * group + item.head * group + at / a.queries) * HEAD_DIM;
            const float *kept = m.merged() + (SHARES * ROWS + row) * HEAD_DIM;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = 16 * chunk + g + 8 * half;
                float y = half ? product.y : product.x;
                y = fmaf(m.rows[row].factor, half ? operand.shift.y : operand.shift.x, y);
                if (exact) y = fmaf(m.rows[row].offset, kept[column], y);
                to[column] = rounded(y);
            }
        }
    }
}

__device__ void attend_block(const Arguments &a, unsigned char *memory) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    uint64_t *barriers = (uint64_t *)(memory + WARPS * RING);
    Item &item = *(Item *)(barriers + WARPS * 2 * MOST_STAGES);
    uint8_t *fragments = (uint8_t *)(&item + 1);
    Row *rows = (Row *)(fragments + 4 * FRAGMENTS);
    uint16_t *halves = (uint16_t *)(rows + ROWS);
    float *work = (float *)(halves + SPLITS * ROWS * HEAD_DIM);
    Feed *feeds = (Feed *)(work + 2 * WARPS * ROWS);
    static_assert(2 * sizeof(Feed) + sizeof(Stream) <= 96, "as cuda.py counts");
    const Memory m = {memory, memory + warp * RING, barriers + warp * 2 * MOST_STAGES, fragments, rows, halves, work,
                      feeds, (Stream *)(feeds + 2), a.ranges ? 0 : *a.seen};
    for (int i = threadIdx.x; i < (int)sizeof(Item) / 16; i += THREADS)
        ((int4 *)&item)[i] = ((const int4 *)(a.items + blockIdx.x))[i];
    if (lane < 2 * MOST_STAGES) barrier_init(m.barriers + lane);
    barrier_init_done();
    __syncthreads();
    const bool exact = a.first + a.last > 0, alone = item.coded == 1 && !exact;
    const long long slot = item.slot + item.split;
    float *part = alone ? m.merged() : a.partial + slot * ROWS * HEAD_DIM;
    float2 *masses = alone ? m.tops() : a.masses + slot * ROWS;
    if (item.split < item.coded)
        attend_codes(a, item, m, part, masses);
    else
        attend_exact(a, item, m, part, masses);
    Operand operand;
    const Map map = {a.value_maps + (long long)item.head * MAP_BYTES};
    operand.load(map, min(warp, CHUNKS - 1), 0);
    __syncthreads();
    if (!alone) {
        int *last = (int *)m.work;
        if (threadIdx.x == 0) {
            const int pieces = (a.rows + ROWS - 1) / ROWS;
            unsigned *done = a.done + (item.sequence * a.head_count + item.head) * pieces + item.row / ROWS;
            const unsigned others = item.coded + exact - 1;
            *last = count_up(done, others) == others;
        }
        __syncthreads();
        if (!*last) return;
        gather(a, item, m, exact);
        __syncthreads();
    }
    normalise(a, item, m, alone ? 1 : SHARES, exact);
    __syncthreads();
    unfold(a, item, m, exact, map, operand);
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_tiles(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    attend_block(a, memory);
}
#endif

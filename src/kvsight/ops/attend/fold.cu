// Queries in the coordinates of the codes: 16-bit fixed point, split into two bytes, in the order in which tensor
// cores read second operands. One block of threads does one KV head of one sequence.

#ifndef EMULATED
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
#endif
constexpr int FOLD_WARPS = 16, FOLD_THREADS = FOLD_WARPS * LANES;

// The block of keys in a half of a matrix product's second operand, or -1.
__device__ __forceinline__ int block_in(int product, int half, const Head &h) {
    int i = 2 * product + half;
    if (product < (h.key4 + 1) / 2) return i < h.key4 ? i : -1;
    product -= (h.key4 + 1) / 2, i = 2 * product + half;
    if (product < (h.key2 + 1) / 2) return i < h.key2 ? h.key4 + i : -1;
    product -= (h.key2 + 1) / 2, i = 2 * product + half;
    const int first = h.key4 + h.key2, whole = h.key1 & ~3;
    if (i < whole) return first + i;
    i = whole + product - whole / 2;
    return half == 0 && i < h.key1 ? first + i : -1;
}

__device__ void fold_block(const Arguments &a, float *memory) {
    const int head = blockIdx.x, sequence = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const long long owner = (long long)sequence * a.head_count + head;
    const Number *query = a.query + owner * a.rows * HEAD_DIM;
    float *raw = memory, *folded = raw + ROWS * HEAD_DIM, *scale = folded + ROWS * KEYS, *scratch = scale + ROWS;
    // all columns, so that no load waits for another one
    Product<16> product(a.fold + (long long)head * HEAD_DIM * KEYS, HEAD_DIM, KEYS, KEYS, FOLD_WARPS);
    // what the next kernel reads is behind that in the queues of memory
    let_next_start();
    const Head h = a.heads[head];
    const int total = a.ranges ? 0 : *a.seen;
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += FOLD_THREADS)
        raw[i] = i < a.rows * HEAD_DIM ? number(query[i]) : 0.f;
    __syncthreads();
    const int columns = 16 * (h.key4 + h.key2 + h.key1);
    for (int n = 0; n < ROW_TILES; n++) {
        if (n > 0) product.load(product.first);
        product.times(raw + 4 * n * HEAD_DIM, HEAD_DIM, scratch);
        __syncthreads();
        for (int i = threadIdx.x; i < 4 * columns; i += FOLD_THREADS)
            folded[(4 * n + i / columns) * KEYS + i % columns] =
                product_at(scratch, i / columns, i % columns, KEYS, FOLD_WARPS);
        __syncthreads();
    }
    uint32_t *out = a.folded + owner * FOLDED;
    for (int r = warp; r < ROWS; r += FOLD_WARPS) {
        float most = 0.f, shift = 0.f;
        for (int i = lane; i < columns; i += LANES) most = fmaxf(most, fabsf(folded[r * KEYS + i]));
        for (int j = lane; j < HEAD_DIM; j += LANES)
            shift = fmaf(raw[r * HEAD_DIM + j], a.fold_shift[head * HEAD_DIM + j], shift);
#pragma unroll
        for (int step = 16; step; step /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            shift += __shfl_xor_sync(~0u, shift, step);
        }
        if (lane == 0) {
            scale[r] = most / QUERY_RANGE;
            const Range range = visible(a, total, sequence, r < a.rows ? r % a.queries : 0);
            ((Row *)(out + FRAGMENTS))[r] = {most / QUERY_RANGE, shift, range.coded0, range.coded1};
        }
    }
    __syncthreads();
    // a word holds four columns of one row's high or low bytes
    for (int i = threadIdx.x; i < FRAGMENTS; i += FOLD_THREADS) {
        const int half = i % 2, of = i / 2 % LANES, n = i / (2 * LANES) % ROW_TILES;
        const int block = block_in(i / (2 * LANES * ROW_TILES), half, h), low = of / 4 % 2, r = 4 * n + of / 8;
        const float inverse = scale[r] > 0.f ? 1.f / scale[r] : 0.f;
        uint32_t word = 0;
        if (block >= 0)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int x = __float2int_rn(folded[r * KEYS + 16 * block + of % 4 * 4 + e] * inverse);
                const int high = (x + 128) >> 8;
                word |= (uint32_t)((low ? x - 256 * high : high) & 255) << 8 * e;
            }
        out[i] = word;
    }
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(FOLD_THREADS) fold_queries(const Arguments a) {
    extern __shared__ __align__(16) float memory[];
    fold_block(a, memory);
}
#endif

// Linear maps of head_dim numbers on tensor cores: a query into the coordinates of the codes, sums of codes into the
// output. A map lies in 16 x 16 pieces in the order of first operands, as 16-bit floats whose rows were scaled to
// their range. Numbers finer than bf16 get a second map of what those leave, and second operands are split, too.

constexpr int PARTS = NUMBER == 0 ? 1 : 2;

constexpr int PIECE_BYTES = 512, PART_BYTES = CHUNKS * CHUNKS * PIECE_BYTES;
constexpr int SCALES = PARTS * PART_BYTES, SHIFTS = SCALES + 4 * HEAD_DIM, MAP_BYTES = SHIFTS + 4 * HEAD_DIM;
// chunks of rows that a warp multiplies
constexpr int MINE = (CHUNKS + WARPS - 1) / WARPS;

struct Map {
    const uint8_t *at;
    __device__ __forceinline__ const float *scales() const { return (const float *)(at + SCALES); }
    __device__ __forceinline__ const float *shift() const { return (const float *)(at + SHIFTS); }
};

// Sixteen rows of a map.
struct Operand {
    uint4 x[CHUNKS];
    float2 scales, shift;  // of rows g and g + 8
    __device__ __forceinline__ void load(Map map, int chunk, int part) {
        const int row = 16 * chunk + threadIdx.x % LANES / 4;
        scales = make_float2(map.scales()[row], map.scales()[row + 8]);
        shift = make_float2(map.shift()[row], map.shift()[row + 8]);
        const uint4 *from = (const uint4 *)(map.at + part * PART_BYTES + chunk * CHUNKS * PIECE_BYTES);
#pragma unroll
        for (int s = 0; s < CHUNKS; s++) x[s] = from[s * LANES + threadIdx.x % LANES];
    }
};
// Rows of numbers as second operands: 16-bit floats [SPLITS, ROWS, HEAD_DIM] in shared memory, and what those leave.
constexpr int SPLITS = NUMBER == 0 ? 1 : 2;

__device__ __forceinline__ void store_halves(uint16_t *halves, int row, int column, float4 y) {
#pragma unroll
    for (int part = 0; part < SPLITS; part++) {
        const uint2 pair = {two_halves(y.x, y.y), two_halves(y.z, y.w)};
        *(uint2 *)(halves + (part * ROWS + row) * HEAD_DIM + column) = pair;
        y.x -= from_half((uint16_t)pair.x), y.y -= from_half((uint16_t)(pair.x >> 16));
        y.z -= from_half((uint16_t)pair.y), y.w -= from_half((uint16_t)(pair.y >> 16));
    }
}

// Numbers g and g + 8 of sixteen rows of the map times rows 4n + t, times their scales. `operand` has the first part.
__device__ __forceinline__ float2 multiply(Map map, int chunk, const Operand &operand, const uint16_t *halves, int n) {
    const int lane = threadIdx.x % LANES, g = lane / 4;
    // row g / 2; where numbers are split, what is left where g is odd
    const uint16_t *from = halves + (g % 2 * (SPLITS - 1) * ROWS + 4 * n + g / 2) * HEAD_DIM + lane % 4 * 4;
    float sum[2][4] = {};
#pragma unroll
    for (int s = 0; s < CHUNKS; s++) {
        const uint2 b = *(const uint2 *)(from + 16 * s);
        mma_half(sum[s % 2], operand.x[s], b.x, b.y);
    }
    if (PARTS == 2) {
        Operand more;
        more.load(map, chunk, 1);
#pragma unroll
        for (int s = 0; s < CHUNKS; s++) {
            const uint2 b = *(const uint2 *)(from + 16 * s);
            mma_half(sum[s % 2], more.x[s], b.x, b.y);
        }
    }
    float low = sum[0][0] + sum[1][0], high = sum[0][2] + sum[1][2];
    if (SPLITS == 2) low += sum[0][1] + sum[1][1], high += sum[0][3] + sum[1][3];
    return make_float2(low * operand.scales.x, high * operand.scales.y);
}

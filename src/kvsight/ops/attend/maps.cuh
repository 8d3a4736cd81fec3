// Linear maps of head_dim numbers on tensor cores: a query into the coordinates of the codes, sums of codes into the
// output. A map lies in 16 x 16 pieces in the order of first operands, as 16-bit floats whose rows were scaled to
// their range; numbers finer than bf16 get a second map of what those leave. Rows of second operands are split into two such
// numbers, so they lose nothing.

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
// Four rows of numbers as columns: row g / 2, the numbers themselves where g is even, what they leave where it is odd.
struct Columns {
    uint32_t b[CHUNKS][2];
    __device__ __forceinline__ void set(int s, const float *y) {
        const bool rest = threadIdx.x / 4 % 2;
        uint16_t half[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            half[e] = to_half(y[e]);
            if (rest) half[e] = to_half(y[e] - from_half(half[e]));
        }
        b[s][0] = half[0] | (uint32_t)half[1] << 16, b[s][1] = half[2] | (uint32_t)half[3] << 16;
    }
};

// Numbers g and g + 8 of sixteen rows of the map times row t, times their scales. `operand` has the first part.
__device__ __forceinline__ float2 multiply(Map map, int chunk, const Operand &operand, const Columns &columns) {
    float sum[2][4] = {};
#pragma unroll
    for (int s = 0; s < CHUNKS; s++) mma_half(sum[s % 2], operand.x[s], columns.b[s][0], columns.b[s][1]);
    if (PARTS == 2) {
        Operand more;
        more.load(map, chunk, 1);
#pragma unroll
        for (int s = 0; s < CHUNKS; s++) mma_half(sum[s % 2], more.x[s], columns.b[s][0], columns.b[s][1]);
    }
    const float low = sum[0][0] + sum[1][0] + (sum[0][1] + sum[1][1]);
    const float high = sum[0][2] + sum[1][2] + (sum[0][3] + sum[1][3]);
    return make_float2(low * operand.scales.x, high * operand.scales.y);
}

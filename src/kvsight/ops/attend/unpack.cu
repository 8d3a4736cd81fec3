// Centred codes of tiles, as numbers that torch's attention reads: [sequences, heads, 64 · tiles, COLUMNS].
//
// One block of threads does one tile of one head. It copies the tile to shared memory; then a thread puts eight
// neighbouring coordinates of one token together and writes them at once. A code minus the middle of its range is
// exact in every number type. Coordinates without bits are zeros.
//
// Compiled at run time with these macros:
//   COLUMNS       coordinates written for each token, a multiple of 16
//   NUMBER        type of the codes written (numbers.cuh)

constexpr int THREADS = 128, CHUNK = 16, TOKENS = 64, CHUNKS = COLUMNS / CHUNK, LEFT_OVER = 15;
// a word is left out after every 128, so that lanes that read of neighbouring chunks use different banks
constexpr int LINE = 128, WORDS = TOKENS * COLUMNS / 4, MEMORY = 4 * (WORDS + WORDS / LINE + 1);

// A piece of a chunk's codes: its bits, the lowest of them and its place in a nibble, 4 bits each; in the upper half
// where its bytes begin in a tile, in units of 128 bytes.
struct Head {
    const uint8_t *tiles;
    long long batch;  // bytes from one sequence to the next
    int words, pad;   // of a tile
    uint32_t pieces[2 * CHUNKS];
};
struct Arguments {
    const Head *heads;
    Number *out;
    int sequence, first, count;  // the first sequence, the first tile, and how many tiles
    int head_count, by_token;    // whether rows of tiles are tokens, as in keys
};

// Eight codes of one piece: coordinates 8 · half and on of a chunk.
__device__ __forceinline__ void add_piece(uint32_t *codes, uint32_t piece, const uint32_t *tile, int token, int half,
                                          bool by_token) {
    const int size = piece & 15, low = piece >> 4 & 15, group = token / 16, inner = token % 16;
    const bool left_over = (piece >> 8 & 15) == LEFT_OVER;
    // groups of tokens share the words of what is left over
    const int lane_words = left_over ? size : 4, share = 4 / lane_words;
    const int slot = left_over ? group % share : piece >> 8 & 15;
    const int start = 32 * (piece >> 16) + group / share;
    const uint32_t mask = (1u << size) - 1;
    if (by_token) {
        const int down = size * slot + 4 * (inner / 8);
#pragma unroll
        for (int q = 0; q < 2; q++) {
            const int at = start + lane_words * (4 * (inner % 8) + 2 * half + q);
            const uint32_t word = tile[at + at / LINE] >> down;
#pragma unroll
            for (int e = 0; e < 4; e++) codes[4 * q + e] |= (word >> 8 * e & mask) << low;
        }
    } else {
        const int down = size * slot + 4 * half + 8 * (inner % 2 * 2 + inner / 8);
#pragma unroll
        for (int g = 0; g < 8; g++) {
            const int at = start + lane_words * (4 * g + inner % 8 / 2);
            codes[g] |= (tile[at + at / LINE] >> down & mask) << low;
        }
    }
}

__device__ void unpack_block(const Arguments &a, unsigned char *memory) {
    const int head = blockIdx.y, sequence = blockIdx.z;
    const Head &h = a.heads[head];
    uint32_t *tile = (uint32_t *)memory;
    const uint32_t *source =
        (const uint32_t *)(h.tiles + (a.sequence + sequence) * h.batch) + (long long)(a.first + blockIdx.x) * h.words;
#pragma unroll 4
    for (int i = threadIdx.x; i < h.words; i += THREADS) tile[i + i / LINE] = source[i];
    __syncthreads();
    const long long row = ((long long)sequence * a.head_count + head) * a.count + blockIdx.x;
    Number *out = a.out + row * TOKENS * COLUMNS;
    for (int i = threadIdx.x; i < TOKENS * CHUNKS * 2; i += THREADS) {
        const int half = i % 2, chunk = i / 2 % CHUNKS, token = i / (2 * CHUNKS);
        uint32_t codes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        int width = 0;
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const uint32_t piece = h.pieces[2 * chunk + p];
            if (piece == 0) continue;
            width += piece & 15;
            add_piece(codes, piece, tile, token, half, a.by_token != 0);
        }
        const float middle = 0.5f * (float)((1 << width) - 1);
        alignas(16) Number numbers[8];
#pragma unroll
        for (int j = 0; j < 8; j++) numbers[j] = rounded((float)codes[j] - middle);
#pragma unroll
        for (int j = 0; j < (int)sizeof numbers / 16; j++) ((uint4 *)(out + 8 * i))[j] = ((const uint4 *)numbers)[j];
    }
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(THREADS) unpack_tiles(const Arguments a) {
    __shared__ __align__(16) unsigned char memory[MEMORY];
    unpack_block(a, memory);
}
#endif

// Code a few new tokens of one layer and write them into its tiles: centre, map, round and pack in one pass.
//
// One block of threads does one KV head of one sequence, keys or values. A code is the nearest of evenly spaced
// levels, so mean, map, lowest level and step are folded into one affine map. A token owns its bits of a tile:
// bytes that it shares with other tokens are read, changed and written back by one thread.
//
// Compiled at run time with these macros:
//   HEAD_DIM      d
//   BLOCKS        most blocks of any head (src/kvsight/tiling.py)
//   NUMBER        type of keys and values (numbers.cuh)

constexpr int THREADS = 128, CHUNK = 16, TOKENS = 64, BATCH = 4;

// One side of one head. A piece is the first coordinate of its chunk, then the lowest bit of its codes, then the
// most that a code of the chunk can be, a byte each from the lowest.
struct Head {
    uint8_t *tiles;
    long long batch;  // bytes from one sequence to the next
    int count4, count2, count1, stored;
    uint32_t pieces[BLOCKS];
};
struct Side {
    const Number *tokens;  // x[b, h, i, :] is `tokens + b · batch + h · head + i · token`
    const Head *heads;
    const float *map;      // [heads, HEAD_DIM, HEAD_DIM]: a code is x @ map + shift, rounded
    const float *shift;    // [heads, HEAD_DIM]
    long long batch, head, token;
};
struct Arguments {
    Side sides[2];          // keys, values
    const int *seen;        // [1]: tokens of a sequence, the new ones included
    int count, first;       // new tokens; tokens before the coded ones
};
constexpr int CODES = HEAD_DIM;

__device__ __forceinline__ uint32_t piece(const uint8_t *codes, uint32_t piece, int column, int size) {
    return codes[(piece & 255) + column] >> (piece >> 8 & 255) & ((1u << size) - 1);
}

// The bytes of one token. Keys: a nibble for each of 16 columns. Values: a byte for each of 8 pairs of rows.
__device__ void write_token(const Head &h, const uint8_t *codes, uint8_t *tile, int at, bool keys) {
    const int group = at / 16, inner = at % 16;
    const int pairs = h.count2 / 2, quads = h.count1 / 4, rest2 = h.count2 & 1, rest1 = h.count1 & 3;
    const int whole = h.count4 + pairs + quads, work = whole + rest2 + rest1, lines = keys ? 16 : 8;
    for (int i = threadIdx.x; i < work * lines; i += THREADS) {
        const int line = i % lines, unit = i / lines;
        const int lane = keys ? 4 * (inner % 8) + line / 4 : 4 * line + inner % 8 / 2;
        const int byte = keys ? line % 4 : 2 * (inner % 2) + inner / 8;
        const int size = unit < h.count4 ? 4
                         : unit < h.count4 + pairs ? 2
                         : unit < whole ? 1
                         : unit < whole + rest2 ? 2 : 1;
        const int share = 4 / size;
        int block, slots, slot0, offset;
        if (unit < whole) {
            block = size == 4 ? unit
                    : size == 2 ? h.count4 + 2 * (unit - h.count4)
                                : h.count4 + h.count2 + 4 * (unit - h.count4 - pairs);
            slots = share, slot0 = 0;
            offset = 512 * unit + 16 * lane + 4 * group + byte;
        } else {
            const int single = unit - whole - rest2;
            block = size == 2 ? h.count4 + h.count2 - 1 : h.count4 + h.count2 + 4 * quads + single;
            slots = 1, slot0 = group % share;
            offset = 512 * whole + (size == 1 ? 256 * rest2 + 128 * single : 0) + 4 * size * lane +
                     4 * (group / share) + byte;
        }
        uint32_t value = 0, mask = 0;
        for (int s = 0; s < slots; s++) {
            const int down = size * (slot0 + s);
            const uint32_t all = (1u << size) - 1, own = h.pieces[block + s];
            if (keys) {
                const int up = down + 4 * (inner / 8);
                value |= piece(codes, own, line, size) << up, mask |= all << up;
            } else {
                value |= piece(codes, own, line, size) << down | piece(codes, own, line + 8, size) << (down + 4);
                mask |= all << down | all << (down + 4);
            }
        }
        tile[offset] = (uint8_t)((mask == 255 ? 0 : tile[offset] & ~mask) | value);
    }
}

__device__ void encode_block(const Arguments &a, unsigned char *memory) {
    const int head = blockIdx.x / 2, sequence = blockIdx.y;
    const bool keys = blockIdx.x % 2 == 0;
    const Side &side = a.sides[keys ? 0 : 1];
    const Head &h = side.heads[head];
    float *x = (float *)memory;                           // [BATCH, HEAD_DIM]
    uint8_t *codes = (uint8_t *)(x + BATCH * HEAD_DIM);   // [BATCH, CODES]
    const Number *tokens = side.tokens + sequence * side.batch + head * side.head;
    const float *map = side.map + (long long)head * HEAD_DIM * HEAD_DIM, *shift = side.shift + head * HEAD_DIM;
    const int position = *a.seen - a.count - a.first;
    const int tile_bytes = 128 * (4 * h.count4 + 2 * h.count2 + h.count1);
    for (int from = 0; from < a.count; from += BATCH) {
        const int some = a.count - from < BATCH ? a.count - from : BATCH;
        for (int i = threadIdx.x; i < some * HEAD_DIM; i += THREADS)
            x[i] = number(tokens[(from + i / HEAD_DIM) * side.token + i % HEAD_DIM]);
        __syncthreads();
        for (int i = threadIdx.x; i < h.stored; i += THREADS) {
            float y[BATCH];
#pragma unroll
            for (int n = 0; n < BATCH; n++) y[n] = shift[i];
#pragma unroll 8
            for (int j = 0; j < HEAD_DIM; j++) {
                const float m = map[j * HEAD_DIM + i];
#pragma unroll
                for (int n = 0; n < BATCH; n++) y[n] = fmaf(x[n * HEAD_DIM + j], m, y[n]);
            }
            uint32_t most = 0;
            for (int b = 0; b < h.count4 + h.count2 + h.count1; b++)
                if ((h.pieces[b] & 255) == (uint32_t)(i / CHUNK * CHUNK)) most = h.pieces[b] >> 16;
            // halfway goes down, as in the reference
            for (int n = 0; n < some; n++)
                codes[n * CODES + i] = (uint8_t)fminf(fmaxf(ceilf(y[n] - 0.5f), 0.f), (float)most);
        }
        __syncthreads();
        for (int n = 0; n < some; n++) {
            const int at = position + from + n;
            if (at >= 0) {
                uint8_t *tile = h.tiles + sequence * h.batch + (long long)(at / TOKENS) * tile_bytes;
                write_token(h, codes + n * CODES, tile, at % TOKENS, keys);
            }
            __syncthreads();
        }
    }
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(THREADS) encode_tiles(const Arguments a) {
    __shared__ __align__(16) unsigned char memory[BATCH * HEAD_DIM * 4 + BATCH * CODES];
    encode_block(a, memory);
}
#endif

// Code new tokens of one layer and write them into its tiles: centre, map, round and pack in one pass.
//
// A code is the nearest of evenly spaced levels, so mean, map, lowest level and step are folded into one affine map.
// It is multiplied by tensor cores: tokens are one operand (keys the first, values the second), so that a lane ends
// with the codes whose bytes it writes. Tokens and map are halves (fp16 numbers), or sums of two; every code is the
// same sum in the same order, wherever its token lies in a launch.
//
// Heads' tiles lie behind one another on a line, and a block of threads takes a slice of it. A team of warps does one
// tile at a time, in shared memory: it begins with the other tokens' bits, or with zeros, and is stored as a whole.
//
// Compiled at run time with these macros:
//   HEAD_DIM      d
//   NUMBER        type of keys and values (numbers.cuh)
//   PARTS         halves that a number of keys and values, and of the map, is the sum of
//   WARPS         of a block
//   TEAM          warps that share a tile: 1 to fill tiles, all to be quick with a few tokens
//   GROUPS        groups of 16 tokens that a warp multiplies at once
//   RESIDENT      whether the map of a head is kept in shared memory
//   PER_SM        blocks that a multiprocessor should hold

constexpr int LANES = 32, CHUNK = 16, TOKENS = 64, THREADS = WARPS * LANES, CHUNKS = HEAD_DIM / CHUNK;
// a lane reads 8 numbers of a token at once: two products of 16 coordinates
constexpr int STEPS = (HEAD_DIM + 31) / 32, PRODUCTS = 2 * STEPS;
constexpr int CHUNK_VECTORS = PRODUCTS * PARTS * LANES;
// with a team's warp for every chunk, its part of the map is on its way before anything else is known
constexpr bool HELD = TEAM > 1 && TEAM >= CHUNKS && HEAD_DIM <= 128;

#ifndef EMULATED
// two numbers in a word each; what is too large for a half becomes the largest one
__device__ __forceinline__ uint32_t two_halves_within(float low, float high) {
    uint32_t y;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ uint32_t half_products_within(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2; min.NaN.f16x2 %0, %0, %3; max.NaN.f16x2 %0, %0, %4;"
        : "=&r"(z) : "r"(x), "r"(y), "r"(0x7bff7bffu), "r"(0xfbfffbffu));
    return z;
}
__device__ __forceinline__ uint32_t bf16_products(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

// Bits of codes (src/kvsight/tiling.py): where they go in every word of a block; the word of the tile where the block
// begins (16 bits), its size (4), how far codes turn right to get there (5), and from bit 28 whether it is left over.
// A mask of 0 is no piece.
struct Piece {
    uint32_t mask, place;
};
// 16 coordinates of one head. A sum times `scale` plus `shift` is a code and a half in units of 2^width, which is a
// little more than `limit`.
struct alignas(16) Coordinates {
    float shift[CHUNK];
    float scale, limit;
    Piece pieces[2];
};
// One side of one head: its tiles, bytes from one sequence to the next, bytes of a tile, chunks that have any bits,
// words of blocks that fill their nibbles, words of 2-bit blocks left over; what brings numbers into the range of
// halves.
struct alignas(16) Store {
    uint8_t *tiles;
    long long batch;
    int nbytes, chunks, whole, pairs;
    float range;
};
struct Head {
    Store store;
    Coordinates coordinates[CHUNKS];
};
constexpr int HEAD_BYTES = (sizeof(Head) + 127) / 128 * 128;
struct Side {
    const Number *tokens;  // x[b, h, i, :] is `tokens + b · batch + h · head + i · token`
    const Head *heads;
    const uint4 *map;      // [heads, CHUNKS, PRODUCTS, PARTS, LANES]
    long long batch, head, token;
};
struct Arguments {
    Side sides[2];     // keys, values
    const int *seen;   // [1]: tokens of a sequence, the new ones included
    int count, first;  // new tokens; tokens before the coded ones
    int heads, batch;
    int tiles;         // the most tiles of a sequence that new tokens can touch
    int blocks;        // of threads
    int image;         // bytes of shared memory for a tile
};

// New tokens of a sequence lie in [begin, end) of the coded ones; the tile begins with token `at`.
struct Span {
    int at, begin, end;
    __device__ bool has(int token) const { return at + token >= begin && at + token < end; }
    __device__ bool whole() const { return at >= begin && at + TOKENS <= end; }
    __device__ bool meets(int from, int tokens) const { return at + from < end && at + from + tokens > begin; }
};

// Bits of new tokens in the word of 16 of them and four columns that a lane has of a block.
template <bool KEYS> __device__ uint32_t new_bits(const Span &span, int lane, int group) {
    const int g = 16 * group + lane / 4, t = 16 * group + lane % 4 * 2;
    if (KEYS) return (span.has(g) ? 0x0f0f0f0fu : 0) | (span.has(g + 8) ? 0xf0f0f0f0u : 0);
    return (span.has(t) ? 0xffu : 0) | (span.has(t + 8) ? 0xff00u : 0) | (span.has(t + 1) ? 0xff0000u : 0) |
           (span.has(t + 9) ? 0xff000000u : 0);
}

// The same in a lane's words of blocks that fill their nibbles, of 2-bit blocks left over, and of 1-bit ones.
template <bool KEYS> struct NewBits {
    uint32_t whole[4], pairs[2], single = 0;

    __device__ NewBits(const Span &span, int lane) {
#pragma unroll
        for (int group = 0; group < 4; group++) whole[group] = new_bits<KEYS>(span, lane, group);
#pragma unroll
        for (int i = 0; i < 2; i++) pairs[i] = (whole[2 * i] & 0x33333333u) | (whole[2 * i + 1] & 0xccccccccu);
#pragma unroll
        for (int group = 0; group < 4; group++) single |= whole[group] & 0x11111111u << group;
    }
    __device__ bool any() const { return whole[0] | whole[1] | whole[2] | whole[3]; }
    __device__ uint4 without(const uint4 &x) const {
        return {x.x & ~whole[0], x.y & ~whole[1], x.z & ~whole[2], x.w & ~whole[3]};
    }
    __device__ uint2 without(const uint2 &x) const { return {x.x & ~pairs[0], x.y & ~pairs[1]}; }
    __device__ uint32_t without(uint32_t x) const { return x & ~single; }
};

// Words of a tile that have bits of new tokens, from one tile to another; with old bits only.
template <bool KEYS, bool OLD>
__device__ __forceinline__ void copy_words(uint8_t *to, const uint8_t *from, const Store &h, const Span &span, int warp,
                                           int lane) {
    const NewBits<KEYS> bits(span, lane);
    if (!bits.any()) return;
    for (int i = warp * LANES + lane; i < h.whole / 4; i += TEAM * LANES) {
        const uint4 x = ((const uint4 *)from)[i];
        ((uint4 *)to)[i] = OLD ? bits.without(x) : x;
    }
    from += 4 * h.whole, to += 4 * h.whole;
    if (h.pairs && warp == 0) {
        const uint2 x = ((const uint2 *)from)[lane];
        ((uint2 *)to)[lane] = OLD ? bits.without(x) : x;
    }
    for (int i = h.pairs + warp * LANES + lane; i < h.nbytes / 4 - h.whole; i += TEAM * LANES) {
        const uint32_t x = ((const uint32_t *)from)[i];
        ((uint32_t *)to)[i] = OLD ? bits.without(x) : x;
    }
}

// Rows g and g + 8 of groups of 16 tokens, in the order of operands. A lane has numbers 8t to 8t + 7 of 32, two in a
// word, four for each of two products.
struct Rows {
    uint32_t words[PARTS][PRODUCTS][GROUPS][4];
};

// Eight numbers times a power of two, as halves.
__device__ __forceinline__ void split(uint32_t (&pairs)[PARTS][4], const Number *from, float range) {
    const uint4 *wide = (const uint4 *)from;
    const uint4 x = wide[0];
#if NUMBER == 2
    const uint4 y = wide[1];
    const uint32_t bits[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = __uint_as_float(bits[2 * i]) * range, high = __uint_as_float(bits[2 * i + 1]) * range;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const uint32_t pair = pairs[part][i] = two_halves_within(low, high);
            low -= from_half((uint16_t)pair), high -= from_half((uint16_t)(pair >> 16));
        }
    }
#else
    const uint32_t bits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if NUMBER == 1
        pairs[0][i] = half_products_within(bits[i], two_halves_within(range, range));
#else
        const uint32_t pair = bf16_products(bits[i], __byte_perm(__float_as_uint(range), 0, 0x3232));
        pairs[0][i] = two_halves_within(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
    }
#endif
}

// `tokens` is the row that the first token of the tile has, or would have. Rows that are not new are those of others.
__device__ __forceinline__ void load_rows(Rows &rows, const Number *tokens, long long stride, const Span &span,
                                          float range, int from, int lane) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int wanted = from + 16 * group + 8 * half + lane / 4, column = lane % 4 * 8;
            const int token = min(max(wanted, span.begin - span.at), span.end - span.at - 1);
            const Number *row = tokens + token * stride + column;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                uint32_t pairs[PARTS][4] = {};
                if (HEAD_DIM % 32 == 0 || 32 * step + column < HEAD_DIM) split(pairs, row + 32 * step, range);
#pragma unroll
                for (int part = 0; part < PARTS; part++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        rows.words[part][2 * step + i / 2][group][half + i % 2 * 2] = pairs[part][i];
            }
        }
}

// What 16 coordinates want besides tokens.
template <bool KEYS> struct Chunk {
    const uint4 *map;
    uint4 held[HELD ? PRODUCTS : 1][PARTS];
    float shift[4], scale, limit;
    Piece pieces[2];

    __device__ __forceinline__ Chunk(const Head &h, const uint4 *all, int chunk, int lane) {
        map = all + chunk * CHUNK_VECTORS + lane;
        if (HELD)
#pragma unroll
            for (int i = 0; i < PRODUCTS; i++)
#pragma unroll
                for (int part = 0; part < PARTS; part++) held[i][part] = map[(i * PARTS + part) * LANES];
        const Coordinates &own = h.coordinates[chunk];
        // keys: columns 4t to 4t + 3; values: rows g and g + 8
#pragma unroll
        for (int i = 0; i < (KEYS ? 4 : 2); i++) shift[i] = own.shift[KEYS ? lane % 4 * 4 + i : lane / 4 + 8 * i];
        scale = own.scale, limit = own.limit;
        pieces[0] = own.pieces[0], pieces[1] = own.pieces[1];
    }
    __device__ __forceinline__ uint4 operand(int product, int part) const {
        return HELD ? held[product][part] : map[(product * PARTS + part) * LANES];
    }
};

// Two products of one group of tokens. Keys: columns 0, 1 and 2, 3 of four, tokens g and g + 8. Values: tokens 2t,
// 2t + 1 and those 8 behind, coordinates g and g + 8.
template <bool KEYS>
__device__ __forceinline__ void multiply(float (&y)[2][4], const uint32_t (&x)[4], const uint4 &m) {
    if (KEYS) {
        const uint4 rows = {x[0], x[1], x[2], x[3]};
        mma_half(y[0], rows, m.x, m.y);
        mma_half(y[1], rows, m.z, m.w);
    } else {
        mma_half(y[0], m, x[0], x[2]);
        mma_half(y[1], m, x[1], x[3]);
    }
}

template <bool KEYS>
__device__ __forceinline__ void map_rows(float (&y)[GROUPS][2][4], const Rows &rows, const Chunk<KEYS> &chunk) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 8; i++) y[group][i / 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < PRODUCTS; i++)
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            const uint4 m = chunk.operand(i, k);
            // the last parts of both are beyond what the map is known to
#pragma unroll
            for (int part = 0; part < (k ? 1 : PARTS); part++)
#pragma unroll
                for (int group = 0; group < GROUPS; group++)
                    multiply<KEYS>(y[group], rows.words[part][i][group], m);
        }
}

// The code in the lowest byte: what is added leaves no digits behind the point.
__device__ __forceinline__ uint32_t code(float y, float scale, float shift, float limit) {
    return __float_as_uint(__fmaf_rz(__saturatef(fmaf(y, scale, shift)), limit, 8388608.f));
}

// Codes of row g (first = 0) or g + 8 (first = 2), a byte for each column.
template <bool KEYS>
__device__ __forceinline__ uint32_t codes(const float (&y)[2][4], int first, const Chunk<KEYS> &chunk) {
    uint32_t c[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        c[i] = code(y[i / 2][first + i % 2], chunk.scale, chunk.shift[KEYS ? i : first / 2], chunk.limit);
    return __byte_perm(__byte_perm(c[0], c[1], 0x40), __byte_perm(c[2], c[3], 0x40), KEYS ? 0x5410 : 0x5140);
}

struct alignas(4 * GROUPS) Words {
    uint32_t of[GROUPS];
};

// Add bits to a tile. Words of a lane are its own, unless the team has other warps.
__device__ __forceinline__ void add(uint32_t *word, uint32_t bits) {
    if (TEAM > 1)
        atomicOr(word, bits);
    else
        *word |= bits;
}
__device__ __forceinline__ void add(uint32_t *words, const Words &bits) {
    if (TEAM > 1) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) atomicOr(words + i, bits.of[i]);
    } else {
        Words all = *(Words *)words;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) all.of[i] |= bits.of[i];
        *(Words *)words = all;
    }
}

__device__ __forceinline__ uint32_t turned_right(uint32_t x, uint32_t bits) { return x >> bits | x << (-bits & 31); }

template <bool KEYS>
__device__ __forceinline__ void pack(uint32_t *image, const float (&y)[GROUPS][2][4], const Chunk<KEYS> &chunk,
                                     const Words &own, int first_group, int lane) {
    uint32_t low[GROUPS], high[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
        low[group] = codes<KEYS>(y[group], 0, chunk), high[group] = codes<KEYS>(y[group], 2, chunk);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t mask = chunk.pieces[i].mask, place = chunk.pieces[i].place;
        if (!mask) continue;
        uint32_t *block = image + (place & 0xffff);
        const uint32_t turn = place >> 20 & 31, turn_high = turn - 4 & 31;
        Words bits;
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
            bits.of[group] = ((turned_right(low[group], turn) & 0x0f0f0f0fu) |
                              (turned_right(high[group], turn_high) & 0xf0f0f0f0u)) &
                             mask & own.of[group];
        if (!(place >> 28)) {
            add(block + 4 * lane + first_group, bits);
        } else {
            // groups of tokens take the places of a nibble in turn
            const int size = place >> 16 & 15;
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                const int group = first_group + j;
                add(block + size * lane + group * size / 4, bits.of[j] << group * size % 4);
            }
        }
    }
}

__device__ __forceinline__ void meet_team() {
    if (TEAM > 1)
        __syncthreads();
    else
        __syncwarp();
}

template <bool KEYS>
__device__ __forceinline__ void begin_tile(uint32_t *image, const uint8_t *tile, const Store &h, const Span &span,
                                           int warp, int lane) {
    if (span.whole())
        for (int i = warp * LANES + lane; i < h.nbytes / 16; i += TEAM * LANES) ((uint4 *)image)[i] = {0, 0, 0, 0};
    else
        copy_words<KEYS, true>((uint8_t *)image, tile, h, span, warp, lane);
    meet_team();
}

template <bool KEYS>
__device__ void encode_tile(const Head &head, const Store &h, const Number *tokens, long long stride, uint8_t *tile,
                            const Span &span, const uint4 *map, const Chunk<KEYS> &first, uint32_t *image) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES % TEAM;
    // to be quick, old bits are read while tokens are on their way; to fill tiles, registers are dearer
    bool begun = TEAM == 1;
    if (begun) begin_tile<KEYS>(image, tile, h, span, warp, lane);
#pragma unroll 1
    for (int group = 0; group < TOKENS / 16; group += GROUPS) {
        if (!span.meets(16 * group, 16 * GROUPS)) continue;
        Rows rows;
        load_rows(rows, tokens, stride, span, h.range, 16 * group, lane);
        if (!begun) begin_tile<KEYS>(image, tile, h, span, warp, lane), begun = true;
        Words own;
#pragma unroll
        for (int j = 0; j < GROUPS; j++) own.of[j] = new_bits<KEYS>(span, lane, group + j);
        float y[GROUPS][2][4];
        if (HELD) {
            if (warp < h.chunks) map_rows(y, rows, first), pack(image, y, first, own, group, lane);
        } else {
#pragma unroll 1
            for (int c = warp; c < h.chunks; c += TEAM) {
                const Chunk<KEYS> chunk(head, map, c, lane);
                map_rows(y, rows, chunk), pack(image, y, chunk, own, group, lane);
            }
        }
    }
    meet_team();
    if (span.whole())
        for (int i = warp * LANES + lane; i < h.nbytes / 16; i += TEAM * LANES)
            ((uint4 *)tile)[i] = ((const uint4 *)image)[i];
    else
        copy_words<KEYS, false>(tile, (const uint8_t *)image, h, span, warp, lane);
    meet_team();
}

// Tiles [from, to) of all sequences of one head.
template <bool KEYS>
__device__ void encode_head(const Arguments &a, int head, int from, int to, unsigned char *memory) {
    const Side &side = a.sides[KEYS ? 0 : 1];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, team = warp / TEAM;
    const Head *h = side.heads + head;
    const Store early = h->store;
    const uint4 *map = side.map + (long long)head * CHUNKS * CHUNK_VECTORS;
    const Chunk<KEYS> first(*h, map, HELD ? warp : 0, lane);
    if (RESIDENT) {
        uint4 *held = (uint4 *)(memory + HEAD_BYTES);
        for (int i = threadIdx.x; i < (int)sizeof(Head) / 4; i += THREADS)
            ((uint32_t *)memory)[i] = ((const uint32_t *)h)[i];
        for (int i = threadIdx.x; i < early.chunks * CHUNK_VECTORS; i += THREADS) copy_async(held + i, map + i);
        copies_done();
        h = (const Head *)memory, map = held;
        memory += HEAD_BYTES + CHUNKS * CHUNK_VECTORS * sizeof(uint4);
        __syncthreads();
    }
    const Store &store = RESIDENT ? h->store : early;
    uint32_t *image = (uint32_t *)(memory + team * a.image);
    const int position = *a.seen - a.count - a.first, begin = max(position, 0);
    for (int i = from + team; i < to; i += WARPS / TEAM) {
        const int sequence = i / a.tiles, tile = begin / TOKENS + i % a.tiles;
        const Span span = {tile * TOKENS, begin, position + a.count};
        if (span.at >= span.end) continue;
        const Number *tokens =
            side.tokens + sequence * side.batch + head * side.head + (span.at - position) * side.token;
        uint8_t *out = store.tiles + sequence * store.batch + (long long)tile * store.nbytes;
        encode_tile<KEYS>(*h, store, tokens, side.token, out, span, map, first, image);
    }
    if (RESIDENT) __syncthreads();
}

__device__ void encode_block(const Arguments &a, unsigned char *memory) {
    const long long per_head = (long long)a.batch * a.tiles, all = 2 * a.heads * per_head;
    const long long end = all * (blockIdx.x + 1) / a.blocks;
    for (long long at = all * blockIdx.x / a.blocks; at < end;) {
        const int owner = (int)(at / per_head);
        const long long before = owner * per_head, stop = min(end, before + per_head);
        const int from = (int)(at - before), to = (int)(stop - before);
        if (owner % 2 == 0)
            encode_head<true>(a, owner / 2, from, to, memory);
        else
            encode_head<false>(a, owner / 2, from, to, memory);
        at = stop;
    }
}

#ifndef EMULATED
extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) encode_tiles(const Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    encode_block(a, memory);
}
#endif

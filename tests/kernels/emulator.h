// Runs one block of CUDA threads after another on a CPU, as fibers of one host thread: deterministic, no races.
//
// It knows the few intrinsics that our kernels use. Tensor core operands are taken apart by the register
// layouts of the PTX manual. Asynchronous copies happen as late as the kernel allows, and shared memory
// starts poisoned, so reading too early is seen. Memory ordering between threads is not tested here.
#pragma once
#define EMULATED
// few headers: every test compiles this once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__
#define INF __builtin_inff()
#define copysignf __builtin_copysignf
#define exp2f __builtin_exp2f
#define fabsf __builtin_fabsf
#define fmaf __builtin_fmaf
#define fmaxf __builtin_fmaxf
#define fminf __builtin_fminf
#define nearbyintf __builtin_nearbyintf
#define nextafterf __builtin_nextafterf
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct int4 {
    int x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
struct Copy {
    void *to;
    const void *from;
    int bytes;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};
struct Barrier {
    std::vector<Copy> copies;
    bool armed = false;
    int expected = 0;
    uint32_t completed = 0;
};
struct Meeting {
    int arrived = 0;
    long generation = 0;
};
struct Index {
    int x, y, z;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current, living;
inline Index block;
inline Meeting all;
// where a barrier lies is its number
inline std::vector<Barrier> barriers;
// copies of 16 bytes that threads have begun
inline std::vector<std::vector<Copy>> begun;
inline std::vector<Meeting> warps;
// what every lane of a warp brings to a meeting, and takes from it
inline uint32_t brought[32][32][12], taken[32][32][4];
inline void (*kernel)();

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
template <class Exchange> void meet(Meeting &m, int size, Exchange exchange) {
    long before = m.generation;
    if (++m.arrived == size) {
        exchange();
        m.arrived = 0;
        m.generation++;
        return;
    }
    while (m.generation == before) yield();
}
inline int lane() { return current % 32; }
inline int warp() { return current / 32; }
template <class Exchange> void meet_warp(Exchange exchange) { meet(warps[warp()], 32, exchange); }
inline void entry() {
    kernel();
    fibers[current].done = true;
    yield();
}
template <class Body> void run(int threads, Index grid, unsigned char *memory, size_t bytes, Body body) {
    static Body *own;
    own = &body;
    kernel = [] { (*own)(); };
    for (block.z = 0; block.z < grid.z; block.z++)
        for (block.y = 0; block.y < grid.y; block.y++)
            for (block.x = 0; block.x < grid.x; block.x++) {
                memset(memory, 0xff, bytes);
                fibers = std::vector<Fiber>(threads);
                warps.assign(threads / 32, {});
                all = {};
                barriers.clear();
                begun.assign(threads, {});
                for (auto &f : fibers) {
                    f.stack.resize(1 << 17);
                    f.done = false;
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp = f.stack.data();
                    f.context.uc_stack.ss_size = f.stack.size();
                    f.context.uc_link = nullptr;
                    makecontext(&f.context, entry, 0);
                }
                for (living = threads; living;)
                    for (current = 0; current < threads; current++)
                        if (!fibers[current].done) {
                            swapcontext(&scheduler, &fibers[current].context);
                            living -= fibers[current].done;
                        }
            }
}
inline Barrier &barrier(const uint64_t *at) {
    if (*at >= barriers.size()) {
        fprintf(stderr, "there is no barrier\n");
        abort();
    }
    return barriers[*at];
}
}  // namespace emulator

#define threadIdx (emulator::Index{emulator::current, 0, 0})
#define blockIdx (emulator::block)

inline void __syncthreads() {
    emulator::meet(emulator::all, (int)emulator::fibers.size(), [] {});
}
template <class T> T __ldcg(const T *p) { return *p; }
inline unsigned count_up(unsigned *at, unsigned last) {
    const unsigned before = *at;
    *at = before < last ? before + 1 : 0;
    return before;
}
inline unsigned atomicOr(unsigned *p, unsigned v) {
    unsigned old = *p;
    *p |= v;
    return old;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
inline float bits_to_float(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
#define __uint_as_float bits_to_float
inline float __fmaf_rz(float x, float y, float z) {
    long double sum = (long double)x * y + z;
    float rounded = (float)sum;
    return rounded > sum ? nextafterf(rounded, -INF) : rounded;
}
inline float __fadd_rz(float x, float y) {
    const double sum = (double)x + y;
    const float near = (float)sum;
    return std::abs((double)near) > std::abs(sum) ? nextafterf(near, 0.f) : near;
}
inline float __saturatef(float x) { return x > 0.f ? fminf(x, 1.f) : 0.f; }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline void __syncwarp() {
    emulator::meet_warp([] {});
}
inline float __shfl_xor_sync(unsigned, float x, int mask) {
    using namespace emulator;
    int w = warp(), l = lane();
    brought[w][l][0] = __float_as_uint(x);
    meet_warp([w] {
        for (int i = 0; i < 32; i++) taken[w][i][0] = brought[w][i][0];
    });
    return bits_to_float(taken[w][l ^ mask][0]);
}
inline float __shfl_sync(unsigned, float x, int from) {
    using namespace emulator;
    int w = warp();
    brought[w][lane()][0] = __float_as_uint(x);
    meet_warp([w] {
        for (int i = 0; i < 32; i++) taken[w][i][0] = brought[w][i][0];
    });
    return bits_to_float(taken[w][from][0]);
}
inline int __any_sync(unsigned, int predicate) {
    using namespace emulator;
    int w = warp();
    brought[w][lane()][0] = predicate;
    meet_warp([w] {
        uint32_t any = 0;
        for (int i = 0; i < 32; i++) any |= brought[w][i][0];
        for (int i = 0; i < 32; i++) taken[w][i][0] = any;
    });
    return (int)taken[w][lane()][0];
}
// movmatrix.m8n8.trans.b16: lane 4r + c holds elements (r, 2c) and (r, 2c + 1)
inline uint32_t transpose8x8(uint32_t x) {
    using namespace emulator;
    int w = warp();
    brought[w][lane()][0] = x;
    meet_warp([w] {
        auto element = [w](int row, int column) {
            return brought[w][4 * row + column / 2][0] >> 16 * (column % 2) & 0xffff;
        };
        for (int i = 0; i < 32; i++)
            taken[w][i][0] = element(2 * (i % 4), i / 4) | element(2 * (i % 4) + 1, i / 4) << 16;
    });
    return taken[w][lane()][0];
}
// mma.m16n8k32 of 8-bit integers
inline void mma_8bit(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     bool is_signed) {
    using namespace emulator;
    int w = warp(), l = lane();
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, (uint32_t)c[0], (uint32_t)c[1], (uint32_t)c[2], (uint32_t)c[3]};
    memcpy(brought[w][l], mine, sizeof mine);
    meet_warp([w, is_signed] {
        auto a = [w](int row, int k) {
            return (int)(brought[w][row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)] >> 8 * (k % 4) & 255);
        };
        auto b = [w, is_signed](int k, int column) {
            int x = (int)(brought[w][column * 4 + k % 16 / 4][4 + k / 16] >> 8 * (k % 4) & 255);
            return is_signed ? (int)(int8_t)x : x;
        };
        for (int i = 0; i < 32; i++)
            for (int e = 0; e < 4; e++) {
                int row = i / 4 + 8 * (e / 2), column = 2 * (i % 4) + e % 2;
                long sum = (int)brought[w][i][6 + e];
                for (int k = 0; k < 32; k++) sum += (long)a(row, k) * b(k, column);
                if (sum != (int)sum) {
                    fprintf(stderr, "an int32 sum overflows\n");
                    abort();
                }
                taken[w][i][e] = (uint32_t)sum;
            }
    });
    for (int e = 0; e < 4; e++) c[e] = (int)taken[w][l][e];
}
inline void mma_signed(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint2 b) {
    mma_8bit(c, a0, a1, a2, a3, b.x, b.y, true);
}
inline void mma_unsigned(int *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    mma_8bit(c, a0, a1, a2, a3, b0, b1, false);
}
// products of two bf16 numbers each; powers of two are all that is multiplied
inline uint32_t bf16_products(uint32_t x, uint32_t y) {
    auto product = [](uint32_t a, uint32_t b) { return __float_as_uint(bits_to_float(a) * bits_to_float(b)); };
    return product(x << 16, y << 16) >> 16 | product(x & 0xffff0000u, y & 0xffff0000u) & 0xffff0000u;
}
inline void barrier_init(uint64_t *at) {
    *at = emulator::barriers.size();
    emulator::barriers.push_back({});
}
inline void barrier_init_done() {}
inline uint64_t cache_policy(bool) { return 0; }
// All lanes of a warp meet, and one copies; what the slot had is gone at once.
inline void copy_bulk(void *to, const void *from, int bytes, uint64_t *at, uint64_t) {
    emulator::meet_warp([] {});
    if (emulator::lane()) return;
    if (bytes < 0 || (bytes && ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16))) {
        fprintf(stderr, "a bulk copy of %d bytes is not aligned\n", bytes);
        abort();
    }
    auto &b = emulator::barrier(at);
    if (b.armed) {
        fprintf(stderr, "a barrier is armed twice\n");
        abort();
    }
    b.armed = true, b.expected = bytes;
    memset(to, 0xff, bytes);
    b.copies.push_back({to, from, bytes});
}
// The first lane that waits makes the copies.
inline void barrier_wait(uint64_t *at, uint32_t parity) {
    while ((emulator::barrier(at).completed & 1) == parity && !emulator::barrier(at).armed) emulator::yield();
    auto &b = emulator::barrier(at);
    if ((b.completed & 1) != parity) return;
    for (auto &c : b.copies) memcpy(c.to, c.from, c.bytes), b.expected -= c.bytes;
    if (b.expected) {
        fprintf(stderr, "copies miss what their barrier expects by %d bytes\n", b.expected);
        abort();
    }
    b = {{}, false, 0, b.completed + 1};
}
inline void copy_async(void *to, const void *from) { emulator::begun[emulator::current].push_back({to, from, 16}); }
inline void copies_done() {
    for (auto &c : emulator::begun[emulator::current]) memcpy(c.to, c.from, c.bytes);
    emulator::begun[emulator::current].clear();
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float from_half(uint16_t bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}
inline uint32_t two_halves(float low, float high) {
    _Float16 h[] = {(_Float16)low, (_Float16)high};
    uint32_t bits;
    memcpy(&bits, h, 4);
    return bits;
}
inline uint32_t two_halves_within(float low, float high) {
    auto within = [](float x) { return x != x ? x : fminf(fmaxf(x, -65504.f), 65504.f); };
    return two_halves(within(low), within(high));
}
inline uint32_t half_products_within(uint32_t x, uint32_t y) {
    return two_halves_within(from_half((uint16_t)x) * from_half((uint16_t)y),
                             from_half((uint16_t)(x >> 16)) * from_half((uint16_t)(y >> 16)));
}
inline float reciprocal(float x) { return 1.f / x; }
// mma.m16n8k16 of 16-bit floats
inline void mma_half(float *d, uint4 a, uint32_t b0, uint32_t b1) {
    using namespace emulator;
    int w = warp(), l = lane();
    uint32_t mine[] = {a.x, a.y, a.z, a.w, b0, b1};
    memcpy(brought[w][l], mine, sizeof mine);
    memcpy(brought[w][l] + 6, d, 16);
    meet_warp([w] {
        auto half = [](uint32_t pair, int k) { return from_half((uint16_t)(pair >> 16 * (k % 2))); };
        for (int i = 0; i < 32; i++)
            for (int e = 0; e < 4; e++) {
                int row = i / 4 + 8 * (e / 2), column = 2 * (i % 4) + e % 2;
                double sum = bits_to_float(brought[w][i][6 + e]);
                for (int k = 0; k < 16; k++) {
                    float x = half(brought[w][row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k);
                    sum += (double)x * half(brought[w][column * 4 + k % 8 / 2][4 + k / 8], k);
                }
                taken[w][i][e] = __float_as_uint((float)sum);
            }
    });
    memcpy(d, taken[w][l], 16);
}
#if NUMBER == 0
inline float from_bits(uint16_t bits) { return bits_to_float((uint32_t)bits << 16); }
inline uint16_t to_bits(float x) {
    uint32_t b = __float_as_uint(x);
    return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
#elif NUMBER == 1
inline float from_bits(uint16_t bits) { return from_half(bits); }
inline uint16_t to_bits(float x) { return (uint16_t)two_halves(x, 0.f); }
#endif

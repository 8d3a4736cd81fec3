// Number types of queries, keys, values and outputs, and four of them. NUMBER: 0 bf16, 1 fp16, 2 fp32.

#ifndef EMULATED
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

__device__ __forceinline__ float from_bits(uint16_t bits) {
#if NUMBER == 0
    return __uint_as_float((uint32_t)bits << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
#endif
}
__device__ __forceinline__ uint16_t to_bits(float x) {
    uint16_t y;
#if NUMBER == 0
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}
#endif

#if NUMBER == 2
typedef float Number;
typedef float4 Quad;
__device__ __forceinline__ float4 numbers(const Quad &x) { return x; }
__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float rounded(float x) { return x; }
#else
typedef uint16_t Number;
typedef uint2 Quad;
__device__ __forceinline__ float number(uint16_t x) { return from_bits(x); }
__device__ __forceinline__ float4 numbers(const Quad &x) {
    return make_float4(from_bits((uint16_t)x.x), from_bits((uint16_t)(x.x >> 16)), from_bits((uint16_t)x.y),
                       from_bits((uint16_t)(x.y >> 16)));
}
__device__ __forceinline__ uint16_t rounded(float x) { return to_bits(x); }
#endif

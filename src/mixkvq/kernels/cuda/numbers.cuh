// The model's 16-bit type, and what float16 parameters can hold. Set by the launcher: BFLOAT16.
#pragma once

#include "intrinsics.cuh"

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ float to_float(u16 x) {
    return BFLOAT16 ? __uint_as_float(u32(x) << 16) : half_to_float(x);
}
__device__ __forceinline__ u16 from_float(float x) {
    if (!BFLOAT16) return float_to_half(x);
    const u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// As `storable` and `_round_down` of mixkvq/quant/affine.py, for float16.
__device__ __forceinline__ float storable(float x) {
    return half_to_float(float_to_half(fminf(fmaxf(x, -65504.f), 65504.f)));
}
__device__ __forceinline__ float round_down(float x) {
    const float rounded = storable(x);
    const float below = storable(rounded - fmaxf(fabsf(rounded) * 0x1p-10f, 0x1p-24f));
    return rounded > x ? below : rounded;
}

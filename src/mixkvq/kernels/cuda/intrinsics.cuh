// The instructions that CUDA C++ has no name for, and number formats, without headers: NVRTC finds none on a user's machine.
// Tests run the kernel on a CPU with a twin of this file (tests/kernels/emulator/intrinsics.cuh).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr unsigned ALL_LANES = 0xffffffffu;

struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };

// Loads of packed bytes, which no kernel of a step writes.
__device__ __forceinline__ u16 load16(const u8* p) { return __ldg(reinterpret_cast<const u16*>(p)); }
__device__ __forceinline__ u32 load32(const u8* p) { return __ldg(reinterpret_cast<const u32*>(p)); }
__device__ __forceinline__ Words2 load64(const u8* p) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    return {v.x, v.y};
}
__device__ __forceinline__ Words4 load128(const u8* p) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    return {v.x, v.y, v.z, v.w};
}
// threadIdx.x in a register: the compiler would read the slow special register again wherever it is used.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Waits for a number that is being loaded. Later uses then have nothing to wait for: the hardware's few scoreboards are
// shared, and a use can otherwise wait for younger loads that have the same one.
__device__ __forceinline__ void settle(int& x) { asm volatile("mov.b32 %0, %0;" : "+r"(x)); }

// Copies 16 bytes to shared memory; they are there after commit_copies and wait_copies.
__device__ __forceinline__ void copy16(void* shared, const u8* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(shared))), "l"(from));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits for this thread's copies but the newest `PENDING` commits.
template <int PENDING>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

// The four bytes of the pair (a, b) that the nibbles of `selector` name.
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// For operands whose quotient is far from the ends of the range.
__device__ __forceinline__ float divide(float x, float y) { return __fdividef(x, y); }

// The lower and the upper of a pair of halves.
__device__ __forceinline__ float half_to_float(u32 pair) {
    float y;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(y) : "r"(pair));
    return y;
}
__device__ __forceinline__ float upper_half_to_float(u32 pair) {
    float y;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(y) : "r"(pair));
    return y;
}
__device__ __forceinline__ u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// The larger of two pairs of halves, element by element.
__device__ __forceinline__ u32 max_halves(u32 a, u32 b) {
    u32 y;
    asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// c[16, 8] += a[16, 32] . b[32, 8]: bytes without sign times bytes with sign, in int32.
__device__ __forceinline__ void multiply_u8_s8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same, both without sign.
__device__ __forceinline__ void multiply_u8_u8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

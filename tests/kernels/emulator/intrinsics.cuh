// A CPU twin of kernels/cuda/intrinsics.cuh and of the CUDA language: every thread of a block is a fiber, and they take turns
// at the points where CUDA threads exchange something. Slow, exact, and enough to test a kernel without a GPU.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
using std::max;
using std::min;

constexpr unsigned ALL_LANES = 0xffffffffu;
struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index { unsigned x, y, z; };
inline Index threadIdx, blockIdx, gridDim;
alignas(16) inline u8 shared[1 << 18];

namespace emulator {
constexpr size_t STACK = 1 << 18;

struct Fiber {
    ucontext_t context;
    std::vector<u8> stack = std::vector<u8>(STACK);
    bool done = false;
    unsigned index = 0;
    std::deque<std::vector<std::pair<void*, const u8*>>> copies;
};
struct Barrier {
    unsigned arrived = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    u32 word[32];
    u32 a[32][4], b[32][2];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline ucontext_t scheduler;
inline void (*body)();

inline Fiber& current() { return fibers[threadIdx.x]; }
inline Warp& warp() { return warps[threadIdx.x / 32]; }
inline unsigned lane() { return threadIdx.x % 32; }

inline void yield() {
    Fiber& me = current();
    swapcontext(&me.context, &scheduler);
    threadIdx.x = me.index;
}
inline void wait(Barrier& barrier, unsigned threads) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}
inline void wait_warp() { wait(warp().barrier, 32); }

inline void entry() {
    body();
    current().done = true;
    swapcontext(&current().context, &scheduler);
}

// One block after the other; shared memory starts as NaN.
inline void run(void (*kernel)(), Index grid, unsigned threads) {
    body = kernel;
    gridDim = grid;
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Warp>(threads / 32);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                std::memset(shared, 0xff, sizeof(shared));
                for (unsigned i = 0; i < threads; ++i) {
                    Fiber& fiber = fibers[i];
                    fiber.done = false;
                    fiber.index = i;
                    fiber.copies.assign(1, {});
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.data();
                    fiber.context.uc_stack.ss_size = fiber.stack.size();
                    makecontext(&fiber.context, entry, 0);
                }
                for (bool running = true; running;) {
                    running = false;
                    for (unsigned i = 0; i < threads; ++i) {
                        if (fibers[i].done) continue;
                        running = true;
                        threadIdx.x = i;
                        swapcontext(&scheduler, &fibers[i].context);
                    }
                }
            }
}
}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block, unsigned(emulator::fibers.size())); }
inline void __syncwarp() { emulator::wait_warp(); }
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) { const int old = *p; *p += x; return old; }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    static_assert(sizeof(T) == 4);
    emulator::Warp& warp = emulator::warp();
    std::memcpy(&warp.word[emulator::lane()], &value, 4);
    emulator::wait_warp();
    T result;
    std::memcpy(&result, &warp.word[source], 4);
    emulator::wait_warp();
    return result;
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) { return __shfl_sync(lanes, value, int(emulator::lane()) ^ mask); }
inline bool __any_sync(unsigned lanes, bool value) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= __shfl_sync(lanes, int(value), i) != 0;
    return any;
}

template <typename To, typename From>
To same_bits(From x) { To y; static_assert(sizeof(x) == sizeof(y)); std::memcpy(&y, &x, sizeof(y)); return y; }
inline float __uint_as_float(u32 x) { return same_bits<float>(x); }
inline u32 __float_as_uint(float x) { return same_bits<u32>(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

template <typename T>
T load(const u8* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) std::abort();  // a GPU would refuse
    T x;
    std::memcpy(&x, p, sizeof(T));
    return x;
}
inline u16 load16(const u8* p) { return load<u16>(p); }
inline u32 load32(const u8* p) { return load<u32>(p); }
inline Words2 load64(const u8* p) { return load<Words2>(p); }
inline Words4 load128(const u8* p) { return load<Words4>(p); }
inline void settle(int&) {}
inline int thread_index() { return int(threadIdx.x); }

// Nothing arrives before it is waited for.
inline void copy16(void* to, const u8* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) std::abort();
    emulator::current().copies.back().emplace_back(to, from);
}
inline void commit_copies() { emulator::current().copies.emplace_back(); }
template <int PENDING>
void wait_copies() {
    auto& copies = emulator::current().copies;
    for (; copies.size() > PENDING + 1; copies.pop_front())
        for (auto& [to, from] : copies.front()) std::memcpy(to, from, 16);
}

inline u32 bytes_of(u32 a, u32 b, u32 selector) {
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= u32((both >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
    return result;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide(float x, float y) { return x / y; }
inline float half_to_float(u32 bits) { return float(same_bits<_Float16>(u16(bits))); }
inline float upper_half_to_float(u32 pair) { return half_to_float(pair >> 16); }
inline u16 float_to_half(float x) { return same_bits<u16>(_Float16(x)); }
inline u32 max_halves(u32 a, u32 b) {
    auto larger = [](u32 x, u32 y) { return u32(half_to_float(x) > half_to_float(y) ? u16(x) : u16(y)); };
    return larger(a, b) | larger(a >> 16, b >> 16) << 16;
}

// The fragments of mma.m16n8k32, as the PTX manual lays them out.
template <typename B>
void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::Warp& warp = emulator::warp();
    const unsigned lane = emulator::lane();
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(warp.a[lane], a, sizeof(a));
    std::memcpy(warp.b[lane], b, sizeof(b));
    emulator::wait_warp();
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + (i & 1);
        for (unsigned k = 0; k < 32; ++k) {
            const u32 from_a = warp.a[row % 8 * 4 + k % 16 / 4][(row >= 8 ? 1 : 0) + (k >= 16 ? 2 : 0)];
            const u32 from_b = warp.b[column * 4 + k % 16 / 4][k >= 16];
            c[i] += int(u8(from_a >> (8 * (k % 4)))) * int(B(from_b >> (8 * (k % 4))));
        }
    }
    emulator::wait_warp();
}
inline void multiply_u8_s8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply<int8_t>(c, a0, a1, a2, a3, b0, b1);
}
inline void multiply_u8_u8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply<u8>(c, a0, a1, a2, a3, b0, b1);
}

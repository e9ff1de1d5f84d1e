// Sizes, arguments, thread roles, shared memory, and what all phases of the decode kernel use.
#pragma once

#include "numbers.cuh"

// Set by the launcher from the page layout: KV_HEADS, HEAD_DIM, KEY_BITS, KEY_GROUPS, VALUE_BITS, VALUE_GROUPS, PAGE_BYTES,
// the offsets of a page's and a chunk's fields, SINKS, ROTATED, SOFTCAP, BFLOAT16, ROW_TILES (4 query rows each), WARPS,
// TOKENS of a page, STAGED_CHUNKS, MAX_PARTS, BLOCKS_PER_MULTIPROCESSOR.

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 4 * ROW_TILES;
constexpr int KEY_STEPS = HEAD_DIM / 32;
constexpr int VALUE_TILES = HEAD_DIM / 16;
constexpr int TILES_PER_GROUP = VALUE_TILES / VALUE_GROUPS;
constexpr int PLANES_PER_GROUP = 8 / KEY_GROUPS;
// The most significant plane comes first; the last one of an odd width has 1 bit of every code, all others have 2.
constexpr int KEY_PLANES = (KEY_BITS + 1) / 2;
constexpr int VALUE_PLANES = (VALUE_BITS + 1) / 2;
constexpr int PLANE_BYTES = HEAD_DIM * 32;  // of one head, with 2 bits of every code
__device__ __forceinline__ constexpr int plane_bits(int bits, int plane) { return bits - 2 * plane == 1 ? 1 : 2; }
constexpr int KEY_PARAM_BYTES = KEY_GROUPS * HEAD_DIM * 2;
constexpr int VALUE_PARAM_BYTES = VALUE_GROUPS * TOKENS * 2;
constexpr int STAGED_BYTES = LANES4 ? CHUNK4_BYTES : 16;
constexpr int PRODUCT_STRIDE = HEAD_DIM + 8;  // rows of a shared array on different banks
constexpr int WEIGHT_STRIDE = TOKENS + 24;
constexpr int MAX_DENSE = SINKS + TOKENS + 16;
constexpr int DENSE_SLICES = THREADS / (HEAD_DIM / 2) ? THREADS / (HEAD_DIM / 2) : 1;  // of the dense tokens, summed apart
constexpr float LOG2_E = 1.4426950408889634f;
// Adding it leaves the nearest integer in the low bits of a float.
constexpr float TO_INTEGER = 12582912.f;
// The largest fixed-point numbers whose digits still fit, with room for rounding.
constexpr float SIGNED_RANGE = 32512.f;
constexpr float UNSIGNED_RANGE = 65280.f;
// Sums of the largest codes, where they lie in their bytes, must fit into 31 bits; promoted lanes add a quarter to keys.
static_assert(HEAD_DIM * 192ll * (32512 + 8128 + 256) < (1ll << 31), "int32 sums of keys of 2 bits overflow");
static_assert(HEAD_DIM * 255ll * (32512 + 256) < (1ll << 31), "int32 sums of keys of 8 bits overflow");
static_assert(TOKENS * 255ll * (65280 + 256) < (1ll << 31), "int32 sums of values overflow");

struct Arguments {
    const u16 *query, *new_keys, *new_values;
    u16* output;
    const u8 *pages, *chunks4, *chunks16;
    const int *table, *lengths;
    u16 *dense_keys, *dense_values;
    const float* model_sinks;
    float *total, *count;
    u16* samples;
    float *part_sums, *part_stats;
    int* tickets;
    long long query_strides[3], key_strides[3], value_strides[3], dense_strides[2];
    int table_stride, group, length, append, pages_per_warp;
    float scaling, softcap;
};

struct Thread {
    int warp, lane, quad, tig, row, digit;
    u32 key_digit, value_digit, sign;  // selectors of this thread's digit, and what makes a low digit signed

    __device__ Thread() {
        const int index = thread_index();
        warp = index >> 5;
        lane = index & 31;
        quad = lane >> 2;
        tig = lane & 3;
        row = quad >> 1;
        digit = quad & 1;
        key_digit = digit ? 0x2064 : 0x7531;
        value_digit = digit ? 0x2604 : 0x7351;
        sign = digit ? 0x80808080u : 0;
    }
};

// The query rows of one head that a block handles.
struct Rows {
    int batch, head, first, count, total;

    __device__ Rows(const Arguments& a) {
        batch = blockIdx.y;
        head = blockIdx.x % KV_HEADS;
        first = (blockIdx.x / KV_HEADS) * ROWS;
        total = a.group * a.length;
        count = min(ROWS, total - first);
    }
    __device__ int query_head(const Arguments& a, int row) const { return head * a.group + (first + row) / a.length; }
    __device__ int token(const Arguments& a, int row) const { return (first + row) % a.length; }
    __device__ long long query_offset(const Arguments& a, int row) const {
        return batch * a.query_strides[0] + query_head(a, row) * a.query_strides[1] + token(a, row) * a.query_strides[2];
    }
};

struct Lengths {
    int pages, dense;

    __device__ Lengths(int length) {
        const int rest = max(length - SINKS, 0);
        pages = rest / TOKENS;
        dense = min(length, SINKS) + rest % TOKENS;
    }
};

// What a warp keeps of the page that it works on: small fields, copied a page ahead, and what its threads exchange.
struct WarpMemory {
    alignas(16) u8 key_params[2][KEY_PARAM_BYTES];  // scales, zeros
    u8 value_params[VALUE_SYMMETRIC ? 1 : 2][VALUE_PARAM_BYTES];
    u8 value_planes[VALUE_BITS * PLANE_BYTES / 2];
    u8 chunks[LANES4 ? STAGED_CHUNKS : 2][STAGED_BYTES];
    union {
        float products[LANES4 ? KEY_GROUPS : 1][LANES4 ? ROWS : 1][PRODUCT_STRIDE];  // query times key scale
        float weights[ROWS][WEIGHT_STRIDE];
    };
};

struct PackedMemory {
    alignas(16) float query[ROWS][HEAD_DIM];
    union {
        WarpMemory warps[WARPS];
        struct {
            float sums[WARPS][ROWS][HEAD_DIM];
            float stats[WARPS][ROWS][2];
        } merge;
    };
};

struct DenseMemory {
    alignas(16) float query[ROWS][HEAD_DIM];
    float weights[ROWS][MAX_DENSE];
    alignas(16) float sums[DENSE_SLICES][ROWS][HEAD_DIM];
};

struct MergeMemory {
    alignas(16) float packed[ROWS][HEAD_DIM];
    float weights[ROWS][MAX_PARTS], mass[ROWS];
    int last;
};

union Memory {
    PackedMemory packed;
    DenseMemory dense;
    MergeMemory merge;
};

// The query rows of a block on their way to shared memory, in float32, scaled.
struct Query {
    static constexpr int ROWS_PER_WARP = (ROWS + WARPS - 1) / WARPS, PAIRS = (HEAD_DIM / 2 + 31) / 32;
    u32 pairs[ROWS_PER_WARP][PAIRS];

    __device__ __forceinline__ void load(const Arguments& a, const Rows& rows) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < ROWS_PER_WARP; ++i) {
            const int row = threadIdx.x / 32 + i * WARPS;
            const u32* from = reinterpret_cast<const u32*>(a.query + rows.query_offset(a, min(row, rows.count - 1)));
#pragma unroll
            for (int j = 0; j < PAIRS; ++j)
                pairs[i][j] = row < rows.count && 32 * j + lane < HEAD_DIM / 2 ? from[32 * j + lane] : 0;
        }
    }
    __device__ __forceinline__ void store(const Arguments& a, float (*query)[HEAD_DIM]) const {
        const float scale = a.scaling * (SOFTCAP ? 1.f : LOG2_E);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < ROWS_PER_WARP; ++i) {
            const int row = threadIdx.x / 32 + i * WARPS;
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                const int d = 2 * (32 * j + lane);
                if (row >= ROWS || d >= HEAD_DIM) continue;
                const u32 pair = pairs[i][j];
                *reinterpret_cast<float2*>(&query[row][d]) =
                    make_float2(to_float(u16(pair)) * scale, to_float(u16(pair >> 16)) * scale);
            }
        }
        __syncthreads();
    }
};

// Logits in units of log 2 from the scaled products.
__device__ __forceinline__ float capped(const Arguments& a, float x) {
    return SOFTCAP ? a.softcap * tanhf(x / a.softcap) * LOG2_E : x;
}

// Over the lanes whose numbers differ in the bits FIRST, 2 FIRST, ... below END.
template <int FIRST, int END>
__device__ __forceinline__ float reduce_max(float x) {
    for (int mask = FIRST; mask < END; mask *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}
template <int FIRST, int END>
__device__ __forceinline__ float reduce_sum(float x) {
    for (int mask = FIRST; mask < END; mask *= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}
__device__ __forceinline__ float reduce_row_max(float x) { return reduce_max<4, 32>(x); }
__device__ __forceinline__ float reduce_row_sum(float x) { return reduce_sum<4, 32>(x); }
__device__ __forceinline__ float reduce_column_max(float x) { return reduce_max<1, 8>(x); }
__device__ __forceinline__ float reduce_column_sum(float x) { return reduce_sum<1, 8>(x); }
__device__ __forceinline__ float reduce_warp_max(float x) { return reduce_max<1, 32>(x); }
__device__ __forceinline__ float reduce_warp_sum(float x) { return reduce_sum<1, 32>(x); }
// From the owners of operand columns to the owners of results of the same row, and back.
__device__ __forceinline__ float to_result(float x, const Thread& t) { return __shfl_sync(ALL_LANES, x, 8 * t.tig); }
__device__ __forceinline__ float to_column(float x, const Thread& t) { return __shfl_sync(ALL_LANES, x, t.row); }

__device__ __forceinline__ u32 fixed_point(float x, float per_unit, float bias) {
    return __float_as_uint(fmaf(x, per_unit, TO_INTEGER + bias));
}

// Operand words of four fixed-point numbers here and four at the neighbour that shares the row: the first two of each make
// one word, the others the second, in the order of the selector.
__device__ __forceinline__ void digits(const u32 (&x)[4], u32 selector, u32& first, u32& second) {
    const u32 here0 = bytes_of(x[0], x[1], 0x5410), here1 = bytes_of(x[2], x[3], 0x5410);
    first = bytes_of(here0, __shfl_xor_sync(ALL_LANES, here0, 4), selector);
    second = bytes_of(here1, __shfl_xor_sync(ALL_LANES, here1, 4), selector);
}

// From logits to weights, and from a page's value codes to weighted sums.
#pragma once

#include "keys.cuh"

// Running softmax of a warp: maximum and mass by result row, sums [row tile][value tile][upper or lower 8 channels].
struct Softmax {
    float top[ROW_TILES], mass[ROW_TILES], sums[ROW_TILES][VALUE_TILES][2];
    float zeros[ROW_TILES][VALUE_GROUPS];  // what value zeros add, by operand column, this thread's tokens

    __device__ Softmax() {
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            top[tile] = minus_infinity();
            mass[tile] = 0;
            for (int i = 0; i < VALUE_TILES; ++i) sums[tile][i][0] = sums[tile][i][1] = 0;
            for (int i = 0; i < VALUE_GROUPS; ++i) zeros[tile][i] = 0;
        }
    }
};

// Weights relative to the page's own maximum, so that fixed point serves pages of little weight too. Returns, by row tile, what
// the page counts against the running maximum.
__device__ __forceinline__ void weigh(const Arguments& a, Logits& logits, WarpMemory& memory, const Thread& t, Softmax& state,
                                      float (&share)[ROW_TILES]) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        float top = minus_infinity(), mass = 0;
#pragma unroll
        for (int plane = 0; plane < 8; ++plane) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                logits[plane][i][tile] = capped(a, logits[plane][i][tile]);
                top = fmaxf(top, logits[plane][i][tile]);
            }
        }
        top = reduce_row_max(top);
#pragma unroll
        for (int plane = 0; plane < 8; ++plane) {
            const float even = exp2_fast(logits[plane][0][tile] - top), odd = exp2_fast(logits[plane][1][tile] - top);
            mass += even + odd;
            float* to = &memory.weights[4 * tile + t.tig][16 * plane + 2 * t.quad + (plane >= 4 ? 16 : 0)];
            *reinterpret_cast<float2*>(to) = make_float2(even, odd);
        }
        const float new_top = fmaxf(state.top[tile], top);
        const float decay = exp2_fast(state.top[tile] - new_top);
        share[tile] = exp2_fast(top - new_top);
        state.top[tile] = new_top;
        state.mass[tile] = state.mass[tile] * decay + mass * share[tile];
        if (__any_sync(ALL_LANES, decay != 1.f)) {
            const float column_decay = to_column(decay, t);
#pragma unroll
            for (int i = 0; i < VALUE_TILES; ++i) {
                state.sums[tile][i][0] *= decay;
                state.sums[tile][i][1] *= decay;
            }
#pragma unroll
            for (int i = 0; i < VALUE_GROUPS; ++i) state.zeros[tile][i] *= column_decay;
        }
    }
    __syncwarp();
}

// What a page's values are multiplied with: weights times value scales as digits, and what turns sums into outputs.
struct ValueOperand {
    u32 words[VALUE_GROUPS][ROW_TILES][4][2];
    float unit[VALUE_GROUPS];
};

// Zeros of four tokens, from their scales where codes lie evenly around 0.
__device__ __forceinline__ void value_zeros(const WarpMemory& memory, int at, const float (&scale)[4], float (&zero)[4]) {
    if (VALUE_SYMMETRIC) {
#pragma unroll
        for (int i = 0; i < 4; ++i) zero[i] = -0.5f * ((1 << VALUE_BITS) - 1) * scale[i];
    } else {
        const Words2 stored = *reinterpret_cast<const Words2*>(memory.value_params[VALUE_SYMMETRIC ? 0 : 1] + at);
        zero[0] = half_to_float(stored.x);
        zero[1] = upper_half_to_float(stored.x);
        zero[2] = half_to_float(stored.y);
        zero[3] = upper_half_to_float(stored.y);
    }
}

__device__ __forceinline__ void prepare_values(const WarpMemory& memory, const Thread& t, const float (&share)[ROW_TILES],
                                               ValueOperand& operand, Softmax& state) {
    float column_share[ROW_TILES];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) column_share[tile] = to_column(share[tile], t);
#pragma unroll
    for (int group = 0; group < VALUE_GROUPS; ++group) {
        // Tokens 16 (k + 4 digit) + 4 tig and the next three, for k = 0 .. 3.
        const int params = 2 * (group * TOKENS + 64 * t.digit + 4 * t.tig);
        Words2 scale[4];
        u32 top2 = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            scale[k] = *reinterpret_cast<const Words2*>(memory.value_params[0] + params + 32 * k);
            top2 = max_halves(top2, max_halves(scale[k].x, scale[k].y));
        }
        const float top = reduce_column_max(fmaxf(half_to_float(top2), upper_half_to_float(top2)));
        const float per_unit = top > 0 ? divide(UNSIGNED_RANGE, top) : 0;
        operand.unit[group] = top * (1 / UNSIGNED_RANGE);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float s[4] = {half_to_float(scale[k].x), upper_half_to_float(scale[k].x), half_to_float(scale[k].y),
                                upper_half_to_float(scale[k].y)};
            float z[4];
            value_zeros(memory, params + 32 * k, s, z);
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                const float* from = &memory.weights[4 * tile + t.row][16 * k + 80 * t.digit + 4 * t.tig];
                const float4 w = *reinterpret_cast<const float4*>(from);
                const float part = w.x * z[0] + w.y * z[1] + w.z * z[2] + w.w * z[3];
                state.zeros[tile][group] = fmaf(part, column_share[tile], state.zeros[tile][group]);
                const float factor = per_unit * (1.f / float(1 << value_shift(k)));
                const u32 x[4] = {fixed_point(w.x * s[0], factor, 0), fixed_point(w.y * s[1], factor, 0),
                                  fixed_point(w.z * s[2], factor, 0), fixed_point(w.w * s[3], factor, 0)};
                digits(x, t.value_digit, operand.words[group][tile][k][0], operand.words[group][tile][k][1]);
            }
        }
    }
}

__device__ __forceinline__ void add_values(const WarpMemory& memory, const Thread& t, const ValueOperand& operand,
                                           const float (&share)[ROW_TILES], Softmax& state) {
#pragma unroll
    for (int value_tile = 0; value_tile < VALUE_TILES; ++value_tile) {
        const int group = value_tile / TILES_PER_GROUP;
        u32 codes[4][4];  // [part of the tile][position]
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            // Channel 16 value_tile + 8 part + quad, words 4 tig and the next three.
            const int channel = 16 * value_tile + 8 * part + t.quad;
            u32 words[2][VALUE_PLANES];
#pragma unroll
            for (int plane = 0; plane < VALUE_PLANES; ++plane) {
                const bool single = plane_bits(VALUE_BITS, plane) == 1;
                const int at = plane * PLANE_BYTES + (single ? channel * 16 + 8 * (t.tig & 1) : channel * 32 + 8 * t.tig);
                const Words2 stored = *reinterpret_cast<const Words2*>(memory.value_planes + at);
                words[0][plane] = single ? even_bits(stored.x, t.tig >= 2) : stored.x;
                words[1][plane] = single ? even_bits(stored.y, t.tig >= 2) : stored.y;
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                codes[part][k] = codes_of<VALUE_BITS>(words[0], k, value_shift(k));
                codes[2 + part][k] = codes_of<VALUE_BITS>(words[1], k, value_shift(k));
            }
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const u32(&b)[4][2] = operand.words[group][tile];
            int c[4] = {0, 0, 0, 0};
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_u8_u8(c, codes[0][k], codes[1][k], codes[2][k], codes[3][k], b[k][0], b[k][1]);
            const float factor = operand.unit[group] * share[tile];
            float(&sums)[2] = state.sums[tile][value_tile];
            sums[0] = fmaf(float(256 * c[0] + c[1]), factor, sums[0]);
            sums[1] = fmaf(float(256 * c[2] + c[3]), factor, sums[1]);
        }
    }
}

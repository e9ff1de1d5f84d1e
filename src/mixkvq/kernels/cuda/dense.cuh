// Sinks, residual and new tokens, which are not quantized, and the statistics of the queries.
#pragma once

#include "common.cuh"

// Keys or values of one dense or new token.
struct DenseTokens {
    const u16 *stored, *fresh;
    long long fresh_stride;
    int count;

    __device__ const u16* operator[](int i) const {
        return i < count ? stored + (long long)i * HEAD_DIM : fresh + (i - count) * fresh_stride;
    }
};

__device__ void attend_dense(const Arguments& a, const Rows& rows, int count, DenseMemory& memory, float* sums, float* stats) {
    const long long slot = rows.batch * a.dense_strides[0] + rows.head * a.dense_strides[1];
    const DenseTokens keys = {a.dense_keys + slot,
                              a.new_keys + rows.batch * a.key_strides[0] + rows.head * a.key_strides[1], a.key_strides[2], count};
    const DenseTokens values = {a.dense_values + slot,
                                a.new_values + rows.batch * a.value_strides[0] + rows.head * a.value_strides[1],
                                a.value_strides[2], count};
    const int tokens = count + a.length;
    Query query;
    query.load(a, rows);
    query.store(a, memory.query);
    for (int i = threadIdx.x; i < tokens; i += THREADS) {
        const u16* key = keys[i];
        float logits[ROWS] = {};
        for (int d = 0; d < HEAD_DIM; d += 8) {
            const Words4 words = *reinterpret_cast<const Words4*>(key + d);
            const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float k = to_float(u16(w[j / 2] >> (16 * (j & 1))));
#pragma unroll
                for (int row = 0; row < ROWS; ++row) logits[row] = fmaf(memory.query[row][d + j], k, logits[row]);
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const bool seen = i - count <= rows.token(a, row);
            memory.weights[row][i] = seen ? capped(a, logits[row]) : minus_infinity();
        }
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < ROWS; row += WARPS) {
        float top = minus_infinity(), mass = 0;
        for (int i = lane; i < tokens; i += 32) top = fmaxf(top, memory.weights[row][i]);
        for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, mask));
        for (int i = lane; i < tokens; i += 32) {
            const float weight = exp2f(memory.weights[row][i] - top);
            memory.weights[row][i] = weight;
            mass += weight;
        }
        for (int mask = 1; mask < 32; mask *= 2) mass += __shfl_xor_sync(ALL_LANES, mass, mask);
        if (lane == 0) {
            stats[2 * row] = top;
            stats[2 * row + 1] = mass;
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
        float sum[ROWS] = {};
#pragma unroll 8
        for (int i = 0; i < tokens; ++i) {
            const float value = to_float(values[i][d]);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) sum[row] = fmaf(memory.weights[row][i], value, sum[row]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sums[row * HEAD_DIM + d] = sum[row];
    }
    if (rows.first > 0) return;
    for (int j = threadIdx.x; a.append && j < a.length * HEAD_DIM; j += THREADS) {
        const int i = count + j / HEAD_DIM, d = j % HEAD_DIM;
        a.dense_keys[slot + (long long)i * HEAD_DIM + d] = keys[i][d];
        a.dense_values[slot + (long long)i * HEAD_DIM + d] = values[i][d];
    }
}

// Running sums of |q| over the group's heads and the new tokens.
__device__ void add_statistics(const Arguments& a, const Rows& rows) {
    if (!a.total || rows.first > 0) return;
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
        float sum = 0;
        for (int j = 0; j < rows.total; ++j)
            sum += fabsf(to_float(a.query[rows.batch * a.query_strides[0] +
                                          (rows.head * a.group + j / a.length) * a.query_strides[1] +
                                          (j % a.length) * a.query_strides[2] + d]));
        a.total[(rows.batch * KV_HEADS + rows.head) * HEAD_DIM + d] += sum;
    }
    if (a.count && rows.head == 0 && threadIdx.x == 0) a.count[rows.batch] += float(rows.total);
}

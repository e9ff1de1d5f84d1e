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

// Query rows times one key.
__device__ __forceinline__ void dense_logits(const u16* key, const float (*query)[HEAD_DIM], float (&logits)[ROWS]) {
    constexpr int BATCH = HEAD_DIM % 64 ? 4 : 8;  // loads in flight
#pragma unroll
    for (int start = 0; start < HEAD_DIM; start += 8 * BATCH) {
        Words4 words[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) words[i] = *reinterpret_cast<const Words4*>(key + start + 8 * i);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const u32 w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float k = to_float(u16(w[j / 2] >> (16 * (j & 1))));
#pragma unroll
                for (int row = 0; row < ROWS; ++row) logits[row] = fmaf(query[row][start + 8 * i + j], k, logits[row]);
            }
        }
    }
}

// Softmax of every row of `memory.weights`, a warp a row.
__device__ void dense_softmax(int tokens, DenseMemory& memory, float* stats) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < ROWS; row += WARPS) {
        float top = minus_infinity(), mass = 0;
        for (int i = lane; i < tokens; i += 32) top = fmaxf(top, memory.weights[row][i]);
        top = reduce_warp_max(top);
        for (int i = lane; i < tokens; i += 32) {
            const float weight = exp2f(memory.weights[row][i] - top);
            memory.weights[row][i] = weight;
            mass += weight;
        }
        mass = reduce_warp_sum(mass);
        if (lane == 0) {
            stats[2 * row] = top;
            stats[2 * row + 1] = mass;
        }
    }
}

// Adds a pair of channels of tokens `first`, `first + DENSE_SLICES`, ... below `end`, which lie `stride` apart from `at` on.
__device__ __forceinline__ void add_pairs(const u16* at, long long stride, int first, int end, const float (*weights)[MAX_DENSE],
                                          float (&sum)[ROWS][2]) {
    constexpr int BATCH = 8;  // loads in flight
    for (int start = first; start < end; start += BATCH * DENSE_SLICES) {
        u32 pairs[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int i = start + k * DENSE_SLICES;
            pairs[k] = i < end ? *reinterpret_cast<const u32*>(at + i * stride) : 0;
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int i = start + k * DENSE_SLICES;
            const float x = to_float(u16(pairs[k])), y = to_float(u16(pairs[k] >> 16));
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const float weight = i < end ? weights[row][i] : 0.f;
                sum[row][0] = fmaf(weight, x, sum[row][0]);
                sum[row][1] = fmaf(weight, y, sum[row][1]);
            }
        }
    }
}

// Weighted sums of the values: a thread has a pair of channels and every DENSE_SLICES-th token.
__device__ void dense_sums(const DenseTokens& values, int tokens, DenseMemory& memory, float* sums) {
    constexpr int PAIRS = HEAD_DIM / 2;
    for (int j = threadIdx.x; j < DENSE_SLICES * PAIRS; j += THREADS) {
        const int slice = j / PAIRS, d = 2 * (j % PAIRS);
        float sum[ROWS][2] = {};
        add_pairs(values.stored + d, HEAD_DIM, slice, values.count, memory.weights, sum);
        // New tokens have places of their own: counted on, as if they followed the stored ones.
        const u16* fresh = values.fresh + d - values.count * values.fresh_stride;
        const int left = (values.count - slice + DENSE_SLICES - 1) / DENSE_SLICES;
        add_pairs(fresh, values.fresh_stride, slice + max(left, 0) * DENSE_SLICES, tokens, memory.weights, sum);
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            *reinterpret_cast<float2*>(&memory.sums[slice][row][d]) = make_float2(sum[row][0], sum[row][1]);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < ROWS * HEAD_DIM; j += THREADS) {
        float sum = 0;
#pragma unroll
        for (int slice = 0; slice < DENSE_SLICES; ++slice) sum += memory.sums[slice][j / HEAD_DIM][j % HEAD_DIM];
        sums[j] = sum;
    }
}

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
        float logits[ROWS] = {};
        dense_logits(keys[i], memory.query, logits);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const bool seen = i - count <= rows.token(a, row);
            memory.weights[row][i] = seen ? capped(a, logits[row]) : minus_infinity();
        }
    }
    __syncthreads();
    dense_softmax(tokens, memory, stats);
    __syncthreads();
    dense_sums(values, tokens, memory, sums);
    if (rows.first > 0) return;
    for (int j = threadIdx.x; a.append && j < a.length * HEAD_DIM; j += THREADS) {
        const int i = count + j / HEAD_DIM, d = j % HEAD_DIM;
        a.dense_keys[slot + (long long)i * HEAD_DIM + d] = keys[i][d];
        a.dense_values[slot + (long long)i * HEAD_DIM + d] = values[i][d];
    }
}

// The queries that are sampled, of the new tokens.
__device__ void keep_samples(const Arguments& a, const Rows& rows) {
    if (!a.samples || rows.first > 0) return;
    u16* ring = a.samples + ((long long)rows.batch * KV_HEADS + rows.head) * KEPT_SAMPLES * HEAD_DIM;
    for (int token = 0; token < a.length; ++token) {
        const int position = a.lengths[rows.batch] + token, number = position / SAMPLED_EVERY;
        if (position % SAMPLED_EVERY) continue;
        const u16* query = a.query + rows.batch * a.query_strides[0] +
                           (rows.head * a.group + number % a.group) * a.query_strides[1] + token * a.query_strides[2];
        for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) ring[number % KEPT_SAMPLES * HEAD_DIM + d] = query[d];
    }
}

// Running sums of |q| over the group's heads and the new tokens.
__device__ void add_statistics(const Arguments& a, const Rows& rows) {
    if (!a.total || rows.first > 0) return;
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
        float sum = 0;
#pragma unroll 4
        for (int j = 0; j < rows.total; ++j)
            sum += fabsf(to_float(a.query[rows.batch * a.query_strides[0] +
                                          (rows.head * a.group + j / a.length) * a.query_strides[1] +
                                          (j % a.length) * a.query_strides[2] + d]));
        a.total[(rows.batch * KV_HEADS + rows.head) * HEAD_DIM + d] += sum;
    }
    if (a.count && rows.head == 0 && threadIdx.x == 0) a.count[rows.batch] += float(rows.total);
}

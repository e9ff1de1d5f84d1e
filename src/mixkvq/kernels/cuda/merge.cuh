// The parts of all blocks of a head made one, rotated back, and written.
#pragma once

#include "common.cuh"

// Orthonormal Hadamard rotation of every row, in blocks of the largest power of two that divides the head dimension.
__device__ void rotate(float (*x)[HEAD_DIM]) {
    constexpr int BLOCK = HEAD_DIM & -HEAD_DIM;
    for (int step = 1; step < BLOCK; step *= 2) {
        __syncthreads();
        for (int j = threadIdx.x; j < ROWS * HEAD_DIM / 2; j += THREADS) {
            const int row = j / (HEAD_DIM / 2), pair = j % (HEAD_DIM / 2);
            const int d = pair / step * 2 * step + pair % step;
            const float u = x[row][d], v = x[row][d + step];
            x[row][d] = u + v;
            x[row][d + step] = u - v;
        }
    }
    __syncthreads();
}

__device__ void merge_parts(const Arguments& a, const Rows& rows, int parts, const float* sums, const float* stats,
                            MergeMemory& memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < ROWS; row += WARPS) {
        const bool sink = a.model_sinks && row < rows.count;
        const float logit = sink ? a.model_sinks[rows.query_head(a, row)] * LOG2_E : minus_infinity();
        float top = logit, mass = 0;
        for (int p = lane; p < parts; p += 32) top = fmaxf(top, stats[2 * (p * ROWS + row)]);
        top = reduce_warp_max(top);
        for (int p = lane; p < parts; p += 32) {
            const float weight = exp2f(stats[2 * (p * ROWS + row)] - top);
            memory.weights[row][p] = weight;
            mass += weight * stats[2 * (p * ROWS + row) + 1];
        }
        mass = reduce_warp_sum(mass);
        if (lane == 0) memory.mass[row] = mass + (sink ? exp2f(logit - top) : 0);
    }
    __syncthreads();
    // Part 0 is the dense one, which is not rotated.
    for (int j = 4 * threadIdx.x; j < ROWS * HEAD_DIM; j += 4 * THREADS) {
        const int row = j / HEAD_DIM;
        constexpr int BATCH = 8;  // loads in flight
        float4 sum = make_float4(0, 0, 0, 0);
        for (int start = 1; start < parts; start += BATCH) {
            float4 x[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int p = start + k;
                x[k] = make_float4(0, 0, 0, 0);
                if (p < parts) x[k] = *reinterpret_cast<const float4*>(sums + (long long)p * ROWS * HEAD_DIM + j);
            }
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const float weight = start + k < parts ? memory.weights[row][start + k] : 0.f;
                sum.x = fmaf(weight, x[k].x, sum.x);
                sum.y = fmaf(weight, x[k].y, sum.y);
                sum.z = fmaf(weight, x[k].z, sum.z);
                sum.w = fmaf(weight, x[k].w, sum.w);
            }
        }
        *reinterpret_cast<float4*>(&memory.packed[row][j % HEAD_DIM]) = sum;
    }
    float gain = 1;
    if (ROTATED) {
        rotate(memory.packed);
        gain = rsqrtf(float(HEAD_DIM & -HEAD_DIM));
    }
    __syncthreads();
    for (int j = threadIdx.x; j < rows.count * HEAD_DIM; j += THREADS) {
        const int row = j / HEAD_DIM, d = j % HEAD_DIM;
        const float dense = memory.weights[row][0] * sums[j];
        const int head = rows.query_head(a, row);
        const long long at = ((long long)rows.batch * (KV_HEADS * a.group) + head) * a.length + rows.token(a, row);
        a.output[at * HEAD_DIM + d] = from_float((gain * memory.packed[row][d] + dense) / memory.mass[row]);
    }
}

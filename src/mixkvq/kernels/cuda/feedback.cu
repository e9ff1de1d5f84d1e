// Error feedback before packing: moves the keys of a full block, so that rounding each channel for itself is then right. The
// numbers of mixkvq/quant/feedback.py, found the way GPTQ does: channels are eliminated from the inverse of H as they are rounded.
//
// A block of threads moves one part of a head of one block of tokens. Its threads form a square of 16 x 16, each of which keeps
// a square of H in registers, with the channels in the order of rounding; the line that everybody needs goes round through
// shared memory. Keys lie in shared memory. One warp rounds a channel, four tokens a lane, while the others eliminate it.
//
// Set by the launcher: KV_HEADS, HEAD_DIM, PARTS, KEY_BITS, KEY_GROUP, TOKENS, CLIP, UNBIASED, CLIPPED_LEVELS, DENSE_BITS, BFLOAT16.

#include "numbers.cuh"

constexpr int THREADS = 256;
constexpr int CHANNELS = HEAD_DIM / PARTS;
constexpr int SIDE = CHANNELS / 16;
constexpr int STAGED = 16;                // samples in shared memory at a time
constexpr int STRIDE = TOKENS + 1;        // neighbouring channels of a token lie in different banks
constexpr int GROUP_LANES = KEY_GROUP / 4;
static_assert(TOKENS == 128 && CHANNELS % 16 == 0 && CHANNELS <= 128, "a warp holds a channel, 256 threads a matrix");

struct Arguments {
    u16* keys;
    const int *rows, *starts, *active;
    const u8* bits;
    const u16* samples;
    long long key_strides[3], sample_strides[3];
    int sample_count;
    float damping, factors[4], gains[2];
};

struct Memory {
    float keys[CHANNELS][STRIDE];
    float samples[STAGED][CHANNELS];
    float lines[2][CHANNELS];
    float errors[TOKENS];
    float powers[CHANNELS], scores[CHANNELS];
    int order[CHANNELS], widths[CHANNELS];
};

// What a launch must reserve.
extern "C" __constant__ unsigned shared_bytes = sizeof(Memory);

template <int LANES>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}
__device__ __forceinline__ void group_range(float& low, float& high) {
#pragma unroll
    for (int mask = GROUP_LANES / 2; mask; mask /= 2) {
        low = fminf(low, __shfl_xor_sync(ALL_LANES, low, mask));
        high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, mask));
    }
}

// Scale and zero of a group that four tokens of every lane belong to: quantize() of mixkvq/quant/affine.py.
struct Fit {
    float scale, zero, levels;

    __device__ Fit(float low, float high, float levels) : levels(levels) {
        zero = round_down(low);
        scale = storable((high - zero) / levels);
    }
    __device__ float code(float x) const {
        const float inverse = scale > 0 ? 1 / scale : 0;
        return rintf(fminf(fmaxf((x - zero) * inverse, 0.f), levels));
    }
    __device__ float squared_error(const float (&x)[4]) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float error = code(x[i]) * scale + zero - x[i];
            sum += error * error;
        }
        return sum_over<GROUP_LANES>(sum);
    }
};

__device__ __forceinline__ void search_clip(const Arguments& a, const float (&x)[4], float low, float high, Fit& best) {
    float least = best.squared_error(x);
    const float middle = (low + high) / 2, half = (high - low) / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Fit other(middle - a.factors[i] * half, middle + a.factors[i] * half, best.levels);
        const float error = other.squared_error(x);
        if (error < least) {
            best = other;
            least = error;
        }
    }
}

// Rounds a channel of keys to the type that they are stored in, and leaves what quantization will take from each of its tokens.
__device__ void round_channel(const Arguments& a, float* keys, int width, int lane, float* errors) {
    float x[4], low = -minus_infinity(), high = minus_infinity();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = to_float(from_float(keys[4 * lane + i]));
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    group_range(low, high);
    Fit fit(low, high, float((1 << width) - 1));
    if (CLIP && fit.levels <= CLIPPED_LEVELS) search_clip(a, x, low, high, fit);
    float codes[4], y[4], scale = fit.scale, zero = fit.zero;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = fit.code(x[i]);
    if (UNBIASED) {
        float x_mean = 0, y_mean = 0, power = 0, overlap = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            y[i] = codes[i] * scale + zero;
            x_mean += x[i];
            y_mean += y[i];
        }
        x_mean = sum_over<GROUP_LANES>(x_mean) / KEY_GROUP;
        y_mean = sum_over<GROUP_LANES>(y_mean) / KEY_GROUP;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            power += (x[i] - x_mean) * (x[i] - x_mean);
            overlap += (x[i] - x_mean) * (y[i] - y_mean);
        }
        power = sum_over<GROUP_LANES>(power);
        overlap = sum_over<GROUP_LANES>(overlap);
        const float gain = fminf(fmaxf(overlap > 0 ? power / overlap : 1.f, a.gains[0]), a.gains[1]);
        if (scale > 0) {
            scale = storable(scale * gain);
            zero = storable(x_mean + gain * (zero - y_mean));
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        keys[4 * lane + i] = x[i];
        errors[4 * lane + i] = x[i] - (codes[i] * scale + zero);
    }
}

// S_d of every channel, as mixkvq/quant/salience.py: its mean step over the groups.
__device__ __forceinline__ float sensitivity(const float* keys, int lane) {
    float low = -minus_infinity(), high = minus_infinity();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low = fminf(low, keys[4 * lane + i]);
        high = fmaxf(high, keys[4 * lane + i]);
    }
    group_range(low, high);
    return sum_over<32>(high - low) / (32 * ((1 << KEY_BITS) - 1));
}

// A thread's square of H, and what to do with lines of it.
struct Square {
    float x[SIDE][SIDE];
    int row, column;

    __device__ Square() : row(threadIdx.x / 16), column(threadIdx.x % 16) {
        for (int i = 0; i < SIDE; ++i)
            for (int j = 0; j < SIDE; ++j) x[i][j] = 0;
    }
    __device__ __forceinline__ void add_outer(const float* line, float factor) {
        float down[SIDE], across[SIDE];
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            down[i] = line[SIDE * row + i] * factor;
            across[i] = line[SIDE * column + i];
        }
#pragma unroll
        for (int i = 0; i < SIDE; ++i)
#pragma unroll
            for (int j = 0; j < SIDE; ++j) x[i][j] = fmaf(down[i], across[j], x[i][j]);
    }
    // Line SIDE * owner + i, for everybody; `i` is known when this is compiled.
    __device__ __forceinline__ void hand_round(int owner, int i, float* line) const {
        if (row != owner) return;
#pragma unroll
        for (int j = 0; j < SIDE; ++j) line[SIDE * column + j] = x[i][j];
    }
    // A step of inversion by sweeping: the line and column that were handed round become those of the inverse, up to a sign.
    __device__ __forceinline__ void sweep(int owner, int i, const float* line) {
        const float inverse = 1 / line[SIDE * owner + i];
        add_outer(line, -inverse);
#pragma unroll
        for (int j = 0; j < SIDE; ++j) {
            if (row == owner) x[i][j] = line[SIDE * column + j] * inverse;
            if (column == owner) x[j][i] = line[SIDE * row + j] * inverse;
        }
        if (row == owner && column == owner) x[i][i] = -inverse;
    }
};

__device__ __forceinline__ void add_samples(const Arguments& a, const u16* samples, int part, Memory& memory, Square& h) {
    for (int first = 0; first < a.sample_count; first += STAGED) {
        __syncthreads();
        for (int i = threadIdx.x; i < STAGED * CHANNELS; i += THREADS) {
            const int sample = first + i / CHANNELS, channel = memory.order[i % CHANNELS] * PARTS + part;
            const bool there = sample < a.sample_count;
            memory.samples[i / CHANNELS][i % CHANNELS] =
                there ? to_float(samples[sample * a.sample_strides[2] + channel]) : 0;
        }
        __syncthreads();
        for (int i = 0; i < STAGED; ++i) h.add_outer(memory.samples[i], 1);
    }
}

// Channels by falling salience; those that are stored as they are come first, since they cannot make up for anything.
__device__ __forceinline__ void find_order(const u8* bits, int part, Memory& memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = threadIdx.x;
    for (int i = warp; i < CHANNELS; i += THREADS / 32) {
        const float step = sensitivity(memory.keys[i], lane);
        if (lane == 0) memory.scores[i] = step;
    }
    __syncthreads();
    const int width = c < CHANNELS ? bits[c * PARTS + part] : 0;
    if (c < CHANNELS) {
        const float score = sqrtf(fmaxf(memory.powers[c], 0.f)) * memory.scores[c];
        memory.scores[c] = width == DENSE_BITS ? -minus_infinity() : score == score ? score : 0;
    }
    __syncthreads();
    if (c < CHANNELS) {
        int rank = 0;
        for (int i = 0; i < CHANNELS; ++i) {
            const float other = memory.scores[i], own = memory.scores[c];
            rank += other > own || (other == own && i < c);
        }
        memory.order[rank] = c;
        memory.widths[rank] = width;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) move_keys(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) u8 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    const int block = blockIdx.x / KV_HEADS, head = blockIdx.x % KV_HEADS, part = blockIdx.y;
    if (!a.active[block]) return;
    const long long row = a.rows[block];
    u16* keys = a.keys + row * a.key_strides[0] + head * a.key_strides[1] + a.starts[block] * a.key_strides[2];
    const u16* samples = a.samples + row * a.sample_strides[0] + head * a.sample_strides[1];
    for (int i = threadIdx.x; i < TOKENS * CHANNELS; i += THREADS)
        memory.keys[i % CHANNELS][i / CHANNELS] =
            to_float(keys[i / CHANNELS * a.key_strides[2] + i % CHANNELS * PARTS + part]);
    if (threadIdx.x < CHANNELS) {
        float power = 0;
        for (int i = 0; i < a.sample_count; ++i) {
            const float x = to_float(samples[i * a.sample_strides[2] + threadIdx.x * PARTS + part]);
            power = fmaf(x, x, power);
        }
        memory.powers[threadIdx.x] = power;
    }
    __syncthreads();
    float power = 0;
    for (int i = 0; i < CHANNELS; ++i) power += memory.powers[i] / CHANNELS;
    if (!(power > 0 && power < -minus_infinity())) return;  // no query yet, or one that is not finite
    find_order(a.bits + (long long)(block * KV_HEADS + head) * HEAD_DIM, part, memory);

    Square h;
    add_samples(a, samples, part, memory, h);
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
#pragma unroll
        for (int j = 0; j < SIDE; ++j)
            h.x[i][j] = h.x[i][j] / power + (h.row == h.column && i == j ? a.damping : 0);
    // Lines take turns in two places: who writes one is a barrier behind everybody who still reads the other.
    for (int owner = 0; owner < 16; ++owner) {
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            float* line = memory.lines[(SIDE * owner + i) & 1];
            h.hand_round(owner, i, line);
            __syncthreads();
            h.sweep(owner, i, line);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
#pragma unroll
        for (int j = 0; j < SIDE; ++j) h.x[i][j] = -h.x[i][j];
    for (int owner = 0; owner < 16; ++owner) {
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            const int turn = SIDE * owner + i, token = threadIdx.x % TOKENS, width = memory.widths[turn];
            float* line = memory.lines[turn & 1];
            h.hand_round(owner, i, line);
            __syncthreads();
            if (width != DENSE_BITS && threadIdx.x < 32)
                round_channel(a, memory.keys[memory.order[turn]], width, threadIdx.x, memory.errors);
            const float inverse = 1 / line[turn];
            h.add_outer(line, -inverse);
            if (width == DENSE_BITS) continue;
            __syncthreads();
            const float error = memory.errors[token] * inverse;
            for (int j = turn + 1 + threadIdx.x / TOKENS; j < CHANNELS; j += THREADS / TOKENS)
                memory.keys[memory.order[j]][token] -= line[j] * error;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * CHANNELS; i += THREADS)
        keys[i / CHANNELS * a.key_strides[2] + i % CHANNELS * PARTS + part] =
            from_float(memory.keys[i % CHANNELS][i / CHANNELS]);
}

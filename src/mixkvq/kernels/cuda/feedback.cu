// Error feedback before packing: moves the keys of a full block, so that rounding each channel for itself is then right. The
// numbers of mixkvq/quant/feedback.py, in its order: H = U D U^T by elimination from the last channel to the first, then
// channels are rounded from the first to the last, and each error is added to the shifts of all later ones.
//
// A block of threads moves one part of a head of one block of tokens. While H is eliminated, the threads form a square of
// 16 x 16, each of which keeps a square of H in registers, with the channels in the order of rounding; the line that everybody
// needs goes through shared memory, and stays there as a column of U D. After that, warps take channels in turn, four tokens a
// lane, with their shifts in registers: who has the next channel rounds it before seeing to its others.
//
// Set by the launcher: KV_HEADS, HEAD_DIM, PARTS, KEY_BITS, KEY_GROUP, TOKENS, CLIP, UNBIASED, CLIPPED_LEVELS, DENSE_BITS, BFLOAT16.

#include "numbers.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int CHANNELS = HEAD_DIM / PARTS;
constexpr int SIDE = CHANNELS / 16;
constexpr int SHARE = CHANNELS / WARPS;   // channels that a warp rounds
constexpr int STAGED = 16;                // samples in shared memory at a time
constexpr int STRIDE = TOKENS + 4;        // four tokens of a lane are aligned, neighbouring channels lie in different banks
constexpr int GROUP_LANES = KEY_GROUP / 4;
constexpr int CLIPS = 5;                  // ranges that a search chooses from, the whole one first
static_assert(TOKENS == 128 && CHANNELS % 16 == 0 && CHANNELS <= 128, "a warp holds a channel, 256 threads a matrix");

struct Arguments {
    u16* keys;
    const int *rows, *starts, *active;
    const u8* bits;
    const u16* samples;
    const float* covariance;  // the samples' summed products, where they were summed before, or nothing
    long long key_strides[3], sample_strides[3];
    int sample_count;
    float damping, factors[CLIPS - 1], gains[2];
};

struct Memory {
    float lines[CHANNELS][CHANNELS];      // before H is eliminated: samples, and what channels are ordered by
    float errors[2][TOKENS];
    u16 keys[CHANNELS][STRIDE];
    u8 order[CHANNELS], widths[CHANNELS];
};

// What a launch must reserve.
extern "C" __constant__ unsigned shared_bytes = sizeof(Memory);

// Sums over so many neighbouring lanes. Several at once: a warp waits for each exchange, but not for one after the other.
template <int LANES, int N>
__device__ __forceinline__ void sum_over(float (&x)[N]) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2)
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(ALL_LANES, x[i], mask);
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
    float scale, zero;

    Fit() = default;
    __device__ Fit(float low, float high, float levels) {
        zero = round_down(low);
        scale = storable((high - zero) / levels);
    }
    __device__ void codes(const float (&x)[4], float levels, float (&codes)[4]) const {
        const float inverse = scale > 0 ? 1 / scale : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) codes[i] = rintf(fminf(fmaxf((x[i] - zero) * inverse, 0.f), levels));
    }
    // Of a lane's tokens.
    __device__ float squared_error(const float (&x)[4], float levels) const {
        float sum = 0, code[4];
        codes(x, levels, code);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float error = code[i] * scale + zero - x[i];
            sum += error * error;
        }
        return sum;
    }
};

__device__ __forceinline__ Fit search_clip(const Arguments& a, const float (&x)[4], float low, float high, float levels) {
    const float middle = (low + high) / 2, half = (high - low) / 2;
    Fit fits[CLIPS];
    float errors[CLIPS];
#pragma unroll
    for (int i = 0; i < CLIPS; ++i) {
        fits[i] = i ? Fit(middle - a.factors[i - 1] * half, middle + a.factors[i - 1] * half, levels) : Fit(low, high, levels);
        errors[i] = fits[i].squared_error(x, levels);
    }
    sum_over<GROUP_LANES>(errors);
    Fit best = fits[0];
    float least = errors[0];
#pragma unroll
    for (int i = 1; i < CLIPS; ++i) {
        if (errors[i] < least) {
            best = fits[i];
            least = errors[i];
        }
    }
    return best;
}

// What is left of a lane's four tokens of a channel after quantization, in place of their keys.
__device__ __forceinline__ void round_channel(const Arguments& a, float (&x)[4], int width) {
    float low = -minus_infinity(), high = minus_infinity();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    group_range(low, high);
    const float levels = float((1 << width) - 1);
    Fit fit = CLIP && levels <= CLIPPED_LEVELS ? search_clip(a, x, low, high, levels) : Fit(low, high, levels);
    float y[4];
    fit.codes(x, levels, y);
    if (UNBIASED) {
        float means[2] = {0, 0}, products[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            means[0] += x[i];
            means[1] += y[i] * fit.scale + fit.zero;
        }
        sum_over<GROUP_LANES>(means);
        const float x_mean = means[0] / KEY_GROUP, y_mean = means[1] / KEY_GROUP;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float difference = x[i] - x_mean;
            products[0] += difference * difference;
            products[1] += difference * (y[i] * fit.scale + fit.zero - y_mean);
        }
        sum_over<GROUP_LANES>(products);
        const float gain = fminf(fmaxf(products[1] > 0 ? products[0] / products[1] : 1.f, a.gains[0]), a.gains[1]);
        if (fit.scale > 0) {
            fit.scale = storable(fit.scale * gain);
            fit.zero = storable(x_mean + gain * (fit.zero - y_mean));
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = y[i] * fit.scale + fit.zero;
}

// S_d of a channel, as mixkvq/quant/salience.py: its mean step over the groups.
__device__ __forceinline__ float sensitivity(const u16* keys, int lane) {
    float low = -minus_infinity(), high = minus_infinity(), range[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float x = to_float(keys[4 * lane + i]);
        low = fminf(low, x);
        high = fmaxf(high, x);
    }
    group_range(low, high);
    range[0] = high - low;
    sum_over<32>(range);
    return range[0] / (32 * ((1 << KEY_BITS) - 1));
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
};

__device__ __forceinline__ void add_samples(const Arguments& a, const u16* samples, int part, Memory& memory, Square& h) {
    for (int first = 0; first < a.sample_count; first += STAGED) {
        __syncthreads();
#pragma unroll
        for (int i = threadIdx.x; i < STAGED * CHANNELS; i += THREADS) {
            const int sample = first + i / CHANNELS, channel = memory.order[i % CHANNELS] * PARTS + part;
            const bool there = sample < a.sample_count;
            memory.lines[i / CHANNELS][i % CHANNELS] =
                there ? to_float(samples[sample * a.sample_strides[2] + channel]) : 0;
        }
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < STAGED; ++i) h.add_outer(memory.lines[i], 1);
    }
    __syncthreads();
}

// H from a matrix with all channels of the head in their own order.
__device__ __forceinline__ void load_covariance(const float* covariance, int part, const Memory& memory, Square& h) {
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        const float* line = covariance + (memory.order[SIDE * h.row + i] * PARTS + part) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < SIDE; ++j) h.x[i][j] = line[memory.order[SIDE * h.column + j] * PARTS + part];
    }
    __syncthreads();
}

// Line i becomes column i of U, times D_i, in its first i places, and D_i.
__device__ __forceinline__ void eliminate(Memory& memory, Square& h) {
    for (int owner = 15; owner >= 0; --owner) {
#pragma unroll
        for (int i = SIDE - 1; i >= 0; --i) {
            float* line = memory.lines[SIDE * owner + i];
            h.hand_round(owner, i, line);
            __syncthreads();
            if (h.row <= owner) h.add_outer(line, -1 / line[SIDE * owner + i]);
        }
    }
}

// Channels by falling salience; those that are stored as they are come first, since they cannot make up for anything.
__device__ __forceinline__ void find_order(const u8* bits, const float* powers, int part, Memory& memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = threadIdx.x;
    float *steps = memory.lines[1], *scores = memory.lines[2];
#pragma unroll 4
    for (int i = warp; i < CHANNELS; i += WARPS) {
        const float step = sensitivity(memory.keys[i], lane);
        if (lane == 0) steps[i] = step;
    }
    __syncthreads();
    const int width = c < CHANNELS ? bits[c * PARTS + part] : 0;
    if (c < CHANNELS) {
        const float score = sqrtf(fmaxf(powers[c], 0.f)) * steps[c];
        scores[c] = width == DENSE_BITS ? -minus_infinity() : score == score ? score : 0;
    }
    __syncthreads();
    if (c < CHANNELS) {
        int rank = 0;
        for (int i = 0; i < CHANNELS; ++i) {
            const float other = scores[i], own = scores[c];
            rank += other > own || (other == own && i < c);
        }
        memory.order[rank] = c;
        memory.widths[rank] = width;
    }
}

// Rounds all channels, and moves the keys.
__device__ __forceinline__ void move_channels(const Arguments& a, Memory& memory) {
    const int lane = threadIdx.x % 32;
    int mine = threadIdx.x / 32;  // the warp's next channel; those after it are WARPS apart
    float shifts[SHARE][4];
#pragma unroll
    for (int m = 0; m < SHARE; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) shifts[m][i] = 0;
    for (int next = 0; next < CHANNELS; ++next) {
        const int last = next - 1;  // the channel that was rounded before
        float errors[4] = {0, 0, 0, 0};
        if (next) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 4; ++i) errors[i] = memory.errors[last & 1][4 * lane + i];
        }
        auto shift = [&](int m) {
            if (!next || mine + WARPS * m >= CHANNELS) return;
            const float weight = memory.lines[mine + WARPS * m][last];
#pragma unroll
            for (int i = 0; i < 4; ++i) shifts[m][i] = fmaf(weight, errors[i], shifts[m][i]);
        };
        shift(0);
        if (mine == next) {
            u16* keys = memory.keys[memory.order[next]] + 4 * lane;
            const float inverse = 1 / memory.lines[next][next];
            const int width = memory.widths[next];
            float original[4], x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                original[i] = to_float(keys[i]);
                const u16 moved = from_float(fmaf(shifts[0][i], inverse, original[i]));
                x[i] = to_float(moved);
                if (width != DENSE_BITS) keys[i] = moved;
            }
            if (width != DENSE_BITS) round_channel(a, x, width);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                memory.errors[next & 1][4 * lane + i] = width == DENSE_BITS ? 0 : original[i] - x[i];
        }
#pragma unroll
        for (int m = 1; m < SHARE; ++m) shift(m);
        if (mine == next) {
            mine += WARPS;
#pragma unroll
            for (int m = 0; m + 1 < SHARE; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) shifts[m][i] = shifts[m + 1][i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) move_keys(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) u8 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    const int block = blockIdx.x / KV_HEADS, head = blockIdx.x % KV_HEADS, part = blockIdx.y;
    if (!a.active[block]) return;
    const long long row = a.rows[block];
    u16* keys = a.keys + row * a.key_strides[0] + head * a.key_strides[1] + a.starts[block] * a.key_strides[2];
    const u16* samples = a.samples + row * a.sample_strides[0] + head * a.sample_strides[1];
    const float* covariance =
        a.covariance ? a.covariance + (row * KV_HEADS + head) * (long long)(HEAD_DIM * HEAD_DIM) : nullptr;
#pragma unroll 8
    for (int i = threadIdx.x; i < TOKENS * CHANNELS; i += THREADS)
        memory.keys[i % CHANNELS][i / CHANNELS] = keys[i / CHANNELS * a.key_strides[2] + i % CHANNELS * PARTS + part];
    float* powers = memory.lines[0];
    if (threadIdx.x < CHANNELS) {
        const int channel = threadIdx.x * PARTS + part;
        float power = covariance ? covariance[channel * (HEAD_DIM + 1)] : 0;
#pragma unroll 16
        for (int i = 0; i < (covariance ? 0 : a.sample_count); ++i) {
            const float x = to_float(samples[i * a.sample_strides[2] + channel]);
            power = fmaf(x, x, power);
        }
        powers[threadIdx.x] = power;
    }
    __syncthreads();
    float power = 0;
    for (int i = 0; i < CHANNELS; ++i) power += powers[i] / CHANNELS;
    if (!(power > 0 && power < -minus_infinity())) return;  // no query yet, or one that is not finite
    find_order(a.bits + (long long)(block * KV_HEADS + head) * HEAD_DIM, powers, part, memory);

    Square h;
    __syncthreads();
    if (covariance) {
        load_covariance(covariance, part, memory, h);
    } else {
        add_samples(a, samples, part, memory, h);
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
#pragma unroll
        for (int j = 0; j < SIDE; ++j)
            h.x[i][j] = h.x[i][j] / power + (h.row == h.column && i == j ? a.damping : 0);
    eliminate(memory, h);
    __syncthreads();
    move_channels(a, memory);
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < TOKENS * CHANNELS; i += THREADS)
        keys[i / CHANNELS * a.key_strides[2] + i % CHANNELS * PARTS + part] = memory.keys[i % CHANNELS][i / CHANNELS];
}

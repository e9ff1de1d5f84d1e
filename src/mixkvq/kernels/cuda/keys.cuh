// From a page's key codes and a query to logits.
#pragma once

#include "codes.cuh"

// What a page is multiplied with: query times key scale as digits, and what turns sums into logits. By operand column.
struct KeyOperand {
    u32 words[KEY_GROUPS][ROW_TILES][KEY_STEPS][2];
    float unit[KEY_GROUPS][ROW_TILES], zero[KEY_GROUPS][ROW_TILES];
};

__device__ __forceinline__ void prepare_keys(const float (*query)[HEAD_DIM], WarpMemory& memory, const Thread& t,
                                             KeyOperand& operand) {
#pragma unroll
    for (int group = 0; group < KEY_GROUPS; ++group) {
        const u8* scales = memory.key_params[0] + group * HEAD_DIM * 2;
        const u8* zeros = memory.key_params[1] + group * HEAD_DIM * 2;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            float product[KEY_STEPS][4], top = 0, zero = 0;
#pragma unroll
            for (int step = 0; step < KEY_STEPS; ++step) {
                const int channel = 32 * step + 8 * t.tig + 4 * t.digit;
                const Words2 scale = *reinterpret_cast<const Words2*>(scales + 2 * channel);
                const Words2 offset = *reinterpret_cast<const Words2*>(zeros + 2 * channel);
                const float4 q = *reinterpret_cast<const float4*>(&query[4 * tile + t.row][channel]);
                float* p = product[step];
                p[0] = q.x * half_to_float(scale.x);
                p[1] = q.y * upper_half_to_float(scale.x);
                p[2] = q.z * half_to_float(scale.y);
                p[3] = q.w * upper_half_to_float(scale.y);
                zero = fmaf(q.x, half_to_float(offset.x), zero);
                zero = fmaf(q.y, upper_half_to_float(offset.x), zero);
                zero = fmaf(q.z, half_to_float(offset.y), zero);
                zero = fmaf(q.w, upper_half_to_float(offset.y), zero);
#pragma unroll
                for (int i = 0; i < 4; ++i) top = fmaxf(top, fabsf(p[i]));
                if (LANES4) {
                    float* to = &memory.products[group][4 * tile + t.row][channel];
                    *reinterpret_cast<float4*>(to) = make_float4(p[0], p[1], p[2], p[3]);
                }
            }
            top = reduce_column_max(top);
            operand.zero[group][tile] = reduce_column_sum(zero);
            operand.unit[group][tile] = top * (1 / SIGNED_RANGE);
            const float per_unit = top > 0 ? divide(SIGNED_RANGE, top) : 0;
#pragma unroll
            for (int step = 0; step < KEY_STEPS; ++step) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = fixed_point(product[step][i], per_unit, 128.f);
                u32(&words)[2] = operand.words[group][tile][step];
                digits(x, t.key_digit, words[0], words[1]);
                words[0] ^= t.sign;
                words[1] ^= t.sign;
            }
        }
    }
    if (LANES4) __syncwarp();
}

using KeySums = int[8][ROW_TILES][4];

// Sums over the channels of two words a row: `planes[.][0]` and `planes[.][1]` are the tile's rows `quad` and `quad + 8`, a pair
// of words for each half of the summed dimension. BITS are those of the planes: all of a key, or the low ones of a lane.
template <int BITS, bool BASE>
__device__ __forceinline__ void multiply_keys(const Words4 (&planes)[(BITS + 1) / 2][2], const KeyOperand& operand, int step,
                                              const u32 (&lanes)[KEY_GROUPS][ROW_TILES][2], KeySums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 selector = half ? 0x7531 : 0x6420;
        u32 codes[4][4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const bool second = part >> 1;
            u32 bytes[(BITS + 1) / 2];
#pragma unroll
            for (int i = 0; i < (BITS + 1) / 2; ++i) {
                const Words4& words = planes[i][part & 1];
                bytes[i] = bytes_of(second ? words.y : words.x, second ? words.w : words.z, selector);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) codes[part][k] = codes_of<BITS>(bytes, k, key_shift(k));
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int plane = 4 * half + k;
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                const int group = plane / PLANES_PER_GROUP;
                const u32(&b)[2] = BASE ? operand.words[group][tile][step] : lanes[group][tile];
                multiply_u8_s8(sums[plane][tile], codes[0][k], codes[1][k], codes[2][k], codes[3][k], b[0], b[1]);
            }
        }
    }
}

// The key planes of one head: channels 32 step + 8 tig and the next seven, of words 2 quad and the next one. What is STAGED is
// loaded a page ahead; all of 8 bits would not fit into the registers.
struct KeyWords {
    static constexpr int STAGED = KEY_BITS < 8 ? KEY_STEPS : 2;
    Words4 planes[STAGED][KEY_PLANES][2];

    __device__ __forceinline__ void load(const u8* page, int head, const Thread& t) {
#pragma unroll
        for (int step = 0; step < STAGED; ++step) load_step(page, head, step, t);
    }
    __device__ __forceinline__ void load_step(const u8* page, int head, int step, const Thread& t) {
        const u32 offsets[] = {KEY_PLANE_0, KEY_PLANE_1, KEY_PLANE_2, KEY_PLANE_3};
#pragma unroll
        for (int plane = 0; plane < KEY_PLANES; ++plane) {
            const bool single = plane_bits(KEY_BITS, plane) == 1;
            const int quad = single ? t.quad & 3 : t.quad;
            const u8* at = page + offsets[plane] + head * PLANE_BYTES / (single ? 2 : 1) + 4 * quad * HEAD_DIM + 16 * t.tig;
#pragma unroll
            for (int i = 0; i < 2; ++i) planes[step % STAGED][plane][i] = load128(at + i * 2 * HEAD_DIM + 64 * step);
        }
    }
    // A plane of 1 bit that has arrived is brought into the places of one of 2.
    __device__ __forceinline__ void align_step(int step, const Thread& t) {
        if (KEY_BITS % 2 == 0) return;
        const bool upper = t.quad >= 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Words4& words = planes[step % STAGED][KEY_PLANES - 1][i];
            words = {even_bits(words.x, upper), even_bits(words.y, upper), even_bits(words.z, upper), even_bits(words.w, upper)};
        }
    }
};

__device__ __forceinline__ void base_sums(KeyWords& words, const u8* page, int head, const Thread& t, const KeyOperand& operand,
                                          KeySums& sums) {
    const u32 none[KEY_GROUPS][ROW_TILES][2] = {};
#pragma unroll
    for (int step = 0; step < KEY_STEPS; ++step) {
        words.align_step(step, t);
        multiply_keys<KEY_BITS, true>(words.planes[step % KeyWords::STAGED], operand, step, none, sums);
        if (step + KeyWords::STAGED < KEY_STEPS) words.load_step(page, head, step + KeyWords::STAGED, t);
    }
}

// Where a head's promoted channels lie: its first chunk, and its lanes counted from the beginning of that one.
struct Run {
    int chunk = 0, first = 0, end = 0;

    __device__ __forceinline__ void settle_all() {
        settle(chunk);
        settle(first);
        settle(end);
    }
    __device__ __forceinline__ int chunks() const { return end > first ? (end + 15) >> 4 : 0; }
};

__device__ __forceinline__ Run load_run(const u8* page, int run_offset, int lane_offset, int head, int lanes_of_chunk) {
    const int first = load16(page + lane_offset + 2 * head), end = load16(page + lane_offset + 2 * head + 2);
    const int skipped = first / lanes_of_chunk;
    return {int(load32(page + run_offset)) + skipped, first - skipped * lanes_of_chunk, end - skipped * lanes_of_chunk};
}

// Copies up to STAGED_CHUNKS chunks of a run, from the given one on.
__device__ __forceinline__ void copy_chunks(const u8* chunks, const Run& run, int chunk, int lane, WarpMemory& memory) {
    const int bytes = min(run.chunks() - chunk, STAGED_CHUNKS) * CHUNK4_BYTES;
    const u8* from = chunks + (long long)(run.chunk + chunk) * CHUNK4_BYTES;
#pragma unroll
    for (int start = 0; start < STAGED_CHUNKS * CHUNK4_BYTES; start += 512) {
        const int i = start + 16 * lane;
        if (i < bytes) copy16(memory.chunks[0] + i, from + i);
    }
}

// 32 lanes from two chunks, of which this head owns those from `first` to `end`, counted from the beginning of the first.
__device__ __forceinline__ void multiply_lanes(const u8 (&chunks)[2][STAGED_BYTES], int first, int end, const KeyOperand& operand,
                                               const WarpMemory& memory, const Thread& t, KeySums& sums) {
    Words4 low[1][2];
    Words4(&words)[2] = low[0];
    int channel[4];
    bool owned[4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        const u8* at = chunks[part] + CHUNK4_PLANE + 64 * t.quad + 8 * t.tig;
        const Words2 even = *reinterpret_cast<const Words2*>(at), odd = *reinterpret_cast<const Words2*>(at + 32);
        // In the place of channels that follow each other: see multiply_keys.
        (part ? words[0].y : words[0].x) = even.x;
        (part ? words[0].w : words[0].z) = even.y;
        (part ? words[1].y : words[1].x) = odd.x;
        (part ? words[1].w : words[1].z) = odd.y;
        const int pair = 4 * t.tig + 2 * t.digit;
        const int numbers = *reinterpret_cast<const u16*>(chunks[part] + CHUNK4_CHANNEL + pair);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int lane = 16 * part + pair + i;
            owned[2 * part + i] = lane >= first && lane < end;
            // A lane that was not copied may name any channel.
            channel[2 * part + i] = owned[2 * part + i] ? (numbers >> (8 * i)) & 0xff : 0;
        }
    }
    u32 lanes[KEY_GROUPS][ROW_TILES][2];
#pragma unroll
    for (int group = 0; group < KEY_GROUPS; ++group) {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            // A low code counts a quarter of a base code.
            const float unit = operand.unit[group][tile];
            const float per_unit = unit > 0 ? divide(0.25f, unit) : 0;
            u32 x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float product = memory.products[group][4 * tile + t.row][channel[i]];
                x[i] = fixed_point(product, owned[i] ? per_unit : 0, 128.f);
            }
            digits(x, t.key_digit, lanes[group][tile][0], lanes[group][tile][1]);
            lanes[group][tile][0] ^= t.sign;
            lanes[group][tile][1] ^= t.sign;
        }
    }
    multiply_keys<2, false>(low, operand, 0, lanes, sums);
}

// The low bits of channels promoted to 4 bits. The first chunks are in shared memory already.
__device__ __forceinline__ void lane_sums(const u8* chunks, const Run& run, const KeyOperand& operand, WarpMemory& memory,
                                          const Thread& t, KeySums& sums) {
    for (int chunk = 0; chunk < run.chunks(); chunk += STAGED_CHUNKS) {
        if (chunk > 0) {
            __syncwarp();
            copy_chunks(chunks, run, chunk, t.lane, memory);
            commit_copies();
            wait_copies<0>();
            __syncwarp();
        }
        const int before = 16 * chunk;
#pragma unroll
        for (int slot = 0; slot < STAGED_CHUNKS; slot += 2) {
            if (chunk + slot < run.chunks()) {
                const auto& pair = reinterpret_cast<const u8(&)[2][STAGED_BYTES]>(memory.chunks[slot]);
                multiply_lanes(pair, run.first - before - 16 * slot, run.end - before - 16 * slot, operand, memory, t, sums);
            }
        }
    }
}

// Logits of this thread's tokens: [plane][even or odd][row tile].
using Logits = float[8][2][ROW_TILES];

__device__ __forceinline__ void to_logits(const KeySums& sums, const KeyOperand& operand, const Thread& t, Logits& logits) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int group = 0; group < KEY_GROUPS; ++group) {
            const float unit = to_result(operand.unit[group][tile], t), zero = to_result(operand.zero[group][tile], t);
#pragma unroll
            for (int i = 0; i < PLANES_PER_GROUP; ++i) {
                const int plane = group * PLANES_PER_GROUP + i;
                const int(&c)[4] = sums[plane][tile];
                const float factor = unit * (1.f / float(1 << key_shift(plane & 3)));
                logits[plane][0][tile] = fmaf(float(256 * c[0] + c[1]), factor, zero);
                logits[plane][1][tile] = fmaf(float(256 * c[2] + c[3]), factor, zero);
            }
        }
    }
}

// Channels that are not quantized: one record each, two at a time so that more loads are in flight.
__device__ __forceinline__ void add_dense_lanes(const u8* chunks, const Run& run, const float (*query)[HEAD_DIM], const Thread& t,
                                                Logits& logits) {
    for (int first = run.first; first < run.end; first += 2) {
        u32 keys[2][8];
        int channel[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Past the end the last one is read again, and left out below.
            const u8* record = chunks + (long long)(run.chunk + min(first + i, run.end - 1)) * CHUNK16_BYTES;
            channel[i] = load16(record + CHUNK16_CHANNEL) & 0xff;
#pragma unroll
            for (int plane = 0; plane < 8; ++plane) keys[i][plane] = load32(record + CHUNK16_KEYS + 32 * plane + 4 * t.quad);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                if (first + i >= run.end) continue;
                const float q = query[4 * tile + t.tig][channel[i]];
#pragma unroll
                for (int plane = 0; plane < 8; ++plane) {
                    logits[plane][0][tile] = fmaf(q, to_float(u16(keys[i][plane])), logits[plane][0][tile]);
                    logits[plane][1][tile] = fmaf(q, to_float(u16(keys[i][plane] >> 16)), logits[plane][1][tile]);
                }
            }
        }
    }
}

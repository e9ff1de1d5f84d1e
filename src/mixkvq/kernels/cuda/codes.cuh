// From words of a page's planes to bytes that hold codes.
#pragma once

#include "common.cuh"

// By how many bits the code of a position is shifted in its byte: whatever saves instructions. Factors are divided out of the
// sums. Key codes of 2 bits stay where they are.
__device__ __forceinline__ constexpr int value_shift(int position) { return VALUE_BITS < 8 ? 2 * (position & 1) : 0; }
__device__ __forceinline__ constexpr int key_shift(int position) {
    return KEY_BITS == 2 ? 2 * position : KEY_BITS < 8 ? 2 * (position & 1) : 0;
}

__device__ __forceinline__ constexpr u32 shifted(u32 x, int left) { return left >= 0 ? x << left : x >> -left; }

// What a plane adds to the bytes that hold the codes of a position, moved up by `shift`: of every byte of its words the bits from
// 2 * position on. `bits` of every code are in this plane, `below` in less significant ones.
__device__ __forceinline__ constexpr u32 plane_part(u32 words, int position, int bits, int below, int shift) {
    const u32 mask = (bits == 2 ? 0x03030303u : 0x01010101u) << (below + shift);
    return shifted(words, below + shift - 2 * position) & mask;
}

// The codes of a position from words of all planes; see `even_bits` for a plane of 1 bit.
template <int BITS>
__device__ __forceinline__ u32 codes_of(const u32 (&planes)[(BITS + 1) / 2], int position, int shift) {
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < (BITS + 1) / 2; ++i) {
        const int below = max(BITS - 2 * (i + 1), 0);
        codes |= plane_part(planes[i], position, plane_bits(BITS, i), below, shift);
    }
    return codes;
}

// A plane of 1 bit has half the words: word t holds, at even bits, the tokens of word t of a plane of 2 bits, and at odd ones
// those of word t + 8. Both are brought to where a plane of 2 bits has its lower bit.
__device__ __forceinline__ u32 even_bits(u32 words, bool upper) { return words >> int(upper); }

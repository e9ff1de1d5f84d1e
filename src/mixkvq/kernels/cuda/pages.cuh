// A block's way through its pages: what is read when, and the parts of its warps made one.
#pragma once

#include "values.cuh"

// The pages of a warp. Every lane looks one of the next 32 up, so that nothing is waited for at a page's turn.
struct PageReader {
    const Arguments& a;
    const Rows& rows;
    int index, end, turn;
    int number = 0;        // of this lane's page
    Run runs, dense_runs;  // of this lane's page, from the first of its head's chunks
    const u8* page;        // the one whose turn it is, or null
    Run run, dense_run;

    __device__ PageReader(const Arguments& a, const Rows& rows, int begin, int end)
        : a(a), rows(rows), index(begin), end(end) {
        look_up();
        take();
    }
    __device__ __forceinline__ void look_up() {
        turn = 0;
        const int mine = index + (threadIdx.x & 31) * WARPS;
        if (mine >= end) return;
        number = a.table[(long long)rows.batch * a.table_stride + mine];
        const u8* record = a.pages + (long long)number * PAGE_BYTES;
        if (LANES4) runs = load_run(record, RUN_4, FIRST_LANE_4, rows.head, 16);
        if (LANES16) dense_runs = load_run(record, RUN_16, FIRST_LANE_16, rows.head, 1);
    }
    // What look_up loads has arrived.
    __device__ __forceinline__ void settle_look_up() {
        settle(number);
        if (LANES4) runs.settle_all();
        if (LANES16) dense_runs.settle_all();
    }
    __device__ __forceinline__ void take() {
        page = index < end ? a.pages + (long long)__shfl_sync(ALL_LANES, number, turn) * PAGE_BYTES : nullptr;
    }
    __device__ __forceinline__ void advance() {
        index += WARPS;
        if (++turn == 32) {
            look_up();
            settle_look_up();
        }
        take();
    }
    __device__ __forceinline__ Run of_turn(const Run& of_lane) const {
        return {__shfl_sync(ALL_LANES, of_lane.chunk, turn), __shfl_sync(ALL_LANES, of_lane.first, turn),
                __shfl_sync(ALL_LANES, of_lane.end, turn)};
    }
    // Every call commits, also past the last page, so that commits can be counted.
    __device__ __forceinline__ void copy_keys(WarpMemory& memory, int lane) {
        if (page) {
            if (LANES4) run = of_turn(runs);
            if (LANES16) dense_run = of_turn(dense_runs);
            copy_params<2>(KEY_SCALE, KEY_ZERO, KEY_PARAM_BYTES, memory.key_params[0], lane);
            if (LANES4) copy_chunks(a.chunks4, run, 0, lane, memory);
        }
        commit_copies();
    }
    __device__ __forceinline__ void copy_values(WarpMemory& memory, int lane) const {
        if (page) {
            copy_params<VALUE_SYMMETRIC ? 1 : 2>(VALUE_SCALE, VALUE_ZERO, VALUE_PARAM_BYTES, memory.value_params[0], lane);
            const u32 offsets[] = {VALUE_PLANE_0, VALUE_PLANE_1, VALUE_PLANE_2, VALUE_PLANE_3};
#pragma unroll
            for (int plane = 0; plane < VALUE_PLANES; ++plane) {
                const int bytes = PLANE_BYTES / 2 * plane_bits(VALUE_BITS, plane);
                copy_field(offsets[plane], bytes, memory.value_planes + plane * PLANE_BYTES, lane);
            }
        }
        commit_copies();
    }
    // This head's part of a field.
    __device__ __forceinline__ void copy_field(u32 field, int bytes, u8* to, int lane) const {
#pragma unroll
        for (int i = 16 * lane; i < bytes; i += 512) copy16(to + i, page + field + rows.head * bytes + i);
    }
    template <int FIELDS>
    __device__ __forceinline__ void copy_params(u32 scale, u32 zero, int bytes, u8* to, int lane) const {
#pragma unroll
        for (int start = 0; start < FIELDS * bytes; start += 512) {
            const int i = start + 16 * lane;
            if (i < FIELDS * bytes) copy16(to + i, page + (i < bytes ? scale : zero - bytes) + rows.head * bytes + i);
        }
    }
};

__device__ void attend_packed(const Arguments& a, const Rows& rows, int begin, int end, PackedMemory& memory, float* sums,
                              float* stats) {
    const Thread t;
    WarpMemory& mine = memory.warps[t.warp];
    Softmax state;
    KeyWords keys;
    Query query;
    query.load(a, rows);
    PageReader reader(a, rows, begin + t.warp, end);
    if (reader.page) keys.load(reader.page, rows.head, t);
    reader.copy_keys(mine, t.lane);
    reader.copy_values(mine, t.lane);
    query.store(a, memory.query);
    reader.settle_look_up();
    // What a phase has used up is brought for the next page at once: it has the other phase's time to arrive.
    while (reader.page) {
        const Run run = reader.run, dense_run = reader.dense_run;
        const u8* page = reader.page;
        reader.advance();
        wait_copies<1>();
        __syncwarp();
        KeyOperand operand;
        prepare_keys(memory.query, mine, t, operand);
        KeySums key_sums = {};
        base_sums(keys, page, rows.head, t, operand, key_sums);
        if (reader.page) keys.load(reader.page, rows.head, t);
        if (LANES4) lane_sums(a.chunks4, run, operand, mine, t, key_sums);
        __syncwarp();
        reader.copy_keys(mine, t.lane);
        Logits logits;
        to_logits(key_sums, operand, t, logits);
        if (LANES16) add_dense_lanes(a.chunks16, dense_run, memory.query, t, logits);
        float share[ROW_TILES];
        weigh(a, logits, mine, t, state, share);
        wait_copies<1>();
        __syncwarp();
        ValueOperand value_operand;
        prepare_values(mine, t, share, value_operand, state);
        add_values(mine, t, value_operand, share, state);
        __syncwarp();
        reader.copy_values(mine, t.lane);
    }
    wait_copies<0>();
    // The warps' parts become one.
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        const int row = 4 * tile + t.tig;
        const float mass = reduce_row_sum(state.mass[tile]);
        if (t.quad == 0) {
            memory.merge.stats[t.warp][row][0] = state.top[tile];
            memory.merge.stats[t.warp][row][1] = mass;
        }
#pragma unroll
        for (int group = 0; group < VALUE_GROUPS; ++group) {
            const float zero = to_result(reduce_column_sum(state.zeros[tile][group]), t);
#pragma unroll
            for (int j = 0; j < TILES_PER_GROUP; ++j) {
                const int value_tile = group * TILES_PER_GROUP + j;
                float* to = &memory.merge.sums[t.warp][row][16 * value_tile + t.quad];
                to[0] = state.sums[tile][value_tile][0] + zero;
                to[8] = state.sums[tile][value_tile][1] + zero;
            }
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < ROWS * HEAD_DIM; j += THREADS) {
        const int row = j / HEAD_DIM, d = j % HEAD_DIM;
        float top = minus_infinity(), mass = 0, sum = 0;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, memory.merge.stats[w][row][0]);
        for (int w = 0; w < WARPS; ++w) {
            const float weight = top == minus_infinity() ? 0 : exp2f(memory.merge.stats[w][row][0] - top);
            mass += weight * memory.merge.stats[w][row][1];
            sum += weight * memory.merge.sums[w][row][d];
        }
        sums[j] = sum;
        if (d == 0) {
            stats[2 * row] = top;
            stats[2 * row + 1] = mass;
        }
    }
}

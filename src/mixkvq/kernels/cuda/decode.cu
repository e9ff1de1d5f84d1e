// Attention of a decode step over packed pages, sinks, residual and the new tokens: one launch for a layer.
//
// The codes are 8-bit integers of a matrix product, as they lie in the page: a mask brings four of them out of a 32-bit
// word. The other operand, the query times the page's key scale, or the probability times the value scale, is a 16-bit
// fixed-point number cut into two digits of 8 bits, which take two columns of the product:
//
//   q' = unit * (256 * high + low)        q' . codes = unit * (256 * (high . codes) + low . codes)
//
// int32 sums are exact, and 16 bits relative to a page's largest q' are finer than bfloat16. The second
// position of a byte holds 4 * code, the third 16 * code: a factor that is divided out of the sum instead of shifted out of
// every code.
//
// A block of threads handles one KV head of one sequence and a share of its pages, every warp a page at a time, or (block
// 0) the dense tokens. The last block of a head to finish merges the parts.
//
// Thread roles. A product's tile has 16 rows (tokens for keys, channels for values) and 8 columns (4 query rows with two
// digits each). A thread is (quad, tig) = (lane / 4, lane % 4):
//   as owner of operand column `quad`: query row `quad / 2`, digit `quad % 2`; two neighbours share a row and swap halves;
//   as owner of results: query row `tig`; of keys tokens 16 i + 2 quad and the next one, for i = 0 .. 7.
// Tokens and channels are assigned to the rows and the summed dimension of the tiles so that threads load whole vectors.

#include "dense.cuh"
#include "merge.cuh"
#include "pages.cuh"

// What a launch must reserve.
extern "C" __constant__ unsigned shared_bytes = sizeof(Memory);

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR) decode(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) u8 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    const Rows rows(a);
    const Lengths lengths(a.lengths[rows.batch]);
    const long long index = (long long)rows.batch * gridDim.x + blockIdx.x;
    float* sums = a.part_sums + index * gridDim.z * ROWS * HEAD_DIM;
    float* stats = a.part_stats + index * gridDim.z * ROWS * 2;
    // Part 0 is the dense one, whose blocks are started last: they are short, and fill the gaps at the end. The others take
    // shares of the pages that keep all warps equally long at work.
    const int most = gridDim.z - 1, portions = (lengths.pages + WARPS - 1) / WARPS;
    const int share = WARPS * max((portions + most - 1) / most, a.pages_per_warp);
    const int parts = 1 + (lengths.pages + share - 1) / share;
    const int part = blockIdx.z == most ? 0 : blockIdx.z + 1;
    if (part >= parts) return;
    if (part == 0) {
        attend_dense(a, rows, lengths.dense, memory.dense, sums, stats);
        add_statistics(a, rows);
        keep_samples(a, rows);
    } else {
        const int begin = (part - 1) * share, end = min(begin + share, lengths.pages);
        attend_packed(a, rows, begin, end, memory.packed, sums + (long long)part * ROWS * HEAD_DIM, stats + part * ROWS * 2);
    }
    // The last block of this head to come here merges; it leaves the ticket as it was for the next launch.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        memory.merge.last = atomicAdd(&a.tickets[index], 1) == parts - 1;
        if (memory.merge.last) a.tickets[index] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!memory.merge.last) return;
    merge_parts(a, rows, parts, sums, stats, memory.merge);
}

/* x as kernels want it that load it in pieces of 16 bytes: every row at a multiple of 16 bytes, the columns in the order of
 * the packed weight, zeros up to a whole piece. */
#include "ptx.cuh"
#include "variants.h"

enum { THREADS = QL_ARRANGE_THREADS, PIECE = 8 };

/* Eight columns' places in x; columns from k on are zeros: -1. */
static __device__ __forceinline__ void load_places(int places[PIECE], const ql_arrange_params *p, int64_t col) {
#pragma unroll
    for (int i = 0; i < PIECE; i++) places[i] = col + i < p->k ? p->order[col + i] : -1;
}

/* A row at a time: into shared memory as it is, out of it in order, as its columns are found anywhere. The order belongs to
 * the weight: its first part is loaded before the wait. The product that follows may start at once, for its weights. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_arrange_ordered(const __grid_constant__ ql_arrange_params p) {
    extern __shared__ __align__(16) uint16_t row[];
    const bool aligned = (uintptr_t)p.x % 16 == 0 && p.x_stride % PIECE == 0;
    const int k = (int)p.k, whole = aligned ? k / PIECE * PIECE : 0, first = (int)threadIdx.x * PIECE;
    int ahead[PIECE];
    start_next_kernel();
    load_places(ahead, &p, first);
    wait_for_previous_kernel();
    for (int64_t m = blockIdx.x; m < p.m; m += gridDim.x) {
        const uint16_t *x = (const uint16_t *)p.x + m * p.x_stride;
        for (int col = first; col < whole; col += THREADS * PIECE) *(uint4 *)(row + col) = *(const uint4 *)(x + col);
        for (int col = whole + (int)threadIdx.x; col < k; col += THREADS) row[col] = x[col];
        __syncthreads();
        uint16_t *out = (uint16_t *)p.out + m * p.out_stride;
        for (int col = first; col < p.out_stride; col += THREADS * PIECE) {
            __align__(16) uint16_t piece[PIECE];
            int places[PIECE];
            if (col != first) load_places(places, &p, col);
#pragma unroll
            for (int i = 0; i < PIECE; i++) {
                const int place = col == first ? ahead[i] : places[i];
                piece[i] = place >= 0 ? row[place] : (uint16_t)0;
            }
            *(uint4 *)(out + col) = *(const uint4 *)piece;
        }
        __syncthreads();
    }
}

/* Rows too long for shared memory, and rows whose columns stay where they are. A thread a piece. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_arrange(const __grid_constant__ ql_arrange_params p) {
    const int64_t across = p.out_stride / PIECE, step = (int64_t)gridDim.x * THREADS;
    start_next_kernel();
    wait_for_previous_kernel();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < p.m * across; i += step) {
        const int64_t m = i / across, col = i % across * PIECE;
        const uint16_t *x = (const uint16_t *)p.x + m * p.x_stride;
        __align__(16) uint16_t piece[PIECE];
#pragma unroll
        for (int j = 0; j < PIECE; j++)
            piece[j] = col + j < p.k ? x[p.order ? p.order[col + j] : col + j] : (uint16_t)0;
        *(uint4 *)((uint16_t *)p.out + m * p.out_stride + col) = *(const uint4 *)piece;
    }
}

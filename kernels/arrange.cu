/* x as kernels want it that load it in pieces of 16 bytes: every row at a multiple of 16 bytes, the columns in the order of
 * the packed weight, zeros up to a whole piece.
 *
 * The order belongs to the weight: it is loaded before the wait. The product that follows may start while this runs, for its
 * weights. */
#include "ptx.cuh"
#include "variants.h"

enum { PIECE = 8, ROWS = QL_ARRANGE_ROWS };

/* Eight columns of an order or its inverse; `instead` of those from k on. */
static __device__ __forceinline__ void load_places(int places[PIECE], const int32_t *order, int col, int k,
                                                   const int instead[PIECE]) {
    if (col + PIECE <= k) {
        *(int4 *)places = __ldg((const int4 *)(order + col));
        *(int4 *)(places + 4) = __ldg((const int4 *)(order + col + 4));
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++) places[i] = col + i < k ? __ldg(order + col + i) : instead[i];
}

/* Where a column of a row lies in shared memory: pieces of a line change places by the line, as those columns that a warp wants at
 * once are of one class (QL_ORDER_CLASS). */
static __device__ __forceinline__ int cell_of(int col) { return col ^ (col >> 3 & 7 * PIECE); }

static __device__ __forceinline__ bool has_pieces(const ql_arrange_params *p) {
    return (uintptr_t)p->x % 16 == 0 && p->x_stride % PIECE == 0;
}

/* ---- a row or a part of it a block: little code, as all of it is read from memory ---- */

/* gridDim.y blocks share a row's columns, a thread has a piece. */
extern "C" __global__ void __launch_bounds__(QL_ARRANGE_THREADS)
    ql_arrange_ordered(const __grid_constant__ ql_arrange_params p) {
    extern __shared__ __align__(16) uint16_t row[];
    const int k = (int)p.k, whole = has_pieces(&p) ? k / PIECE * PIECE : 0;
    const int col = (int)(blockIdx.y * QL_ARRANGE_THREADS + threadIdx.x) * PIECE;
    const int none[PIECE] = {-1, -1, -1, -1, -1, -1, -1, -1};
    __align__(16) int places[PIECE];
    start_next_kernel();
    load_places(places, p.order, col, k, none);
#pragma unroll
    for (int i = 0; i < PIECE; i++) places[i] = places[i] >= 0 ? cell_of(places[i]) : -1;
    const uint16_t *x = (const uint16_t *)p.x + blockIdx.x * p.x_stride;
    const uint32_t to = shared_address(row);
    wait_for_previous_kernel();
    /* Nothing waits for a piece before all are on their way. */
#pragma unroll 1
    for (int i = (int)threadIdx.x * PIECE; i < whole; i += QL_ARRANGE_THREADS * PIECE)
        cp_async_16(to + (uint32_t)(cell_of(i) * 2), x + i, 16);
#pragma unroll 1
    for (int i = whole + (int)threadIdx.x; i < k; i += QL_ARRANGE_THREADS) row[cell_of(i)] = x[i];
    cp_async_commit();
    cp_async_wait(0);
    __syncthreads();
    if (col >= p.out_stride) return;
    __align__(16) uint16_t piece[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; i++) piece[i] = places[i] >= 0 ? row[places[i]] : (uint16_t)0;
    *(uint4 *)((uint16_t *)p.out + blockIdx.x * p.out_stride + col) = *(const uint4 *)piece;
}

/* ---- some rows a block ---- */

/* Asks for a row as it is, zeros from k on. */
static __device__ __forceinline__ void ask_for_row(const ql_arrange_params *p, uint32_t to, int64_t m) {
    if (m < p->m) {
        const uint16_t *x = (const uint16_t *)p->x + m * p->x_stride;
        const int k = (int)p->k, width = (int)p->out_stride;
        if (has_pieces(p))
#pragma unroll 4
            for (int col = (int)threadIdx.x * PIECE; col < width; col += QL_ARRANGE_THREADS * PIECE)
                cp_async_16(to + (uint32_t)(cell_of(col) * 2), x + col, min(16, (k - col) * 2));
        else
#pragma unroll 4
            for (int col = (int)threadIdx.x; col < width; col += QL_ARRANGE_THREADS)
                store_shared_2(to + (uint32_t)(cell_of(col) * 2), col < k ? x[col] : (uint16_t)0);
    }
    cp_async_commit();
}

/* Of two rows the second comes while the first is put in order. Places lie in shared memory in 16 bits: a thread reads those that
 * it wrote. */
extern "C" __global__ void __launch_bounds__(QL_ARRANGE_THREADS)
    ql_arrange_rows(const __grid_constant__ ql_arrange_params p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const int k = (int)p.k, width = (int)p.out_stride, step = QL_ARRANGE_THREADS * PIECE;
    const int first = (int)threadIdx.x * PIECE;
    const uint32_t own = shared_address(shared) + threadIdx.x * 16, own_step = QL_ARRANGE_THREADS * 16;
    const uint32_t rows = shared_address(shared) + (uint32_t)((width + step - 1) / step) * own_step;
    /* Where there is a column k it is zero. */
    const int beyond[PIECE] = {k, k, k, k, k, k, k, k};
    uint32_t at = own;
#pragma unroll 1
    for (int col = first; col < width; col += step, at += own_step) {
        __align__(16) int places[PIECE];
        uint32_t pairs[PIECE / 2];
        load_places(places, p.order, col, k, beyond);
#pragma unroll
        for (int i = 0; i < PIECE / 2; i++)
            pairs[i] = (uint32_t)(cell_of(places[2 * i]) | cell_of(places[2 * i + 1]) << 16);
        store_shared_16(at, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
    wait_for_previous_kernel();
    uint32_t here = rows, next = rows + (p.two_rows ? (uint32_t)QL_ARRANGED_ROW_BYTES(width) : 0);
    ask_for_row(&p, here, blockIdx.x);
    start_next_kernel();
#pragma unroll 1
    for (int64_t m = blockIdx.x; m < p.m; m += gridDim.x) {
        cp_async_wait(0);
        __syncthreads();
        if (p.two_rows) ask_for_row(&p, next, m + gridDim.x);
        uint16_t *out = (uint16_t *)p.out + m * p.out_stride;
        at = own;
#pragma unroll 1
        for (int col = first; col < width; col += step, at += own_step) {
            const uint4 pairs = load_shared_16(at);
            uint32_t words[PIECE / 2];
#pragma unroll
            for (int i = 0; i < PIECE / 2; i++) {
                const uint32_t pair = word_of(pairs, i);
                words[i] = load_shared_2(here + (pair & 0xffff) * 2) | (uint32_t)load_shared_2(here + (pair >> 16) * 2)
                                                                           << 16;
            }
            store_global_16(out + col, make_uint4(words[0], words[1], words[2], words[3]));
        }
        if (!p.two_rows) {
            __syncthreads();
            ask_for_row(&p, next, m + gridDim.x);
        }
        const uint32_t before = here;
        here = next;
        next = before;
    }
}

/* ---- four rows at a time: a cell of shared memory is written and read for all of them at once ---- */

/* Eight columns of a row, zeros from k on. */
static __device__ __forceinline__ uint4 load_piece(const uint16_t *row, int col, int k, bool in_one) {
    if (in_one && col + PIECE <= k) return *(const uint4 *)(row + col);
    __align__(16) uint16_t piece[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; i++) piece[i] = col + i < k ? row[col + i] : (uint16_t)0;
    return *(const uint4 *)piece;
}

/* Where a column's cell lies: runs of two cells change places with others, so that neighbouring threads, which read eight
 * cells each, want other banks. */
static __device__ __forceinline__ uint32_t cell_at(uint32_t col) {
    const uint32_t run = col / 2;
    return (run ^ (run >> 3 & 3)) * 16 + col % 2 * 8;
}

/* Values of one column in two words, of the low or the high halves. */
static __device__ __forceinline__ uint32_t pair_of(uint32_t a, uint32_t b, int high) {
    return __byte_perm(a, b, high ? 0x7632 : 0x5410);
}

extern "C" __global__ void __launch_bounds__(QL_ARRANGE_THREADS, 2)
    ql_arrange_many(const __grid_constant__ ql_arrange_params p) {
    extern __shared__ __align__(16) uint8_t shared[];
    const bool in_one = has_pieces(&p);
    const int k = (int)p.k, width = (int)p.out_stride, first = (int)threadIdx.x * PIECE,
              step = QL_ARRANGE_THREADS * PIECE;
    const uint32_t base = shared_address(shared);
    wait_for_previous_kernel();
    start_next_kernel();
#pragma unroll 1
    for (int64_t m = (int64_t)blockIdx.x * ROWS; m < p.m; m += (int64_t)gridDim.x * ROWS) {
        const int rows = (int)min(p.m - m, (int64_t)ROWS);
        const uint16_t *x = (const uint16_t *)p.x + m * p.x_stride;
        __syncthreads();
#pragma unroll 1
        for (int col = first; col < width; col += step) {
            uint4 v[ROWS];
            const int same[PIECE] = {col, col + 1, col + 2, col + 3, col + 4, col + 5, col + 6, col + 7};
            __align__(16) int place[PIECE];
            load_places(place, p.inverse, col, k, same);
#pragma unroll
            for (int r = 0; r < ROWS; r++) v[r] = load_piece(x + min(r, rows - 1) * p.x_stride, col, k, in_one);
#pragma unroll
            for (int i = 0; i < PIECE; i++)
                store_shared_8(base + cell_at((uint32_t)place[i]),
                               make_uint2(pair_of(word_of(v[0], i / 2), word_of(v[1], i / 2), i % 2),
                                          pair_of(word_of(v[2], i / 2), word_of(v[3], i / 2), i % 2)));
        }
        __syncthreads();
        uint16_t *out = (uint16_t *)p.out + m * p.out_stride;
#pragma unroll 1
        for (int col = first; col < width; col += step) {
            uint4 two[PIECE / 2];
#pragma unroll
            for (int i = 0; i < PIECE / 2; i++) two[i] = load_shared_16(base + cell_at((uint32_t)(col + 2 * i)));
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                uint32_t words[PIECE / 2];
#pragma unroll
                for (int i = 0; i < PIECE / 2; i++)
                    words[i] = r < 2 ? pair_of(two[i].x, two[i].z, r % 2) : pair_of(two[i].y, two[i].w, r % 2);
                if (r < rows)
                    store_global_16(out + r * p.out_stride + col, make_uint4(words[0], words[1], words[2], words[3]));
            }
        }
    }
}

/* ---- rows too long for shared memory, and rows whose columns stay where they are: a thread a piece ---- */

extern "C" __global__ void __launch_bounds__(QL_ARRANGE_THREADS)
    ql_arrange(const __grid_constant__ ql_arrange_params p) {
    const int64_t across = p.out_stride / PIECE, step = (int64_t)gridDim.x * QL_ARRANGE_THREADS;
    start_next_kernel();
    wait_for_previous_kernel();
    for (int64_t i = (int64_t)blockIdx.x * QL_ARRANGE_THREADS + threadIdx.x; i < p.m * across; i += step) {
        const int64_t m = i / across, col = i % across * PIECE;
        const uint16_t *x = (const uint16_t *)p.x + m * p.x_stride;
        __align__(16) uint16_t piece[PIECE];
#pragma unroll
        for (int j = 0; j < PIECE; j++)
            piece[j] = col + j < p.k ? x[p.order ? p.order[col + j] : col + j] : (uint16_t)0;
        *(uint4 *)((uint16_t *)p.out + m * p.out_stride + col) = *(const uint4 *)piece;
    }
}

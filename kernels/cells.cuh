/* 2 to 8 rows of x for the decode kernels where the weight has its columns in another order: from global memory to the places in
 * shared memory where the weight expects them.
 *
 * Stores to random places want a bank several times over, so there are as few as can be: a column of x is one cell of 16 bytes, with 8
 * tokens, or with 4 in the half that is its group's of two (decode.h) and zeros in the other. Matrices are then loaded with columns as
 * rows, and turned over on their way. A thread brings pieces of 8 columns of every row, turns them over in registers, and stores them:
 * eight neighbours' columns have places of eight classes (QL_ORDER_CLASS), so that a quarter of a warp wants each bank once. All loads
 * are on their way before most codes, behind which they would wait. Places belong to the weight, so that they do not wait for the kernel
 * before. */
#ifndef QL_KERNELS_CELLS_CUH
#define QL_KERNELS_CELLS_CUH

#include "code_raw.cuh"
#include "decode.h"
#include "ptx.cuh"

enum { QL_CELLS_ROWS = 8 /* at most */, QL_CELLS_PIECE = 8 };

/* What a thread brings. */
typedef struct ql_columns {
    uint4 places[QL_CELLS_PIECES][2], rows[QL_CELLS_PIECES][QL_CELLS_ROWS];
} ql_columns;

static __device__ __forceinline__ int column_of_piece(int piece) {
    return ((int)threadIdx.x + piece * (int)blockDim.x) * QL_CELLS_PIECE;
}

static __device__ __forceinline__ void load_places(ql_columns *own, const ql_decode_params *p) {
#pragma unroll
    for (int i = 0; i < QL_CELLS_PIECES; i++) {
        const int column = column_of_piece(i);
        own->places[i][0] = own->places[i][1] = make_uint4(~0u, ~0u, ~0u, ~0u);
        if (column >= p->k) continue;
        own->places[i][0] = load_stream_16(p->product.inverse + column);
        own->places[i][1] = load_stream_16(p->product.inverse + column + 4);
    }
}

/* Zeros from k on, up to the block's `columns`; with 4 tokens everywhere, for the halves that are not stored. */
static __device__ __forceinline__ void clear_cells(const ql_decode_params *p, int tokens, int columns, uint32_t base) {
#pragma unroll 4
    for (int column = (tokens == 4 ? 0 : p->k) + (int)threadIdx.x; column < columns; column += (int)blockDim.x)
        store_shared_16(base + (uint32_t)(column * QL_DECODE_CELL), make_uint4(0, 0, 0, 0));
}

static __device__ __forceinline__ void load_columns(ql_columns *own, const ql_decode_params *p, int tokens) {
#pragma unroll
    for (int i = 0; i < QL_CELLS_PIECES; i++) {
        const int column = column_of_piece(i);
        const uint16_t *from = (const uint16_t *)p->x + column;
#pragma unroll
        for (int row = 0; row < tokens; row++) own->rows[i][row] = make_uint4(0, 0, 0, 0);
        if (column >= p->k) continue;
#pragma unroll
        for (int row = 0; row < tokens; row++, from += p->x_stride)
            if (row < p->m) own->rows[i][row] = load_late_16(from);
    }
    /* Nor does the compiler ask for some of it later. */
    __syncwarp();
}

/* Stores a piece. group_k: columns of a group. */
static __device__ __forceinline__ void store_columns(const ql_columns *own, const ql_decode_params *p, int piece,
                                                     int tokens, int group_k, uint32_t base) {
    const uint4 *x = own->rows[piece];
    if (column_of_piece(piece) >= p->k) return;
#pragma unroll
    for (int i = 0; i < QL_CELLS_PIECE; i++) {
        const uint32_t place = word_of(own->places[piece][i / 4], i % 4);
        uint32_t pairs[QL_CELLS_ROWS / 2];
#pragma unroll
        for (int row = 0; row < tokens; row += 2)
            pairs[row / 2] = halves_of(word_of(x[row], i / 2), word_of(x[row + 1], i / 2), i % 2);
        if (tokens == 8)
            store_shared_16(base + place * QL_DECODE_CELL, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        else
            store_shared_8(base + place * QL_DECODE_CELL + place / (uint32_t)group_k % 2 * 8,
                           make_uint2(pairs[0], pairs[1]));
    }
}

/* Where a lane reads 32 columns of x from the line of cells at `at` on: a row of the matrices that ldmatrix loads. */
static __device__ __forceinline__ uint32_t place_of_cells(uint32_t at, int lane) {
    return at + (uint32_t)(lane * QL_DECODE_CELL);
}

/* Columns step * 16 of a block to 32 further, as the small operand of two steps; step: even. x: of the batch's first. */
static __device__ __forceinline__ void load_cells(uint32_t b[2][2], uint32_t x, int block, int step) {
    load_matrices_transposed(b[0], b[1], x + (uint32_t)((block * 4 + step) * 16 * QL_DECODE_CELL));
}

/* Sums of x over each group of a batch, [groups][tokens] in fp32. x is the large operand of mma: 8 of its 16 rows are
 * the halves of the cells of a run of columns, a group, or two where these have half a cell each, 8 those of the next; of the only
 * run its second half. one: a pair of ones. at: the batch's first cell. */
static __device__ __forceinline__ void sum_cells(float *sums, int code, int type, int tokens, int groups, uint32_t one,
                                                 uint32_t at) {
    const int lane = thread_anew() % 32;
    const int runs = groups * tokens / 8, pairs = runs == 1 ? 1 : runs / 2;
    const int run_k = QL_DECODE_BATCH_K(code, 8) / (runs == 1 ? 2 : runs);
    const uint32_t ones[2] = {one, one};
    at += (uint32_t)((lane / 8 % 2 * run_k + lane / 16 * 8 + lane % 8) * QL_DECODE_CELL);
    float *to = sums + lane / 4;
#pragma unroll 1
    for (int i = 0; i < 2 * pairs; i += 2, to += 16) {
        float sum[4] = {0}, odd[4] = {0};
#pragma unroll
        for (int left = run_k; left > 0; left -= 64, at += 64 * QL_DECODE_CELL)
#pragma unroll
            for (int step = 0; step < (run_k < 64 ? run_k : 64) / 16; step++) {
                uint32_t a[4];
                load_matrices_transposed(a, a + 2, at + (uint32_t)(step * 16 * QL_DECODE_CELL));
                multiply_16816(step % 2 ? odd : sum, a, ones, type);
            }
        if (run_k > 32) at += (uint32_t)(run_k * QL_DECODE_CELL);
        const float low = sum[0] + odd[0], high = sum[2] + odd[2];
        if (lane % 4) continue;
        to[0] = runs == 1 ? low + high : low;
        if (runs > 1) to[8] = high;
    }
    __syncwarp();
}

#endif

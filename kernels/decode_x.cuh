/* x in shared memory, for the decode kernels whose weight has its columns as x has them: rows in whole lines, brought there by a
 * block's warps, and where a lane reads them. What brings columns in another order is order.cuh's and cells.cuh's. */
#ifndef QL_KERNELS_DECODE_X_CUH
#define QL_KERNELS_DECODE_X_CUH

#include "cells.cuh"
#include "decode.h"
#include "few_tokens.cuh"
#include "ptx.cuh"
#include "sums.cuh"

/* The row of zeros is half a line off: its banks are those that pieces of up to four rows leave. */
#define ZERO_ROW(p) ((p)->m * (p)->x_pitch + 64)

/* Columns of the block's part of rows of x into shared memory, zeros beyond k, and the row of zeros where there is one: of its
 * runs of `run` columns the one that is `piece`, and every `pieces`-th after it; of the rows, `most` at most, every `rows`-th
 * from `row` on. first: the part's first column, whose place is `to`. */
static __device__ __forceinline__ void copy_x(const ql_decode_params *p, bool zeros, int most, int first, int columns,
                                              uint32_t to, int run, int piece, int pieces, int row, int rows,
                                              int lane) {
#pragma unroll 1
    for (int column = piece * run + lane * 8; column < columns;
         column += run == 256 || column & 256 ? pieces * run - (run - 256) : 256) {
        const int bytes = min(max((p->k - first - column) * 2, 0), 16);
        const uint16_t *from = (const uint16_t *)p->x + (bytes ? first + column : 0) + row * p->x_stride;
        uint32_t at = to + (uint32_t)(column * 2);
        if (zeros) store_shared_16(at + (uint32_t)ZERO_ROW(p), make_uint4(0, 0, 0, 0));
        at += (uint32_t)(row * p->x_pitch);
#pragma unroll
        for (int i = 0; i < most; i++, from += rows * p->x_stride, at += (uint32_t)(rows * p->x_pitch))
            if (row + i * rows < p->m) cp_async_16(at ^ QL_DECODE_TURN(row + i * rows), from, bytes);
    }
    cp_async_commit();
}

/* Of the same warps of all teams, which share columns of x. */
static __device__ __forceinline__ void wait_for_teams(int teams, int member) {
    if (teams == 1)
        __syncwarp();
    else
        named_barrier(member + 1, teams * 32);
}

/* A row of x that pieces of 16 bytes do not meet; the host gives no more of them. A call, so that the loop of strips has its
 * registers. */
static __device__ __noinline__ void load_row(const uint16_t *x, int k, int x_at, int first, int columns) {
    wait_for_previous_kernel();
#pragma unroll 1
    for (int column = (int)threadIdx.x; column < columns; column += (int)blockDim.x)
        *(uint16_t *)(shared + x_at + column * 2) = first + column < k ? x[first + column] : (uint16_t)0;
}

/* The row of zeros. */
static __device__ __forceinline__ void clear_row(const ql_decode_params *p) {
#pragma unroll 1
    for (int i = (int)threadIdx.x * 16; i < p->x_pitch; i += (int)blockDim.x * 16)
        *(uint4 *)(shared + p->x_at + ZERO_ROW(p) + i) = make_uint4(0, 0, 0, 0);
}

/* Where a lane reads x, whose first column for the warp lies at `at`: a row of the matrices that ldmatrix loads. other: what
 * to add to it where the second slot's group is multiplied. A slot's columns are zeros while the other's group is. */
typedef struct ql_decode_x {
    uint32_t row, other;
} ql_decode_x;

static __device__ __forceinline__ ql_decode_x place_x(const ql_decode_params *p, int code, int tokens, int slots,
                                                      bool cells, int part, uint32_t at, int lane) {
    ql_decode_x x = {0, 0};
    if (cells) {
        x.row = place_of_cells(at, lane);
        return x;
    }
    if (tokens == 1) {
        x.row = place_of_one(at, lane);
        return x;
    }
    if (tokens == 16) {
        /* Lanes 0-7 give the rows of a matrix, and so on: two of 8 columns each for tokens 0-7 and two for 8-15. */
        const int token = min(lane % 8 + lane / 16 * 8, p->m - 1);
        x.row = at + (uint32_t)(token * p->x_pitch + (lane / 8 % 2 * 16 ^ (int)QL_DECODE_TURN(token)));
        return x;
    }
    /* Four of 8 columns each. Rows beyond m are doubles of the last. */
    const int here = lane % 8, token = min(slots == 2 ? here % 4 : here, p->m - 1);
    const int piece = lane / 8 * 16, zero = ZERO_ROW(p) + piece;
    const int live = token * p->x_pitch + (piece ^ (int)QL_DECODE_TURN(token));
    const bool second = slots == 2 && here >= 4;
    if (slots == 2 && code == QL_CODE_TABLE4) {
        x.row = place_of_both(at + (uint32_t)live, part, lane);
        return x;
    }
    x.row = at + (uint32_t)(second ? zero : live);
    x.other = (uint32_t)(second ? live - zero : zero - live);
    return x;
}

/* Where columns of x lie, from those of batch `own` of the block's part of K on: made again, as the compiler would keep what it can find again. */
static __device__ __forceinline__ uint32_t x_at_anew(const ql_decode_params *p, int own, int batch_bytes) {
    return shared_address(shared) + (uint32_t)(p->x_at + own * batch_bytes);
}

#endif

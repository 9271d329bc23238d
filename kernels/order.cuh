/* x for the decode kernels where the weight has its columns in another order: from global memory to the places in shared
 * memory where the weight expects them.
 *
 * A warp brings pieces of 256 columns of every row, and of the places where these belong, into a stage, and moves no pieces
 * but its own: none waits for another until all are in place. Pieces are asked for before the codes, behind which they would
 * wait; those that the stage has no room for, when the piece before is gone. Places belong to the weight, so the first do not
 * wait for the kernel before. All of it is inlined: before a call the compiler waits for every load that is on its way, the
 * codes too. */
#ifndef QL_KERNELS_ORDER_CUH
#define QL_KERNELS_ORDER_CUH

#include "decode.h"
#include "ptx.cuh"

/* Columns of a warp's piece, and of a thread's in it. */
enum { QL_PIECE = 256, QL_LANE_PIECE = 8 };

/* Where the piece that begins at `column` of the stage has its places; its rows lie behind all places. */
static __device__ __forceinline__ uint32_t places_at(const ql_decode_params *p, uint32_t base, int column) {
    return base + (uint32_t)(p->stage_at + column * 4);
}

static __device__ __forceinline__ uint32_t row_at(const ql_decode_params *p, uint32_t base, int column) {
    return base + (uint32_t)(p->stage_at + p->stage_columns * 4 + column * 2);
}

/* The places of a warp's piece from `column` on, in whole lines: other lanes' than those that use them. */
static __device__ __forceinline__ void ask_for_places(const ql_decode_params *p, int column, uint32_t to) {
    column += (int)threadIdx.x % 32 * 4;
    to += threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < 2; i++, column += QL_PIECE / 2, to += QL_PIECE / 2 * 4) {
        const int bytes = min(max((p->k - column) * 4, 0), 16);
        cp_async_16(to, p->product.inverse + (bytes ? column : 0), bytes);
    }
}

/* The lane's columns of the rows of x. */
static __device__ __forceinline__ void ask_for_rows(const ql_decode_params *p, int column, uint32_t to) {
    column += (int)threadIdx.x % 32 * QL_LANE_PIECE;
    to += threadIdx.x % 32 * (QL_LANE_PIECE * 2);
    const int bytes = min(max((p->k - column) * 2, 0), 16);
    const uint16_t *from = (const uint16_t *)p->x + (bytes ? column : 0);
#pragma unroll 1
    for (int row = 0; row < p->m; row++, from += p->x_stride, to += (uint32_t)(p->stage_columns * 2))
        cp_async_16(to, from, bytes);
}

/* As many pieces as there is room for. base: the address of shared memory. */
static __device__ __forceinline__ void ask_for_columns(const ql_decode_params *p, uint32_t base) {
    const int first = (int)threadIdx.x / 32 * QL_PIECE, step = (int)blockDim.x * QL_LANE_PIECE;
    const int end = min(p->k, p->stage_columns);
#pragma unroll 1
    for (int column = first; column < end; column += step) ask_for_places(p, column, places_at(p, base, column));
    wait_for_previous_kernel();
#pragma unroll 1
    for (int column = first; column < end; column += step) ask_for_rows(p, column, row_at(p, base, column));
}

/* Moves the lane's columns of a piece, but for those that are not among the block's `columns` from `first` on. places, from: of
 * the warp's piece. */
static __device__ __forceinline__ void move_piece(const ql_decode_params *p, uint32_t base, int column, uint32_t places,
                                                  uint32_t from, int first, int columns) {
    const uint32_t none = 0x80000000u;
    uint32_t to[QL_LANE_PIECE];
    column += (int)threadIdx.x % 32 * QL_LANE_PIECE;
    places += threadIdx.x % 32 * (QL_LANE_PIECE * 4);
    from += threadIdx.x % 32 * (QL_LANE_PIECE * 2);
#pragma unroll
    for (int i = 0; i < QL_LANE_PIECE; i += 4) {
        const uint4 four = load_shared_16(places + (uint32_t)(i * 4));
#pragma unroll
        for (int j = i; j < i + 4; j++) {
            const uint32_t place = word_of(four, j % 4) - (uint32_t)first;
            const bool inside = column + j < p->k && place < (uint32_t)columns;
            to[j] = inside ? base + (uint32_t)p->x_at + place * 2 : none;
        }
    }
#pragma unroll 1
    for (int row = 0; row < p->m; row++, from += (uint32_t)(p->stage_columns * 2)) {
        const uint4 x = load_shared_16(from);
#pragma unroll
        for (int i = 0; i < QL_LANE_PIECE; i++) {
            if (to[i] < none) store_shared_2(to[i] ^ QL_DECODE_TURN(row), word_of(x, i / 2) >> i % 2 * 16);
            to[i] += (uint32_t)p->x_pitch;
        }
    }
}

/* Moves all pieces, once those asked for are there; zeros to columns beyond k. */
static __device__ __forceinline__ void move_columns(const ql_decode_params *p, uint32_t base, int first, int columns) {
    int end = 0; /* of what the stage has had */
#pragma unroll 1
    for (int column = (int)threadIdx.x / 32 * QL_PIECE; column < p->k; column += (int)blockDim.x * QL_LANE_PIECE) {
        if (column >= end) {
            /* The first are a group already. Another one would be waited for until the codes are there. */
            if (end) cp_async_commit();
            cp_async_wait(0);
            end += p->stage_columns;
        }
        const int here = column - end + p->stage_columns, next = column + p->stage_columns;
        __syncwarp();
        move_piece(p, base, column, places_at(p, base, here), row_at(p, base, here), first, columns);
        if (next < p->k) {
            __syncwarp();
            ask_for_places(p, next, places_at(p, base, here));
            ask_for_rows(p, next, row_at(p, base, here));
        }
    }
#pragma unroll 1
    for (int column = max(p->k - first, 0) + (int)threadIdx.x; column < columns; column += (int)blockDim.x)
#pragma unroll 1
        for (int row = 0; row < p->m; row++)
            store_shared_2(base + (uint32_t)(p->x_at + row * p->x_pitch + (column * 2 ^ (int)QL_DECODE_TURN(row))), 0);
}

#endif

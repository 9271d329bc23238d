/* The table of pairs of the decode kernels: entry `byte` is the 16-bit values of its two nibbles, a copy a lane, so that no
 * two lanes want the same bank; entries lie 256 bytes apart, so that one byte permutation makes the address. */
#ifndef QL_KERNELS_PAIRS_CUH
#define QL_KERNELS_PAIRS_CUH

#include "decode.h"
#include "ptx.cuh"

enum { QL_PAIRS_PIECES = 2 };

/* What a thread makes of it: values of two pieces of 32 bytes, and one of the nested table. */
typedef struct ql_table_part {
    float low[QL_PAIRS_PIECES], high[QL_PAIRS_PIECES], nested;
} ql_table_part;

static __device__ __forceinline__ void load_piece(float *low, float *high, const float *table, int piece) {
    *low = __ldg(table + piece / 4 % 16);
    *high = __ldg(table + piece / 64 % 16);
}

static __device__ __forceinline__ ql_table_part load_table(const ql_packed_params *w) {
    ql_table_part part = {{0}, {0}, 0};
#pragma unroll
    for (int i = 0; i < QL_PAIRS_PIECES; i++)
        load_piece(&part.low[i], &part.high[i], w->table, (int)threadIdx.x + i * (int)blockDim.x);
    if (w->nested_table) part.nested = __ldg(w->nested_table + threadIdx.x % 256);
    return part;
}

static __device__ __forceinline__ void store_piece(uint8_t *pairs, int piece, float low, float high, int type) {
    uint32_t pair = round16_pair(low, high, type);
    uint4 *to = (uint4 *)(pairs + piece / 4 * 256 + piece % 4 * 32);
    if (piece < 1024) to[0] = to[1] = make_uint4(pair, pair, pair, pair);
}

/* nested: where the nested table goes, if there is one. */
static __device__ __forceinline__ void store_table(uint8_t *pairs, float *nested, const ql_packed_params *w,
                                                   const ql_table_part *part, int type) {
    int piece = (int)threadIdx.x, threads = (int)blockDim.x;
#pragma unroll
    for (int i = 0; i < QL_PAIRS_PIECES; i++, piece += threads)
        store_piece(pairs, piece, part->low[i], part->high[i], type);
#pragma unroll 1
    for (; piece < 1024; piece += threads) {
        float low, high;
        load_piece(&low, &high, w->table, piece);
        store_piece(pairs, piece, low, high, type);
    }
    if (!w->nested_table) return;
    if (threadIdx.x < 256) nested[threadIdx.x] = part->nested;
#pragma unroll 1
    for (int i = (int)threadIdx.x + threads; i < 256; i += threads) nested[i] = w->nested_table[i];
}

#endif

/* The tables of the decode kernels: entry `byte` of pairs is the 16-bit values of its two nibbles, a copy a lane, so that no
 * two lanes want the same bank; entries lie 256 bytes apart, so that one byte permutation makes the address. The other half of
 * those 256 bytes is the same for the table of a double quantization's absmax, in fp32. */
#ifndef QL_KERNELS_PAIRS_CUH
#define QL_KERNELS_PAIRS_CUH

#include "decode.h"
#include "ptx.cuh"

enum { QL_PAIRS_PIECES = 4 };

/* What a thread makes of them: up to four pieces of 32 bytes of each. */
typedef struct ql_table_part {
    float low[QL_PAIRS_PIECES], high[QL_PAIRS_PIECES], nested[QL_PAIRS_PIECES];
} ql_table_part;

static __device__ __forceinline__ void load_piece(float *low, float *high, float *nested, const ql_packed_params *w,
                                                  int piece) {
    *low = __ldg(w->table + piece / 4 % 16);
    *high = __ldg(w->table + piece / 64 % 16);
    if (w->nested_table) *nested = __ldg(w->nested_table + piece / 4 % 256);
}

/* Of `threads` threads, the first of a block: `pieces` of each, and what is left then by a loop. */
static __device__ __forceinline__ ql_table_part load_table(const ql_packed_params *w, int threads, int pieces) {
    ql_table_part part = {{0}, {0}, {0}};
#pragma unroll
    for (int i = 0; i < pieces; i++)
        load_piece(&part.low[i], &part.high[i], &part.nested[i], w, (int)threadIdx.x + i * threads);
    return part;
}

/* A piece is two of 16 bytes, half a line apart; which of the two comes first changes from entry to entry, as lanes of neighbouring
 * entries would want the same banks. */
static __device__ __forceinline__ void store_piece(uint8_t *pairs, int piece, float low, float high, float nested,
                                                   bool has_nested, int type) {
    const uint32_t pair = round16_pair(low, high, type), absmax = __float_as_uint(nested);
    const int entry = piece / 4;
    uint4 *to = (uint4 *)(pairs + entry * 256 + piece % 4 * 16 + entry % 2 * 64);
    uint4 *other = (uint4 *)(pairs + entry * 256 + piece % 4 * 16 + (1 - entry % 2) * 64);
    if (piece >= 1024) return;
    *to = *other = make_uint4(pair, pair, pair, pair);
    if (has_nested) to[8] = other[8] = make_uint4(absmax, absmax, absmax, absmax);
}

static __device__ __forceinline__ void store_table(uint8_t *pairs, const ql_packed_params *w, const ql_table_part *part,
                                                   int type, int threads, int pieces) {
    const bool has_nested = w->nested_table != NULL;
    int piece = (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < pieces; i++, piece += threads)
        store_piece(pairs, piece, part->low[i], part->high[i], part->nested[i], has_nested, type);
#pragma unroll 1
    for (; piece < 1024; piece += threads) {
        float low, high, nested = 0;
        load_piece(&low, &high, &nested, w, piece);
        store_piece(pairs, piece, low, high, nested, has_nested, type);
    }
}

#endif

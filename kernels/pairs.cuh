/* The tables of the decode kernels: entry `byte` of pairs is the 16-bit values of its two nibbles, a copy a lane, so that no
 * two lanes want the same bank; entries lie 256 bytes apart, so that one byte permutation makes the address. The other half of
 * those 256 bytes is the same for the table of a double quantization's absmax, in fp32.
 *
 * A warp makes units of eight entries. What it needs of both tables it copies to where the first of its entries will be: loads
 * to registers would wait for codes, which share their scoreboard. */
#ifndef QL_KERNELS_PAIRS_CUH
#define QL_KERNELS_PAIRS_CUH

#include "decode.h"
#include "ptx.cuh"

/* The most units of a warp, of 32 in all; bytes of one; where a warp has its units' part of the table of absmax meanwhile. */
enum { QL_PAIRS_UNITS = 5, QL_PAIRS_UNIT_BYTES = 2048, QL_PAIRS_NESTED_AT = 64 };

/* Asks for what warp `warp` of `warps` needs. pairs: address. */
static __device__ __forceinline__ void ask_for_table(uint32_t pairs, const ql_packed_params *w, int warp, int warps,
                                                     int lane) {
    const int unit = warp + lane / 2 * warps;
    pairs += (uint32_t)(warp * QL_PAIRS_UNIT_BYTES);
    if (lane < 4) cp_async_16(pairs + (uint32_t)(lane * 16), w->table + lane * 4, 16);
    if (w->nested_table && unit < 32)
        cp_async_16(pairs + (uint32_t)(QL_PAIRS_NESTED_AT + lane * 16), w->nested_table + unit * 8 + lane % 2 * 4, 16);
    cp_async_commit();
}

/* Makes the units of a warp, once what was asked for is there. Four lanes make an entry, of which each has two pieces of 16 bytes
 * half a line apart; which of the two comes first changes from entry to entry, as lanes of neighbouring entries would want the
 * same banks. */
static __device__ __forceinline__ void make_pairs(uint8_t *pairs, const ql_packed_params *w, int type, int warp,
                                                  int warps, int lane) {
    const float *from = (const float *)(pairs + warp % 32 * QL_PAIRS_UNIT_BYTES);
    float low[QL_PAIRS_UNITS], high[QL_PAIRS_UNITS], absmax[QL_PAIRS_UNITS];
    cp_async_wait(0);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < QL_PAIRS_UNITS; i++) {
        const int unit = warp + i * warps;
        low[i] = unit < 32 ? from[unit % 2 * 8 + lane / 4] : 0.0f;
        high[i] = unit < 32 ? from[unit / 2] : 0.0f;
        absmax[i] = unit < 32 ? from[QL_PAIRS_NESTED_AT / 4 + i * 8 + lane / 4] : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < QL_PAIRS_UNITS; i++) {
        const int unit = warp + i * warps, turn = lane / 4 % 2 * 64;
        const uint32_t pair = round16_pair(low[i], high[i], type), value = __float_as_uint(absmax[i]);
        uint8_t *to = pairs + unit * QL_PAIRS_UNIT_BYTES + lane / 4 * 256 + lane % 4 * 16;
        if (unit >= 32) break;
        *(uint4 *)(to + turn) = *(uint4 *)(to + 64 - turn) = make_uint4(pair, pair, pair, pair);
        if (w->nested_table)
            *(uint4 *)(to + 128 + turn) = *(uint4 *)(to + 192 - turn) = make_uint4(value, value, value, value);
    }
}

#endif

/* 8-bit codes as the operands of mma.sync. A lane takes 16 neighbouring bytes of a row, a piece, for what mma calls columns
 * anywhere in 64, and as many bytes of the activations: a sum does not mind the order of its columns. */
#ifndef QL_KERNELS_W8A8_PIECES_CUH
#define QL_KERNELS_W8A8_PIECES_CUH

#include "e4m3.cuh"
#include "ptx.cuh"
#include "w8a8.h"

/* Where a piece of a row of 128 columns is in shared memory: odd rows swap halves, so that eight lanes' pieces of two rows
 * meet no bank twice. */
static __device__ __forceinline__ int piece_at(int row, int piece) {
    return row * QL_W8A8_GROUP + ((piece ^ (row & 1) << 2) << 4);
}

/* Four columns of two rows as the large operand of multiply_16816: fp16, which holds every value of e4m3. */
static __device__ __forceinline__ void operand_of_e4m3(uint32_t a[4], uint32_t low, uint32_t high) {
    uint32_t pair[2];
    halves_of_e4m3(pair, low);
    a[0] = pair[0];
    a[2] = pair[1];
    halves_of_e4m3(pair, high);
    a[1] = pair[0];
    a[3] = pair[1];
}

/* Two neighbours of four int8, exact in both types. */
static __device__ __forceinline__ uint32_t pair_of_int8(uint32_t four, int first, int type) {
    const uint32_t biased = four ^ 0x80808080u;
    if (type == QL_VALUE_F16)
        return add_half2(__byte_perm(biased, 0x64646464u, first ? 0x4342 : 0x4140), 0xe480e480u); /* 1024 + 128 less */
    const float low = __uint_as_float(__byte_perm(biased, 0x4b000000u, first ? 0x7652 : 0x7650)) - (0x1p23f + 128.0f);
    const float high = __uint_as_float(__byte_perm(biased, 0x4b000000u, first ? 0x7653 : 0x7651)) - (0x1p23f + 128.0f);
    return round16_pair(low, high, QL_VALUE_BF16);
}

/* As operand_of_e4m3. */
static __device__ __forceinline__ void operand_of_int8(uint32_t a[4], uint32_t low, uint32_t high, int type) {
    a[0] = pair_of_int8(low, 0, type);
    a[1] = pair_of_int8(high, 0, type);
    a[2] = pair_of_int8(low, 2, type);
    a[3] = pair_of_int8(high, 2, type);
}

#endif

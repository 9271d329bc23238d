/* One token and a table with double quantization, in the decode kernels: where shared memory limits, as pairs of values are
 * looked up there, x is read from it once in place of eight times.
 *
 * The eight columns of mma would all be that token. Here they are eight steps of 16 columns of K: x of 128 columns is in two
 * registers a lane. A step multiplies with all of them but its own made 0, and so leaves its sums in its own column; of two
 * groups of 64 each has half of the columns. What the columns have is added where a warp leaves a strip. */
#ifndef QL_KERNELS_ONE_TOKEN_CUH
#define QL_KERNELS_ONE_TOKEN_CUH

#include "code_raw.cuh"

/* Where a lane reads x of 256 columns that begin at `at`: a row of a matrix is a half of a step. First and last halves are in
 * turns in one matrix and in the other, so that no two rows of one want the same banks. */
static __device__ __forceinline__ uint32_t place_of_one(uint32_t at, int lane) {
    const int step = lane % 8, last = lane / 8 % 2 ^ step / 4;
    return at + (uint32_t)(lane / 16 * 256 + step * 32 + last * 16);
}

/* is_step[i]: 1 in the lanes of column i, 0 elsewhere; the compiler is not to know. */
static __device__ __forceinline__ void find_steps(uint32_t is_step[8], int column) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        is_step[i] = column == i;
        asm volatile("" : "+r"(is_step[i]));
    }
}

/* The four steps of a block of a batch: sum += W x. x: of the 256 columns that the block is in; pairs, low: raw_fragment. */
static __device__ __forceinline__ void multiply_block_of_one(float *sum, const ql_batch_codes *codes, int type,
                                                             int block, const uint32_t x[2][2],
                                                             const uint32_t is_step[8], const uint8_t *pairs,
                                                             uint32_t low) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int step = block % 2 * 4 + i;
        const uint32_t *from = x[block % 4 / 2];
        uint32_t a[4];
        /* Products, as the pipe for bits is busy with addresses of pairs. */
        const uint32_t b[2] = {from[step / 4] * is_step[step], from[1 - step / 4] * is_step[step]};
        raw_fragment(a, codes, QL_CODE_TABLE4, type, false, block, i, pairs, low);
        multiply_16816(sum, a, b, type);
    }
}

/* A warp's sums of a strip's rows, of which each has two columns of two rows, into shared memory. */
static __device__ __forceinline__ void leave_sums_of_one(const float *sum, uint8_t *to) {
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float all = sum[2 * h] + sum[2 * h + 1];
        all += __shfl_xor_sync(ALL_LANES, all, 1);
        all += __shfl_xor_sync(ALL_LANES, all, 2);
        if (lane % 4 == 0) *(float *)(to + lane + h * 32) = all;
    }
}

#endif

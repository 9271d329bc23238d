/* Tables and few tokens, in the decode kernels: where shared memory limits, as pairs of values are looked up there, columns of
 * mma that tokens leave free serve to read x from it less often.
 *
 * Up to four tokens: of the eight columns half are tokens of one group, half the same of another (decode.h). x of a block of
 * each is in the same registers, and a step multiplies with the other's columns made 0.
 *
 * One token, with double quantization: the columns are eight steps of 16 columns of K: x of 128 columns is in two registers a
 * lane. A step multiplies with all of them but its own made 0, and so leaves its sums in its own column; of two groups of 64
 * each has half of the columns, of four groups of 32 a quarter, which is one lane's of four. What the columns have is added
 * where a warp leaves a strip. */
#ifndef QL_KERNELS_FEW_TOKENS_CUH
#define QL_KERNELS_FEW_TOKENS_CUH

#include "code_raw.cuh"

/* is[i]: 1 where the lane's column belongs to i, or 0; the compiler is not to know. */
static __device__ __forceinline__ void hide(uint32_t *is, int count) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(is[i]));
}

/* ---- up to four tokens ---- */

/* Where a lane reads x of two blocks, `part` apart: a row of the matrices that ldmatrix loads. live: the row's place in the
 * first block's line, with its piece. Rows of the second block are read half a line ahead of those of the first, as they would
 * want the same banks; where groups are halves of one block (part 0), that half a line is all that is between them. */
static __device__ __forceinline__ uint32_t place_of_both(uint32_t live, int part, int lane) {
    return lane % 8 < 4 ? live : (live ^ 64) + (uint32_t)(part * 128);
}

/* sum += W x of both blocks, of odd steps `odd`. is_side: which of the two the lane's column is. x: as of multiply_block; pairs,
 * low: as of raw_fragment. */
static __device__ __forceinline__ void multiply_both_blocks(float *sum, float *odd, const ql_batch_codes *codes,
                                                            int type, int block, int part, uint32_t x,
                                                            const uint32_t is_side[2], const uint8_t *pairs,
                                                            uint32_t low) {
#pragma unroll
    for (int step = 0; step < (part ? 4 : 2); step += 2) {
        uint32_t b[2][2];
        load_matrices(b[0], b[1], (x ^ (uint32_t)(step * 32)) + (uint32_t)(block * 128));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int side = i % 2, second = i / 2;
            uint32_t a[4];
            /* Products, as the pipe for bits is busy with addresses of pairs. */
            const uint32_t own[2] = {b[second][0] * is_side[side], b[second][1] * is_side[side]};
            raw_fragment(a, codes, QL_CODE_TABLE4, type, false, false, QL_RAW_IN_TURN, block + side * part,
                         (step ^ 2 * side) + second, pairs, low);
            multiply_16816(second ? odd : sum, a, own, type);
        }
    }
}

/* ---- one token ---- */

/* Where a lane reads x of 256 columns that begin at `at`: a row of a matrix is a half of a step. First and last halves are in
 * turns in one matrix and in the other, so that no two rows of one want the same banks. */
static __device__ __forceinline__ uint32_t place_of_one(uint32_t at, int lane) {
    const int step = lane % 8, last = lane / 8 % 2 ^ step / 4;
    return at + (uint32_t)(lane / 16 * 256 + step * 32 + last * 16);
}

/* The four steps of a block of a batch: sum += W x. x: of the 256 columns that the block is in; is_step: which of eight
 * steps the lane's column is. */
static __device__ __forceinline__ void multiply_block_of_one(float *sum, const ql_batch_codes *codes, int type,
                                                             int block, const uint32_t x[2][2],
                                                             const uint32_t is_step[8], const uint8_t *pairs,
                                                             uint32_t low) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int step = block % 2 * 4 + i;
        const uint32_t *from = x[block % 4 / 2];
        uint32_t a[4];
        const uint32_t b[2] = {from[step / 4] * is_step[step], from[1 - step / 4] * is_step[step]};
        raw_fragment(a, codes, QL_CODE_TABLE4, type, false, false, QL_RAW_IN_TURN, block, i, pairs, low);
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

/* Codes as 16-bit numbers for mma without any scaling: what the decode kernels multiply by x. A lane's fragment is four
 * pairs: rows g, g + 8, then the same rows 8 columns on.
 *
 * For fp16 a code is left where it lies: as a denormal it is code * 2^-24 times the power of two of its place, which is
 * one for all codes of a row (QL_RAW_UNIT). For bf16, whose denormals are below fp32's, it is 128 + code, or code - 128 of
 * a byte. Both are exact. A byte in bf16 may be parted: the difference of two numbers of one instruction each, which two products
 * take in place of the four that make the number itself. With the bits of 128 above it a byte is 128 + code below 128, and 2 code from
 * there on: code - 128 more than 128 + code. A table's codes become its values, rounded to 16 bit when the table of pairs was made. */
#ifndef QL_KERNELS_CODE_RAW_CUH
#define QL_KERNELS_CODE_RAW_CUH

#include "code_bits.cuh"
#include "decode.h"

/* A lane's codes of a batch. */
typedef struct ql_batch_codes {
    uint4 low[8];
    uint2 high[4]; /* 3 bit */
} ql_batch_codes;

/* Row g + 8 * half of the fragment holds (code + QL_RAW_OFFSET) * QL_RAW_ONE * QL_RAW_UNIT, of odd steps times QL_RAW_ODD
 * where those are apart and need no shift. Where codes are QL_RAW_JOINED row g + 8 holds row g's numbers as well: a byte of
 * two codes, one mask fewer; sums of row g are taken away from its sums. That wants registers, which sm_90 has left. */
#if __CUDA_ARCH__ == 900
#define QL_RAW_JOINED(code, type) ((code) == QL_CODE_INT4 && (type) == QL_VALUE_F16)
#else
#define QL_RAW_JOINED(code, type) false
#endif
#define QL_RAW_ODD(code, type, parted)                                                                                 \
    ((parted) ? -1.0f : (type) == QL_VALUE_F16 && (code) == QL_CODE_INT3 ? 16.0f : 1.0f)
#define QL_RAW_UNIT(code, type, half)                                                                                  \
    ((type) != QL_VALUE_F16 || !(half) ? 1.0f : (code) == QL_CODE_INT4 ? 16.0f : (code) == QL_CODE_INT2 ? 4.0f : 1.0f)
#define QL_RAW_ONE(code, type) ((type) == QL_VALUE_F16 && (code) != QL_CODE_TABLE4 ? 0x1p-24f : 1.0f)
#define QL_RAW_OFFSET(code, type, parted)                                                                              \
    ((type) == QL_VALUE_F16 ? 0.0f : (code) == QL_CODE_INT8 && !(parted) ? -128.0f : 128.0f)

/* Two bytes of the pair table: `low` is the byte offset of the lane's copy. */
static __device__ __forceinline__ uint32_t table_pair(const uint8_t *pairs, uint32_t word, int byte, uint32_t low) {
    uint32_t at = __byte_perm(word, low, 0x7704u + (uint32_t)byte * 0x10u);
    return *(const uint32_t *)(pairs + at);
}

/* Whether loads of a table's codes and some of the look-ups between them keep their turn: left to itself the compiler asks for the
 * next batch where this one ends. Only one GPU has been seen to gain. */
#define QL_RAW_IN_TURN (__CUDA_ARCH__ == 900)

/* A look-up in its turn. */
static __device__ __forceinline__ uint32_t table_pair_in_turn(const uint8_t *pairs, uint32_t word, int byte,
                                                              uint32_t low) {
    uint32_t pair, at = __byte_perm(word, low, 0x7704u + (uint32_t)byte * 0x10u);
    asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(pair) : "r"(shared_address(pairs) + at));
    return pair;
}

/* 2 and 3 bit: a word with row g + 8 * half's codes of two steps as joined_codes() has it, but that of 2 bit those of row
 * g + 8 are two bits on. */
static __device__ __forceinline__ uint32_t two_steps(const ql_batch_codes *codes, int code, int block, int step,
                                                     int half) {
    const int second = step / 2;
    const uint32_t low = word_of(codes->low[block / 2], block % 2 * 2 + second);
    if (code == QL_CODE_INT2) return low;
    const uint32_t high = block % 2 ? codes->high[block / 2].y : codes->high[block / 2].x;
    return joined_codes(low, high, step, half);
}

/* The fragment of step `step` (of 4) of block `block` of a batch. low: of a table, 4 * lane. All but codes, pairs and low
 * are constants. */
static __device__ __forceinline__ void raw_fragment(uint32_t a[4], const ql_batch_codes *codes, int code, int type,
                                                    bool odd_apart, bool parted, bool in_turn, int block, int step,
                                                    const uint8_t *pairs, uint32_t low) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int h = i % 2, p = i / 2;
        if (code == QL_CODE_TABLE4) {
            const uint32_t word = word_of(codes->low[block], step);
            const bool anchors = in_turn && ((step == 0 && i == 0) || (step == 3 && i == 3));
            a[i] = anchors ? table_pair_in_turn(pairs, word, 2 * p + h, low) : table_pair(pairs, word, 2 * p + h, low);
        } else if (code == QL_CODE_INT8) {
            uint32_t word = word_of(codes->low[2 * block + step / 2], step % 2 * 2 + p);
            if (type == QL_VALUE_F16) {
                a[i] = h ? __byte_perm(word, 0, 0x4341) : word & 0x00ff00ffu;
            } else if (parted) {
                a[i] = __byte_perm(word, 0x43434343u, h ? 0x4341 : 0x4240);
            } else {
                /* 128 + the low seven bits, less 128 or 256 as the byte's high bit is set or not. */
                uint32_t bytes = shifted(word, 8 * h);
                a[i] = sub_bf162(masked_or(bytes, 0x007f007fu, 0x43004300u),
                                 masked_not_or(bytes, 0x00800080u, 0x43004300u));
            }
        } else if (code == QL_CODE_INT4) {
            uint32_t word = word_of(codes->low[block], step);
            if (type == QL_VALUE_F16) {
                const uint32_t bytes = p ? __byte_perm(word, 0, 0x4341) : word & 0x00ff00ffu;
                a[i] = !h ? bytes & 0x000f000fu : QL_RAW_JOINED(code, type) ? bytes : bytes & 0x00f000f0u;
            } else {
                a[i] = masked_or(shifted(word, 8 * p + 4 * h), 0x000f000fu, 0x43004300u);
            }
        } else {
            const int in_row = code == QL_CODE_INT2 ? 2 * h : 0, place = 4 * (step % 2) + in_row;
            /* Where the code's lowest bit is to stand. */
            const int to = type != QL_VALUE_F16 ? 0 : odd_apart ? place : in_row;
            const uint32_t mask = twice((code == QL_CODE_INT2 ? 3u : 7u) << to);
            const uint32_t word = two_steps(codes, code, block, step, h) >> (8 * p + place - to);
            a[i] = type == QL_VALUE_F16 ? word & mask : masked_or(word, mask, 0x43004300u);
        }
    }
}

/* What a parted fragment has too much. */
static __device__ __forceinline__ void raw_excess(uint32_t excess[4], const uint32_t a[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) excess[i] = fma_relu_bf162(a[i], 0x3f003f00u, 0xc300c300u);
}

#endif

/* Where the codes of a fragment of packed.h stand in their words, and how they are brought to one place: for a step `s` of
 * 16 columns of a tile, row g + 8 h, columns 8 p on. Two neighbours' codes have the two halves of a word. All but words are
 * constants. */
#ifndef QL_KERNELS_CODE_BITS_CUH
#define QL_KERNELS_CODE_BITS_CUH

#include "packed.h"
#include "ptx.cuh"

/* The same 16 bits in both halves. */
static __device__ __forceinline__ uint32_t twice(uint32_t bits) { return bits * 0x00010001u; }

/* The lowest bit of a code of 2, 3 or 4 bits within 16; columns 8 further on are 8 bits higher. */
static __device__ __forceinline__ int code_bit(int code, int s, int h) {
    return code == QL_CODE_INT4 ? 4 * h : 4 * (s % 2) + 2 * h;
}

/* The third bit of 3 bit, in its own word. */
static __device__ __forceinline__ int high_bit(int s, int p, int h) {
    return 8 * p + 4 * (s % 2) + 2 * (s / 2 % 2) + h;
}

/* The codes of 2, 3 or 4 bits with their lowest bits at `at` of each half, in `rest`, which has zeros there. */
static __device__ __forceinline__ uint32_t codes_at(uint32_t word, uint32_t high, int code, int s, int p, int h, int at,
                                                    uint32_t rest) {
    const uint32_t low_mask = twice((code == QL_CODE_INT4 ? 15u : 3u) << at);
    if (code == QL_CODE_INT3) rest = masked_or(shifted(high, high_bit(s, p, h) - (at + 2)), twice(4u << at), rest);
    return masked_or(shifted(word, 8 * p + code_bit(code, s, h) - at), low_mask, rest);
}

/* 3 bit: a word with row g + 8 * h's codes of two steps, an even one and the next. Bit 16 e + 8 p + 4 (s % 2) is the lowest of
 * column 2t + 8 p + e; every fourth bit is to be ignored. */
static __device__ __forceinline__ uint32_t joined_codes(uint32_t low, uint32_t high, int s, int h) {
    return masked_else(low >> 2 * h, 0x33333333u, shifted(high, s / 2 % 2 * 2 + h - 2));
}

/* Bytes h and h + 2 of a word as the low mantissa bits of fp16 1024: 1024 + code. */
static __device__ __forceinline__ uint32_t half_bytes(uint32_t word, int h) {
    return __byte_perm(word, 0x64646464u, h ? 0x4341 : 0x4240);
}

#endif

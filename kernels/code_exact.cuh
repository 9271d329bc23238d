/* Codes of a packed weight as exact 16-bit numbers, q - zero, in the fragment order of the matrix instructions; scales
 * are applied elsewhere. A code is put into the mantissa of a power of two by one mask, and one fused multiply-add
 * takes that power and the zero away: both steps are exact.
 *
 * Each row has a "zero word", the same for a whole group, that says what the multiply-add subtracts. */
#ifndef QL_KERNELS_CODE_EXACT_CUH
#define QL_KERNELS_CODE_EXACT_CUH

#include "code_bits.cuh"

/* What subtracts zero `z` from codes that stand at bit `at` of the mantissa, as a pair: -(2^10 / 2^at + z) in fp16,
 * -(2^7 / 2^at + z) in bf16. */
static __device__ __forceinline__ uint32_t minus_pair(uint32_t z, int at, int type) {
    return type == QL_VALUE_F16 ? twice(z << at) + twice(0xe400u - ((uint32_t)at << 10))
                                : twice(z << at) + twice(0xc300u - ((uint32_t)at << 7));
}

/* bits << at taken as part of a power of two; divided by 2^at and the power and zero subtracted. */
static __device__ __forceinline__ uint32_t take_away(uint32_t raw, int at, uint32_t minus, int type) {
    if (type == QL_VALUE_F16)
        return at ? fma_half2(raw, twice(0x3c00u - ((uint32_t)at << 10)), minus) : add_half2(raw, minus);
    return fma_bf162(raw, twice(0x3f80u - ((uint32_t)at << 7)), minus);
}

/* The zero word of a row: `zero` is the row's, in all formats. */
static __device__ __forceinline__ uint32_t zero_word(uint32_t zero, int code, int type) {
    if (code == QL_CODE_INT8 && type == QL_VALUE_BF16) {
        uint32_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(128.0f - (float)zero));
        return twice(bits);
    }
    return zero;
}

/* Two 2- or 4-bit codes of a row less its zero. */
static __device__ __forceinline__ uint32_t small_codes(uint32_t word, int code, int s, int p, int h, uint32_t zero,
                                                       int type) {
    const int bits = QL_CODE_BITS(code);
    const int from = code_bit(code, s, h), room = type == QL_VALUE_F16 ? 10 : 7;
    /* Where the mantissa has no room for the code in its place, it comes down. */
    const int at = from + bits <= room ? from : from - (code == QL_CODE_INT4 ? 4 : 2);
    const uint32_t magic = twice(type == QL_VALUE_F16 ? 0x6400u : 0x4300u);
    return take_away(codes_at(word, 0, code, s, p, h, at, magic), at, minus_pair(zero, at, type), type);
}

/* Two 3-bit codes. */
static __device__ __forceinline__ uint32_t three_bit_codes(uint32_t low, uint32_t high, int s, int p, int h,
                                                           uint32_t zero, int type) {
    const int at = 4 * (s % 2);
    const uint32_t magic = twice(type == QL_VALUE_F16 ? 0x6400u : 0x4300u);
    const uint32_t raw = masked_or(joined_codes(low, high, s, h) >> 8 * p, twice(7u << at), magic);
    return take_away(raw, at, minus_pair(zero, at, type), type);
}

/* Two 8-bit codes less their zero: bytes h and h + 2 of the word. */
static __device__ __forceinline__ uint32_t byte_codes(uint32_t word, int h, uint32_t zero, int type, int has_zeros) {
    if (type == QL_VALUE_F16) return add_half2(half_bytes(word, h), minus_pair(zero, 0, type));
    /* bf16 has room for seven bits: 128 + (q & 127), less 128 with or without 128 by the highest bit, is q - 128. */
    const uint32_t in_place = word >> (8 * h);
    const uint32_t low = masked_or(in_place, 0x007f007fu, 0x43004300u);
    uint32_t exact = sub_bf162(low, masked_not_or(in_place, 0x00800080u, 0x43004300u));
    return has_zeros ? add_bf162(exact, zero) : exact;
}

/* a[4] of one step of 16 columns: rows g and g + 8, columns 2t.. and 2t + 8... `words`, `high`: the lane's codes of a
 * tile; zero: the zero words of both rows. */
static __device__ __forceinline__ void exact_step(uint32_t a[4], const uint32_t *words, const uint32_t *high, int s,
                                                  const uint32_t zero[2], bool has_zeros, int code, int type) {
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t *to = &a[2 * p + h];
            if (code == QL_CODE_INT8) {
                *to = byte_codes(words[2 * s + p], h, zero[h], type, has_zeros);
            } else if (code == QL_CODE_INT3) {
                *to = three_bit_codes(words[s / 2], high[s / 4], s, p, h, zero[h], type);
            } else {
                *to = small_codes(words[code == QL_CODE_INT4 ? s : s / 2], code, s, p, h, zero[h], type);
            }
        }
}

#endif

/* Vectors of LANES fp32 or 32-bit integers, one meaning on every instruction set. Part of the kernels, which each
 * isa_*.c includes once after it has defined QL_AVX512 (which takes VNNI and VBMI in), QL_AVX2, or none for plain C.
 * The arithmetic operators work on these types themselves; here is what they have no operator for. */
#ifndef QL_CPU_VECTOR_H
#define QL_CPU_VECTOR_H

#include "../formats/number.h"

#include <stdint.h>
#include <string.h>

#if defined(QL_AVX512) || defined(QL_AVX2)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 32")

#if defined(QL_AVX512)
#define LANES 16
#elif defined(QL_AVX2)
#define LANES 8
#else
#define LANES 4
#endif
/* Weights are decoded in blocks of BLOCK x BLOCK. */
#define BLOCK (8 * LANES)
/* Rows of a decoded block do not lie a power of two apart: turning writes down the columns, and all of a column's lines
 * would fall into a few sets of the first cache. */
#define PANEL_STRIDE (BLOCK + LANES)

/* Keeps the compiler from holding loaded values beyond this point: activations are read again by each product as its
 * memory operand, which is free, where kept ones would push the sums out of the registers. */
#define forget_memory() __asm__ volatile("" ::: "memory")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

INLINE vf vf_load(const float *from) {
    vf value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void vf_store(float *to, vf value) { memcpy(to, &value, sizeof value); }

INLINE vf vf_set(float value) { return value - (vf){0}; }

INLINE vi vi_set(int32_t value) { return value - (vi){0}; }

INLINE vi vi_lane(void) {
#if LANES == 16
    return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
    return (vi){0, 1, 2, 3, 4, 5, 6, 7};
#else
    return (vi){0, 1, 2, 3};
#endif
}

INLINE vf vf_from_int(vi value) { return __builtin_convertvector(value, vf); }

INLINE vi vi_shift(vi value, int right) { return (vi)((vu)value >> right); }

INLINE vf vf_fma(vf a, vf b, vf c) {
#if defined(QL_AVX512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(QL_AVX2)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* a * b + c rounded once on every path, which plain C has only through a call a lane. */
INLINE vf vf_fma_once(vf a, vf b, vf c) {
#if LANES == 4
    for (int i = 0; i < LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#else
    return vf_fma(a, b, c);
#endif
}

/* Sums adjacent halves: one order on every path. */
INLINE float vf_sum(vf value) {
    float lane[LANES];
    vf_store(lane, value);
#if defined(QL_AVX512)
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)value),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)value), 1)));
#elif defined(QL_AVX2)
    __m256 eight = (__m256)value;
#endif
#if LANES >= 8
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
#endif
}

/* The first `count` words, the other lanes 0; nothing beyond them is read. Any count. */
INLINE vi vi_load_some(const void *words, int64_t count) {
#if defined(QL_AVX512)
    __mmask16 mask = (__mmask16)(count >= LANES ? 0xffffu : count > 0 ? (1u << count) - 1u : 0u);
    return (vi)_mm512_maskz_loadu_epi32(mask, words);
#else
    vi value = {0};
    if (count >= LANES)
        memcpy(&value, words, sizeof value);
    else if (count > 0)
        memcpy(&value, words, (size_t)count * 4);
    return value;
#endif
}

INLINE vi vi_load(const void *words) {
    vi value;
    memcpy(&value, words, sizeof value);
    return value;
}

/* Lane i is value[index[i]]. */
INLINE vi vi_permute(vi value, vi index) {
#if defined(QL_AVX512)
    return (vi)_mm512_permutexvar_epi32((__m512i)index, (__m512i)value);
#elif defined(QL_AVX2)
    return (vi)_mm256_permutevar8x32_epi32((__m256i)value, (__m256i)index);
#else
    return __builtin_shuffle(value, index);
#endif
}

/* ---- conversions from and to 16-bit memory ---- */

/* `count` values of an fp32, fp16 or bf16 array from `index` on, the other lanes 0. */
INLINE vf vf_convert(const void *array, ql_dtype dtype, int64_t index, int64_t count) {
    if (dtype == QL_F32) return (vf)vi_load_some((const float *)array + index, count);
    const uint16_t *from = (const uint16_t *)array + index;
#if LANES == 4
    vf value = {0};
    for (int i = 0; i < LANES && i < count; i++) value[i] = ql_f32_load(from, dtype, i);
    return value;
#else
    uint16_t some[LANES] = {0};
    if (count < LANES) {
        if (count > 0) memcpy(some, from, (size_t)count * 2);
        from = some;
    }
#if LANES == 16
    __m256i halves = _mm256_loadu_si256((const void *)from);
    if (dtype == QL_F16) return (vf)_mm512_cvtph_ps(halves);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    __m128i halves = _mm_loadu_si128((const void *)from);
    if (dtype == QL_F16) return (vf)_mm256_cvtph_ps(halves);
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#endif
#endif
}

/* bf16 of each lane in the low half of its word, the high half 0; NaN stays NaN. */
INLINE vi vi_bf16_from_f32(vf value) {
    vu bits = (vu)value;
    vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    vu quiet = bits >> 16 | 0x40u;
    vu nan = (vu)(value != value);
    return (vi)((rounded & ~nan) | (quiet & nan));
}

INLINE void vf_store_as(void *array, ql_dtype dtype, int64_t index, vf value, int64_t count) {
    if (count > LANES) count = LANES;
    if (dtype == QL_F32) {
        if (count == LANES)
            vf_store((float *)array + index, value);
        else
            memcpy((float *)array + index, &value, (size_t)count * 4);
        return;
    }
    uint16_t *to = (uint16_t *)array + index;
#if LANES == 4
    for (int i = 0; i < count; i++) ql_f32_store(to, dtype, i, value[i]);
#else
    uint16_t halves[LANES];
#if LANES == 16
    __m256i packed = dtype == QL_F16 ? _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                     : _mm512_cvtepi32_epi16((__m512i)vi_bf16_from_f32(value));
    _mm256_storeu_si256((void *)halves, packed);
#else
    __m128i packed;
    if (dtype == QL_F16) {
        packed = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m256i words = (__m256i)vi_bf16_from_f32(value);
        packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
    _mm_storeu_si128((void *)halves, packed);
#endif
    memcpy(to, halves, (size_t)count * 2);
#endif
}

/* ---- tables of 16 ---- */

#if defined(QL_AVX512)
typedef struct vtable {
    __m512 all;
} vtable;
#elif defined(QL_AVX2)
typedef struct vtable {
    __m256 low, high;
} vtable;
#else
typedef struct vtable {
    float all[16];
} vtable;
#endif

INLINE vtable vtable_load(const float *values) {
    vtable table;
    memcpy(&table, values, sizeof table);
    return table;
}

/* Lane i is the table's value at the low four bits of index[i]; the other bits may be anything. */
INLINE vf vtable_at(const vtable *table, vi index) {
#if defined(QL_AVX512)
    return (vf)_mm512_permutexvar_ps((__m512i)index, table->all);
#elif defined(QL_AVX2)
    __m256 low = _mm256_permutevar8x32_ps(table->low, (__m256i)index);
    __m256 high = _mm256_permutevar8x32_ps(table->high, (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
#else
    vf value;
    for (int i = 0; i < LANES; i++) value[i] = table->all[index[i] & 15];
    return value;
#endif
}

/* ---- bytes of words as floats ---- */

/* 2^23, added to what vf_biased_byte gives: in AVX-512 one masked byte shuffle makes the float 2^23 + byte. */
#if defined(QL_AVX512)
#define BYTE_BIAS 0x1p23f
#else
#define BYTE_BIAS 0.0f
#endif

/* Byte `which` of each word, unsigned, plus BYTE_BIAS. */
INLINE vf vf_biased_byte(vi words, int which) {
#if defined(QL_AVX512)
    const __m512i from = _mm512_set4_epi32(12 + which, 8 + which, 4 + which, which);
    const __m512i bias = _mm512_set1_epi32(0x4b000000);
    return (vf)_mm512_castsi512_ps(_mm512_mask_shuffle_epi8(bias, 0x1111111111111111u, (__m512i)words, from));
#else
    return vf_from_int((vi)((vu)words >> 8 * which & 0xffu));
#endif
}

/* ---- transposition ---- */

/* row[i] lane j <-> row[j] lane i, by log2(LANES) rounds of a perfect shuffle of the rows. */
INLINE void vf_transpose(vf row[LANES]) {
#if LANES == 16
    const vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif LANES == 8
    const vi low = {0, 8, 1, 9, 2, 10, 3, 11};
#else
    const vi low = {0, 4, 1, 5};
#endif
    const vi high = low + LANES / 2;
    for (int round = 1; round < LANES; round *= 2) {
        vf next[LANES];
        UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shuffle(row[i], row[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(row[i], row[i + LANES / 2], high);
        }
        UNROLL
        for (int i = 0; i < LANES; i++) row[i] = next[i];
    }
}

#endif

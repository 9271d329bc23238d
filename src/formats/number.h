/* Conversions between the number formats: IEEE half, bfloat16, e4m3, e5m2, e8m0 and fp32. All round to nearest, ties to
 * even, and keep NaN; the halves overflow to infinity, e4m3 saturates (it has no infinity). */
#ifndef QL_FORMATS_NUMBER_H
#define QL_FORMATS_NUMBER_H

#include "dtype.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define QL_E4M3_MAX 448.0f

static inline uint32_t ql_bits_from_f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float ql_f32_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float ql_f32_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return ql_f32_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return ql_f32_from_bits(sign | ((magnitude << 13) + (112u << 23)));
    /* A subnormal is magnitude * 2^-24 exactly. */
    return ql_f32_from_bits(sign | ql_bits_from_f32((float)magnitude * 0x1p-24f));
}

static inline uint16_t ql_f16_from_f32(float value) {
    uint32_t bits = ql_bits_from_f32(value);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (magnitude >= 0x38800000u) {
        uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
        return (uint16_t)(sign | rounded >> 13);
    }
    /* Adding 0.5 leaves the value at the subnormal's grid of 2^-24, rounded by the addition itself. */
    uint32_t grid = ql_bits_from_f32(ql_f32_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    return (uint16_t)(sign | grid);
}

static inline float ql_f32_from_bf16(uint16_t half) { return ql_f32_from_bits((uint32_t)half << 16); }

static inline uint16_t ql_bf16_from_f32(float value) {
    uint32_t bits = ql_bits_from_f32(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float ql_f32_from_e4m3(uint8_t byte) {
    uint32_t sign = (uint32_t)(byte & 0x80u) << 24;
    uint32_t magnitude = byte & 0x7fu;
    if (magnitude == 0x7fu) return ql_f32_from_bits(sign | 0x7fc00000u);
    if (magnitude >= 0x08u) return ql_f32_from_bits(sign | ((magnitude << 20) + (120u << 23)));
    return ql_f32_from_bits(sign | ql_bits_from_f32((float)magnitude * 0x1p-9f));
}

/* Saturates to +-448, infinities too; NaN gives 0x7f with the sign. */
static inline uint8_t ql_e4m3_from_f32(float value) {
    uint32_t bits = ql_bits_from_f32(value);
    uint32_t sign = bits >> 24 & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (magnitude >= 0x43e00000u) return (uint8_t)(sign | 0x7eu);
    if (magnitude >= 0x3c800000u) {
        uint32_t rounded = magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u);
        return (uint8_t)(sign | rounded >> 20);
    }
    /* 2^14 has an ulp of 2^-9, the grid of the subnormals. */
    uint32_t grid = ql_bits_from_f32(ql_f32_from_bits(magnitude) + 0x1p14f) - 0x46800000u;
    return (uint8_t)(sign | grid);
}

static inline float ql_f32_from_e5m2(uint8_t byte) { return ql_f32_from_f16((uint16_t)(byte << 8)); }

static inline float ql_f32_from_e8m0(uint8_t byte) {
    if (byte == 0xffu) return ql_f32_from_bits(0x7fc00000u);
    return byte ? ql_f32_from_bits((uint32_t)byte << 23) : 0x1p-127f;
}

/* Element `index` of an array of any floating dtype. */
static inline float ql_f32_load(const void *array, ql_dtype dtype, int64_t index) {
    switch (dtype) {
    case QL_F32: return ((const float *)array)[index];
    case QL_F16: return ql_f32_from_f16(((const uint16_t *)array)[index]);
    case QL_BF16: return ql_f32_from_bf16(((const uint16_t *)array)[index]);
    case QL_F64: return (float)((const double *)array)[index];
    case QL_E4M3: return ql_f32_from_e4m3(((const uint8_t *)array)[index]);
    case QL_E5M2: return ql_f32_from_e5m2(((const uint8_t *)array)[index]);
    case QL_E8M0: return ql_f32_from_e8m0(((const uint8_t *)array)[index]);
    default: return NAN;
    }
}

/* Writes element `index` of an fp32, fp16 or bf16 array. */
static inline void ql_f32_store(void *array, ql_dtype dtype, int64_t index, float value) {
    switch (dtype) {
    case QL_F16: ((uint16_t *)array)[index] = ql_f16_from_f32(value); break;
    case QL_BF16: ((uint16_t *)array)[index] = ql_bf16_from_f32(value); break;
    default: ((float *)array)[index] = value; break;
    }
}

#endif

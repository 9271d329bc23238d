/* Numbers as they lie in memory: floats of three types, e4m3, and codes in streams of bits. */
#ifndef QL_KERNELS_VALUE_CUH
#define QL_KERNELS_VALUE_CUH

#include "params.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

/* Element `index` of an array of any of the three types. */
static __device__ __forceinline__ float load_value(const void *array, int type, int64_t index) {
    switch (type) {
    case QL_VALUE_F16: return __half2float(((const __half *)array)[index]);
    case QL_VALUE_BF16: return __bfloat162float(((const __nv_bfloat16 *)array)[index]);
    default: return ((const float *)array)[index];
    }
}

/* Stores `value`, rounded to nearest even. */
static __device__ __forceinline__ void store_value(void *array, int type, int64_t index, float value) {
    switch (type) {
    case QL_VALUE_F16: ((__half *)array)[index] = __float2half_rn(value); break;
    case QL_VALUE_BF16: ((__nv_bfloat16 *)array)[index] = __float2bfloat16_rn(value); break;
    default: ((float *)array)[index] = value; break;
    }
}

/* Macros, as the parameters of several kinds of kernels have these fields. The bias of output `index`, 0 where there is
 * none; and whether every eight outputs of 16 bit from a multiple of eight on are 16 bytes that one store can write. */
#define BIAS_AT(p, index) ((p)->bias ? load_value((p)->bias, (p)->bias_type, (index) * (p)->bias_stride) : 0.0f)
#define HAS_WHOLE_PIECES(p) ((p)->n % 8 == 0 && (uintptr_t)(p)->out % 16 == 0)

/* Exact; NaN for 0x7f and 0xff. */
static __device__ __forceinline__ float value_from_e4m3(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3)));
}

/* Nearest even, saturated to +-448; NaN gives NaN. */
static __device__ __forceinline__ uint8_t e4m3_from_value(float value) {
    return (uint8_t)__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

/* Code `index` of a stream of `bits`-bit codes whose word w is at words[w * stride]. A code that straddles two words has
 * its low bits in the first. */
static __device__ __forceinline__ uint32_t load_code(const int32_t *words, int64_t stride, int bits, int64_t index) {
    int64_t bit = index * bits;
    int shift = (int)(bit & 31);
    int64_t word = bit >> 5;
    uint32_t code = (uint32_t)words[word * stride] >> shift;
    if (shift + bits > 32) code |= (uint32_t)words[(word + 1) * stride] << (32 - shift);
    return code & ((1u << bits) - 1u);
}

#endif

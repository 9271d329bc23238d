/* How the quantizers read floats: runs of eight as fp32, and magnitudes over a group of lanes or a block. */
#ifndef QL_KERNELS_SOURCE_CUH
#define QL_KERNELS_SOURCE_CUH

#include "divide.cuh"
#include "ptx.cuh"
#include "quantize.h"
#include "value.cuh"

static __device__ __forceinline__ void unpack_halves(float *out, uint4 bits) {
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = __half22float2(*(const __half2 *)&word[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

static __device__ __forceinline__ void unpack_bfloats(float *out, uint4 bits) {
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(word[i] << 16);
        out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}

/* Eight values of a 16-bit type. */
static __device__ __forceinline__ void unpack_run(float *out, uint4 bits, int type) {
    if (type == QL_VALUE_F16)
        unpack_halves(out, bits);
    else
        unpack_bfloats(out, bits);
}

/* out[i] = fp32 of array[first + i] for i in [0, 8), 0 from `end` on. vector: array + first is at a multiple of 16 bytes. */
static __device__ __forceinline__ void load_run(float *out, const void *array, int type, bool vector, int64_t first,
                                                int64_t end) {
    if (vector && first + QL_RUN <= end) {
        if (type == QL_VALUE_F32) {
            const float4 *from = (const float4 *)((const float *)array + first);
            *(float4 *)out = from[0];
            *(float4 *)(out + 4) = from[1];
            return;
        }
        unpack_run(out, *(const uint4 *)((const uint16_t *)array + first), type);
        return;
    }
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) out[i] = first + i < end ? load_value(array, type, first + i) : 0.0f;
}

/* Where row `row` of the matrix begins. */
static __device__ __forceinline__ const void *row_of(const ql_source *source, int64_t row) {
    return (const char *)source->data + row * source->row_stride * (source->type == QL_VALUE_F32 ? 4 : 2);
}

/* An element of a matrix with any strides. */
static __device__ __forceinline__ float load_strided(const ql_strided *m, int64_t row, int64_t col) {
    int64_t at = row * m->row_stride + col * m->col_stride;
    return m->type == QL_VALUE_F64 ? __double2float_rn(((const double *)m->data)[at])
                                   : load_value(m->data, m->type, at);
}

#define INFINITY_BITS 0x7f800000u

/* The bits of |value|: they order as magnitudes do, with every NaN above infinity, so that a maximum keeps NaN. */
static __device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

/* Magnitudes from the limit to infinity, no NaN; a limit of 0xffffffff: none. */
static __device__ __forceinline__ bool is_outlier(uint32_t magnitude, uint32_t limit) {
    return magnitude >= limit && magnitude <= INFINITY_BITS;
}

/* The bits of a 16-bit magnitude, which order likewise, as magnitude_bits has them. */
static __device__ __forceinline__ uint32_t widened(uint32_t magnitude, int type) {
    return type == QL_VALUE_F16 ? magnitude_bits(__half2float(__ushort_as_half((uint16_t)magnitude))) : magnitude << 16;
}

static __device__ __forceinline__ uint32_t run_magnitude(uint32_t most, const float *run) {
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) most = max(most, magnitude_bits(run[i]));
    return most;
}

/* The maximum over the `lanes` neighbours (a power of two up to 32) that share a group, for each of them. The whole warp
 * must be here. */
static __device__ __forceinline__ uint32_t lanes_max(uint32_t value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

/* The maximum over the block, for each of its threads. */
static __device__ __forceinline__ uint32_t block_max(uint32_t value) {
    __shared__ uint32_t most[32];
    value = __reduce_max_sync(ALL_LANES, value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) value = max(value, most[i]);
    return value;
}

/* *whole = a / b rounded to the nearest whole number, by inverse = 1 / b rounded; false where that may be wrong. The product
 * is off by less than three units in the last place, so it is right but near a half or where it is no number; beyond 512 it
 * may be off by some, which every caller clamps. */
static __device__ __forceinline__ bool round_quotient(int *whole, float a, float inverse) {
    /* Adding 1.5 * 2^23 rounds to a whole number, which the low bits then are. */
    float quotient = __fmul_rn(a, inverse), shifted = __fadd_rn(quotient, 0x1.8p23f);
    *whole = (int)__float_as_uint(shifted) - 0x4b400000;
    float fraction = __fsub_rn(quotient, __fsub_rn(shifted, 0x1.8p23f));
    return fabsf(fraction) < 0.499f && fabsf(quotient) < 0x1p20f;
}

/* FP8's scale of an absmax: absmax / 448, 1 for zero; NaN stays. */
static __device__ __forceinline__ float e4m3_scale(float absmax) {
    float scale = __fdiv_rn(absmax, 448.0f);
    return scale == 0.0f ? 1.0f : scale;
}

/* The lanes that share a group of `size` columns: as many as have a run each, a power of two. */
static __device__ __forceinline__ int lanes_of(int64_t size) {
    int lanes = 1;
    while (lanes < 32 && lanes * QL_RUN < size) lanes *= 2;
    return lanes;
}

#endif

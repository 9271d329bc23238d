/* Scales and codes of activations, eight values at a time. */
#ifndef QL_KERNELS_W8A8_ACTIVATION_CUH
#define QL_KERNELS_W8A8_ACTIVATION_CUH

#include "source.cuh"
#include "w8a8_quantize.h"

/* What turns values of one unit into codes. */
typedef struct __align__(16) ql_encoder {
    float scale;  /* e4m3's; int8: 127 / absmax of lifted values */
    float factor; /* e4m3: 1 / scale; int8: the lift */
    int quotient; /* e4m3: codes are those of x / scale, not of x * factor */
    int exact;    /* e4m3: the quotient is divided for; int8: every code is 0 */
} ql_encoder;

/* Rare, and long. */
static __device__ __noinline__ float exact_quotient(float x, float scale) { return __fdiv_rn(x, scale); }

/* a / 448 to nearest, where it is not negative: of every significand a product and what it lacks give that. */
static __device__ __forceinline__ float over_448(float a) {
    if (!(a > 0x1p-100f && a < 0x1p100f)) return exact_quotient(a, 448.0f);
    const float quotient = __fmul_rn(a, 1.0f / 448.0f);
    return __fmaf_rn(__fmaf_rn(-quotient, 448.0f, a), 1.0f / 448.0f, quotient);
}

/* 1 / a to nearest, as __frcp_rn has it where neither is near an end of the range. */
static __device__ __forceinline__ float quick_reciprocal(float a) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(a));
    return __fmaf_rn(near, __fmaf_rn(-a, near, 1.0f), near);
}

static __device__ __forceinline__ float token_scale(uint32_t most, float upper_bound, float least) {
    const float absmax = __uint_as_float(most);
    const float scale = over_448(absmax > upper_bound ? upper_bound : absmax);
    return scale < least ? least : scale;
}

/* Of a unit with this scale and largest magnitude (0 where nobody asked); static and tensor scales multiply by the
 * reciprocal, where it is finite. */
static __device__ __forceinline__ ql_encoder e4m3_encoder(float scale, uint32_t most, bool reciprocal) {
    ql_encoder e = {scale, __frcp_rn(scale), false, false};
    if (scale == 0.0f) e.factor = 0.0f;
    e.quotient = scale != 0.0f && !(reciprocal && fabsf(e.factor) < __uint_as_float(INFINITY_BITS));
    e.exact = most >= INFINITY_BITS || !(fabsf(scale) > 0x1p-60f && fabsf(scale) < 0x1p60f);
    return e;
}

static __device__ __forceinline__ ql_encoder int8_encoder(uint32_t most) {
    float absmax = __uint_as_float(most), lift = absmax < 0x1p-100f ? 0x1p100f : 1.0f;
    return (ql_encoder){__fdiv_rn(127.0f, __fmul_rn(absmax, lift)), lift, false, most == 0 || most >= INFINITY_BITS};
}

/* x / scale to the side of every bound between codes that the quotient to nearest is on, or on it: a product with the
 * reciprocal, and what it lacks by the remainder, which fma has exactly. Bounds have five bits, so only a scale that is a
 * few units in its last place from x / bound could be met wrongly: none is, of all of these. */
static __device__ __forceinline__ float e4m3_quotient(float x, const ql_encoder *e) {
    const float quotient = __fmul_rn(x, e->factor);
    return __fmaf_rn(__fmaf_rn(-quotient, e->scale, x), e->factor, quotient);
}

static __device__ __forceinline__ uint2 e4m3_of_values(const float *value) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pair[i] = __nv_cvt_float2_to_fp8x2(make_float2(value[2 * i], value[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
    return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

/* Eight codes as bytes, the first lowest, where the encoder is not exact. */
static __device__ __forceinline__ uint2 e4m3_quick_run(const float *run, const ql_encoder *e) {
    float value[QL_RUN];
    if (e->quotient) {
#pragma unroll
        for (int i = 0; i < QL_RUN; i++) value[i] = e4m3_quotient(run[i], e);
    } else {
#pragma unroll
        for (int i = 0; i < QL_RUN; i++) value[i] = __fmul_rn(run[i], e->factor);
    }
    return e4m3_of_values(value);
}

/* The same of any encoder. */
static __device__ __forceinline__ uint2 e4m3_run(const float *run, const ql_encoder *e) {
    if (!e->quotient || !e->exact) return e4m3_quick_run(run, e);
    float value[QL_RUN];
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) value[i] = exact_quotient(run[i], e->scale);
    return e4m3_of_values(value);
}

/* Of magnitudes that no formula below was made for: rare, and long. */
static __device__ __noinline__ uint2 rare_group_codes(float scale, uint4 bits, uint32_t most, int type) {
    const ql_encoder e = e4m3_encoder(scale, most, false);
    float run[QL_RUN];
    unpack_run(run, bits, type);
    return e4m3_run(run, &e);
}

/* The scale of a group, whose largest magnitude is `most`, and codes of eight of its values: those of over_448 and
 * e4m3_encoder, with one branch. */
static __device__ __forceinline__ uint2 group_codes(float *scale, uint4 bits, uint32_t most, int type) {
    const float absmax = most ? __uint_as_float(most) : 448.0f;
    if (!(absmax > 0x1p-50f && absmax < 0x1p60f)) {
        *scale = exact_quotient(absmax, 448.0f);
        if (*scale == 0.0f) *scale = 1.0f;
        return rare_group_codes(*scale, bits, most, type);
    }
    const float quotient = __fmul_rn(absmax, 1.0f / 448.0f);
    *scale = __fmaf_rn(__fmaf_rn(-quotient, 448.0f, absmax), 1.0f / 448.0f, quotient);
    const ql_encoder e = {*scale, quick_reciprocal(*scale), true, false};
    float run[QL_RUN];
    unpack_run(run, bits, type);
    return e4m3_quick_run(run, &e);
}

/* 0xff in each of the bytes whose bit of four is set. */
static __device__ __forceinline__ uint32_t bytes_of_bits(uint32_t four) {
    return ((four & 15u) * 0x00204081u & 0x01010101u) * 0xffu;
}

/* The lowest byte of each of four words. */
static __device__ __forceinline__ uint32_t low_bytes(const uint32_t *word) {
    return __byte_perm(__byte_perm(word[0], word[1], 0x0040), __byte_perm(word[2], word[3], 0x0040), 0x5410);
}

/* Adding 1.5 * 2^23 leaves the sum's last place at 1: the addition itself rounds half to even. Values whose bit of `marked`
 * is set have code 0. */
static __device__ __forceinline__ uint2 int8_run(const float *run, const ql_encoder *e, uint32_t marked) {
    const uint32_t zeros = e->exact ? 0xffu : marked;
    uint32_t code[QL_RUN];
#pragma unroll
    for (int i = 0; i < QL_RUN; i++)
        code[i] = __float_as_uint(__fadd_rn(__fmul_rn(__fmul_rn(run[i], e->factor), e->scale), 0x1.8p23f));
    return make_uint2(low_bytes(code) & ~bytes_of_bits(zeros), low_bytes(code + 4) & ~bytes_of_bits(zeros >> 4));
}

/* The next piece of a value, which becomes what is left; of infinities and NaN nothing is. */
static __device__ __forceinline__ uint32_t next_pieces(float value[2], int type) {
    const uint32_t pair = round16_pair(value[0], value[1], type);
#pragma unroll
    for (int i = 0; type == QL_VALUE_BF16 && i < 2; i++) {
        const float taken = __uint_as_float(pair >> 16 * i << 16);
        value[i] = fabsf(taken) < __uint_as_float(INFINITY_BITS) ? __fsub_rn(value[i], taken) : 0.0f;
    }
    return pair;
}

/* The larger magnitudes of eight 16-bit values' even and of their odd ones, as bits. */
static __device__ __forceinline__ uint32_t pair_magnitude(uint4 run) {
    const uint32_t sign = 0x80008000u;
    return __vmaxu2(__vmaxu2(run.x & ~sign, run.y & ~sign), __vmaxu2(run.z & ~sign, run.w & ~sign));
}

static __device__ __forceinline__ uint32_t larger_of(uint32_t pair) { return max(pair & 0xffffu, pair >> 16); }

/* Bit i: run[i] is one. */
static __device__ __forceinline__ uint32_t outliers_of(const float *run, uint32_t limit) {
    uint32_t marked = 0;
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) marked |= (uint32_t)is_outlier(magnitude_bits(run[i]), limit) << i;
    return marked;
}

static __device__ __forceinline__ uint32_t outlier_limit(float threshold) {
    return threshold > 0.0f ? __float_as_uint(threshold) : 0xffffffffu;
}

/* The largest magnitude of those that are no outliers. */
static __device__ __forceinline__ uint32_t inlier_magnitude(uint32_t most, const float *run, uint32_t marked) {
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) most = marked >> i & 1 ? most : max(most, magnitude_bits(run[i]));
    return most;
}

#endif

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

static __device__ __forceinline__ float token_scale(uint32_t most, float upper_bound, float least) {
    float absmax = __uint_as_float(most);
    float scale = __fdiv_rn(absmax > upper_bound ? upper_bound : absmax, 448.0f);
    return scale < least ? least : scale;
}

/* Of a unit with this scale and largest magnitude (0 where nobody asked); static and tensor scales multiply by the
 * reciprocal, where it is finite. */
static __device__ __forceinline__ ql_encoder e4m3_encoder(float scale, uint32_t most, bool reciprocal) {
    ql_encoder e = {scale, __fdiv_rn(1.0f, scale), false, false};
    if (scale == 0.0f) e.factor = 0.0f;
    e.quotient = scale != 0.0f && !(reciprocal && fabsf(e.factor) < __uint_as_float(INFINITY_BITS));
    e.exact = most >= INFINITY_BITS || !(fabsf(scale) > 0x1p-60f && fabsf(scale) < 0x1p60f);
    return e;
}

static __device__ __forceinline__ ql_encoder int8_encoder(uint32_t most) {
    float absmax = __uint_as_float(most), lift = absmax < 0x1p-100f ? 0x1p100f : 1.0f;
    return (ql_encoder){__fdiv_rn(127.0f, __fmul_rn(absmax, lift)), lift, false, most == 0 || most >= INFINITY_BITS};
}

/* Rare, and long. */
static __device__ __noinline__ float exact_quotient(float x, float scale) { return __fdiv_rn(x, scale); }

/* x / scale to nearest: what a product with the reciprocal lacks is put right twice, by the remainder, which fma has
 * exactly, where scale and x are in the range in which that holds. */
static __device__ __forceinline__ float e4m3_quotient(float x, const ql_encoder *e) {
    float quotient = __fmul_rn(x, e->factor);
    quotient = __fmaf_rn(__fmaf_rn(-quotient, e->scale, x), e->factor, quotient);
    return __fmaf_rn(__fmaf_rn(-quotient, e->scale, x), e->factor, quotient);
}

/* Eight codes as bytes, the first lowest. */
static __device__ __forceinline__ uint2 e4m3_run(const float *run, const ql_encoder *e) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float a = run[2 * i], b = run[2 * i + 1];
        float2 values = e->quotient ? make_float2(e4m3_quotient(a, e), e4m3_quotient(b, e))
                                    : make_float2(__fmul_rn(a, e->factor), __fmul_rn(b, e->factor));
        if (e->quotient && e->exact) values = make_float2(exact_quotient(a, e->scale), exact_quotient(b, e->scale));
        pair[i] = __nv_cvt_float2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3);
    }
    return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

/* Adding 1.5 * 2^23 leaves the sum's last place at 1: the addition itself rounds half to even. Values whose bit of `marked`
 * is set have code 0. */
static __device__ __forceinline__ uint2 int8_run(const float *run, const ql_encoder *e, uint32_t marked) {
    uint32_t code[QL_RUN];
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) {
        float shifted = __fadd_rn(__fmul_rn(__fmul_rn(run[i], e->factor), e->scale), 0x1.8p23f);
        code[i] = e->exact || (marked >> i & 1) ? 0 : __float_as_uint(shifted) & 0xffu;
    }
    return make_uint2(code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                      code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24);
}

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

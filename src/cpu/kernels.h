/* Between the engine, which prepares a call, and the kernels, which are compiled once for each instruction set. */
#ifndef QL_CPU_KERNELS_H
#define QL_CPU_KERNELS_H

#include "../formats/weight.h"

#include <stdbool.h>

/* Products of multiples of 2^-63, as larger bf16 are, and sums of such are multiples of 2^-126: zero or normal. */
#define BF16_LEAST 0x1p-56f

/* Up to here, products of bf16 pairs are passes over the checkpoint's bytes, in which e4m3 is exact; more go through
 * panels, rounded to bf16. */
#define BF16_FUSED_ROWS 16

/* One product with fp32 activations: out[m][n] = row_scale[m] * sum_k x[m][k] * W[n][k] + bias[n]. */
typedef struct ql_product {
    void *out; /* [m, n] contiguous, dtype */
    ql_dtype dtype;
    int64_t m;
    const float *x; /* [m, k], rows x_stride apart */
    const uint16_t
        *x_bf16; /* of bf16_linear, in place of x: k is even, each value zero, not finite, or >= BF16_LEAST; with FP8, k
                  * may be odd up to BF16_FUSED_ROWS rows, and values may be any of e4m3 */
    int64_t x_stride;
    const float *row_scale;    /* [m], or NULL for ones */
    const float *group_scales; /* of bf16_linear with FP8: [m, ceil(k / 128)], of x's groups of 128 columns, or NULL */
    const float *bias;         /* [n], or NULL */
    const ql_weight *weight;
} ql_product;

/* One product of quantized activations with an INT8 weight:
 * out[m][n] = ((sum_k codes[m][k] * W.codes[n][k]) / 127 * x_absmax[m] + sum_j outliers[m][j] * W.codes[n][columns[j]])
 *           * (absmax[n] / 127) + bias[n], in this order. */
typedef struct ql_int8_product {
    void *out;
    ql_dtype dtype;
    int64_t m;
    const int8_t *codes; /* [m, k], rows codes_stride apart, zeros from k to codes_stride, a multiple of 64 */
    int64_t codes_stride;
    const float *x_absmax;  /* [m] */
    const int64_t *columns; /* [outlier_count] */
    const float *outliers;  /* [m, outlier_count] */
    int64_t outlier_count;
    const float *bias;
    const ql_weight *weight;
} ql_int8_product;

/* Each returns 0, or -1 where scratch could not be had. */
typedef struct ql_kernels {
    int (*linear)(const ql_product *product);
    int (*int8_linear)(const ql_int8_product *product);
    int (*grad)(const ql_product *product); /* out[m][k] = sum_n x[m][n] * W[n][k]: x has n columns, out has k */
    int (*dequantize)(void *out, ql_dtype dtype, const ql_weight *weight);
    void (*to_f32)(float *out, const void *x, ql_dtype dtype, int64_t count);
    /* Products of bf16 pairs, NULL where there are none; the processor must have AVX512_BF16. */
    bool (*bf16_suits)(const ql_weight *weight, int64_t m); /* whether they are quicker with m rows of x */
    int (*bf16_linear)(const ql_product *product);          /* only where bf16_suits, with the same m */
} ql_kernels;

const ql_kernels *ql_kernels_plain(void);
/* NULL where the processor's kind has no such thing; the caller asks the processor itself first. */
const ql_kernels *ql_kernels_avx2(void);   /* and FMA, F16C */
const ql_kernels *ql_kernels_avx512(void); /* F, BW, DQ, VL, VNNI and VBMI */

#endif

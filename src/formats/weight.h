/* What the engines multiply with: one quantized weight W of shape [n, k] = [out_features, in_features], described by
 * pointers into the checkpoint's own tensors, or into what formats/packed.h made of them. Nothing here owns memory. Whoever
 * fills a ql_weight has checked every size; an engine reads exactly the extents that are given here.
 *
 * Each format's value of W[row][col] is one fp32 formula, stated at its struct. "stream" of b-bit codes: code i sits in
 * bits [b*i, b*i + b) of consecutive little-endian 32-bit words, lowest bit first; 3-bit codes straddle words. */
#ifndef QL_FORMATS_WEIGHT_H
#define QL_FORMATS_WEIGHT_H

#include "dtype.h"

#include <stdint.h>

typedef enum ql_format {
    QL_FORMAT_GPTQ,
    QL_FORMAT_AWQ,
    QL_FORMAT_EETQ,
    QL_FORMAT_INT8,
    QL_FORMAT_FOURBIT,
    QL_FORMAT_FP8,
    QL_FORMAT_PACKED
} ql_format;

/* W = (q - z) * s with g = g_idx ? g_idx[col] : col / group_size; q is code `col` of the stream down column `row` of
 * qweight, z = (code `row` of qzeros row g + zero_offset) & (2^bits - 1), s = scales[g][row]. */
typedef struct ql_gptq {
    const int32_t *qweight; /* [ceil(k * bits / 32), n] */
    const int32_t *qzeros;  /* [groups, ceil(n * bits / 32)] */
    const void *scales;     /* [groups, n], scales_dtype: fp16, bf16 or fp32 */
    const int32_t *g_idx;   /* [k], all in [0, groups), or NULL */
    ql_dtype scales_dtype;
    int bits;           /* 2, 3, 4 or 8 */
    int zero_offset;    /* 1: zeros are stored less one (v1), 0: as they are (v2) */
    int64_t group_size; /* at least 1; k where the layer has one group */
    int64_t groups;
} ql_gptq;

/* W = (q - z) * s with g = col / group_size; q = nibble inv[row % 8] of qweight[col][row / 8], z likewise of
 * qzeros[g][row / 8], inv = {0,4,1,5,2,6,3,7}, s = scales[g][row]. Where the zeros come as products (llm-awq's fast
 * storage), W = q * s + zero_products[g][row], rounded once. */
typedef struct ql_awq {
    const int32_t *qweight;    /* [k, ceil(n / 8)] */
    const int32_t *qzeros;     /* [groups, ceil(n / 8)], or NULL */
    const void *scales;        /* [groups, n], scales_dtype */
    const void *zero_products; /* [groups, n], scales_dtype, or NULL; exactly one of this and qzeros is given */
    ql_dtype scales_dtype;
    int64_t group_size;
    int64_t groups;
} ql_awq;

/* W = q * s, s = scales[row], q = weight[off(col, row)] ^ 0x80 as int8 with
 * off(k, n) = (n>>1)*2K + (k>>6)*128 + (n&1)*64 + (k & 48) + (((k & 7) << 1) | ((k >> 3) & 1)); k % 64 == 0, n % 2 == 0. */
typedef struct ql_eetq {
    const uint8_t *weight; /* n * k bytes */
    const void *scales;    /* [n], scales_dtype */
    ql_dtype scales_dtype;
} ql_eetq;

/* W = q * absmax[row] / 127 (one fp32 product by absmax, one by 1/127). The product quantizes the activations row by
 * row (LLM.int8()): entries of magnitude >= threshold, where threshold > 0, are outliers, their columns are multiplied
 * in floating point from the original activations. */
typedef struct ql_int8 {
    const int8_t *codes; /* [n, k] */
    const float *absmax; /* [n] */
    float threshold;     /* 0: no outliers */
} ql_int8;

/* W = code[q] * absmax(i / blocksize), i = row * k + col, q = the high nibble of packed[i / 2] for even i, else the low.
 * absmax(j) = absmax[j], or nested_code[nested[j]] * absmax[j / nested_blocksize] + offset. */
typedef struct ql_fourbit {
    const uint8_t *packed;    /* [(n * k + 1) / 2] */
    const float *code;        /* [16] */
    const float *absmax;      /* [blocks], or [ceil(blocks / nested_blocksize)] where nested is given */
    const uint8_t *nested;    /* [blocks], or NULL */
    const float *nested_code; /* [256], or NULL */
    float offset;
    int64_t blocksize; /* a power of two, at least 32 */
    int64_t nested_blocksize;
} ql_fourbit;

/* How an FP8 layer treats its activations before the product. */
typedef enum ql_fp8_activation {
    QL_FP8_NONE,   /* as they are: only the weight is quantized */
    QL_FP8_STATIC, /* one scale that the checkpoint brings */
    QL_FP8_TENSOR, /* one scale, absmax / 448 of the call */
    QL_FP8_TOKEN,  /* a scale a row, max(min(absmax, upper_bound) / 448, 1 / (448 * 512)) */
    QL_FP8_GROUP   /* a scale for each 128 columns of a row */
} ql_fp8_activation;

/* W = e4m3(weight[row * row_stride + col * col_stride]) * s, s = scale[(row / block_n) * scale_stride + col / block_k]
 * (block_n = n and block_k = k for one scale, block_n = 1 for one a row). */
typedef struct ql_fp8 {
    const uint8_t *weight;
    int64_t row_stride, col_stride;
    const float *scale;
    int64_t block_n, block_k, scale_stride;
    ql_fp8_activation activation;
    float input_scale;       /* of QL_FP8_STATIC */
    float input_upper_bound; /* of QL_FP8_TOKEN, infinity where none */
    bool promoted; /* on a GPU, sums of 128 products are added in fp32, not in the tensor cores' accumulators */
} ql_fp8;

/* What tells a packed weight's layout, beside its bytes. Zeros are kept as they count, not as the checkpoint stores
 * them. */
typedef struct ql_packed_spec {
    ql_format source; /* of the checkpoint: GPTQ, AWQ, EETQ or FOURBIT */
    int code;         /* QL_CODE_* of kernels/packed.h */
    int64_t n, k;
    int64_t group_size; /* a multiple of 16; k where there is one group */
    int64_t groups;
    ql_dtype scales_dtype;    /* fp32 of FOURBIT */
    bool has_zeros;           /* without them each is 2^(bits - 1) */
    int zero_offset;          /* GPTQ: how the checkpoint stores zeros */
    bool has_order;           /* columns are sorted by their groups */
    int64_t nested_blocksize; /* FOURBIT: 0 where absmax is not nested */
    float nested_offset;
} ql_packed_spec;

/* W = (q - z) * s, or table[q] * absmax, as kernels/packed.h tells; formats/packed.h makes it. */
typedef struct ql_packed {
    ql_packed_spec spec;
    const uint8_t *codes;
    const void *scales;   /* by QL_GROUP_PLACE, scales_dtype; bytes of nested absmax */
    const uint8_t *zeros; /* by QL_GROUP_PLACE, or NULL */
    const float *table, *nested_table, *nested_absmax;
    const int32_t *order;     /* [k]: column j here is column order[j] of the checkpoint, or NULL */
    const int32_t *inverse;   /* [k]: inverse[order[j]] = j, or NULL */
    const int32_t *word_tail; /* the checkpoint's words that codes fill in part, or NULL */
    const int32_t *zero_tail;
} ql_packed;

typedef struct ql_weight {
    ql_format format;
    int64_t n, k;
    union {
        ql_gptq gptq;
        ql_awq awq;
        ql_eetq eetq;
        ql_int8 int8;
        ql_fourbit fourbit;
        ql_fp8 fp8;
        ql_packed packed;
    };
} ql_weight;

/* W[row][col] by the formulas above, one element at a time: the plain definition that everything faster is tested
 * against. */
float ql_weight_at(const ql_weight *weight, int64_t row, int64_t col);

#endif

/* Quantizers on the GPU where the weight is: the bits of those of formats/, but that a NaN may be another NaN. Each launches
 * on the place's stream and does not wait; every pointer is device memory but where it says the host. They return 0, or -1
 * with a sentence in message.
 *
 * A `rows` matrix has contiguous rows (col_stride 1) of fp32, fp16 or bf16; ql_cuda_lay_out makes one of any other. */
#ifndef QL_CUDA_QUANTIZE_H
#define QL_CUDA_QUANTIZE_H

#include "../formats/fourbit.h"
#include "../formats/matrix.h"
#include "launch.h"

/* out = the tensor in row-major order without gaps; fp64 as fp32, rounded once. At most 16 dimensions. */
int ql_cuda_lay_out(const ql_cuda_place *place, void *out, const void *from, ql_dtype dtype, int ndim,
                    const int64_t *shape, const int64_t *stride, char message[QL_CUDA_MESSAGE]);

/* ---- a scale a row ---- */

/* packed: the bytes of [cols, rows] in EETQ's tiles; scales [rows]. */
int ql_cuda_eetq_quantize(const ql_cuda_place *place, uint8_t *packed, void *scales, ql_dtype scales_dtype,
                          const ql_matrix *rows, char message[QL_CUDA_MESSAGE]);

/* codes [cols, rows] row-major, any sizes; absmax [rows] is scratch. */
int ql_cuda_eetq_codes(const ql_cuda_place *place, int8_t *codes, void *scales, ql_dtype scales_dtype,
                       const ql_matrix *rows, float *absmax, char message[QL_CUDA_MESSAGE]);

/* codes [rows, cols], absmax [rows]. outliers [cols], or NULL: columns to be zeroed, as ql_cuda_int8_outliers finds them. */
int ql_cuda_int8_quantize(const ql_cuda_place *place, int8_t *codes, float *absmax, const ql_matrix *rows,
                          float threshold, const uint8_t *outliers, char message[QL_CUDA_MESSAGE]);

/* outliers[col] = 1 where a row has |a| >= threshold (> 0) in it, else 0. */
int ql_cuda_int8_outliers(const ql_cuda_place *place, uint8_t *outliers, const ql_matrix *rows, float threshold,
                          char message[QL_CUDA_MESSAGE]);

/* columns = the indices of the flags that are set, ascending; there is room for all of them. */
int ql_cuda_int8_columns(const ql_cuda_place *place, int64_t *columns, const uint8_t *outliers, int64_t cols,
                         char message[QL_CUDA_MESSAGE]);

/* A number that the host has, or one element on the device. */
typedef struct ql_cuda_number {
    float value;
    const void *data; /* NULL: value */
    ql_dtype dtype;   /* fp32, fp16 or bf16 */
} ql_cuda_number;

/* codes [rows, cols] by the given scale, copied to scales [1]. */
int ql_cuda_fp8_static(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows,
                       const ql_cuda_number *scale, char message[QL_CUDA_MESSAGE]);

/* One scale [1] for all; absmax [rows] is scratch. */
int ql_cuda_fp8_tensor(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows, float *absmax,
                       char message[QL_CUDA_MESSAGE]);

/* A scale a row, [rows], of an absmax that upper_bound bounds. */
int ql_cuda_fp8_tokens(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows,
                       const ql_cuda_number *upper_bound, char message[QL_CUDA_MESSAGE]);

/* scales [ceil(rows / block_rows), ceil(cols / 128)]; block_rows is 1 or 128. */
int ql_cuda_fp8_blocks(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows,
                       int64_t block_rows, char message[QL_CUDA_MESSAGE]);

/* ---- blocks of a flat array of `count` values, blocksize a power of two of at least 32 ---- */

int ql_cuda_fourbit_quantize(const ql_cuda_place *place, uint8_t *packed, float *absmax, const void *x, ql_dtype dtype,
                             int64_t count, int64_t blocksize, ql_fourbit_type type, char message[QL_CUDA_MESSAGE]);

/* code [16]; out in fp32, fp16 or bf16. */
int ql_cuda_fourbit_dequantize(const ql_cuda_place *place, void *out, ql_dtype dtype, const uint8_t *packed,
                               const float *absmax, const float *code, int64_t count, int64_t blocksize,
                               char message[QL_CUDA_MESSAGE]);

/* map [256], ascending, on the host. */
int ql_cuda_blockwise_quantize(const ql_cuda_place *place, uint8_t *codes, float *absmax, const void *x, ql_dtype dtype,
                               const float *map, int64_t count, int64_t blocksize, char message[QL_CUDA_MESSAGE]);

int ql_cuda_blockwise_dequantize(const ql_cuda_place *place, void *out, ql_dtype dtype, const uint8_t *codes,
                                 const float *absmax, const float *map, int64_t count, int64_t blocksize,
                                 char message[QL_CUDA_MESSAGE]);

/* mean [1], as ql_mean_of_sums; sums [ceil(count / QL_MEAN_CHUNK)] is scratch. */
int ql_cuda_mean(const ql_cuda_place *place, float *mean, double *sums, const float *values, int64_t count,
                 char message[QL_CUDA_MESSAGE]);

/* ---- parameters by groups of columns ---- */

typedef enum ql_cuda_rule { QL_CUDA_GPTQ, QL_CUDA_GPTQ_SYMMETRIC, QL_CUDA_AWQ } ql_cuda_rule;

/* scales and zeros fp32 [rows, groups]; AWQ's before the scale is rounded. */
int ql_cuda_group_params(const ql_cuda_place *place, float *scales, float *zeros, const ql_matrix *rows,
                         int64_t group_size, int bits, ql_cuda_rule rule, char message[QL_CUDA_MESSAGE]);

/* What GPTQ's and AWQ's packers take: a weight with its parameters, floats of any dtype and strides [rows, groups]. */
typedef struct ql_cuda_encoding {
    ql_matrix rows, scales, zeros;
    const void *g_idx;    /* [cols], all in [-groups, groups), or NULL: col / group_size */
    ql_dtype g_idx_dtype; /* int32 or int64 */
    int64_t g_idx_stride, group_size;
    int bits, zero_offset;
    bool is_awq; /* AWQ's words, 4 bit; else GPTQ's */
} ql_cuda_encoding;

/* The words of the codes, those of the zeros, and the scales in fp16 [groups, rows], as formats/gptq.h and awq.h. */
int ql_cuda_encode(const ql_cuda_place *place, int32_t *words, int32_t *zero_words, uint16_t *stored_scales,
                   const ql_cuda_encoding *encoding, char message[QL_CUDA_MESSAGE]);

#endif

/* Scales and codes of FP8 (float8_e4m3fn): W8A8 checkpoints and the activations of a call.
 *
 * A unit (a tensor, a row, 128 columns of a row, a block of 128 x 128) has one fp32 scale; a value is e4m3(code) * scale.
 * Codes round half to even and saturate at +-448. NaN stays NaN, as a code and as a scale: a unit with NaN is NaN
 * throughout. An infinity makes the scale infinite, and 0 * infinity makes the unit NaN, unless an upper bound holds the
 * scale: then it saturates. A unit of zeros has zeros for codes. */
#ifndef QL_FORMATS_FP8_H
#define QL_FORMATS_FP8_H

#include "matrix.h"

enum { QL_FP8_GROUP_SIZE = 128 };

/* A row's scale: max(min(absmax, upper_bound) / 448, 1 / (448 * 512)). NaN stays NaN. */
float ql_fp8_token_scale(float absmax, float upper_bound);

/* absmax / 448; 1 where that is zero, so that neither zeros nor magnitudes whose scale underflows become 0 / 0. NaN stays
 * NaN. */
float ql_fp8_scale(float absmax);

/* max |x[0, k)|, NaN where one is NaN. */
float ql_fp8_absmax(const float *x, int64_t k);

/* codes[i] = e4m3(x[i] * (1 / scale)) where `reciprocal`, else e4m3(x[i] / scale): formats fix one or the other, and they
 * differ at ties. A scale so small that 1 / scale overflows divides either way; a scale of 0 gives codes of 0. */
void ql_fp8_quantize_row(uint8_t *codes, const float *x, int64_t k, float scale, bool reciprocal);

/* ---- of a matrix [rows, cols]; each takes a range of rows, groups of rows for blocks, and fills that part ---- */

/* absmax [rows]. */
void ql_fp8_absmax_rows(float *absmax, const ql_matrix *x, int64_t row_begin, int64_t row_end);

/* codes [rows, cols] by ql_fp8_quantize_row, row r with scales[r * scale_stride] (0: one scale for all). */
void ql_fp8_quantize_rows(uint8_t *codes, const ql_matrix *x, const float *scales, int64_t scale_stride,
                          bool reciprocal, int64_t row_begin, int64_t row_end);

/* Blocks of block_rows x 128, block rows [block_begin, block_end): codes [rows, cols], scales [ceil(rows / block_rows),
 * ceil(cols / 128)] by ql_fp8_scale, x / scale. block_rows 1: the groups of activations; 128: the blocks of a weight. */
void ql_fp8_quantize_blocks(uint8_t *codes, float *scales, const ql_matrix *x, int64_t block_rows, int64_t block_begin,
                            int64_t block_end);

#endif

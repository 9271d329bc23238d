/* LLM.int8() (bitsandbytes): int8 rows with one absmax each, for weights and for the activations of a call.
 *
 * Of one row, in fp32, with a threshold T (0: none):
 *   absmax = max |a| over the entries with |a| < T where T > 0, over all where not;
 *   q = a * (127 / absmax) rounded half to even, in [-127, 127]; a row of zeros has q = 0;
 *   entries with |a| >= T are outliers and have q = 0. An infinity is one wherever T > 0.
 * Where there are several rows, each column with an outlier in any of them is then zeroed in all of them, for its
 * product is made from the original values; each row's absmax keeps what it was. The weight is quantized with T = 0,
 * and is q * absmax / 127.
 *
 * NaN (never an outlier, as it is not >= T) makes absmax NaN; an infinity at T = 0 makes it infinite. The row's codes
 * are 0 then, and 0 * absmax is NaN: nothing that was not finite comes out as a finite number. An absmax so small that
 * 127 / absmax overflows is scaled up by a power of two first: bitsandbytes never meets one, as it takes fp16 alone. */
#ifndef QL_FORMATS_INT8_H
#define QL_FORMATS_INT8_H

#include "run.h"

/* One row of k contiguous fp32 values: codes [k], *absmax. */
void ql_int8_quantize_row(int8_t *codes, float *absmax, const float *x, int64_t k, float threshold);

/* Rows [row_begin, row_end) of a float matrix: codes [rows, cols] row-major, absmax [rows]. Each row by itself: columns
 * are not zeroed for other rows' outliers. */
void ql_int8_quantize_rows(int8_t *codes, float *absmax, const ql_matrix *source, float threshold, int64_t row_begin,
                           int64_t row_end);

/* outlier[col] = whether any row has |a| >= threshold (> 0) in that column, for col in [col_begin, col_end). */
void ql_int8_find_outliers(bool *outlier, const ql_matrix *source, float threshold, int64_t col_begin, int64_t col_end);

/* Zeroes `count` columns of rows [row_begin, row_end) of codes [rows, k]. */
void ql_int8_zero_columns(int8_t *codes, int64_t k, const int64_t *columns, int64_t count, int64_t row_begin,
                          int64_t row_end);

#endif

/* A matrix as the caller's tensor holds it, any strides, and the groups that quantizers split its columns into. */
#ifndef QL_FORMATS_MATRIX_H
#define QL_FORMATS_MATRIX_H

#include "dtype.h"
#include "number.h"

#include <stdint.h>

typedef struct ql_matrix {
    const void *data;
    ql_dtype dtype;
    int64_t rows, cols;
    int64_t row_stride, col_stride; /* in elements */
} ql_matrix;

/* An element of a matrix of floats, in fp32 (fp64 is rounded to it). */
static inline float ql_matrix_f32(const ql_matrix *matrix, int64_t row, int64_t col) {
    return ql_f32_load(matrix->data, matrix->dtype, row * matrix->row_stride + col * matrix->col_stride);
}

/* An element of a matrix of codes, uint8. */
static inline uint8_t ql_matrix_u8(const ql_matrix *matrix, int64_t row, int64_t col) {
    return ((const uint8_t *)matrix->data)[row * matrix->row_stride + col * matrix->col_stride];
}

/* An element of a matrix of packed words, int32. */
static inline int32_t ql_matrix_i32(const ql_matrix *matrix, int64_t row, int64_t col) {
    return ((const int32_t *)matrix->data)[row * matrix->row_stride + col * matrix->col_stride];
}

/* Groups of group_size columns (at least 1) in k of them; the last may be short. */
static inline int64_t ql_group_count(int64_t k, int64_t group_size) { return k / group_size + (k % group_size != 0); }

#endif

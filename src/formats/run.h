/* Runs of a float matrix as fp32, and magnitudes that keep NaN: what the row-wise quantizers read with. */
#ifndef QL_FORMATS_RUN_H
#define QL_FORMATS_RUN_H

#include "matrix.h"

/* out[i] = fp32 of element [row, col + i], for i in [0, count). The dtype is asked once a run, not once an element, so
 * that each loop stays a plain conversion that the compiler can vectorize. fp64 beyond fp32 becomes infinite. */
static inline void ql_matrix_run(float *out, const ql_matrix *matrix, int64_t row, int64_t col, int64_t count) {
    int64_t first = row * matrix->row_stride + col * matrix->col_stride;
    int64_t stride = matrix->col_stride;
    switch (matrix->dtype) {
    case QL_F16: {
        const uint16_t *from = (const uint16_t *)matrix->data + first;
        for (int64_t i = 0; i < count; i++) out[i] = ql_f32_from_f16(from[i * stride]);
        break;
    }
    case QL_BF16: {
        const uint16_t *from = (const uint16_t *)matrix->data + first;
        for (int64_t i = 0; i < count; i++) out[i] = ql_f32_from_bf16(from[i * stride]);
        break;
    }
    case QL_F64: {
        const double *from = (const double *)matrix->data + first;
        for (int64_t i = 0; i < count; i++) out[i] = (float)from[i * stride];
        break;
    }
    default: {
        const float *from = (const float *)matrix->data + first;
        for (int64_t i = 0; i < count; i++) out[i] = from[i * stride];
        break;
    }
    }
}

/* The bits of |value|. They order as the magnitudes do, with every NaN above infinity: an integer maximum over them is
 * an absolute maximum that NaN survives. */
static inline int32_t ql_magnitude_bits(float value) { return (int32_t)(ql_bits_from_f32(value) & 0x7fffffffu); }

#endif

/* What the FP8 type and functions take: scales of one element or one a row in any of their dtypes, and e4m3 bytes. */
#ifndef QL_LAYERS_SCALES_H
#define QL_LAYERS_SCALES_H

#include "../formats/matrix.h"
#include "layer.h"

#include <stdlib.h>

/* uint8 is e8m0 by its bytes: not every framework can hold the type itself. */
static inline ql_dtype scale_dtype(const ql_tensor *tensor) { return tensor->dtype == QL_U8 ? QL_E8M0 : tensor->dtype; }

static inline int check_scale(const ql_tensor *tensor, const char *name) {
    static const ql_dtype taken[] = {QL_F32, QL_BF16, QL_F16, QL_E8M0, QL_U8};
    if (ql_check_dtype(tensor, name, 5, taken) < 0) return -1;
    return ql_check_aligned(tensor, name);
}

static inline int check_bytes(const ql_tensor *tensor, const char *name) {
    static const ql_dtype taken[] = {QL_E4M3, QL_U8};
    static const int64_t any[2] = {-1, -1};
    if (ql_check_dtype(tensor, name, 2, taken) < 0) return -1;
    return ql_check_shape(tensor, name, 2, any);
}

static inline int check_not_empty(const ql_tensor *tensor, const char *name) {
    if (tensor->shape[0] >= 1 && tensor->shape[1] >= 1) return 0;
    PyErr_Format(PyExc_ValueError, "%s must have at least one row and one column, got [%lld, %lld]", name,
                 (long long)tensor->shape[0], (long long)tensor->shape[1]);
    return -1;
}

static inline int check_one_scale(const ql_tensor *tensor, const char *name) {
    if (check_scale(tensor, name) < 0) return -1;
    if (ql_tensor_numel(tensor) == 1) return 0;
    char got[256];
    PyErr_Format(PyExc_ValueError, "%s must have one element, got %s", name,
                 ql_tensor_describe(tensor, got, sizeof got));
    return -1;
}

static inline bool is_number(PyObject *object) {
    return PyFloat_Check(object) || (PyLong_Check(object) && !PyBool_Check(object));
}

/* An upper bound given as a number. One that comes in a tensor is read without this check, as a layer may be made before
 * its tensors are filled; NaN bounds nothing then. */
static inline int number_bound(float *bound, PyObject *object, const char *name) {
    double value = 0.0;
    if (ql_arg_float(&value, object, name) < 0) return -1;
    *bound = (float)value;
    if (value > 0.0) return 0;
    PyErr_Format(PyExc_ValueError, "%s must be above 0, got %R", name, object);
    return -1;
}

/* One scale, or `count` of them as [count], [count, 1] or [1, count]: a matrix of one column. */
static inline bool view_vector(ql_matrix *scales, const ql_tensor *tensor, int64_t count) {
    *scales = (ql_matrix){.data = tensor->data, .dtype = scale_dtype(tensor), .rows = 1, .cols = 1};
    if (ql_tensor_numel(tensor) == 1) return true;
    scales->rows = count;
    bool is_row = tensor->ndim == 2 && tensor->shape[0] == 1;
    bool is_column = tensor->ndim == 1 || (tensor->ndim == 2 && tensor->shape[1] == 1);
    if (!is_row && !is_column) return false;
    scales->row_stride = tensor->stride[is_row ? 1 : 0];
    return tensor->shape[is_row ? 1 : 0] == count;
}

/* Whether the product can read the scales where they are. */
static inline bool is_direct(const ql_matrix *scales) {
    return scales->dtype == QL_F32 && (scales->cols == 1 || scales->col_stride == 1);
}

static inline void convert_scales(float *out, const ql_matrix *scales) {
    for (int64_t row = 0; row < scales->rows; row++)
        for (int64_t col = 0; col < scales->cols; col++)
            out[row * scales->cols + col] = ql_matrix_f32(scales, row, col);
}

/* The bytes of rows * cols floats; -1 with MemoryError where they do not fit int64. */
static inline int floats_bytes(int64_t *bytes, int64_t rows, int64_t cols) {
    if (!__builtin_mul_overflow(rows, cols, bytes) && !__builtin_mul_overflow(*bytes, (int64_t)sizeof(float), bytes))
        return 0;
    PyErr_NoMemory();
    return -1;
}

/* rows * cols floats, or NULL with MemoryError. */
static inline float *alloc_floats(int64_t rows, int64_t cols) {
    int64_t bytes;
    if (floats_bytes(&bytes, rows, cols) < 0) return NULL;
    float *floats = malloc((size_t)bytes);
    if (!floats) PyErr_NoMemory();
    return floats;
}

#endif

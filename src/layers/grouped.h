/* What the GPTQ and the AWQ functions share: the group_size argument, and tensors read, checked and made in sets. */
#ifndef QL_LAYERS_GROUPED_H
#define QL_LAYERS_GROUPED_H

#include "../formats/matrix.h"
#include "layer.h"

/* group_size as given, -1 for one group, or at least 1; 0, or -1 with TypeError or ValueError. A missing one is a
 * TypeError that names `function`: it is required, but comes after arguments that are not. */
static inline int ql_arg_group_size(int64_t *group_size, PyObject *object, const char *function) {
    if (!object) {
        PyErr_Format(PyExc_TypeError, "%s: group_size is missing", function);
        return -1;
    }
    if (ql_arg_int(group_size, object, "group_size") < 0) return -1;
    if (*group_size == -1 || *group_size >= 1) return 0;
    PyErr_Format(PyExc_ValueError, "group_size must be -1 (one group) or at least 1, got %lld", (long long)*group_size);
    return -1;
}

/* 2, 3, 4 or 8 bits; 0, or -1 with ValueError. */
static inline int ql_check_bits(int64_t bits) {
    if (bits == 2 || bits == 3 || bits == 4 || bits == 8) return 0;
    PyErr_Format(PyExc_ValueError, "bits must be 2, 3, 4 or 8, got %lld", (long long)bits);
    return -1;
}

static inline int ql_arg_bits(int *bits, PyObject *object) {
    int64_t width = 0;
    if (ql_arg_int(&width, object, "bits") < 0 || ql_check_bits(width) < 0) return -1;
    *bits = (int)width;
    return 0;
}

/* The columns of a group where there are k: k itself for -1 and for groups longer than k. At least 1. */
static inline int64_t ql_group_columns(int64_t group_size, int64_t k) {
    int64_t longest = k > 1 ? k : 1;
    return group_size == -1 || group_size > longest ? longest : group_size;
}

/* Rows that a thread takes at a time: enough values that waking it is nothing beside them. */
static inline int64_t ql_row_grain(int64_t cols) {
    int64_t rows = cols > 0 ? 16384 / cols : 16384;
    return rows < 16 ? 16 : rows;
}

/* Holds a tensor that must be there. */
static inline int ql_layer_hold_required(ql_layer *layer, PyObject *object, const char *name) {
    if (!ql_arg_is_none(object)) return ql_layer_hold(layer, object, name);
    PyErr_Format(PyExc_TypeError, "%s must be a tensor, got None", name);
    return -1;
}

/* Tensors are aligned, of one device and of `ndim` dimensions. */
static inline int ql_tensors_check(const ql_tensor *tensors, const char *const *names, int count, int ndim) {
    static const int64_t any[QL_MAX_DIMS] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    for (int i = 0; i < count; i++)
        if (ql_check_aligned(&tensors[i], names[i]) < 0 || ql_check_shape(&tensors[i], names[i], ndim, any) < 0 ||
            ql_check_same_device(&tensors[i], names[i], &tensors[0], names[0]) < 0)
            return -1;
    return 0;
}

/* Reads and checks them: all to be released, or none and -1. */
static inline int ql_tensors_read(ql_tensor *tensors, PyObject *const *objects, const char *const *names, int count,
                                  int ndim) {
    if (ql_tensor_read_all(tensors, objects, names, count) < 0) return -1;
    if (ql_tensors_check(tensors, names, count, ndim) == 0) return 0;
    ql_tensors_release(tensors, count);
    return -1;
}

/* A 2-D tensor as the formats see it. */
static inline ql_matrix ql_matrix_of(const ql_tensor *tensor) {
    return (ql_matrix){
        .data = tensor->data,
        .dtype = tensor->dtype,
        .rows = tensor->shape[0],
        .cols = tensor->shape[1],
        .row_stride = tensor->stride[0],
        .col_stride = tensor->stride[1],
    };
}

/* A set of 2-D outputs in the framework of `like` and on the device of `beside`: each begins as dtypes[i] of
 * [shapes[i][0], shapes[i][1]]. */
static inline int ql_outputs_begin(ql_output *outputs, PyObject *like, const ql_tensor *beside, int count,
                                   const ql_dtype *dtypes, const int64_t (*shapes)[2]) {
    for (int i = 0; i < count; i++) {
        if (ql_output_begin_beside(&outputs[i], like, beside, dtypes[i], 2, shapes[i]) == 0) continue;
        while (i-- > 0) ql_output_abandon(&outputs[i]);
        return -1;
    }
    return 0;
}

static inline void ql_outputs_abandon(ql_output *outputs, int count) {
    for (int i = 0; i < count; i++) ql_output_abandon(&outputs[i]);
}

/* The tuple of all of them; on failure nothing is left over. */
static inline PyObject *ql_outputs_finish(ql_output *outputs, int count) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; i < count; i++) {
        PyObject *object = tuple ? ql_output_finish(&outputs[i]) : NULL;
        if (object) {
            PyTuple_SetItem(tuple, i, object);
            continue;
        }
        Py_CLEAR(tuple);
        ql_output_abandon(&outputs[i]);
    }
    return tuple;
}

#endif

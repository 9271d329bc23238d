/* Linear8bitLt, and the quantizer of LLM.int8() as a function. */
#include "../formats/int8.h"
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "layer.h"
#include "quantize.h"

#include <stdio.h>
#include <stdlib.h>

enum { ROWS_A_RANGE = 16, COLUMNS_A_RANGE = 1024 };

/* 0 or positive, and still so as the fp32 number that the entries are compared with. */
static int threshold_of(float *threshold, PyObject *object) {
    double value = 0.0;
    if (ql_arg_float(&value, object, "threshold") < 0) return -1;
    *threshold = (float)value;
    if (value >= 0.0 && isfinite(*threshold) && (*threshold > 0.0f) == (value > 0.0)) return 0;
    PyErr_Format(PyExc_ValueError, "threshold must be 0 or a positive finite fp32 number, got %R", object);
    return -1;
}

/* ---- the layer ---- */

enum { HELD_CB, HELD_SCB };

typedef struct int8_config {
    float threshold;
} int8_config;

static int int8_bind(ql_layer *layer) {
    static const ql_dtype codes[] = {QL_I8}, statistics[] = {QL_F32};
    static const int64_t any[] = {-1, -1};
    const ql_tensor *CB = ql_layer_tensor(layer, HELD_CB), *SCB = ql_layer_tensor(layer, HELD_SCB);
    const int8_config *config = layer->extra;
    if (!CB || !SCB) {
        PyErr_Format(PyExc_TypeError, "%s must be a tensor, got None", CB ? "SCB" : "CB");
        return -1;
    }
    if (ql_check_dtype(CB, "CB", 1, codes) < 0 || ql_check_shape(CB, "CB", 2, any) < 0 ||
        ql_check_contiguous(CB, "CB") < 0)
        return -1;
    if (CB->shape[1] == 0) {
        PyErr_SetString(PyExc_ValueError, "CB has in_features 0, a layer takes at least one input");
        return -1;
    }
    if (ql_check_dtype(SCB, "SCB", 1, statistics) < 0 || ql_check_shape(SCB, "SCB", 1, CB->shape) < 0 ||
        ql_check_contiguous(SCB, "SCB") < 0 || ql_check_aligned(SCB, "SCB") < 0)
        return -1;
    layer->weight = (ql_weight){
        .format = QL_FORMAT_INT8,
        .n = CB->shape[0],
        .k = CB->shape[1],
        .int8 = {.codes = CB->data, .absmax = SCB->data, .threshold = config->threshold},
    };
    return 0;
}

static PyObject *int8_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"CB", "SCB", "bias", "threshold"};
    static const ql_signature signature = {"Linear8bitLt", 4, 3, 2, names};
    PyObject *values[4];
    float threshold;
    if (ql_args_tuple(values, &signature, args, kwargs) < 0 || threshold_of(&threshold, values[3]) < 0) return NULL;
    ql_layer *layer = ql_layer_alloc(type, int8_bind, sizeof(int8_config));
    if (!layer) return NULL;
    ((int8_config *)layer->extra)->threshold = threshold;
    snprintf(layer->summary, sizeof layer->summary, "threshold=%g", (double)threshold);
    if (ql_layer_hold(layer, values[0], "CB") < 0 || ql_layer_hold(layer, values[1], "SCB") < 0 ||
        ql_layer_ready(layer, values[2]) < 0) {
        Py_DECREF(layer);
        return NULL;
    }
    return (PyObject *)layer;
}

/* ---- the quantizer ---- */

typedef struct quantize_work {
    ql_matrix source;
    float threshold;
    int8_t *codes;
    float *absmax;
    bool *outlier;          /* [cols], where threshold > 0 */
    const int64_t *columns; /* those that are */
    int64_t column_count;
} quantize_work;

static void quantize_rows(void *context, int64_t begin, int64_t end) {
    const quantize_work *work = context;
    ql_int8_quantize_rows(work->codes, work->absmax, &work->source, work->threshold, begin, end);
}

static void find_outliers(void *context, int64_t begin, int64_t end) {
    const quantize_work *work = context;
    ql_int8_find_outliers(work->outlier, &work->source, work->threshold, begin, end);
}

static void zero_columns(void *context, int64_t begin, int64_t end) {
    const quantize_work *work = context;
    ql_int8_zero_columns(work->codes, work->source.cols, work->columns, work->column_count, begin, end);
}

/* The columns with an outlier, int64 [O] ascending in the framework of `like`, zeroed in the codes where there are
 * several rows. */
static PyObject *take_outliers(quantize_work *work, PyObject *like) {
    work->outlier = malloc(work->source.cols ? (size_t)work->source.cols * sizeof *work->outlier : 1);
    if (!work->outlier) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(work->source.cols, COLUMNS_A_RANGE, find_outliers, work);
    for (int64_t col = 0; col < work->source.cols; col++) work->column_count += work->outlier[col];
    Py_END_ALLOW_THREADS
    ql_output output;
    PyObject *result = NULL;
    if (ql_output_begin(&output, like, QL_I64, 1, &work->column_count) == 0) {
        int64_t *columns = output.view.data;
        Py_BEGIN_ALLOW_THREADS
        for (int64_t col = 0, found = 0; col < work->source.cols; col++)
            if (work->outlier[col]) columns[found++] = col;
        work->columns = columns;
        if (work->source.rows > 1 && work->column_count)
            ql_cpu_parallel(work->source.rows, ROWS_A_RANGE, zero_columns, work);
        Py_END_ALLOW_THREADS
        result = ql_output_finish(&output);
    }
    free(work->outlier);
    return result;
}

/* Codes and absmax, and the outlier columns or None. */
static PyObject *quantize_on_cpu(quantize_work *work, PyObject *object) {
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(work->source.rows, ROWS_A_RANGE, quantize_rows, work);
    Py_END_ALLOW_THREADS
    return work->threshold > 0.0f ? take_outliers(work, object) : Py_NewRef(Py_None);
}

/* The columns that are flagged on the GPU. How many they are decides the size of a tensor, so the host waits for them. */
static PyObject *take_device_outliers(const ql_cuda_place *place, const uint8_t *flags, const ql_tensor *x,
                                      PyObject *object) {
    int64_t cols = x->shape[1], count = 0;
    char message[QL_CUDA_MESSAGE];
    uint8_t *read = malloc(cols ? (size_t)cols : 1);
    if (!read) return PyErr_NoMemory();
    int result = 0;
    if (cols) {
        Py_BEGIN_ALLOW_THREADS
        result = ql_cuda_read(read, flags, (size_t)cols, place, message);
        Py_END_ALLOW_THREADS
    }
    for (int64_t col = 0; result == 0 && col < cols; col++) count += read[col];
    free(read);
    ql_output columns;
    if (ql_cuda_result(result, message) < 0 || ql_output_begin_beside(&columns, object, x, QL_I64, 1, &count) < 0)
        return NULL;
    if (count == 0 ||
        ql_cuda_result(ql_cuda_int8_columns(place, columns.view.data, flags, cols, message), message) == 0)
        return ql_output_finish(&columns);
    ql_output_abandon(&columns);
    return NULL;
}

static PyObject *quantize_on_gpu(quantize_work *work, PyObject *object, const ql_tensor *x) {
    ql_cuda_place place;
    ql_matrix rows;
    ql_output copy = {0}, flags = {0};
    char message[QL_CUDA_MESSAGE];
    PyObject *columns = NULL;
    if (ql_place_of(&place, object, x) == 0 && ql_device_rows(&rows, &copy, &place, object, x) == 0) {
        float threshold = work->threshold;
        if (!(threshold > 0.0f))
            columns = Py_NewRef(Py_None);
        else if (ql_device_scratch(&flags, object, x, rows.cols) == 0 &&
                 ql_cuda_result(ql_cuda_int8_outliers(&place, flags.view.data, &rows, threshold, message), message) ==
                     0)
            columns = take_device_outliers(&place, flags.view.data, x, object);
        /* With one row the column of an outlier has nothing else. */
        const uint8_t *zeroed = rows.rows > 1 ? flags.view.data : NULL;
        if (columns &&
            ql_cuda_result(ql_cuda_int8_quantize(&place, work->codes, work->absmax, &rows, threshold, zeroed, message),
                           message) < 0)
            Py_CLEAR(columns);
    }
    ql_output_abandon(&copy);
    ql_output_abandon(&flags);
    return columns;
}

static PyObject *quantize(PyObject *object, const ql_tensor *x, float threshold) {
    ql_output codes, absmax;
    if (ql_output_begin_beside(&codes, object, x, QL_I8, 2, x->shape) < 0) return NULL;
    if (ql_output_begin_beside(&absmax, object, x, QL_F32, 1, x->shape) < 0) {
        ql_output_abandon(&codes);
        return NULL;
    }
    quantize_work work = {
        .source = {.data = x->data,
                   .dtype = x->dtype,
                   .rows = x->shape[0],
                   .cols = x->shape[1],
                   .row_stride = x->stride[0],
                   .col_stride = x->stride[1]},
        .threshold = threshold,
        .codes = codes.view.data,
        .absmax = absmax.view.data,
    };
    PyObject *columns = ql_is_on_gpu(x) ? quantize_on_gpu(&work, object, x) : quantize_on_cpu(&work, object);
    PyObject *first = columns ? ql_output_finish(&codes) : NULL;
    PyObject *second = first ? ql_output_finish(&absmax) : NULL;
    PyObject *result = second ? PyTuple_Pack(3, first, second, columns) : NULL;
    ql_output_abandon(&codes);
    ql_output_abandon(&absmax);
    Py_XDECREF(first);
    Py_XDECREF(second);
    Py_XDECREF(columns);
    return result;
}

static PyObject *int8_quantize(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"x", "threshold"};
    static const ql_signature signature = {"int8_quantize", 2, 1, 1, names};
    static const int64_t any[] = {-1, -1};
    PyObject *values[2];
    float threshold;
    ql_tensor x;
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || threshold_of(&threshold, values[1]) < 0 ||
        ql_tensor_read(&x, values[0], "x") < 0)
        return NULL;
    PyObject *result = NULL;
    if (ql_check_float(&x, "x", false) == 0 && ql_check_shape(&x, "x", 2, any) == 0 && ql_check_aligned(&x, "x") == 0)
        result = quantize(values[0], &x, threshold);
    ql_tensor_release(&x);
    return result;
}

/* ---- what the module takes from here ---- */

PyMethodDef ql_int8_methods[] = {
    {"int8_quantize", QL_METHOD(int8_quantize), METH_FASTCALL | METH_KEYWORDS,
     "int8_quantize(x, *, threshold=0.0)\n--\n\n"
     "x [R, C] -> (codes int8 [R, C], absmax fp32 [R], outlier columns int64 [O], or None at threshold 0)."},
    {NULL, NULL, 0, NULL},
};

int ql_int8_add_type(PyObject *module) {
    return ql_layer_make_type(module, "_qlinear.Linear8bitLt", int8_new,
                              "Linear8bitLt(CB, SCB, bias=None, *, threshold=0.0)\n--\n\n"
                              "LLM.int8(): int8 weights [N, K] with their rows' absmax; activations are quantized\n"
                              "row by row, but for columns with an entry of magnitude >= threshold (> 0).",
                              NULL, NULL);
}

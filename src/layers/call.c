#include "call.h"

#include "../cpu/engine.h"
#include "../cuda/engine.h"
#include "../formats/matrix.h"
#include "device.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------------
 * The input as rows */

/* [rows, width], each contiguous, stride elements apart; a copy where the tensor's own strides are not like that. */
typedef struct ql_rows {
    const void *data;
    int64_t rows, stride;
    void *copy;            /* on the CPU */
    bool on_device;        /* the copy is device_copy, on a GPU */
    ql_output device_copy; /* large: a call that makes no copy does not clear it */
} ql_rows;

/* Whether the leading dimensions step through memory as one, and each row is contiguous. */
static bool ql_rows_view(ql_rows *rows, const ql_tensor *x, int64_t width) {
    int last = x->ndim - 1;
    if (width > 1 && x->stride[last] != 1) return false;
    int64_t stride = width, count = 1;
    bool first = true;
    for (int i = last - 1; i >= 0; i--) {
        if (x->shape[i] == 1) continue;
        if (first)
            stride = x->stride[i];
        else if (x->stride[i] != stride * count)
            return false;
        first = false;
        count *= x->shape[i];
    }
    rows->data = x->data;
    rows->stride = stride;
    return true;
}

static void ql_copy_strided(char *out, const char *from, const ql_tensor *x, int dimension, size_t size) {
    int64_t count = x->shape[dimension], step = x->stride[dimension] * (int64_t)size;
    int64_t inner = (int64_t)size;
    for (int i = dimension + 1; i < x->ndim; i++) inner *= x->shape[i];
    for (int64_t i = 0; i < count; i++) {
        if (dimension == x->ndim - 1)
            memcpy(out + i * inner, from + i * step, size);
        else
            ql_copy_strided(out + i * inner, from + i * step, x, dimension + 1, size);
    }
}

static int ql_rows_copy_cpu(ql_rows *rows, const ql_tensor *x) {
    size_t size = ql_dtype_size(x->dtype);
    rows->copy = malloc((size_t)ql_tensor_numel(x) * size);
    if (!rows->copy) {
        PyErr_NoMemory();
        return -1;
    }
    ql_copy_strided(rows->copy, x->data, x, 0, size);
    rows->data = rows->copy;
    return 0;
}

static int ql_rows_copy_cuda(ql_rows *rows, PyObject *object, const ql_tensor *x) {
    ql_cuda_place place;
    if (ql_place_of(&place, object, x) < 0 ||
        ql_output_begin_beside(&rows->device_copy, object, x, x->dtype, x->ndim, x->shape) < 0)
        return -1;
    rows->on_device = true;
    char message[QL_CUDA_MESSAGE];
    rows->data = rows->device_copy.view.data;
    int result =
        ql_cuda_copy(&place, rows->device_copy.view.data, x->data, x->dtype, x->ndim, x->shape, x->stride, message);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

/* 0, or -1; ql_rows_release in both cases. */
static int ql_rows_of(ql_rows *rows, PyObject *object, const ql_tensor *x, int64_t width) {
    rows->copy = NULL;
    rows->on_device = false;
    rows->rows = 1;
    for (int i = 0; i < x->ndim - 1; i++) rows->rows *= x->shape[i];
    rows->data = x->data;
    rows->stride = width;
    if (ql_tensor_numel(x) == 0 || ql_rows_view(rows, x, width)) return 0;
    return x->device_type == QL_DEVICE_CPU ? ql_rows_copy_cpu(rows, x) : ql_rows_copy_cuda(rows, object, x);
}

static void ql_rows_release(ql_rows *rows) {
    free(rows->copy);
    if (rows->on_device) ql_output_abandon(&rows->device_copy);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The engines */

/* What a product is made of. Weight and bias are copies: while the GIL is away another thread may bind the layer anew. */
typedef struct ql_call {
    ql_weight weight;
    ql_matrix bias; /* one column of n; data is NULL where there is none */
    PyObject *object;
    const ql_tensor *x;
    const ql_rows *rows;
    ql_output *output;
} ql_call;

static int ql_cpu_failed(int result) {
    if (result < 0) PyErr_NoMemory();
    return result;
}

static ql_matrix ql_bias_of(const ql_layer *layer) {
    const ql_tensor *bias = ql_layer_tensor(layer, layer->bias);
    if (!bias) return (ql_matrix){0};
    return (ql_matrix){bias->data, bias->dtype, bias->shape[0], 1, bias->stride[0], 1};
}

/* The bias in fp32, converted where it is not: a copy of [n] is nothing beside the product. */
static int ql_call_bias(const float **bias, float **copy, const ql_call *call) {
    const ql_matrix *from = &call->bias;
    *bias = *copy = NULL;
    if (!from->data) return 0;
    if (from->dtype == QL_F32 && from->row_stride == 1) {
        *bias = from->data;
        return 0;
    }
    *copy = malloc((size_t)from->rows * sizeof **copy);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t i = 0; i < from->rows; i++) (*copy)[i] = ql_matrix_f32(from, i, 0);
    *bias = *copy;
    return 0;
}

static int ql_run_cpu_linear(const ql_call *call) {
    const float *bias;
    float *copy;
    if (ql_call_bias(&bias, &copy, call) < 0) return -1;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cpu_linear(call->output->view.data, call->rows->data, call->rows->stride, call->x->dtype,
                           call->rows->rows, &call->weight, bias);
    Py_END_ALLOW_THREADS
    free(copy);
    return ql_cpu_failed(result);
}

static int ql_run_cpu_grad(const ql_call *call) {
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cpu_linear_grad(call->output->view.data, call->rows->data, call->rows->stride, call->x->dtype,
                                call->rows->rows, &call->weight);
    Py_END_ALLOW_THREADS
    return ql_cpu_failed(result);
}

/* A launch takes a microsecond or two, less than giving the GIL away and taking it back costs others. */
static int ql_run_cuda_linear(const ql_call *call) {
    ql_cuda_product product = {.out = call->output->view.data,
                               .x = call->rows->data,
                               .x_stride = call->rows->stride,
                               .m = call->rows->rows,
                               .dtype = call->x->dtype,
                               .weight = &call->weight,
                               .bias = {call->bias.data, call->bias.dtype, call->bias.row_stride}};
    ql_cuda_place place;
    ql_cuda_product_plan plan;
    ql_output scratch;
    scratch.pending = scratch.view.data = NULL;
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, call->object, call->x) < 0) return -1;
    if (ql_cuda_linear_plan(&plan, &place, &product, message) < 0) return ql_cuda_failed(message);
    if (plan.scratch_bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "x has too many rows: the scratch for them is out of range");
        return -1;
    }
    if (plan.scratch_bytes > 0 &&
        ql_output_begin_beside(&scratch, call->object, call->x, QL_U8, 1, &plan.scratch_bytes) < 0)
        return -1;
    int result = ql_cuda_linear(&place, &product, &plan, scratch.view.data, message);
    ql_output_abandon(&scratch);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

static int ql_run_cuda_grad(const ql_call *call) {
    ql_cuda_place place;
    if (ql_place_of(&place, call->object, call->x) < 0) return -1;
    char message[QL_CUDA_MESSAGE];
    int result = ql_cuda_linear_grad(&place, call->output->view.data, call->rows->data, call->rows->stride,
                                     call->x->dtype, call->rows->rows, &call->weight, message);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

/* ------------------------------------------------------------------------------------------------------------------
 * From an object to an object */

static int ql_check_activation(const ql_layer *layer, const ql_tensor *x, const char *name, int64_t width) {
    if (ql_check_float(x, name, false) < 0 || ql_check_aligned(x, name) < 0 ||
        ql_check_same_device(x, name, ql_layer_device(layer), layer->held[0].name) < 0)
        return -1;
    if (x->ndim >= 1 && x->shape[x->ndim - 1] == width) return 0;
    char got[256];
    PyErr_Format(PyExc_ValueError, "%s must have shape [..., %lld], got %s", name, (long long)width,
                 ql_tensor_describe(x, got, sizeof got));
    return -1;
}

typedef int (*ql_run)(const ql_call *);

/* [..., width] -> [..., out_width], in the framework of `object`, by the engine of the layer's device. */
static PyObject *ql_call_rows(ql_layer *layer, PyObject *object, const ql_tensor *x, const char *name, int64_t width,
                              int64_t out_width, ql_run run_cpu, ql_run run_cuda) {
    if (ql_check_activation(layer, x, name, width) < 0) return NULL;
    PyObject *result = NULL;
    ql_rows rows;
    ql_output output;
    const ql_call call = {layer->weight, ql_bias_of(layer), object, x, &rows, &output};
    layer->running++;
    if (ql_rows_of(&rows, object, x, width) == 0) {
        int64_t shape[QL_MAX_DIMS];
        memcpy(shape, x->shape, sizeof shape[0] * (size_t)x->ndim);
        shape[x->ndim - 1] = out_width;
        if (ql_output_begin_beside(&output, object, x, x->dtype, x->ndim, shape) == 0) {
            ql_run run = x->device_type == QL_DEVICE_CPU ? run_cpu : run_cuda;
            if (rows.rows == 0 || out_width == 0 || run(&call) == 0)
                result = ql_output_finish(&output);
            else
                ql_output_abandon(&output);
        }
    }
    layer->running--;
    ql_rows_release(&rows);
    return result;
}

PyObject *ql_call_linear_read(ql_layer *layer, PyObject *x, const ql_tensor *tensor) {
    if (ql_layer_refresh(layer) < 0) return NULL;
    return ql_call_rows(layer, x, tensor, "x", layer->weight.k, layer->weight.n, ql_run_cpu_linear, ql_run_cuda_linear);
}

PyObject *ql_call_linear(ql_layer *layer, PyObject *x) {
    ql_tensor tensor;
    if (ql_tensor_read(&tensor, x, "x") < 0) return NULL;
    PyObject *result = ql_call_linear_read(layer, x, &tensor);
    ql_tensor_release(&tensor);
    return result;
}

PyObject *ql_call_grad(ql_layer *layer, PyObject *grad_output) {
    ql_tensor tensor;
    PyObject *result = NULL;
    /* The layer comes second: reading an argument may run Python code, which may replace the layer's storage. */
    if (ql_tensor_read(&tensor, grad_output, "grad_output") < 0) return NULL;
    if (ql_layer_refresh(layer) == 0)
        result = ql_call_rows(layer, grad_output, &tensor, "grad_output", layer->weight.n, layer->weight.k,
                              ql_run_cpu_grad, ql_run_cuda_grad);
    ql_tensor_release(&tensor);
    return result;
}

static int ql_dequantize_cpu(const ql_weight *weight, ql_tensor *out) {
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cpu_dequantize(out->data, out->dtype, weight);
    Py_END_ALLOW_THREADS
    return ql_cpu_failed(result);
}

static int ql_dequantize_cuda(PyObject *object, const ql_weight *weight, ql_tensor *out) {
    ql_cuda_place place;
    if (ql_place_of(&place, object, out) < 0) return -1;
    char message[QL_CUDA_MESSAGE];
    int result = ql_cuda_dequantize(&place, out->data, out->dtype, weight, message);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

static int ql_dequantize_run(PyObject *object, const ql_weight *weight, ql_tensor *out) {
    if (ql_tensor_numel(out) == 0) return 0;
    return out->device_type == QL_DEVICE_CPU ? ql_dequantize_cpu(weight, out) : ql_dequantize_cuda(object, weight, out);
}

PyObject *ql_call_dequantize(ql_layer *layer, ql_dtype dtype) {
    if (ql_layer_refresh(layer) < 0) return NULL;
    ql_output output;
    const ql_weight weight = layer->weight;
    const int64_t shape[2] = {weight.n, weight.k};
    PyObject *object = layer->held[0].object;
    layer->running++;
    PyObject *result = NULL;
    if (ql_output_begin_beside(&output, object, ql_layer_device(layer), dtype, 2, shape) == 0) {
        if (ql_dequantize_run(object, &weight, &output.view) == 0)
            result = ql_output_finish(&output);
        else
            ql_output_abandon(&output);
    }
    layer->running--;
    return result;
}

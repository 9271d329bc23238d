#include "layer.h"

#include "../cpu/engine.h"
#include "../cuda/engine.h"
#include "../formats/number.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

static PyTypeObject *ql_layer_base;

/* ------------------------------------------------------------------------------------------------------------------
 * The tensors held */

ql_layer *ql_layer_alloc(PyTypeObject *type, int (*bind)(ql_layer *), size_t extra_size) {
    ql_layer *layer = (ql_layer *)QL_FROM_SLOT(allocfunc, PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!layer) return NULL;
    layer->bind = bind;
    layer->bias = -1;
    if (extra_size && !(layer->extra = calloc(1, extra_size))) {
        Py_DECREF(layer);
        PyErr_NoMemory();
        return NULL;
    }
    return layer;
}

int ql_layer_hold(ql_layer *layer, PyObject *object, const char *name) {
    int index = layer->held_count;
    ql_held *held = &layer->held[index];
    held->name = name;
    if (!ql_arg_is_none(object)) {
        if (ql_tensor_read(&held->tensor, object, name) < 0) return -1;
        held->object = Py_NewRef(object);
    }
    layer->held_count++;
    return index;
}

/* Where the layer's tensors are: with the first one. */
static const ql_tensor *ql_layer_device(const ql_layer *layer) { return &layer->held[0].tensor; }

static int ql_layer_check_devices(const ql_layer *layer) {
    /* A first tensor that is missing is bind's to complain of. */
    for (int i = 1; layer->held[0].object && i < layer->held_count; i++) {
        const ql_tensor *tensor = ql_layer_tensor(layer, i);
        if (tensor &&
            ql_check_same_device(tensor, layer->held[i].name, ql_layer_device(layer), layer->held[0].name) < 0)
            return -1;
    }
    return 0;
}

static int ql_place_of(ql_cuda_place *place, PyObject *object, const ql_tensor *tensor, const char *name) {
    place->device = tensor->device_id;
    return ql_tensor_stream(&place->stream, object, tensor, name);
}

/* What the CUDA side says of a failure, as an exception. */
static int ql_cuda_failed(const char *message) {
    PyErr_Format(PyExc_RuntimeError, "CUDA: %s", message);
    return -1;
}

const void *ql_layer_contents(const ql_layer *layer, int index, void **copy) {
    const ql_held *held = &layer->held[index];
    *copy = NULL;
    if (held->tensor.device_type == QL_DEVICE_CPU) return held->tensor.data;
    size_t bytes = (size_t)ql_tensor_numel(&held->tensor) * ql_dtype_size(held->tensor.dtype);
    ql_cuda_place place;
    if (ql_check_contiguous(&held->tensor, held->name) < 0 ||
        ql_place_of(&place, held->object, &held->tensor, held->name) < 0)
        return NULL;
    if (!(*copy = malloc(bytes ? bytes : 1))) return PyErr_NoMemory();
    char message[QL_CUDA_MESSAGE];
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cuda_read(*copy, held->tensor.data, bytes, &place, message);
    Py_END_ALLOW_THREADS
    if (result == 0) return *copy;
    free(*copy);
    *copy = NULL;
    ql_cuda_failed(message);
    return NULL;
}

static int ql_layer_check_bias(const ql_layer *layer) {
    const ql_tensor *bias = layer->bias < 0 ? NULL : ql_layer_tensor(layer, layer->bias);
    if (!bias) return 0;
    if (ql_check_float(bias, "bias", bias->device_type == QL_DEVICE_CPU) < 0) return -1;
    return ql_check_shape(bias, "bias", 1, &layer->weight.n);
}

int ql_layer_ready(ql_layer *layer, PyObject *bias) {
    layer->bias = ql_layer_hold(layer, bias, "bias");
    if (layer->bias < 0 || ql_layer_check_devices(layer) < 0 || layer->bind(layer) < 0) return -1;
    return ql_layer_check_bias(layer);
}

static bool ql_tensor_same(const ql_tensor *a, const ql_tensor *b) {
    size_t bytes = (size_t)a->ndim * sizeof *a->shape;
    return a->data == b->data && a->dtype == b->dtype && a->ndim == b->ndim && a->device_type == b->device_type &&
           memcmp(a->shape, b->shape, bytes) == 0 && memcmp(a->stride, b->stride, bytes) == 0;
}

/* A tensor's storage can be replaced under the object that is held (`weight.data = ...`, resize_), so what was borrowed is
 * read again at each call; a change binds anew, and one that does not fit leaves the layer as it was. */
static int ql_layer_refresh(ql_layer *layer) {
    ql_tensor before[QL_MAX_HELD];
    uint32_t changed = 0;
    int result = 0;
    for (int i = 0; i < layer->held_count && result == 0; i++) {
        ql_held *held = &layer->held[i];
        if (!held->object || !held->tensor.borrowed) continue;
        ql_tensor now;
        if (ql_tensor_read(&now, held->object, held->name) < 0) {
            result = -1;
        } else if (!ql_tensor_same(&now, &held->tensor)) {
            before[i] = held->tensor;
            held->tensor = now;
            changed |= 1u << i;
        }
    }
    if (!changed && (result < 0 || !layer->copies_values)) return result;
    ql_weight weight = layer->weight;
    if (result == 0) result = ql_layer_check_devices(layer);
    if (result == 0) result = layer->bind(layer);
    if (result == 0) result = ql_layer_check_bias(layer);
    if (result == 0) return 0;
    layer->weight = weight;
    for (int i = 0; i < layer->held_count; i++)
        if (changed & 1u << i) layer->held[i].tensor = before[i];
    return -1;
}

/* ------------------------------------------------------------------------------------------------------------------
 * A call */

/* The rows of an activation: [rows, width], each contiguous, stride elements apart. */
typedef struct ql_rows {
    const void *data;
    int64_t rows, stride;
    void *copy; /* freed by the caller */
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

static int ql_rows_of(ql_rows *rows, const ql_tensor *x, int64_t width) {
    *rows = (ql_rows){.rows = 1};
    for (int i = 0; i < x->ndim - 1; i++) rows->rows *= x->shape[i];
    if (rows->rows == 0 || ql_rows_view(rows, x, width)) return 0;
    if (x->device_type != QL_DEVICE_CPU) return ql_check_contiguous(x, "a CUDA input whose rows are not evenly spaced");
    size_t size = ql_dtype_size(x->dtype);
    rows->copy = malloc((size_t)ql_tensor_numel(x) * size);
    if (!rows->copy) {
        PyErr_NoMemory();
        return -1;
    }
    ql_copy_strided(rows->copy, x->data, x, 0, size);
    rows->data = rows->copy;
    rows->stride = width;
    return 0;
}

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

/* The bias in fp32, converted where it is not: a copy of [n] is nothing beside the product. */
static int ql_layer_bias(const float **bias, float **copy, const ql_layer *layer) {
    const ql_tensor *tensor = ql_layer_tensor(layer, layer->bias);
    *bias = *copy = NULL;
    if (!tensor) return 0;
    if (tensor->dtype == QL_F32 && ql_tensor_is_contiguous(tensor)) {
        *bias = tensor->data;
        return 0;
    }
    int64_t n = layer->weight.n;
    *copy = malloc((size_t)n * sizeof **copy);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t i = 0; i < n; i++) (*copy)[i] = ql_f32_load(tensor->data, tensor->dtype, i * tensor->stride[0]);
    *bias = *copy;
    return 0;
}

/* One mapping of rows: its output, its input and what it needs to run where the layer's tensors are. */
typedef struct ql_call {
    const ql_layer *layer;
    ql_output *output;
    PyObject *object;
    const ql_tensor *x;
    const ql_rows *rows;
} ql_call;

static int ql_cpu_failed(int result) {
    if (result < 0) PyErr_NoMemory();
    return result;
}

static int ql_run_cpu_linear(const ql_call *call) {
    const float *bias;
    float *copy;
    if (ql_layer_bias(&bias, &copy, call->layer) < 0) return -1;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cpu_linear(call->output->view.data, call->rows->data, call->rows->stride, call->x->dtype,
                           call->rows->rows, &call->layer->weight, bias);
    Py_END_ALLOW_THREADS
    free(copy);
    return ql_cpu_failed(result);
}

static int ql_run_cpu_grad(const ql_call *call) {
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cpu_linear_grad(call->output->view.data, call->rows->data, call->rows->stride, call->x->dtype,
                                call->rows->rows, &call->layer->weight);
    Py_END_ALLOW_THREADS
    return ql_cpu_failed(result);
}

/* A launch takes a microsecond or two, less than giving the GIL away and taking it back costs others. */
static int ql_run_cuda_linear(const ql_call *call) {
    const ql_tensor *bias = ql_layer_tensor(call->layer, call->layer->bias);
    ql_cuda_bias description = {0};
    if (bias) description = (ql_cuda_bias){bias->data, bias->dtype, bias->stride[0]};
    int64_t bytes = ql_cuda_linear_scratch(call->rows->rows, &call->layer->weight);
    ql_cuda_place place;
    ql_output scratch = {0};
    if (ql_place_of(&place, call->object, call->x, "x") < 0) return -1;
    if (bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "x has too many rows: the scratch for them is out of range");
        return -1;
    }
    if (bytes > 0 && ql_output_begin_beside(&scratch, call->object, call->x, QL_U8, 1, &bytes) < 0) return -1;
    char message[QL_CUDA_MESSAGE];
    int result = ql_cuda_linear(&place, call->output->view.data, call->rows->data, call->rows->stride, call->x->dtype,
                                call->rows->rows, &call->layer->weight, &description, scratch.view.data, message);
    ql_output_abandon(&scratch);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

static int ql_run_cuda_grad(const ql_call *call) {
    ql_cuda_place place;
    if (ql_place_of(&place, call->object, call->x, "grad_output") < 0) return -1;
    char message[QL_CUDA_MESSAGE];
    int result = ql_cuda_linear_grad(&place, call->output->view.data, call->rows->data, call->rows->stride,
                                     call->x->dtype, call->rows->rows, &call->layer->weight, message);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

/* [..., width] -> [..., out_width], in the framework of `object`, by the engine of the layer's device. */
static PyObject *ql_layer_map(ql_layer *layer, PyObject *object, const char *name, int64_t width, int64_t out_width,
                              int (*run_cpu)(const ql_call *), int (*run_cuda)(const ql_call *)) {
    ql_tensor x;
    if (ql_tensor_read(&x, object, name) < 0) return NULL;
    PyObject *result = NULL;
    ql_rows rows = {0};
    if (ql_check_activation(layer, &x, name, width) == 0 && ql_rows_of(&rows, &x, width) == 0) {
        int64_t shape[QL_MAX_DIMS];
        memcpy(shape, x.shape, sizeof shape[0] * (size_t)x.ndim);
        shape[x.ndim - 1] = out_width;
        ql_output output;
        if (ql_output_begin_beside(&output, object, &x, x.dtype, x.ndim, shape) == 0) {
            ql_call call = {layer, &output, object, &x, &rows};
            int (*run)(const ql_call *) = x.device_type == QL_DEVICE_CPU ? run_cpu : run_cuda;
            if (rows.rows == 0 || run(&call) == 0)
                result = ql_output_finish(&output);
            else
                ql_output_abandon(&output);
        }
    }
    free(rows.copy);
    ql_tensor_release(&x);
    return result;
}

static PyObject *ql_layer_call(PyObject *self, PyObject *args, PyObject *kwargs) {
    ql_layer *layer = (ql_layer *)self;
    if (PyTuple_Size(args) != 1 || (kwargs && PyDict_Size(kwargs)))
        return PyErr_Format(PyExc_TypeError, "a layer is called with one tensor x, got %zd arguments",
                            PyTuple_Size(args) + (kwargs ? PyDict_Size(kwargs) : 0));
    if (ql_layer_refresh(layer) < 0) return NULL;
    return ql_layer_map(layer, PyTuple_GetItem(args, 0), "x", layer->weight.k, layer->weight.n,
                        ql_run_cpu_linear, ql_run_cuda_linear);
}

static PyObject *ql_layer_grad_input(PyObject *self, PyObject *grad_output) {
    ql_layer *layer = (ql_layer *)self;
    if (ql_layer_refresh(layer) < 0) return NULL;
    return ql_layer_map(layer, grad_output, "grad_output", layer->weight.n, layer->weight.k,
                        ql_run_cpu_grad, ql_run_cuda_grad);
}

static int ql_dequantize_cpu(const ql_layer *layer, ql_tensor *out) {
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cpu_dequantize(out->data, out->dtype, &layer->weight);
    Py_END_ALLOW_THREADS
    return ql_cpu_failed(result);
}

static int ql_dequantize_cuda(const ql_layer *layer, ql_tensor *out) {
    ql_cuda_place place;
    const ql_held *first = &layer->held[0];
    if (ql_place_of(&place, first->object, &first->tensor, first->name) < 0) return -1;
    char message[QL_CUDA_MESSAGE];
    int result = ql_cuda_dequantize(&place, out->data, out->dtype, &layer->weight, message);
    return result < 0 ? ql_cuda_failed(message) : 0;
}

static PyObject *ql_layer_dequantize(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"dtype"};
    static const ql_signature signature = {"dequantize", 1, 1, 0, names};
    ql_layer *layer = (ql_layer *)self;
    PyObject *values[1];
    ql_dtype dtype = QL_F32;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_dtype(&dtype, values[0], "dtype") < 0 ||
        ql_layer_refresh(layer) < 0)
        return NULL;
    ql_output output;
    int64_t shape[2] = {layer->weight.n, layer->weight.k};
    PyObject *like = layer->held[0].object;
    if (ql_output_begin_beside(&output, like, ql_layer_device(layer), dtype, 2, shape) < 0) return NULL;
    int result = ql_layer_device(layer)->device_type == QL_DEVICE_CPU ? ql_dequantize_cpu(layer, &output.view)
                                                                      : ql_dequantize_cuda(layer, &output.view);
    if (result == 0) return ql_output_finish(&output);
    ql_output_abandon(&output);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The base type */

static PyObject *ql_layer_in_features(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(((ql_layer *)self)->weight.k);
}

static PyObject *ql_layer_out_features(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(((ql_layer *)self)->weight.n);
}

static PyObject *ql_layer_nbytes(PyObject *self, void *unused) {
    (void)unused;
    ql_layer *layer = (ql_layer *)self;
    int64_t bytes = 0;
    for (int i = 0; i < layer->held_count; i++) {
        const ql_tensor *tensor = ql_layer_tensor(layer, i);
        if (tensor) bytes += ql_tensor_numel(tensor) * (int64_t)ql_dtype_size(tensor->dtype);
    }
    return PyLong_FromLongLong(bytes);
}

static PyObject *ql_layer_repr(PyObject *self) {
    ql_layer *layer = (ql_layer *)self;
    PyObject *name = PyObject_GetAttrString((PyObject *)Py_TYPE(self), "__name__");
    if (!name) return NULL;
    PyObject *repr = PyUnicode_FromFormat("%U(in_features=%lld, out_features=%lld, %s%sbias=%s)", name,
                                          (long long)layer->weight.k, (long long)layer->weight.n, layer->summary,
                                          layer->summary[0] ? ", " : "",
                                          ql_layer_tensor(layer, layer->bias) ? "True" : "False");
    Py_DECREF(name);
    return repr;
}

static int ql_layer_traverse(PyObject *self, visitproc visit, void *arg) {
    ql_layer *layer = (ql_layer *)self;
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < layer->held_count; i++) Py_VISIT(layer->held[i].object);
    return 0;
}

/* Python objects are dropped at deallocation only: a layer cannot be called without its tensors, and a cycle through one
 * goes through its tensors' attributes, which their own collector clears. */
static void ql_layer_dealloc(PyObject *self) {
    ql_layer *layer = (ql_layer *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (layer->weakrefs) PyObject_ClearWeakRefs(self);
    for (int i = 0; i < layer->held_count; i++) {
        if (layer->held[i].object) ql_tensor_release(&layer->held[i].tensor);
        Py_CLEAR(layer->held[i].object);
    }
    if (layer->clear) layer->clear(layer);
    free(layer->extra);
    QL_FROM_SLOT(freefunc, PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef ql_layer_methods[] = {
    {"grad_input", ql_layer_grad_input, METH_O,
     "grad_input(grad_output)\n--\n\nThe gradient to the input: [..., out_features] -> [..., in_features]."},
    {"dequantize", QL_METHOD(ql_layer_dequantize), METH_FASTCALL | METH_KEYWORDS,
     "dequantize(dtype='float32')\n--\n\nThe weight [out_features, in_features]."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ql_layer_getset[] = {
    {"in_features", ql_layer_in_features, NULL, "K, the size of the input's last dimension.", NULL},
    {"out_features", ql_layer_out_features, NULL, "N, the size of the output's last dimension.", NULL},
    {"nbytes", ql_layer_nbytes, NULL, "Bytes of all the tensors held.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef ql_layer_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ql_layer, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

int ql_layer_add_type(PyObject *module) {
    static PyType_Slot slots[] = {
        {Py_tp_call, QL_SLOT(ql_layer_call)},
        {Py_tp_repr, QL_SLOT(ql_layer_repr)},
        {Py_tp_traverse, QL_SLOT(ql_layer_traverse)},
        {Py_tp_dealloc, QL_SLOT(ql_layer_dealloc)},
        {Py_tp_methods, ql_layer_methods},
        {Py_tp_getset, ql_layer_getset},
        {Py_tp_members, ql_layer_members},
        {Py_tp_doc, "What the six quantized linear layers share."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "_qlinear.Layer",
        .basicsize = sizeof(ql_layer),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);
    if (!type) return -1;
    ql_layer_base = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "Layer", type);
}

int ql_layer_make_type(PyObject *module, const char *name, newfunc new, const char *doc, PyGetSetDef *getset) {
    static PyGetSetDef none[] = {{NULL, NULL, NULL, NULL, NULL}};
    PyType_Slot slots[] = {
        {Py_tp_new, QL_SLOT(new)},
        {Py_tp_doc, (void *)(uintptr_t)doc},
        {Py_tp_getset, getset ? getset : none},
        {Py_tp_traverse, QL_SLOT(ql_layer_traverse)},
        {Py_tp_dealloc, QL_SLOT(ql_layer_dealloc)},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = name,
        .basicsize = sizeof(ql_layer),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpecWithBases(&spec, (PyObject *)ql_layer_base);
    if (!type) return -1;
    int result = PyModule_AddObjectRef(module, strchr(name, '.') + 1, type);
    Py_DECREF(type);
    return result;
}

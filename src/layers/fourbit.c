/* Linear4bit: NF4 and FP4 weights of bitsandbytes, and its 4-bit and 8-bit blockwise quantizers. */
#include "../formats/fourbit.h"
#include "../cpu/threads.h"
#include "../formats/dynamic_map.h"
#include "layer.h"

#include <stdio.h>

/* ------------------------------------------------------------------------------------------------------------------
 * What the type and the functions share */

static const ql_dtype taken_f32[] = {QL_F32}, taken_u8[] = {QL_U8};

/* A contiguous tensor of one dtype and `count` elements in any shape. */
static int check_flat(const ql_tensor *tensor, const char *name, const ql_dtype *dtype, int64_t count) {
    if (ql_check_dtype(tensor, name, 1, dtype) < 0 || ql_check_contiguous(tensor, name) < 0) return -1;
    if (ql_tensor_numel(tensor) == count) return 0;
    char got[256];
    PyErr_Format(PyExc_ValueError, "%s must have %lld elements, got %s", name, (long long)count,
                 ql_tensor_describe(tensor, got, sizeof got));
    return -1;
}

static int check_blocksize(int64_t blocksize, const char *name) {
    if (blocksize >= 32 && (blocksize & (blocksize - 1)) == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s must be a power of two, at least 32, got %lld", name, (long long)blocksize);
    return -1;
}

/* Blocks that a thread takes at a time: enough values that starting it is nothing beside them. */
static int64_t block_grain(int64_t blocksize) { return blocksize < 65536 ? 65536 / blocksize : 1; }

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

enum { HELD_WEIGHT, HELD_ABSMAX, HELD_CODE, HELD_NESTED_ABSMAX, HELD_NESTED_CODE };

typedef struct fourbit_extra {
    int64_t n, k, blocksize, nested_blocksize;
    float nested_offset;
} fourbit_extra;

static int check_absent(const ql_tensor *tensor, const char *name) {
    if (!tensor) return 0;
    PyErr_Format(PyExc_ValueError, "%s belongs to an absmax of uint8, and absmax is float32", name);
    return -1;
}

static int check_present(const ql_tensor *tensor, const char *name) {
    if (tensor) return 0;
    PyErr_Format(PyExc_ValueError, "%s is missing: absmax is uint8, which needs it", name);
    return -1;
}

/* The scales of `blocks` blocks: absmax itself, or its codes with what they are decoded by. */
static int bind_absmax(ql_fourbit *weight, const ql_layer *layer, int64_t blocks) {
    static const ql_dtype taken[] = {QL_F32, QL_U8};
    const fourbit_extra *extra = layer->extra;
    const ql_tensor *absmax = ql_layer_tensor(layer, HELD_ABSMAX);
    const ql_tensor *nested_absmax = ql_layer_tensor(layer, HELD_NESTED_ABSMAX);
    const ql_tensor *nested_code = ql_layer_tensor(layer, HELD_NESTED_CODE);
    if (ql_check_dtype(absmax, "absmax", 2, taken) < 0 || check_flat(absmax, "absmax", &absmax->dtype, blocks) < 0)
        return -1;
    if (absmax->dtype == QL_F32) {
        if (check_absent(nested_absmax, "nested_absmax") < 0 || check_absent(nested_code, "nested_code") < 0) return -1;
        weight->absmax = absmax->data;
        return 0;
    }
    int64_t nested_blocks = ql_group_count(blocks, extra->nested_blocksize);
    if (check_present(nested_absmax, "nested_absmax") < 0 || check_present(nested_code, "nested_code") < 0 ||
        check_flat(nested_absmax, "nested_absmax", taken_f32, nested_blocks) < 0 ||
        check_flat(nested_code, "nested_code", taken_f32, QL_MAP_SIZE) < 0)
        return -1;
    weight->absmax = nested_absmax->data;
    weight->nested = absmax->data;
    weight->nested_code = nested_code->data;
    weight->nested_blocksize = extra->nested_blocksize;
    weight->offset = extra->nested_offset;
    return 0;
}

static int fourbit_bind(ql_layer *layer) {
    const fourbit_extra *extra = layer->extra;
    const ql_tensor *packed = ql_layer_tensor(layer, HELD_WEIGHT);
    const ql_tensor *code = ql_layer_tensor(layer, HELD_CODE);
    int64_t count = extra->n * extra->k;
    ql_weight weight = {.format = QL_FORMAT_FOURBIT, .n = extra->n, .k = extra->k};
    if (check_flat(packed, "weight", taken_u8, count / 2 + count % 2) < 0 ||
        bind_absmax(&weight.fourbit, layer, ql_group_count(count, extra->blocksize)) < 0 ||
        check_flat(code, "code", taken_f32, 16) < 0)
        return -1;
    weight.fourbit.packed = packed->data;
    weight.fourbit.code = code->data;
    weight.fourbit.blocksize = extra->blocksize;
    layer->weight = weight;
    snprintf(layer->summary, sizeof layer->summary, "blocksize=%lld%s", (long long)extra->blocksize,
             weight.fourbit.nested ? ", double quantized" : "");
    return 0;
}

/* shape (N, K): two positive ints whose product and bytes fit. */
static int parse_shape(fourbit_extra *extra, PyObject *object) {
    int64_t size[2], bytes;
    bool is_pair = (PyTuple_Check(object) || PyList_Check(object)) && PySequence_Size(object) == 2;
    if (!is_pair) {
        PyErr_Format(PyExc_TypeError, "shape must be a pair (out_features, in_features), got %R", object);
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        if (!item) return -1;
        int result = ql_arg_int(&size[i], item, i ? "shape[1]" : "shape[0]");
        Py_DECREF(item);
        if (result < 0) return -1;
    }
    if (size[0] < 1 || size[1] < 1 || __builtin_mul_overflow(size[0], size[1], &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)sizeof(float), &bytes)) {
        PyErr_Format(PyExc_ValueError, "shape must be two positive sizes whose product is in range, got (%lld, %lld)",
                     (long long)size[0], (long long)size[1]);
        return -1;
    }
    extra->n = size[0];
    extra->k = size[1];
    return 0;
}

static PyObject *fourbit_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    enum {
        WEIGHT,
        ABSMAX,
        CODE,
        BIAS,
        SHAPE,
        BLOCKSIZE,
        NESTED_ABSMAX,
        NESTED_CODE,
        NESTED_OFFSET,
        NESTED_BLOCKSIZE,
        COUNT
    };
    static const char *const names[] = {"weight",        "absmax",          "code",          "bias",
                                        "shape",         "blocksize",       "nested_absmax", "nested_code",
                                        "nested_offset", "nested_blocksize"};
    static const ql_signature signature = {"Linear4bit", COUNT, 4, 3, names};
    PyObject *values[COUNT];
    if (ql_args_tuple(values, &signature, args, kwargs) < 0) return NULL;
    for (int i = SHAPE; i <= BLOCKSIZE; i++)
        if (!values[i]) return PyErr_Format(PyExc_TypeError, "Linear4bit: %s is missing", names[i]);
    fourbit_extra extra = {0};
    double offset = 0.0;
    extra.nested_blocksize = 256;
    if (parse_shape(&extra, values[SHAPE]) < 0 || ql_arg_int(&extra.blocksize, values[BLOCKSIZE], "blocksize") < 0 ||
        check_blocksize(extra.blocksize, "blocksize") < 0 ||
        ql_arg_int(&extra.nested_blocksize, values[NESTED_BLOCKSIZE], "nested_blocksize") < 0 ||
        check_blocksize(extra.nested_blocksize, "nested_blocksize") < 0 ||
        ql_arg_float(&offset, values[NESTED_OFFSET], "nested_offset") < 0)
        return NULL;
    extra.nested_offset = (float)offset;

    ql_layer *layer = ql_layer_alloc(type, fourbit_bind, sizeof extra);
    if (!layer) return NULL;
    *(fourbit_extra *)layer->extra = extra;
    static const int order[] = {WEIGHT, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE}; /* of HELD_ */
    for (int i = 0; i < 5; i++) {
        PyObject *object = values[order[i]];
        bool missing = i <= HELD_CODE && ql_arg_is_none(object);
        if (missing) PyErr_Format(PyExc_TypeError, "%s must be a tensor, got None", names[order[i]]);
        if (missing || ql_layer_hold(layer, object, names[order[i]]) < 0) {
            Py_DECREF(layer);
            return NULL;
        }
    }
    if (ql_layer_ready(layer, values[BIAS]) == 0) return (PyObject *)layer;
    Py_DECREF(layer);
    return NULL;
}

PyDoc_STRVAR(fourbit_doc,
             "Linear4bit(weight, absmax, code, bias=None, *, shape, blocksize, nested_absmax=None, nested_code=None,\n"
             "           nested_offset=0.0, nested_blocksize=256)\n--\n\n"
             "y = x W' + bias with W [N, K] = shape in 4-bit codes: weight uint8 of (N * K + 1) // 2 bytes, absmax\n"
             "float32 of a block each or uint8 with nested_absmax and nested_code [256], code float32 [16].");

int ql_fourbit_add_type(PyObject *module) {
    return ql_layer_make_type(module, "_qlinear.Linear4bit", fourbit_new, fourbit_doc, NULL, NULL);
}

/* ------------------------------------------------------------------------------------------------------------------
 * Quantizers */

static PyObject *list_of_floats(const float *values, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *value = PyFloat_FromDouble((double)values[i]);
        if (!value || PyList_SetItem(list, i, value) < 0) Py_CLEAR(list);
    }
    return list;
}

static const char *const type_choices[] = {"nf4", "fp4", NULL};

static PyObject *fourbit_code(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"quant_type"};
    static const ql_signature signature = {"fourbit_code", 1, 1, 1, names};
    PyObject *values[1];
    int type = QL_NF4;
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_choice(&type, values[0], "quant_type", type_choices) < 0)
        return NULL;
    return list_of_floats(ql_fourbit_code((ql_fourbit_type)type), 16);
}

static PyObject *dynamic_map(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"signed", "max_exponent_bits", "total_bits"};
    static const ql_signature signature = {"dynamic_map", 3, 3, 0, names};
    PyObject *values[3];
    bool is_signed = true;
    int64_t max_exponent_bits = 7, total_bits = 8;
    float map[QL_MAP_SIZE];
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_bool(&is_signed, values[0], "signed") < 0 ||
        ql_arg_int(&max_exponent_bits, values[1], "max_exponent_bits") < 0 ||
        ql_arg_int(&total_bits, values[2], "total_bits") < 0)
        return NULL;
    if (ql_dynamic_map(map, is_signed, max_exponent_bits, total_bits) < 0)
        return PyErr_Format(PyExc_ValueError,
                            "total_bits must be in [2, 8] and max_exponent_bits %s, got total_bits %lld and "
                            "max_exponent_bits %lld",
                            is_signed ? "in [1, total_bits - 1]" : "total_bits - 1 where signed is False",
                            (long long)total_bits, (long long)max_exponent_bits);
    return list_of_floats(map, QL_MAP_SIZE);
}

/* One quantization or its inverse as the threads see it: `body` takes a range of blocks. */
typedef struct blocks_task {
    const ql_values *x;
    void *out;
    float *absmax;
    const uint8_t *codes;
    const float *map; /* the code of 4 bits, or the map of 8 */
    ql_fourbit_type type;
    ql_dtype dtype;
    int64_t count, blocksize;
} blocks_task;

static void run_quantize_4bit(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_fourbit_quantize(task->out, task->absmax, task->x, task->count, task->blocksize, task->type, begin, end);
}

static void run_dequantize_4bit(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_fourbit_dequantize(task->out, task->dtype, task->codes, task->absmax, task->map, task->count, task->blocksize,
                          begin, end);
}

static void run_quantize_8bit(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_blockwise_quantize(task->out, task->absmax, task->x, task->map, task->count, task->blocksize, begin, end);
}

static void run_dequantize_8bit(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_blockwise_dequantize(task->out, task->dtype, task->codes, task->absmax, task->map, task->count, task->blocksize,
                            begin, end);
}

static void run_blocks(blocks_task *task, void (*body)(void *, int64_t, int64_t)) {
    int64_t blocks = ql_group_count(task->count, task->blocksize);
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(blocks, block_grain(task->blocksize), body, task);
    Py_END_ALLOW_THREADS
}

/* The tensor's values; one that is contiguous is one dimension of task->count. */
static ql_values values_of(const ql_tensor *x, const int64_t *count, const int64_t *one) {
    if (ql_tensor_is_contiguous(x)) return (ql_values){x->data, x->dtype, 1, count, one};
    return (ql_values){x->data, x->dtype, x->ndim, x->shape, x->stride};
}

/* Quantizes x by `body` into a tensor of `shape` uint8 and absmax; the pair of both. */
static PyObject *quantize(PyObject *object, const ql_tensor *x, blocks_task *task, int ndim, const int64_t *shape,
                          void (*body)(void *, int64_t, int64_t)) {
    static const int64_t one = 1;
    int64_t blocks = ql_group_count(task->count, task->blocksize);
    ql_values values = values_of(x, &task->count, &one);
    ql_output codes, absmax;
    if (ql_output_begin(&codes, object, QL_U8, ndim, shape) < 0) return NULL;
    if (ql_output_begin(&absmax, object, QL_F32, 1, &blocks) < 0) {
        ql_output_abandon(&codes);
        return NULL;
    }
    task->x = &values;
    task->out = codes.view.data;
    task->absmax = absmax.view.data;
    run_blocks(task, body);
    PyObject *first = ql_output_finish(&codes);
    if (!first) {
        ql_output_abandon(&absmax);
        return NULL;
    }
    PyObject *second = ql_output_finish(&absmax);
    PyObject *pair = second ? PyTuple_Pack(2, first, second) : NULL;
    Py_DECREF(first);
    Py_XDECREF(second);
    return pair;
}

static int check_values(const ql_tensor *x) {
    return ql_check_float(x, "x", true) < 0 || ql_check_aligned(x, "x") < 0 ? -1 : 0;
}

static PyObject *quantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"x", "quant_type", "blocksize"};
    static const ql_signature signature = {"quantize_4bit", 3, 1, 3, names};
    PyObject *values[3], *result = NULL;
    blocks_task task = {0};
    int type = QL_NF4;
    ql_tensor x;
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_choice(&type, values[1], "quant_type", type_choices) < 0 ||
        ql_arg_int(&task.blocksize, values[2], "blocksize") < 0 || check_blocksize(task.blocksize, "blocksize") < 0 ||
        ql_tensor_read_cpu(&x, values[0], "x") < 0)
        return NULL;
    if (check_values(&x) == 0) {
        task.type = (ql_fourbit_type)type;
        task.count = ql_tensor_numel(&x);
        result = quantize(values[0], &x, &task, 2, (int64_t[]){task.count / 2 + task.count % 2, 1}, run_quantize_4bit);
    }
    ql_tensor_release(&x);
    return result;
}

/* A map that does not ascend has no nearest value by bisection; NaN ascends from nothing. */
static int check_map(const ql_tensor *code) {
    if (check_flat(code, "code", taken_f32, QL_MAP_SIZE) < 0) return -1;
    const float *map = code->data;
    for (int i = 0; i < QL_MAP_SIZE; i++) {
        if (map[i] >= map[i ? i - 1 : 0]) continue;
        PyErr_Format(PyExc_ValueError, "code must ascend, and does not at index %d", i);
        return -1;
    }
    return 0;
}

static PyObject *quantize_blockwise(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"x", "code", "blocksize"};
    static const ql_signature signature = {"quantize_blockwise", 3, 2, 3, names};
    PyObject *values[3], *result = NULL;
    blocks_task task = {0};
    ql_tensor x, code;
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_int(&task.blocksize, values[2], "blocksize") < 0 || check_blocksize(task.blocksize, "blocksize") < 0 ||
        ql_tensor_read_cpu(&x, values[0], "x") < 0)
        return NULL;
    if (ql_tensor_read_cpu(&code, values[1], "code") == 0) {
        if (check_values(&x) == 0 && check_map(&code) == 0) {
            task.map = code.data;
            task.count = ql_tensor_numel(&x);
            result = quantize(values[0], &x, &task, x.ndim, x.shape, run_quantize_8bit);
        }
        ql_tensor_release(&code);
    }
    ql_tensor_release(&x);
    return result;
}

/* The three tensors of a dequantization, to be released, or -1 and none. */
static int read_three(ql_tensor *tensors, PyObject *const *objects, const char *const *names) {
    for (int i = 0; i < 3; i++) {
        if (ql_tensor_read_cpu(&tensors[i], objects[i], names[i]) == 0) continue;
        while (i-- > 0) ql_tensor_release(&tensors[i]);
        return -1;
    }
    return 0;
}

/* Dequantizes tensors (codes, absmax, map), which have been checked but for absmax, into a tensor of `shape`. */
static PyObject *dequantize(PyObject *object, const ql_tensor *tensors, blocks_task *task, int ndim,
                            const int64_t *shape, void (*body)(void *, int64_t, int64_t)) {
    ql_output output;
    if (check_flat(&tensors[1], "absmax", taken_f32, ql_group_count(task->count, task->blocksize)) < 0 ||
        ql_output_begin(&output, object, task->dtype, ndim, shape) < 0)
        return NULL;
    task->out = output.view.data;
    task->codes = tensors[0].data;
    task->absmax = tensors[1].data;
    task->map = tensors[2].data;
    run_blocks(task, body);
    return ql_output_finish(&output);
}

static PyObject *dequantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"packed", "absmax", "code", "count", "blocksize", "dtype"};
    static const ql_signature signature = {"dequantize_4bit", 6, 3, 6, names};
    PyObject *values[6], *result = NULL;
    blocks_task task = {.dtype = QL_F32};
    ql_tensor tensors[3];
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_int(&task.count, values[3], "count") < 0 ||
        ql_arg_int(&task.blocksize, values[4], "blocksize") < 0 || check_blocksize(task.blocksize, "blocksize") < 0 ||
        ql_arg_dtype(&task.dtype, values[5], "dtype") < 0)
        return NULL;
    if (task.count < 0)
        return PyErr_Format(PyExc_ValueError, "count must be at least 0, got %lld", (long long)task.count);
    if (read_three(tensors, values, names) < 0) return NULL;
    if (check_flat(&tensors[0], "packed", taken_u8, task.count / 2 + task.count % 2) == 0 &&
        check_flat(&tensors[2], "code", taken_f32, 16) == 0)
        result = dequantize(values[0], tensors, &task, 1, &task.count, run_dequantize_4bit);
    for (int i = 0; i < 3; i++) ql_tensor_release(&tensors[i]);
    return result;
}

static PyObject *dequantize_blockwise(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"x", "absmax", "code", "blocksize", "dtype"};
    static const ql_signature signature = {"dequantize_blockwise", 5, 3, 5, names};
    PyObject *values[5], *result = NULL;
    blocks_task task = {.dtype = QL_F32};
    ql_tensor tensors[3];
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_int(&task.blocksize, values[3], "blocksize") < 0 || check_blocksize(task.blocksize, "blocksize") < 0 ||
        ql_arg_dtype(&task.dtype, values[4], "dtype") < 0 || read_three(tensors, values, names) < 0)
        return NULL;
    task.count = ql_tensor_numel(&tensors[0]);
    if (check_flat(&tensors[0], "x", taken_u8, task.count) == 0 &&
        check_flat(&tensors[2], "code", taken_f32, QL_MAP_SIZE) == 0)
        result = dequantize(values[0], tensors, &task, tensors[0].ndim, tensors[0].shape, run_dequantize_8bit);
    for (int i = 0; i < 3; i++) ql_tensor_release(&tensors[i]);
    return result;
}

PyMethodDef ql_fourbit_methods[] = {
    {"fourbit_code", QL_METHOD(fourbit_code), METH_FASTCALL | METH_KEYWORDS,
     "fourbit_code(quant_type)\n--\n\nThe 16 values of 'nf4' or 'fp4', in the order of their bit patterns."},
    {"dynamic_map", QL_METHOD(dynamic_map), METH_FASTCALL | METH_KEYWORDS,
     "dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)\n--\n\n"
     "The 256 values of bitsandbytes' dynamic map, ascending."},
    {"quantize_4bit", QL_METHOD(quantize_4bit), METH_FASTCALL | METH_KEYWORDS,
     "quantize_4bit(x, *, quant_type, blocksize)\n--\n\n"
     "x float, any shape -> (packed uint8 [(n + 1) // 2, 1], absmax float32 [blocks])."},
    {"dequantize_4bit", QL_METHOD(dequantize_4bit), METH_FASTCALL | METH_KEYWORDS,
     "dequantize_4bit(packed, absmax, code, *, count, blocksize, dtype)\n--\n\nThe inverse, [count] in dtype."},
    {"quantize_blockwise", QL_METHOD(quantize_blockwise), METH_FASTCALL | METH_KEYWORDS,
     "quantize_blockwise(x, code, *, blocksize)\n--\n\n"
     "x float, any shape, code float32 [256] ascending -> (uint8 of x's shape, absmax float32 [blocks])."},
    {"dequantize_blockwise", QL_METHOD(dequantize_blockwise), METH_FASTCALL | METH_KEYWORDS,
     "dequantize_blockwise(x, absmax, code, *, blocksize, dtype)\n--\n\nThe inverse, of x's shape in dtype."},
    {NULL, NULL, 0, NULL},
};

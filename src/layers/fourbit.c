/* Linear4bit: NF4 and FP4 weights of bitsandbytes. */
#include "../formats/dynamic_map.h"
#include "blocks.h"

#include <stdio.h>

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

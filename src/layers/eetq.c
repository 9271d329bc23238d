/* EETQLinear, and EETQ's quantizer and tile packing as functions. */
#include "../formats/eetq.h"
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "../cuda/recode.h"
#include "layer.h"
#include "quantize.h"

enum { PAIRS_A_RANGE = 16, ROWS_A_RANGE = 2 * PAIRS_A_RANGE };

/* ---- the layer ---- */

enum { HELD_WEIGHT, HELD_SCALES };

static int check_tiles(const char *name, int64_t in_features, int64_t out_features) {
    if (in_features % QL_EETQ_TILE == 0 && out_features % 2 == 0) return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s has in_features %lld and out_features %lld, EETQ's tiles take multiples of %d and of 2", name,
                 (long long)in_features, (long long)out_features, QL_EETQ_TILE);
    return -1;
}

static int eetq_bind(ql_layer *layer) {
    static const ql_dtype codes[] = {QL_I8};
    static const int64_t any[] = {-1, -1};
    const ql_tensor *weight = ql_layer_tensor(layer, HELD_WEIGHT), *scales = ql_layer_tensor(layer, HELD_SCALES);
    if (!weight || !scales) {
        PyErr_Format(PyExc_TypeError, "%s must be a tensor, got None", weight ? "weight_scales" : "weight");
        return -1;
    }
    if (ql_check_dtype(weight, "weight", 1, codes) < 0 || ql_check_shape(weight, "weight", 2, any) < 0 ||
        check_tiles("weight", weight->shape[0], weight->shape[1]) < 0 || ql_check_contiguous(weight, "weight") < 0)
        return -1;
    if (weight->shape[0] == 0) {
        PyErr_SetString(PyExc_ValueError, "weight has in_features 0, a layer takes at least one input");
        return -1;
    }
    if (ql_check_float(scales, "weight_scales", false) < 0 ||
        ql_check_shape(scales, "weight_scales", 1, weight->shape + 1) < 0 ||
        ql_check_contiguous(scales, "weight_scales") < 0 || ql_check_aligned(scales, "weight_scales") < 0)
        return -1;
    layer->weight = (ql_weight){
        .format = QL_FORMAT_EETQ,
        .n = weight->shape[1],
        .k = weight->shape[0],
        .eetq = {.weight = weight->data, .scales = scales->data, .scales_dtype = scales->dtype},
    };
    return 0;
}

static PyObject *eetq_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"weight", "weight_scales", "bias"};
    static const ql_signature signature = {"EETQLinear", 3, 3, 2, names};
    PyObject *values[3];
    if (ql_args_tuple(values, &signature, args, kwargs) < 0) return NULL;
    ql_layer *layer = ql_layer_alloc(type, eetq_bind, 0);
    if (!layer) return NULL;
    if (ql_layer_hold(layer, values[0], "weight") < 0 || ql_layer_hold(layer, values[1], "weight_scales") < 0 ||
        ql_layer_ready(layer, values[2]) < 0) {
        Py_DECREF(layer);
        return NULL;
    }
    return (PyObject *)layer;
}

/* ---- the quantizer ---- */

typedef struct quantize_work {
    ql_matrix source;
    void *codes, *scales;
    ql_dtype scales_dtype;
} quantize_work;

static void quantize_pairs(void *context, int64_t begin, int64_t end) {
    const quantize_work *work = context;
    ql_eetq_quantize(work->codes, work->scales, work->scales_dtype, &work->source, begin, end);
}

static void quantize_channels(void *context, int64_t begin, int64_t end) {
    const quantize_work *work = context;
    ql_eetq_codes(work->codes, work->scales, work->scales_dtype, &work->source, begin, end);
}

static int read_weight(ql_tensor *weight, PyObject *object, bool tiled) {
    static const int64_t any[] = {-1, -1};
    if (ql_tensor_read(weight, object, "weight") < 0) return -1;
    if (ql_check_float(weight, "weight", true) == 0 && ql_check_shape(weight, "weight", 2, any) == 0 &&
        ql_check_aligned(weight, "weight") == 0 &&
        (!tiled || check_tiles("weight", weight->shape[1], weight->shape[0]) == 0))
        return 0;
    ql_tensor_release(weight);
    return -1;
}

/* The two outputs, [K, N] and [N], in the framework of `like`. Of an fp64 weight the scales are fp32: that is what they
 * are computed in, and what the layer takes. */
static int begin_quantized(ql_output *codes, ql_output *scales, PyObject *like, const ql_tensor *weight) {
    const int64_t shape[] = {weight->shape[1], weight->shape[0]};
    ql_dtype scales_dtype = weight->dtype == QL_F64 ? QL_F32 : weight->dtype;
    if (ql_output_begin_beside(codes, like, weight, QL_I8, 2, shape) < 0) return -1;
    if (ql_output_begin_beside(scales, like, weight, scales_dtype, 1, shape + 1) == 0) return 0;
    ql_output_abandon(codes);
    return -1;
}

static PyObject *finish_quantized(ql_output *codes, ql_output *scales) {
    PyObject *first = ql_output_finish(codes);
    PyObject *second = first ? ql_output_finish(scales) : NULL;
    PyObject *both = second ? PyTuple_Pack(2, first, second) : NULL;
    ql_output_abandon(scales);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return both;
}

static void quantize_on_cpu(quantize_work *work, const ql_tensor *weight, bool tiled) {
    work->source = (ql_matrix){.data = weight->data,
                               .dtype = weight->dtype,
                               .rows = weight->shape[0],
                               .cols = weight->shape[1],
                               .row_stride = weight->stride[0],
                               .col_stride = weight->stride[1]};
    Py_BEGIN_ALLOW_THREADS
    if (tiled)
        ql_cpu_parallel(work->source.rows / 2, PAIRS_A_RANGE, quantize_pairs, work);
    else
        ql_cpu_parallel(work->source.rows, ROWS_A_RANGE, quantize_channels, work);
    Py_END_ALLOW_THREADS
}

static int quantize_on_gpu(const quantize_work *work, PyObject *object, const ql_tensor *weight, bool tiled) {
    ql_cuda_place place;
    ql_matrix rows;
    ql_output copy = {0}, absmax = {0};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    if (ql_place_of(&place, object, weight) == 0 && ql_device_rows(&rows, &copy, &place, object, weight) == 0) {
        if (tiled)
            result = ql_cuda_result(
                ql_cuda_eetq_quantize(&place, work->codes, work->scales, work->scales_dtype, &rows, message), message);
        else if (ql_device_scratch(&absmax, object, weight, rows.rows * (int64_t)sizeof(float)) == 0)
            result = ql_cuda_result(ql_cuda_eetq_codes(&place, work->codes, work->scales, work->scales_dtype, &rows,
                                                       absmax.view.data, message),
                                    message);
    }
    ql_output_abandon(&copy);
    ql_output_abandon(&absmax);
    return result;
}

static PyObject *quantize(PyObject *object, bool tiled) {
    ql_tensor weight;
    if (read_weight(&weight, object, tiled) < 0) return NULL;
    ql_output codes, scales;
    PyObject *result = NULL;
    if (begin_quantized(&codes, &scales, object, &weight) == 0) {
        quantize_work work = {.codes = codes.view.data, .scales = scales.view.data, .scales_dtype = scales.view.dtype};
        if (!ql_is_on_gpu(&weight)) {
            quantize_on_cpu(&work, &weight, tiled);
            result = finish_quantized(&codes, &scales);
        } else if (quantize_on_gpu(&work, object, &weight, tiled) == 0) {
            result = finish_quantized(&codes, &scales);
        } else {
            ql_output_abandon(&codes);
            ql_output_abandon(&scales);
        }
    }
    ql_tensor_release(&weight);
    return result;
}

static PyObject *eetq_quantize(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"weight"};
    static const ql_signature signature = {"eetq_quantize", 1, 1, 1, names};
    PyObject *weight;
    (void)module;
    return ql_args_fast(&weight, &signature, args, nargs, kwnames) < 0 ? NULL : quantize(weight, true);
}

static PyObject *eetq_codes(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"weight"};
    static const ql_signature signature = {"eetq_codes", 1, 1, 1, names};
    PyObject *weight;
    (void)module;
    return ql_args_fast(&weight, &signature, args, nargs, kwnames) < 0 ? NULL : quantize(weight, false);
}

/* ---- tiles and plain codes ---- */

typedef struct retile_work {
    const ql_tensor *from; /* int8 [K, N] */
    void *to;
} retile_work;

static void pack_pairs(void *context, int64_t begin, int64_t end) {
    const retile_work *work = context;
    const ql_tensor *codes = work->from;
    ql_eetq_pack(work->to, codes->data, codes->stride[0], codes->stride[1], codes->shape[0], begin, end);
}

static void unpack_pairs(void *context, int64_t begin, int64_t end) {
    const retile_work *work = context;
    const ql_tensor *weight = work->from;
    ql_eetq_unpack(work->to, weight->data, weight->shape[0], weight->shape[1], begin, end);
}

static int pack_on_gpu(const ql_cuda_place *place, void *to, const ql_tensor *from, char *message) {
    ql_matrix codes = {from->data, from->dtype, from->shape[0], from->shape[1], from->stride[0], from->stride[1]};
    return ql_cuda_eetq_pack(place, to, &codes, message);
}

static int unpack_on_gpu(const ql_cuda_place *place, void *to, const ql_tensor *from, char *message) {
    return ql_cuda_eetq_unpack(place, to, from->data, from->shape[0], from->shape[1], message);
}

typedef int (*retile_on_gpu)(const ql_cuda_place *, void *, const ql_tensor *, char *);

static int run_retile(PyObject *object, const ql_tensor *from, void *to, void (*pairs)(void *, int64_t, int64_t),
                      retile_on_gpu on_gpu) {
    if (ql_tensor_numel(from) == 0) return 0;
    if (ql_is_on_gpu(from)) {
        ql_cuda_place place;
        char message[QL_CUDA_MESSAGE];
        if (ql_place_of(&place, object, from) < 0) return -1;
        return ql_cuda_result(on_gpu(&place, to, from, message), message);
    }
    retile_work work = {.from = from, .to = to};
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(from->shape[1] / 2, PAIRS_A_RANGE, pairs, &work);
    Py_END_ALLOW_THREADS
    return 0;
}

/* int8 [K, N] of any strides -> int8 [K, N] by `pairs`, or on a GPU by its counterpart. */
static PyObject *retile(PyObject *object, const ql_tensor *from, const char *name,
                        void (*pairs)(void *, int64_t, int64_t), retile_on_gpu on_gpu) {
    static const ql_dtype taken[] = {QL_I8};
    static const int64_t any[] = {-1, -1};
    ql_output output;
    if (ql_check_dtype(from, name, 1, taken) < 0 || ql_check_shape(from, name, 2, any) < 0 ||
        check_tiles(name, from->shape[0], from->shape[1]) < 0 ||
        ql_output_begin_beside(&output, object, from, QL_I8, 2, from->shape) < 0)
        return NULL;
    if (run_retile(object, from, output.view.data, pairs, on_gpu) == 0) return ql_output_finish(&output);
    ql_output_abandon(&output);
    return NULL;
}

static PyObject *eetq_pack(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"codes"};
    static const ql_signature signature = {"eetq_pack", 1, 1, 1, names};
    PyObject *object;
    ql_tensor codes;
    (void)module;
    if (ql_args_fast(&object, &signature, args, nargs, kwnames) < 0 || ql_tensor_read(&codes, object, "codes") < 0)
        return NULL;
    PyObject *result = retile(object, &codes, "codes", pack_pairs, pack_on_gpu);
    ql_tensor_release(&codes);
    return result;
}

static PyObject *eetq_unpack(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"weight"};
    static const ql_signature signature = {"eetq_unpack", 1, 1, 1, names};
    PyObject *object;
    ql_tensor weight;
    (void)module;
    if (ql_args_fast(&object, &signature, args, nargs, kwnames) < 0 || ql_tensor_read(&weight, object, "weight") < 0)
        return NULL;
    /* Strides mean nothing between tiles, so only the bytes as they lie can be a weight. */
    PyObject *result = ql_check_contiguous(&weight, "weight") < 0
                           ? NULL
                           : retile(object, &weight, "weight", unpack_pairs, unpack_on_gpu);
    ql_tensor_release(&weight);
    return result;
}

/* ---- what the module takes from here ---- */

PyMethodDef ql_eetq_methods[] = {
    {"eetq_quantize", QL_METHOD(eetq_quantize), METH_FASTCALL | METH_KEYWORDS,
     "eetq_quantize(weight)\n--\n\nweight [N, K] -> (weight int8 [K, N] interleaved, weight_scales [N])."},
    {"eetq_codes", QL_METHOD(eetq_codes), METH_FASTCALL | METH_KEYWORDS,
     "eetq_codes(weight)\n--\n\nweight [N, K] -> (codes int8 [K, N] row-major, weight_scales [N])."},
    {"eetq_pack", QL_METHOD(eetq_pack), METH_FASTCALL | METH_KEYWORDS,
     "eetq_pack(codes)\n--\n\ncodes int8 [K, N] -> the interleaved weight, int8 [K, N]."},
    {"eetq_unpack", QL_METHOD(eetq_unpack), METH_FASTCALL | METH_KEYWORDS,
     "eetq_unpack(weight)\n--\n\nThe interleaved weight int8 [K, N] -> codes int8 [K, N]."},
    {NULL, NULL, 0, NULL},
};

int ql_eetq_add_type(PyObject *module) {
    return ql_layer_make_type(module, "_qlinear.EETQLinear", eetq_new,
                              "EETQLinear(weight, weight_scales, bias=None)\n--\n\n"
                              "int8 weights in EETQ's interleaved layout, one scale an output channel.",
                              NULL, NULL);
}

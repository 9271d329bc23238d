/* Fp8Linear: W8A8 and W8A16 on float8_e4m3fn weights, with the quantizer of activations and weights and the product of two
 * quantized matrices. */
#include "../formats/fp8.h"
#include "../cpu/engine.h"
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "grouped.h"
#include "quantize.h"
#include "scales.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

enum { HELD_WEIGHT, HELD_WEIGHT_SCALE, HELD_INPUT_SCALE, HELD_INPUT_SCALE_UB };

static const char *const activation_choices[] = {"none", "static", "tensor", "token", "group", NULL};

typedef struct fp8_extra {
    ql_fp8_activation activation;
    bool prefer_blocks; /* scales whose shape could be a channel's or a block's are a block's */
    bool promoted;
    float upper_bound; /* where it came as a number; infinity where none */
    int64_t block_n, block_k;
} fp8_extra;

/* The scales as a matrix, and what one of them is for. A shape that is both [1, N] and the grid of blocks is a channel's,
 * unless the activations come in groups or the blocks are not the usual ones; a grid may be larger than needed, the rest
 * is padding. */
static int view_weight_scale(ql_matrix *scales, ql_fp8 *weight, const ql_tensor *tensor, int64_t n, int64_t k,
                             const fp8_extra *extra) {
    int64_t down = ql_group_count(n, extra->block_n), across = ql_group_count(k, extra->block_k);
    bool is_pair = tensor->ndim == 2;
    bool is_exact = is_pair && tensor->shape[0] == down && tensor->shape[1] == across;
    bool is_grid = is_pair && tensor->shape[0] >= down && tensor->shape[1] >= across;
    if (!(extra->prefer_blocks && is_exact) && view_vector(scales, tensor, n)) {
        weight->block_n = scales->rows == 1 ? n : 1;
        weight->block_k = k;
        return 0;
    }
    if (is_grid) {
        *scales = (ql_matrix){tensor->data, scale_dtype(tensor), down, across, tensor->stride[0], tensor->stride[1]};
        weight->block_n = extra->block_n;
        weight->block_k = extra->block_k;
        return 0;
    }
    char got[256];
    PyErr_Format(PyExc_ValueError,
                 "weight_scale must have one element, shape [%lld], [%lld, 1] or [1, %lld], or a grid of blocks of at "
                 "least [%lld, %lld], got %s",
                 (long long)n, (long long)n, (long long)n, (long long)down, (long long)across,
                 ql_tensor_describe(tensor, got, sizeof got));
    return -1;
}

/* The scales in fp32, for a weight that cannot read the tensor itself. */
static const float *converted_scales(ql_layer *layer, const ql_matrix *scales) {
    int64_t bytes;
    if (floats_bytes(&bytes, scales->rows, scales->cols) < 0) return NULL;
    ql_kept *made = ql_kept_new((size_t)bytes);
    if (!made) return NULL;
    convert_scales((float *)(void *)made->data, scales);
    return ql_layer_keep(layer, made);
}

/* The value of a scale of one element, whatever its rank; nothing where it is absent. */
static int bind_one_scale(float *value, const ql_layer *layer, int index, const char *name) {
    const ql_tensor *tensor = ql_layer_tensor(layer, index);
    if (!tensor) return 0;
    void *copy;
    const void *contents = check_one_scale(tensor, name) < 0 ? NULL : ql_layer_contents(layer, index, &copy);
    if (!contents) return -1;
    *value = ql_f32_load(contents, scale_dtype(tensor), 0);
    free(copy);
    return 0;
}

/* The values that the weight has of its activations' scales. */
static int bind_activation(ql_fp8 *weight, const ql_layer *layer) {
    const fp8_extra *extra = layer->extra;
    weight->activation = extra->activation;
    weight->promoted = extra->promoted;
    weight->input_upper_bound = extra->upper_bound;
    if (bind_one_scale(&weight->input_scale, layer, HELD_INPUT_SCALE, "input_scale") < 0) return -1;
    return bind_one_scale(&weight->input_upper_bound, layer, HELD_INPUT_SCALE_UB, "input_scale_ub");
}

static int fp8_bind(ql_layer *layer) {
    const fp8_extra *extra = layer->extra;
    const ql_tensor *bytes = ql_layer_tensor(layer, HELD_WEIGHT);
    const ql_tensor *tensor = ql_layer_tensor(layer, HELD_WEIGHT_SCALE);
    ql_matrix scales;
    ql_weight weight = {.format = QL_FORMAT_FP8};
    ql_fp8 *fp8 = &weight.fp8;
    if (check_bytes(bytes, "weight") < 0 || check_not_empty(bytes, "weight") < 0 ||
        check_scale(tensor, "weight_scale") < 0 || bind_activation(fp8, layer) < 0 ||
        view_weight_scale(&scales, fp8, tensor, bytes->shape[0], bytes->shape[1], extra) < 0)
        return -1;
    weight.n = bytes->shape[0];
    weight.k = bytes->shape[1];
    fp8->weight = bytes->data;
    fp8->row_stride = bytes->stride[0];
    fp8->col_stride = bytes->stride[1];
    fp8->scale = scales.data;
    fp8->scale_stride = scales.row_stride;
    if (!is_direct(&scales)) {
        if (tensor->device_type != QL_DEVICE_CPU) {
            PyErr_Format(PyExc_NotImplementedError,
                         "weight_scale on a GPU must be float32 with contiguous rows, got %s",
                         ql_dtype_name(scale_dtype(tensor)));
            return -1;
        }
        fp8->scale = converted_scales(layer, &scales);
        fp8->scale_stride = scales.cols;
        if (!fp8->scale) return -1;
    }
    layer->weight = weight;
    /* On a GPU reading a value back would wait for the stream at each call, and no graph could capture it. */
    layer->copies_values =
        tensor->device_type == QL_DEVICE_CPU && (!is_direct(&scales) || ql_layer_tensor(layer, HELD_INPUT_SCALE) ||
                                                 ql_layer_tensor(layer, HELD_INPUT_SCALE_UB));
    const char *scope = fp8->block_k < weight.k || (fp8->block_n > 1 && fp8->block_n < weight.n) ? "block"
                        : fp8->block_n == 1                                                      ? "channel"
                                                                                                 : "tensor";
    snprintf(layer->summary, sizeof layer->summary, "activation=%s, weight_scale=%s",
             activation_choices[extra->activation], scope);
    return 0;
}

/* block_size: two positive ints. */
static int parse_block_size(fp8_extra *extra, PyObject *object) {
    int64_t *const sizes[2] = {&extra->block_n, &extra->block_k};
    extra->block_n = extra->block_k = 128;
    if (!object) return 0;
    if (!(PyTuple_Check(object) || PyList_Check(object)) || PySequence_Size(object) != 2) {
        PyErr_Format(PyExc_TypeError, "block_size must be a pair of ints, got %R", object);
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        if (!item) return -1;
        int result = ql_arg_int(sizes[i], item, i ? "block_size[1]" : "block_size[0]");
        Py_DECREF(item);
        if (result < 0) return -1;
    }
    if (extra->block_n >= 1 && extra->block_k >= 1) return 0;
    PyErr_Format(PyExc_ValueError, "block_size must be two sizes of at least 1, got %R", object);
    return -1;
}

/* Scales that the mode would not use are refused: a checkpoint that brings them means something else. */
static int check_activation_scales(ql_fp8_activation activation, PyObject *input_scale, PyObject *bound) {
    const char *name = activation_choices[activation];
    if (activation == QL_FP8_STATIC && ql_arg_is_none(input_scale)) {
        PyErr_SetString(PyExc_ValueError, "input_scale is missing: activation is 'static'");
        return -1;
    }
    if (activation != QL_FP8_STATIC && !ql_arg_is_none(input_scale)) {
        PyErr_Format(PyExc_ValueError, "input_scale is of activation 'static' only, got activation '%s'", name);
        return -1;
    }
    if (activation != QL_FP8_TOKEN && !ql_arg_is_none(bound)) {
        PyErr_Format(PyExc_ValueError, "input_scale_ub is of activation 'token' only, got activation '%s'", name);
        return -1;
    }
    return 0;
}

static PyObject *fp8_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    enum { WEIGHT, WEIGHT_SCALE, BIAS, ACTIVATION, INPUT_SCALE, INPUT_SCALE_UB, BLOCK_SIZE, PROMOTED, COUNT };
    static const char *const names[] = {"weight",      "weight_scale",   "bias",       "activation",
                                        "input_scale", "input_scale_ub", "block_size", "promoted"};
    static const ql_signature signature = {"Fp8Linear", COUNT, 3, 2, names};
    PyObject *values[COUNT];
    int activation = QL_FP8_TOKEN;
    fp8_extra extra = {.upper_bound = INFINITY};
    if (ql_args_tuple(values, &signature, args, kwargs) < 0 ||
        ql_arg_choice(&activation, values[ACTIVATION], "activation", activation_choices) < 0 ||
        check_activation_scales((ql_fp8_activation)activation, values[INPUT_SCALE], values[INPUT_SCALE_UB]) < 0 ||
        parse_block_size(&extra, values[BLOCK_SIZE]) < 0 ||
        ql_arg_bool(&extra.promoted, values[PROMOTED], "promoted") < 0)
        return NULL;
    PyObject *bound = values[INPUT_SCALE_UB];
    if (!ql_arg_is_none(bound) && is_number(bound)) {
        if (number_bound(&extra.upper_bound, bound, "input_scale_ub") < 0) return NULL;
        bound = NULL;
    }
    extra.activation = (ql_fp8_activation)activation;
    extra.prefer_blocks = extra.activation == QL_FP8_GROUP || extra.block_n != 128 || extra.block_k != 128;

    ql_layer *layer = ql_layer_alloc(type, fp8_bind, sizeof extra);
    if (!layer) return NULL;
    *(fp8_extra *)layer->extra = extra;
    if (ql_layer_hold_required(layer, values[WEIGHT], "weight") >= 0 &&
        ql_layer_hold_required(layer, values[WEIGHT_SCALE], "weight_scale") >= 0 &&
        ql_layer_hold(layer, values[INPUT_SCALE], "input_scale") >= 0 &&
        ql_layer_hold(layer, bound, "input_scale_ub") >= 0 && ql_layer_ready(layer, values[BIAS]) == 0)
        return (PyObject *)layer;
    Py_DECREF(layer);
    return NULL;
}

PyDoc_STRVAR(
    fp8_doc,
    "Fp8Linear(weight, weight_scale, bias=None, *, activation='token', input_scale=None, input_scale_ub=None,\n"
    "          block_size=(128, 128), promoted=False)\n--\n\n"
    "y = x W' + bias with W float8_e4m3fn (or its bytes, uint8) [N, K], any strides; weight_scale of one\n"
    "element, a row each, or a block each. activation: 'none' (W8A16), 'static' (input_scale), 'tensor',\n"
    "'token' or 'group' (of 128 columns). Scales in fp32 are read where they lie. promoted: on a GPU, sums of each\n"
    "128 products are added in fp32, not in the tensor cores' accumulators of about 14 bits.");

int ql_fp8_add_type(PyObject *module) {
    return ql_layer_make_type(module, "_qlinear.Fp8Linear", fp8_new, fp8_doc, NULL, NULL);
}

/* ------------------------------------------------------------------------------------------------------------------
 * fp8_quantize */

typedef enum quantize_mode { MODE_STATIC, MODE_TENSOR, MODE_TOKEN, MODE_GROUP, MODE_BLOCK } quantize_mode;

static const char *const mode_choices[] = {"static", "tensor", "token", "group", "block", NULL};

typedef struct quantize_task {
    ql_matrix x;
    uint8_t *codes;
    float *scales; /* as they are returned */
    float *absmax; /* [rows], of MODE_TENSOR on the CPU */
    quantize_mode mode;
    ql_cuda_number scale, bound; /* of MODE_STATIC, MODE_TOKEN; on the CPU values */
} quantize_task;

static void run_absmax(void *context, int64_t begin, int64_t end) {
    const quantize_task *task = context;
    ql_fp8_absmax_rows(task->absmax, &task->x, begin, end);
}

static void run_quantize_one(void *context, int64_t begin, int64_t end) {
    const quantize_task *task = context;
    ql_fp8_quantize_rows(task->codes, &task->x, task->scales, 0, true, begin, end);
}

static void run_quantize_tokens(void *context, int64_t begin, int64_t end) {
    const quantize_task *task = context;
    ql_fp8_absmax_rows(task->scales, &task->x, begin, end);
    for (int64_t row = begin; row < end; row++)
        task->scales[row] = ql_fp8_token_scale(task->scales[row], task->bound.value);
    ql_fp8_quantize_rows(task->codes, &task->x, task->scales, 1, false, begin, end);
}

static void run_quantize_blocks(void *context, int64_t begin, int64_t end) {
    const quantize_task *task = context;
    int64_t block_rows = task->mode == MODE_GROUP ? 1 : QL_FP8_GROUP_SIZE;
    ql_fp8_quantize_blocks(task->codes, task->scales, &task->x, block_rows, begin, end);
}

/* Rows of no columns, of which there may be any number, have nothing but the scale of a token. */
static int64_t rows_to_quantize(const quantize_task *task) {
    return task->x.cols == 0 && task->mode != MODE_TOKEN ? 0 : task->x.rows;
}

static void run_quantize(quantize_task *task) {
    int64_t rows = rows_to_quantize(task), cols = task->x.cols;
    int64_t grain = cols < 65536 ? 65536 / (cols > 0 ? cols : 1) : 1;
    switch (task->mode) {
    case MODE_TENSOR:
        ql_cpu_parallel(rows, grain, run_absmax, task);
        task->scales[0] = ql_fp8_scale(ql_fp8_absmax(task->absmax, rows));
        ql_cpu_parallel(rows, grain, run_quantize_one, task);
        break;
    case MODE_STATIC: ql_cpu_parallel(rows, grain, run_quantize_one, task); break;
    case MODE_TOKEN: ql_cpu_parallel(rows, grain, run_quantize_tokens, task); break;
    case MODE_GROUP: ql_cpu_parallel(rows, grain, run_quantize_blocks, task); break;
    case MODE_BLOCK: ql_cpu_parallel(ql_group_count(rows, QL_FP8_GROUP_SIZE), 1, run_quantize_blocks, task); break;
    }
}

/* The shape of the scales; its number of dimensions. */
static int scales_shape(int64_t *shape, const quantize_task *task, const ql_tensor *x) {
    shape[0] = task->mode == MODE_BLOCK ? ql_group_count(x->shape[0], QL_FP8_GROUP_SIZE) : x->shape[0];
    shape[1] = task->mode == MODE_TOKEN ? 1 : ql_group_count(x->shape[1], QL_FP8_GROUP_SIZE);
    if (task->mode != MODE_STATIC && task->mode != MODE_TENSOR) return 2;
    shape[0] = 1;
    return 1;
}

static int quantize_on_cpu(quantize_task *task, const ql_tensor *x) {
    task->x = ql_matrix_of(x);
    if (task->mode == MODE_STATIC) task->scales[0] = task->scale.value;
    int64_t rows = rows_to_quantize(task);
    if (task->mode == MODE_TENSOR && rows && !(task->absmax = alloc_floats(rows, 1))) return -1;
    Py_BEGIN_ALLOW_THREADS
    run_quantize(task);
    Py_END_ALLOW_THREADS
    free(task->absmax);
    return 0;
}

static int launch_quantize(const quantize_task *task, const ql_cuda_place *place, const ql_matrix *rows, float *absmax,
                           char *message) {
    switch (task->mode) {
    case MODE_STATIC: return ql_cuda_fp8_static(place, task->codes, task->scales, rows, &task->scale, message);
    case MODE_TENSOR: return ql_cuda_fp8_tensor(place, task->codes, task->scales, rows, absmax, message);
    case MODE_TOKEN: return ql_cuda_fp8_tokens(place, task->codes, task->scales, rows, &task->bound, message);
    case MODE_GROUP: return ql_cuda_fp8_blocks(place, task->codes, task->scales, rows, 1, message);
    default: return ql_cuda_fp8_blocks(place, task->codes, task->scales, rows, QL_FP8_GROUP_SIZE, message);
    }
}

static int quantize_on_gpu(const quantize_task *task, PyObject *object, const ql_tensor *x) {
    ql_cuda_place place;
    ql_matrix rows;
    ql_output copy = {0}, absmax = {0};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    int64_t scratch = task->mode == MODE_TENSOR ? x->shape[0] * (int64_t)sizeof(float) : 0;
    if (ql_place_of(&place, object, x) == 0 && ql_device_rows(&rows, &copy, &place, object, x) == 0 &&
        (scratch == 0 || ql_device_scratch(&absmax, object, x, scratch) == 0))
        result = ql_cuda_result(launch_quantize(task, &place, &rows, absmax.view.data, message), message);
    ql_output_abandon(&copy);
    ql_output_abandon(&absmax);
    return result;
}

static PyObject *quantize_matrix(PyObject *object, quantize_task *task, const ql_tensor *x) {
    ql_output outputs[2];
    int64_t shape[2];
    if (ql_output_begin_beside(&outputs[0], object, x, QL_E4M3, 2, x->shape) < 0) return NULL;
    int ndim = scales_shape(shape, task, x);
    if (ql_output_begin_beside(&outputs[1], object, x, QL_F32, ndim, shape) < 0) {
        ql_output_abandon(&outputs[0]);
        return NULL;
    }
    task->codes = outputs[0].view.data;
    task->scales = outputs[1].view.data;
    int result = ql_is_on_gpu(x) ? quantize_on_gpu(task, object, x) : quantize_on_cpu(task, x);
    if (result == 0) return ql_outputs_finish(outputs, 2);
    for (int i = 0; i < 2; i++) ql_output_abandon(&outputs[i]);
    return NULL;
}

/* A scale of one element, of the object: read by the kernel where it is on x's GPU and the kernel knows its dtype, else by
 * the host. */
static int one_scale(ql_cuda_number *number, const ql_tensor *tensor, PyObject *object, const char *name,
                     const ql_tensor *x) {
    if (check_one_scale(tensor, name) < 0) return -1;
    ql_dtype dtype = scale_dtype(tensor);
    bool is_there = ql_is_on_gpu(x) && ql_is_on_gpu(tensor) && x->device_id == tensor->device_id;
    if (is_there && dtype != QL_E8M0) {
        *number = (ql_cuda_number){.data = tensor->data, .dtype = dtype};
        return 0;
    }
    void *copy;
    const void *contents = ql_host_contents(&copy, object, tensor, name);
    if (contents) number->value = ql_f32_load(contents, dtype, 0);
    free(copy);
    return contents ? 0 : -1;
}

static int check_mode(quantize_mode mode, PyObject *scale, PyObject *bound) {
    if (mode == MODE_STATIC && ql_arg_is_none(scale)) {
        PyErr_SetString(PyExc_ValueError, "scale is missing: mode is 'static'");
        return -1;
    }
    if (mode != MODE_STATIC && !ql_arg_is_none(scale)) {
        PyErr_Format(PyExc_ValueError, "scale is of mode 'static' only, got mode '%s'", mode_choices[mode]);
        return -1;
    }
    if (mode != MODE_TOKEN && !ql_arg_is_none(bound)) {
        PyErr_Format(PyExc_ValueError, "scale_ub is of mode 'token' only, got mode '%s'", mode_choices[mode]);
        return -1;
    }
    return 0;
}

static int check_quantized(const ql_tensor *x) {
    static const int64_t any[2] = {-1, -1};
    return ql_check_float(x, "x", true) < 0 || ql_check_aligned(x, "x") < 0 ? -1 : ql_check_shape(x, "x", 2, any);
}

/* Quantizes x, with *number as the tensor `scale` has it, or, where that is None, as it is. */
static PyObject *quantize_objects(quantize_task *task, PyObject *x, ql_cuda_number *number, PyObject *scale,
                                  const char *scale_name) {
    ql_tensor tensors[2];
    PyObject *const objects[] = {x, scale}, *result = NULL;
    const char *const names[] = {"x", scale_name};
    int count = ql_arg_is_none(scale) ? 1 : 2;
    if (ql_tensor_read_all(tensors, objects, names, count) < 0) return NULL;
    if (check_quantized(&tensors[0]) == 0 &&
        (count == 1 || one_scale(number, &tensors[1], scale, scale_name, &tensors[0]) == 0))
        result = quantize_matrix(x, task, &tensors[0]);
    ql_tensors_release(tensors, count);
    return result;
}

static PyObject *fp8_quantize(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    enum { X, SCALE, MODE, SCALE_UB, COUNT };
    static const char *const names[] = {"x", "scale", "mode", "scale_ub"};
    static const ql_signature signature = {"fp8_quantize", COUNT, 2, 1, names};
    PyObject *values[COUNT];
    quantize_task task = {.bound.value = INFINITY};
    int mode = MODE_TOKEN;
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0) return NULL;
    if (!values[MODE]) return PyErr_Format(PyExc_TypeError, "fp8_quantize: mode is missing");
    if (ql_arg_choice(&mode, values[MODE], "mode", mode_choices) < 0 ||
        check_mode((quantize_mode)mode, values[SCALE], values[SCALE_UB]) < 0)
        return NULL;
    task.mode = (quantize_mode)mode;
    if (task.mode == MODE_STATIC) return quantize_objects(&task, values[X], &task.scale, values[SCALE], "scale");
    PyObject *bound = values[SCALE_UB];
    if (!ql_arg_is_none(bound) && is_number(bound)) {
        if (number_bound(&task.bound.value, bound, "scale_ub") < 0) return NULL;
        bound = NULL;
    }
    return quantize_objects(&task, values[X], &task.bound, bound, "scale_ub");
}

/* ------------------------------------------------------------------------------------------------------------------
 * fp8_matmul: rows of a are decoded, scaled, and multiplied with b as a weight, a panel at a time */

enum { PANEL = 256 }; /* rows: enough that decoding b once a panel is little beside the product */

typedef struct matmul_task {
    ql_matrix a, scale_a;
    int64_t first, rows; /* the panel */
    float *x;            /* [PANEL, K] */
    float *y;            /* [PANEL, N], or in the output itself */
    ql_weight weight;
    ql_output output;
} matmul_task;

static void run_decode(void *context, int64_t begin, int64_t end) {
    const matmul_task *task = context;
    const ql_matrix *a = &task->a;
    for (int64_t i = begin; i < end; i++) {
        int64_t row = task->first + i;
        float scale = ql_matrix_f32(&task->scale_a, task->scale_a.rows == 1 ? 0 : row, 0);
        float value[256];
        for (int code = 0; code < 256; code++) value[code] = ql_f32_from_e4m3((uint8_t)code) * scale;
        for (int64_t k = 0; k < a->cols; k++) task->x[i * a->cols + k] = value[ql_matrix_u8(a, row, k)];
    }
}

static void run_round(void *context, int64_t begin, int64_t end) {
    const matmul_task *task = context;
    int64_t n = task->weight.n;
    for (int64_t i = begin * n; i < end * n; i++)
        ql_f32_store(task->output.view.data, task->output.view.dtype, task->first * n + i, task->y[i]);
}

/* 0, or -1 where the engine had no memory. */
static int run_matmul(matmul_task *task, const float *bias) {
    int64_t n = task->weight.n, k = task->weight.k;
    bool is_rounded = task->output.view.dtype != QL_F32;
    for (task->first = 0; task->first < task->a.rows; task->first += PANEL) {
        task->rows = task->a.rows - task->first < PANEL ? task->a.rows - task->first : PANEL;
        ql_cpu_parallel(task->rows, 16, run_decode, task);
        float *y = is_rounded ? task->y : (float *)task->output.view.data + task->first * n;
        if (ql_cpu_linear(y, task->x, k, QL_F32, task->rows, &task->weight, bias) < 0) return -1;
        if (is_rounded) ql_cpu_parallel(task->rows, 16, run_round, task);
    }
    return 0;
}

/* A vector of `count` floats as fp32, where it lies or in *copy, which the caller frees. */
static int contiguous_floats(const float **floats, float **copy, const ql_matrix *vector) {
    *floats = vector->data;
    *copy = NULL;
    if (vector->dtype == QL_F32 && (vector->rows == 1 || vector->row_stride == 1)) return 0;
    if (!(*copy = alloc_floats(vector->rows, 1))) return -1;
    convert_scales(*copy, vector);
    *floats = *copy;
    return 0;
}

static int check_factor_scale(ql_matrix *scales, const ql_tensor *tensor, const char *name, int64_t count) {
    if (check_scale(tensor, name) < 0) return -1;
    if (view_vector(scales, tensor, count)) return 0;
    char got[256];
    PyErr_Format(PyExc_ValueError, "%s must have one element or shape [%lld], [%lld, 1] or [1, %lld], got %s", name,
                 (long long)count, (long long)count, (long long)count, ql_tensor_describe(tensor, got, sizeof got));
    return -1;
}

enum { A, B, SCALE_A, SCALE_B, BIAS, DTYPE, MATMUL_COUNT };

/* tensors [A .. BIAS] are read; has_bias tells whether the last one is there. */
static int check_matmul(matmul_task *task, ql_matrix *scale_b, ql_matrix *bias, const ql_tensor *tensors,
                        bool has_bias) {
    const ql_tensor *a = &tensors[A], *b = &tensors[B];
    if (check_bytes(a, "a") < 0 || check_bytes(b, "b") < 0 || check_not_empty(b, "b") < 0) return -1;
    int64_t k = b->shape[0], n = b->shape[1];
    if (a->shape[1] != k) {
        PyErr_Format(PyExc_ValueError, "a must have as many columns as b has rows, %lld, got [%lld, %lld]",
                     (long long)k, (long long)a->shape[0], (long long)a->shape[1]);
        return -1;
    }
    if (check_factor_scale(&task->scale_a, &tensors[SCALE_A], "scale_a", a->shape[0]) < 0 ||
        check_factor_scale(scale_b, &tensors[SCALE_B], "scale_b", n) < 0)
        return -1;
    if (has_bias) {
        const ql_tensor *tensor = &tensors[BIAS];
        if (ql_check_float(tensor, "bias", true) < 0 || ql_check_aligned(tensor, "bias") < 0 ||
            ql_check_shape(tensor, "bias", 1, &n) < 0)
            return -1;
        *bias = (ql_matrix){tensor->data, tensor->dtype, n, 1, tensor->stride[0], 0};
    }
    task->a = ql_matrix_of(a);
    task->weight = (ql_weight){.format = QL_FORMAT_FP8, .n = n, .k = k};
    task->weight.fp8 = (ql_fp8){
        .weight = b->data,
        .row_stride = b->stride[1],
        .col_stride = b->stride[0],
        .block_n = scale_b->rows == 1 ? n : 1,
        .block_k = k,
        .scale_stride = 1,
        .activation = QL_FP8_NONE,
    };
    return 0;
}

static PyObject *matmul_checked(PyObject *object, matmul_task *task, ql_dtype dtype, const float *bias) {
    int64_t m = task->a.rows, shape[2] = {m, task->weight.n}, panel = m < PANEL ? m : PANEL;
    if (ql_output_begin(&task->output, object, dtype, 2, shape) < 0) return NULL;
    if (m == 0) return ql_output_finish(&task->output);
    task->x = alloc_floats(panel, task->weight.k);
    if (task->x && dtype != QL_F32) task->y = alloc_floats(panel, task->weight.n);
    int result = task->x && (task->y || dtype == QL_F32) ? 0 : -1;
    if (result == 0) {
        Py_BEGIN_ALLOW_THREADS
        result = run_matmul(task, bias);
        Py_END_ALLOW_THREADS
        if (result < 0) PyErr_NoMemory();
    }
    free(task->x);
    free(task->y);
    if (result == 0) return ql_output_finish(&task->output);
    ql_output_abandon(&task->output);
    return NULL;
}

static PyObject *fp8_matmul(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"a", "b", "scale_a", "scale_b", "bias", "dtype"};
    static const ql_signature signature = {"fp8_matmul", MATMUL_COUNT, 5, 4, names};
    PyObject *values[MATMUL_COUNT], *result = NULL;
    matmul_task task = {0};
    ql_tensor tensors[BIAS + 1];
    ql_matrix scale_b, bias_vector = {0};
    ql_dtype dtype = QL_F32;
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0) return NULL;
    if (!values[DTYPE]) return PyErr_Format(PyExc_TypeError, "fp8_matmul: dtype is missing");
    if (ql_arg_dtype(&dtype, values[DTYPE], "dtype") < 0) return NULL;
    bool has_bias = !ql_arg_is_none(values[BIAS]);
    int count = has_bias ? BIAS + 1 : BIAS, on_cpu = 0;
    if (ql_tensor_read_all(tensors, values, names, count) < 0) return NULL;
    while (on_cpu < count && ql_check_on_cpu(&tensors[on_cpu], names[on_cpu]) == 0) on_cpu++;
    if (on_cpu == count && check_matmul(&task, &scale_b, &bias_vector, tensors, has_bias) == 0) {
        const float *bias = NULL;
        float *scale_copy = NULL, *bias_copy = NULL;
        if (contiguous_floats(&task.weight.fp8.scale, &scale_copy, &scale_b) == 0 &&
            (!has_bias || contiguous_floats(&bias, &bias_copy, &bias_vector) == 0))
            result = matmul_checked(values[A], &task, dtype, bias);
        free(scale_copy);
        free(bias_copy);
    }
    ql_tensors_release(tensors, count);
    return result;
}

PyMethodDef ql_fp8_methods[] = {
    {"fp8_quantize", QL_METHOD(fp8_quantize), METH_FASTCALL | METH_KEYWORDS,
     "fp8_quantize(x, scale=None, *, mode, scale_ub=None)\n--\n\n"
     "x float [R, C] -> (float8_e4m3fn [R, C], or uint8 where x's framework has no float8; scale float32). mode:\n"
     "'static' (scale given), 'tensor' [1], 'token' [R, 1], 'group' [R, ceil(C / 128)] or 'block' [ceil(R / 128),\n"
     "ceil(C / 128)]."},
    {"fp8_matmul", QL_METHOD(fp8_matmul), METH_FASTCALL | METH_KEYWORDS,
     "fp8_matmul(a, b, scale_a, scale_b, bias=None, *, dtype)\n--\n\n"
     "a [M, K] @ b [K, N] of float8_e4m3fn, any strides, times scale_a (one or M) and scale_b (one or N), plus bias."},
    {NULL, NULL, 0, NULL},
};

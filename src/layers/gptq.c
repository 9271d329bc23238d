/* The type QuantLinear and the functions of the GPTQ storage. */
#include "../formats/gptq.h"
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "../formats/bits.h"
#include "grouped.h"
#include "quantize.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { QWEIGHT, QZEROS, SCALES, G_IDX };

/* In the order of the zero_format argument's names. */
typedef enum ql_zero_format { QL_ZEROS_AUTO, QL_ZEROS_V1, QL_ZEROS_V2 } ql_zero_format;
static const char *const ql_zero_formats[] = {"auto", "gptq", "gptq_v2", NULL};

typedef struct ql_gptq_config {
    int bits;
    int64_t group_size;  /* as given: -1 or at least 1 */
    int64_t in_features; /* 0: not given */
    ql_zero_format zero_format;
} ql_gptq_config;

/* ------------------------------------------------------------------------------------------------------------------
 * From tensors to a weight */

/* g_idx as it counts: NULL for a tensor that is absent or empty, which some writers leave where there is no act-order. */
static const ql_tensor *ql_gptq_g_idx_tensor(const ql_layer *layer) {
    const ql_tensor *g_idx = ql_layer_tensor(layer, G_IDX);
    return g_idx && ql_tensor_numel(g_idx) > 0 ? g_idx : NULL;
}

/* K: the argument, else the length of g_idx, else as many whole codes as the rows of qweight hold. */
static int ql_gptq_in_features(int64_t *k, const ql_gptq_config *config, const ql_tensor *qweight,
                               const ql_tensor *g_idx) {
    int64_t rows = qweight->shape[0], bits = config->bits, derived;
    if (__builtin_mul_overflow(rows / bits, (int64_t)QL_CHUNK, &derived) ||
        __builtin_add_overflow(derived, rows % bits * QL_CHUNK / bits, &derived)) {
        PyErr_Format(PyExc_ValueError, "qweight has too many rows: %lld", (long long)rows);
        return -1;
    }
    *k = config->in_features ? config->in_features : g_idx ? g_idx->shape[0] : derived;
    if (ql_code_words(*k, config->bits) == rows) return 0;
    PyErr_Format(PyExc_ValueError, "qweight must have %lld rows for in_features=%lld and bits=%d, got %lld",
                 (long long)ql_code_words(*k, config->bits), (long long)*k, config->bits, (long long)rows);
    return -1;
}

static int ql_gptq_check(const ql_layer *layer) {
    static const ql_dtype word[] = {QL_I32}, index[] = {QL_I32, QL_I64};
    static const int64_t any[] = {-1, -1};
    const ql_tensor *qweight = &layer->held[QWEIGHT].tensor;
    const ql_tensor *qzeros = &layer->held[QZEROS].tensor;
    const ql_tensor *scales = &layer->held[SCALES].tensor;
    const ql_tensor *g_idx = ql_layer_tensor(layer, G_IDX);
    if (ql_check_dtype(qweight, "qweight", 1, word) < 0 || ql_check_shape(qweight, "qweight", 2, any) < 0 ||
        ql_check_contiguous(qweight, "qweight") < 0 || ql_check_dtype(qzeros, "qzeros", 1, word) < 0 ||
        ql_check_contiguous(qzeros, "qzeros") < 0 || ql_check_float(scales, "scales", false) < 0 ||
        ql_check_contiguous(scales, "scales") < 0)
        return -1;
    if (!g_idx) return 0;
    return ql_check_dtype(g_idx, "g_idx", 2, index) < 0 || ql_check_shape(g_idx, "g_idx", 1, any) < 0 ||
                   ql_check_aligned(g_idx, "g_idx") < 0
               ? -1
               : 0;
}

/* The resolved g_idx, int32 [k], in *copy for the caller to own, NULL where it is trivial; contents: its elements on the
 * host. */
static int ql_gptq_copy_g_idx(ql_kept **copy, const void *contents, const ql_tensor *g_idx, const ql_gptq *gptq,
                              int64_t k) {
    *copy = NULL;
    ql_kept *resolved = ql_kept_new((size_t)k * sizeof(int32_t));
    if (!resolved) return -1;
    int64_t position = 0;
    ql_g_idx kind = ql_gptq_resolve_g_idx((int32_t *)(void *)resolved->data, &position, contents, g_idx->dtype,
                                          g_idx->stride[0], k, gptq->groups, gptq->group_size);
    if (kind == QL_G_IDX_GENERAL) {
        *copy = resolved;
        return 0;
    }
    free(resolved);
    if (kind == QL_G_IDX_TRIVIAL) return 0;
    int64_t at = position * g_idx->stride[0];
    long long value = g_idx->dtype == QL_I64 ? ((const int64_t *)contents)[at] : ((const int32_t *)contents)[at];
    PyErr_Format(PyExc_ValueError, "g_idx must be in [-%lld, %lld), got %lld at position %lld", (long long)gptq->groups,
                 (long long)gptq->groups, value, (long long)position);
    return -1;
}

static void ql_gptq_summarize(ql_layer *layer, const ql_gptq_config *config) {
    snprintf(layer->summary, sizeof layer->summary, "bits=%d, group_size=%lld, zero_format='%s'%s", config->bits,
             (long long)config->group_size, ql_zero_formats[layer->weight.gptq.zero_offset ? QL_ZEROS_V1 : QL_ZEROS_V2],
             layer->weight.gptq.g_idx ? ", act_order" : "");
}

/* What bind takes of g_idx: a new copy in *copy on the CPU; on a GPU its own memory in gptq->g_idx, if nothing in it has to
 * be resolved. Neither where it is trivial. */
static int ql_gptq_bind_g_idx(ql_kept **copy, ql_gptq *gptq, const ql_layer *layer, int64_t k) {
    const ql_tensor *g_idx = ql_gptq_g_idx_tensor(layer);
    *copy = NULL;
    if (!g_idx) return 0;
    void *read;
    const void *contents = ql_layer_contents(layer, G_IDX, &read);
    int result = contents ? ql_gptq_copy_g_idx(copy, contents, g_idx, gptq, k) : -1;
    if (result == 0 && *copy && g_idx->device_type != QL_DEVICE_CPU) {
        if (g_idx->dtype == QL_I32 && memcmp(contents, (*copy)->data, (*copy)->bytes) == 0) {
            gptq->g_idx = g_idx->data;
        } else {
            PyErr_SetString(PyExc_NotImplementedError,
                            "g_idx on a GPU must be int32 without negative entries where it is not trivial");
            result = -1;
        }
        free(*copy);
        *copy = NULL;
    }
    free(read);
    return result;
}

/* 1 or 0 in gptq->zero_offset, by the argument or, for "auto", by the zeros themselves. */
static int ql_gptq_bind_zeros(ql_gptq *gptq, const ql_layer *layer, int64_t n) {
    const ql_gptq_config *config = layer->extra;
    gptq->zero_offset = config->zero_format == QL_ZEROS_V1;
    if (config->zero_format != QL_ZEROS_AUTO) return 0;
    void *read;
    const void *contents = ql_layer_contents(layer, QZEROS, &read);
    /* An empty tensor may have no memory. */
    if (!contents && PyErr_Occurred()) return -1;
    gptq->zero_offset = !ql_gptq_zeros_are_middle(contents, gptq->groups, n, gptq->bits);
    free(read);
    return 0;
}

/* On the CPU g_idx is checked and copied here, once: the engine indexes with entries that nobody can change any more. So a
 * change of its contents in place is not seen, and neither is one of qzeros by zero_format "auto". */
static int ql_gptq_bind(ql_layer *layer) {
    const ql_gptq_config *config = layer->extra;
    const ql_tensor *qweight = &layer->held[QWEIGHT].tensor;
    const ql_tensor *qzeros = &layer->held[QZEROS].tensor;
    const ql_tensor *scales = &layer->held[SCALES].tensor;
    const ql_tensor *g_idx = ql_gptq_g_idx_tensor(layer);
    int64_t k;
    if (ql_gptq_check(layer) < 0 || ql_gptq_in_features(&k, config, qweight, g_idx) < 0 ||
        (g_idx && ql_check_shape(g_idx, "g_idx", 1, &k) < 0))
        return -1;
    int64_t n = qweight->shape[1];
    int64_t group_size = ql_group_columns(config->group_size, k);
    /* A part of an act-order layer, split along K for several GPUs, keeps all groups: its g_idx counts in the whole. */
    bool is_part = g_idx && scales->ndim == 2 && scales->shape[0] >= 1;
    int64_t groups = is_part ? scales->shape[0] : ql_group_count(k, group_size);
    const int64_t zeros_shape[] = {groups, ql_code_words(n, config->bits)}, scales_shape[] = {groups, n};
    if (ql_check_shape(qzeros, "qzeros", 2, zeros_shape) < 0 || ql_check_shape(scales, "scales", 2, scales_shape) < 0)
        return -1;
    ql_gptq gptq = {
        .qweight = qweight->data,
        .qzeros = qzeros->data,
        .scales = scales->data,
        .scales_dtype = scales->dtype,
        .bits = config->bits,
        .group_size = group_size,
        .groups = groups,
    };
    ql_kept *copy;
    if (ql_gptq_bind_zeros(&gptq, layer, n) < 0 || ql_gptq_bind_g_idx(&copy, &gptq, layer, k) < 0) return -1;
    if (copy) gptq.g_idx = ql_layer_keep(layer, copy);
    layer->weight = (ql_weight){.format = QL_FORMAT_GPTQ, .n = n, .k = k, .gptq = gptq};
    ql_gptq_summarize(layer, config);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

static int ql_gptq_configure(ql_gptq_config *config, PyObject *bits, PyObject *group_size, PyObject *zero_format,
                             PyObject *in_features) {
    int64_t width = 0;
    int choice = QL_ZEROS_AUTO;
    if (!bits) {
        PyErr_SetString(PyExc_TypeError, "QuantLinear: bits is missing");
        return -1;
    }
    if (ql_arg_int(&width, bits, "bits") < 0 || ql_check_bits(width) < 0 ||
        ql_arg_group_size(&config->group_size, group_size, "QuantLinear") < 0 ||
        ql_arg_choice(&choice, zero_format, "zero_format", ql_zero_formats) < 0)
        return -1;
    config->bits = (int)width;
    config->zero_format = (ql_zero_format)choice;
    if (ql_arg_is_none(in_features)) return 0;
    if (ql_arg_int(&config->in_features, in_features, "in_features") < 0) return -1;
    if (config->in_features >= 1) return 0;
    PyErr_Format(PyExc_ValueError, "in_features must be at least 1, got %lld", (long long)config->in_features);
    return -1;
}

static PyObject *ql_gptq_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"qweight", "qzeros",     "scales",      "g_idx",      "bias",
                                        "bits",    "group_size", "zero_format", "in_features"};
    static const ql_signature signature = {"QuantLinear", 9, 5, 3, names};
    PyObject *values[9];
    if (ql_args_tuple(values, &signature, args, kwargs) < 0) return NULL;
    ql_layer *layer = ql_layer_alloc(type, ql_gptq_bind, sizeof(ql_gptq_config));
    if (!layer) return NULL;
    if (ql_gptq_configure(layer->extra, values[5], values[6], values[7], values[8]) == 0 &&
        ql_layer_hold_required(layer, values[0], names[0]) == QWEIGHT &&
        ql_layer_hold_required(layer, values[1], names[1]) == QZEROS &&
        ql_layer_hold_required(layer, values[2], names[2]) == SCALES &&
        ql_layer_hold(layer, values[3], names[3]) == G_IDX && ql_layer_ready(layer, values[4]) == 0)
        return (PyObject *)layer;
    Py_DECREF((PyObject *)layer);
    return NULL;
}

static PyObject *ql_gptq_zero_format(PyObject *self, void *unused) {
    (void)unused;
    const ql_gptq *gptq = &((ql_layer *)self)->weight.gptq;
    return PyUnicode_FromString(ql_zero_formats[gptq->zero_offset ? QL_ZEROS_V1 : QL_ZEROS_V2]);
}

static PyGetSetDef ql_gptq_getset[] = {
    {"zero_format", ql_gptq_zero_format, NULL, "How the zeros are read: 'gptq' (stored less one) or 'gptq_v2'.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int ql_gptq_add_type(PyObject *module) {
    return ql_layer_make_type(module, "_qlinear.QuantLinear", ql_gptq_new,
                              "QuantLinear(qweight, qzeros, scales, g_idx=None, bias=None, *, bits, group_size, "
                              "zero_format='auto', in_features=None)\n--\n\nA linear layer of the GPTQ family, 2, 3, 4 "
                              "or 8 bit. g_idx, and the zeros for zero_format='auto', are read when the layer is made.",
                              NULL, ql_gptq_getset);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The functions */

/* What a function works on; each uses its part. */
typedef struct ql_gptq_job {
    ql_matrix input, scales, zeros;
    const int32_t *g_idx; /* resolved, or NULL; on the CPU */
    const ql_tensor *device_g_idx;
    int64_t group_size;
    int bits, zero_offset;
    bool sym;
    void *output, *second_output, *third_output;
} ql_gptq_job;

static void ql_find_params_body(void *context, int64_t begin, int64_t end) {
    const ql_gptq_job *job = context;
    ql_gptq_find_params(job->output, job->second_output, &job->input, job->group_size, job->bits, job->sym, begin, end);
}

static int ql_find_params_launch(const ql_cuda_place *place, const ql_gptq_job *job, char *message) {
    return ql_cuda_group_params(place, job->output, job->second_output, &job->input, job->group_size, job->bits,
                                job->sym ? QL_CUDA_GPTQ_SYMMETRIC : QL_CUDA_GPTQ, message);
}

static void ql_pack_weight_body(void *context, int64_t begin, int64_t end) {
    const ql_gptq_job *job = context;
    ql_gptq_pack_weight(job->output, &job->input, &job->scales, &job->zeros, job->g_idx, job->group_size, job->bits,
                        begin, end);
}

static void ql_pack_params_body(void *context, int64_t begin, int64_t end) {
    const ql_gptq_job *job = context;
    ql_gptq_pack_params(job->second_output, job->third_output, &job->scales, &job->zeros, job->bits, job->zero_offset,
                        begin, end);
}

static int ql_pack_launch(const ql_cuda_place *place, const ql_gptq_job *job, char *message) {
    ql_cuda_encoding encoding = {.rows = job->input,
                                 .scales = job->scales,
                                 .zeros = job->zeros,
                                 .group_size = job->group_size,
                                 .bits = job->bits,
                                 .zero_offset = job->zero_offset};
    if (job->device_g_idx) {
        encoding.g_idx = job->device_g_idx->data;
        encoding.g_idx_dtype = job->device_g_idx->dtype;
        encoding.g_idx_stride = job->device_g_idx->stride[0];
    }
    return ql_cuda_encode(place, job->output, job->second_output, job->third_output, &encoding, message);
}

static void ql_gptq_run(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), ql_gptq_job *job) {
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(count, grain, body, job);
    Py_END_ALLOW_THREADS
}

/* The launch on the weight's GPU, where its values are made contiguous rows. */
static int ql_gptq_launch(ql_gptq_job *job, PyObject *object, const ql_tensor *weight,
                          int (*launch)(const ql_cuda_place *, const ql_gptq_job *, char *)) {
    ql_cuda_place place;
    ql_output copy = {0};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    if (ql_place_of(&place, object, weight) == 0 && ql_device_rows(&job->input, &copy, &place, object, weight) == 0)
        result = ql_cuda_result(launch(&place, job, message), message);
    ql_output_abandon(&copy);
    return result;
}

static int ql_find_params_run(ql_gptq_job *job, PyObject *object, const ql_tensor *weight) {
    if (ql_tensor_numel(weight) == 0) return 0; /* the outputs are empty as well, whatever sizes it claims */
    if (ql_is_on_gpu(weight)) return ql_gptq_launch(job, object, weight, ql_find_params_launch);
    ql_gptq_run(job->input.rows, ql_row_grain(job->input.cols), ql_find_params_body, job);
    return 0;
}

static PyObject *ql_gptq_find_params_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"weight", "bits", "group_size", "sym"};
    static const ql_signature signature = {"gptq_find_params", 4, 1, 3, names};
    PyObject *values[4];
    ql_gptq_job job = {0};
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_bits(&job.bits, values[1]) < 0 ||
        ql_arg_group_size(&job.group_size, values[2], signature.function) < 0 ||
        ql_arg_bool(&job.sym, values[3], "sym") < 0)
        return NULL;
    ql_tensor weight;
    if (ql_tensors_read(&weight, values, names, 1, 2) < 0) return NULL;
    PyObject *result = NULL;
    if (ql_check_float(&weight, "weight", true) == 0) {
        static const ql_dtype dtypes[] = {QL_F32, QL_F32};
        job.input = ql_matrix_of(&weight);
        job.group_size = ql_group_columns(job.group_size, job.input.cols);
        int64_t groups = ql_group_count(job.input.cols, job.group_size);
        const int64_t shapes[][2] = {{job.input.rows, groups}, {job.input.rows, groups}};
        ql_output outputs[2];
        if (ql_outputs_begin(outputs, values[0], &weight, 2, dtypes, shapes) == 0) {
            job.output = outputs[0].view.data;
            job.second_output = outputs[1].view.data;
            if (ql_find_params_run(&job, values[0], &weight) == 0)
                result = ql_outputs_finish(outputs, 2);
            else
                ql_outputs_abandon(outputs, 2);
        }
    }
    ql_tensor_release(&weight);
    return result;
}

/* The part of gptq_pack after its tensors are read: weight, scales, zeros. */
static PyObject *ql_gptq_pack_tensors(ql_gptq_job *job, const ql_tensor *tensors, PyObject *like) {
    static const ql_dtype dtypes[] = {QL_I32, QL_I32, QL_F16};
    int64_t n = tensors[0].shape[0], k = tensors[0].shape[1];
    int64_t groups = ql_group_count(k, job->group_size);
    const int64_t params_shape[] = {n, groups};
    if (ql_check_float(&tensors[0], "weight", true) < 0 || ql_check_float(&tensors[1], "scales", true) < 0 ||
        ql_check_float(&tensors[2], "zeros", true) < 0 || ql_check_shape(&tensors[1], "scales", 2, params_shape) < 0 ||
        ql_check_shape(&tensors[2], "zeros", 2, params_shape) < 0)
        return NULL;
    const int64_t shapes[][2] = {{ql_code_words(k, job->bits), n}, {groups, ql_code_words(n, job->bits)}, {groups, n}};
    job->input = ql_matrix_of(&tensors[0]);
    job->scales = ql_matrix_of(&tensors[1]);
    job->zeros = ql_matrix_of(&tensors[2]);
    ql_output outputs[3];
    if (ql_outputs_begin(outputs, like, &tensors[0], 3, dtypes, shapes) < 0) return NULL;
    job->output = outputs[0].view.data;
    job->second_output = outputs[1].view.data;
    job->third_output = outputs[2].view.data;
    if (ql_tensor_numel(&tensors[0]) == 0) return ql_outputs_finish(outputs, 3); /* all are empty as well */
    if (!ql_is_on_gpu(&tensors[0])) {
        ql_gptq_run(n, 16, ql_pack_weight_body, job);
        ql_gptq_run(groups, 4, ql_pack_params_body, job);
    } else if (ql_gptq_launch(job, like, &tensors[0], ql_pack_launch) < 0) {
        ql_outputs_abandon(outputs, 3);
        return NULL;
    }
    return ql_outputs_finish(outputs, 3);
}

/* Checks gptq_pack's g_idx and resolves it on the host, on a GPU as well: only there an entry out of range can be told. */
static int ql_gptq_read_g_idx(ql_kept **copy, PyObject *object, const ql_tensor *g_idx, int64_t group_size, int64_t k) {
    static const ql_dtype index[] = {QL_I32, QL_I64};
    ql_gptq gptq = {.group_size = group_size, .groups = ql_group_count(k, group_size)};
    if (ql_check_dtype(g_idx, "g_idx", 2, index) < 0 || ql_check_shape(g_idx, "g_idx", 1, &k) < 0) return -1;
    void *read;
    const void *contents = ql_host_contents(&read, object, g_idx, "g_idx");
    if (!contents && PyErr_Occurred()) return -1;
    int result = ql_gptq_copy_g_idx(copy, contents, g_idx, &gptq, k);
    free(read);
    return result;
}

/* gptq_pack after its tensors are read, with g_idx, which is of the object, or NULL. */
static PyObject *ql_gptq_pack_indexed(ql_gptq_job *job, const ql_tensor *tensors, PyObject *like,
                                      const ql_tensor *g_idx, PyObject *object) {
    if (!g_idx) return ql_gptq_pack_tensors(job, tensors, like);
    ql_kept *copy = NULL;
    PyObject *result = NULL;
    if (ql_check_aligned(g_idx, "g_idx") == 0 && ql_check_same_device(g_idx, "g_idx", &tensors[0], "weight") == 0 &&
        ql_gptq_read_g_idx(&copy, object, g_idx, job->group_size, tensors[0].shape[1]) == 0) {
        job->g_idx = copy ? (const int32_t *)(const void *)copy->data : NULL;
        job->device_g_idx = copy ? g_idx : NULL;
        result = ql_gptq_pack_tensors(job, tensors, like);
    }
    free(copy);
    return result;
}

static PyObject *ql_gptq_pack_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"weight", "scales", "zeros", "g_idx", "bits", "group_size", "zero_format"};
    static const ql_signature signature = {"gptq_pack", 7, 4, 3, names};
    PyObject *values[7];
    ql_gptq_job job = {0};
    int stored = 0; /* among the zero formats after "auto" */
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0) return NULL;
    if (!values[4]) return PyErr_Format(PyExc_TypeError, "gptq_pack: bits is missing");
    if (ql_arg_bits(&job.bits, values[4]) < 0 ||
        ql_arg_group_size(&job.group_size, values[5], signature.function) < 0 ||
        ql_arg_choice(&stored, values[6], "zero_format", ql_zero_formats + QL_ZEROS_V1) < 0)
        return NULL;
    job.zero_offset = stored + QL_ZEROS_V1 == QL_ZEROS_V1;
    ql_tensor tensors[4];
    int count = ql_arg_is_none(values[3]) ? 3 : 4;
    PyObject *result = NULL;
    if (ql_tensor_read_all(tensors, values, names, count) < 0) return NULL;
    if (ql_tensors_check(tensors, names, 3, 2) == 0) {
        job.group_size = ql_group_columns(job.group_size, tensors[0].shape[1]);
        result = ql_gptq_pack_indexed(&job, tensors, values[0], count == 4 ? &tensors[3] : NULL, values[3]);
    }
    ql_tensors_release(tensors, count);
    return result;
}

PyMethodDef ql_gptq_methods[] = {
    {"gptq_find_params", QL_METHOD(ql_gptq_find_params_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_find_params(weight, *, bits, group_size, sym=False)\n--\n\nweight float [N, K] -> scales and zeros, fp32 "
     "[N, G], by GPTQ's min-max rule."},
    {"gptq_pack", QL_METHOD(ql_gptq_pack_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_pack(weight, scales, zeros, g_idx=None, *, bits, group_size, zero_format='gptq')\n--\n\nweight [N, K], "
     "scales "
     "and zeros [N, G] -> qweight, qzeros, scales fp16 [G, N]. Codes and zeros are rounded to even and clamped."},
    {NULL, NULL, 0, NULL},
};

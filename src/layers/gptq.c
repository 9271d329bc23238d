/* The type QuantLinear and the functions of the GPTQ storage. */
#include "../formats/gptq.h"
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "../cuda/recode.h"
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

/* A resolved g_idx. One that a rebind replaced stays linked until the layer goes, since a product on another thread may
 * still read it. */
typedef struct ql_g_idx_copy {
    struct ql_g_idx_copy *older;
    int64_t k;
    int32_t group[];
} ql_g_idx_copy;

typedef struct ql_gptq_config {
    int bits;
    int64_t group_size;  /* as given: -1 or at least 1 */
    int64_t in_features; /* 0: not given */
    ql_zero_format zero_format;
    ql_g_idx_copy *g_idx; /* the newest first */
} ql_gptq_config;

static void ql_gptq_clear(ql_layer *layer) {
    ql_gptq_config *config = layer->extra;
    while (config->g_idx) {
        ql_g_idx_copy *older = config->g_idx->older;
        free(config->g_idx);
        config->g_idx = older;
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 * From tensors to a weight */

static int ql_check_bits(int64_t bits) {
    if (bits == 2 || bits == 3 || bits == 4 || bits == 8) return 0;
    PyErr_Format(PyExc_ValueError, "bits must be 2, 3, 4 or 8, got %lld", (long long)bits);
    return -1;
}

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

/* The resolved g_idx in *copy for the caller to own, NULL where it is trivial; contents: its elements on the host. */
static int ql_gptq_copy_g_idx(ql_g_idx_copy **copy, const void *contents, const ql_tensor *g_idx, const ql_gptq *gptq,
                              int64_t k) {
    *copy = NULL;
    ql_g_idx_copy *resolved = malloc(sizeof *resolved + (size_t)k * sizeof resolved->group[0]);
    if (!resolved) {
        PyErr_NoMemory();
        return -1;
    }
    resolved->older = NULL;
    resolved->k = k;
    int64_t position = 0;
    ql_g_idx kind = ql_gptq_resolve_g_idx(resolved->group, &position, contents, g_idx->dtype, g_idx->stride[0], k,
                                          gptq->groups, gptq->group_size);
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

/* Makes the copy the newest of the layer's, or drops it for an equal one; the groups to use. */
static const int32_t *ql_gptq_keep_g_idx(ql_gptq_config *config, ql_g_idx_copy *copy) {
    size_t bytes = (size_t)copy->k * sizeof copy->group[0];
    for (ql_g_idx_copy *kept = config->g_idx; kept; kept = kept->older) {
        if (kept->k == copy->k && memcmp(kept->group, copy->group, bytes) == 0) {
            free(copy);
            return kept->group;
        }
    }
    copy->older = config->g_idx;
    config->g_idx = copy;
    return copy->group;
}

static void ql_gptq_summarize(ql_layer *layer, const ql_gptq_config *config) {
    snprintf(layer->summary, sizeof layer->summary, "bits=%d, group_size=%lld, zero_format='%s'%s", config->bits,
             (long long)config->group_size, ql_zero_formats[layer->weight.gptq.zero_offset ? QL_ZEROS_V1 : QL_ZEROS_V2],
             layer->weight.gptq.g_idx ? ", act_order" : "");
}

/* What bind takes of g_idx: a new copy in *copy on the CPU; on a GPU its own memory in gptq->g_idx, if nothing in it has to
 * be resolved. Neither where it is trivial. */
static int ql_gptq_bind_g_idx(ql_g_idx_copy **copy, ql_gptq *gptq, const ql_layer *layer, int64_t k) {
    const ql_tensor *g_idx = ql_gptq_g_idx_tensor(layer);
    *copy = NULL;
    if (!g_idx) return 0;
    void *read;
    const void *contents = ql_layer_contents(layer, G_IDX, &read);
    int result = contents ? ql_gptq_copy_g_idx(copy, contents, g_idx, gptq, k) : -1;
    if (result == 0 && *copy && g_idx->device_type != QL_DEVICE_CPU) {
        if (g_idx->dtype == QL_I32 && memcmp(contents, (*copy)->group, (size_t)k * sizeof(int32_t)) == 0) {
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
    ql_gptq_config *config = layer->extra;
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
    ql_g_idx_copy *copy;
    if (ql_gptq_bind_zeros(&gptq, layer, n) < 0 || ql_gptq_bind_g_idx(&copy, &gptq, layer, k) < 0) return -1;
    if (copy) gptq.g_idx = ql_gptq_keep_g_idx(config, copy);
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
    layer->clear = ql_gptq_clear;
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
    int64_t group_size, count;
    int bits, zero_offset;
    bool sym;
    void *output, *second_output, *third_output;
} ql_gptq_job;

/* How it is done: on the CPU `body` takes a range of what `grain` counts, on a GPU `launch` takes all. */
typedef struct ql_gptq_work {
    void (*body)(void *job, int64_t begin, int64_t end);
    int (*launch)(const ql_cuda_place *place, const ql_gptq_job *job, char *message);
} ql_gptq_work;

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

static void ql_pack_codes_body(void *context, int64_t begin, int64_t end) {
    const ql_gptq_job *job = context;
    ql_gptq_pack_codes(job->output, &job->input, job->bits, begin, end);
}

static int ql_pack_codes_launch(const ql_cuda_place *place, const ql_gptq_job *job, char *message) {
    return ql_cuda_gptq_pack_codes(place, job->output, &job->input, job->bits, message);
}

static void ql_unpack_codes_body(void *context, int64_t begin, int64_t end) {
    const ql_gptq_job *job = context;
    ql_gptq_unpack_codes(job->output, job->count, &job->input, job->bits, begin, end);
}

static int ql_unpack_codes_launch(const ql_cuda_place *place, const ql_gptq_job *job, char *message) {
    return ql_cuda_gptq_unpack_codes(place, job->output, job->count, &job->input, job->bits, message);
}

static void ql_unplanar_body(void *context, int64_t begin, int64_t end) {
    const ql_gptq_job *job = context;
    ql_gptq_unplanar(job->output, &job->input, job->bits, begin, end);
}

static int ql_unplanar_launch(const ql_cuda_place *place, const ql_gptq_job *job, char *message) {
    return ql_cuda_gptq_unplanar(place, job->output, &job->input, job->bits, message);
}

static const ql_gptq_work ql_find_params_work = {ql_find_params_body, ql_find_params_launch};
static const ql_gptq_work ql_pack_codes_work = {ql_pack_codes_body, ql_pack_codes_launch};
static const ql_gptq_work ql_unpack_codes_work = {ql_unpack_codes_body, ql_unpack_codes_launch};
static const ql_gptq_work ql_unplanar_work = {ql_unplanar_body, ql_unplanar_launch};

static void ql_gptq_run(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), ql_gptq_job *job) {
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(count, grain, body, job);
    Py_END_ALLOW_THREADS
}

/* The launch on the GPU of `tensor`, whose values `as_rows` asks for as contiguous rows. */
static int ql_gptq_launch(ql_gptq_job *job, PyObject *object, const ql_tensor *tensor, bool as_rows,
                          int (*launch)(const ql_cuda_place *, const ql_gptq_job *, char *)) {
    ql_cuda_place place;
    ql_output copy = {0};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    if (ql_place_of(&place, object, tensor) == 0 &&
        (!as_rows || ql_device_rows(&job->input, &copy, &place, object, tensor) == 0))
        result = ql_cuda_result(launch(&place, job, message), message);
    ql_output_abandon(&copy);
    return result;
}

static int ql_arg_bits(int *bits, PyObject *object) {
    int64_t width = 0;
    if (ql_arg_int(&width, object, "bits") < 0 || ql_check_bits(width) < 0) return -1;
    *bits = (int)width;
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
            int failed = 0;
            if (ql_is_on_gpu(&weight))
                failed = ql_gptq_launch(&job, values[0], &weight, true, ql_find_params_work.launch);
            else
                ql_gptq_run(job.input.rows, ql_row_grain(job.input.cols), ql_find_params_work.body, &job);
            if (failed)
                ql_outputs_abandon(outputs, 2);
            else
                result = ql_outputs_finish(outputs, 2);
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
    if (!ql_is_on_gpu(&tensors[0])) {
        ql_gptq_run(n, 16, ql_pack_weight_body, job);
        ql_gptq_run(groups, 4, ql_pack_params_body, job);
    } else if (ql_gptq_launch(job, like, &tensors[0], true, ql_pack_launch) < 0) {
        ql_outputs_abandon(outputs, 3);
        return NULL;
    }
    return ql_outputs_finish(outputs, 3);
}

/* Checks gptq_pack's g_idx and resolves it on the host, on a GPU as well: only there an entry out of range can be told. */
static int ql_gptq_read_g_idx(ql_g_idx_copy **copy, PyObject *object, const ql_tensor *g_idx, int64_t group_size,
                              int64_t k) {
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

/* gptq_pack after its tensors are read, with g_idx (None or not) read and resolved. */
static PyObject *ql_gptq_pack_indexed(ql_gptq_job *job, const ql_tensor *tensors, PyObject *like, PyObject *object) {
    static const char *const names[] = {"g_idx"};
    if (ql_arg_is_none(object)) return ql_gptq_pack_tensors(job, tensors, like);
    ql_tensor g_idx;
    ql_g_idx_copy *copy = NULL;
    PyObject *result = NULL;
    if (ql_tensors_read(&g_idx, &object, names, 1, 1) < 0) return NULL;
    if (ql_check_same_device(&g_idx, "g_idx", &tensors[0], "weight") == 0 &&
        ql_gptq_read_g_idx(&copy, object, &g_idx, job->group_size, tensors[0].shape[1]) == 0) {
        job->g_idx = copy ? copy->group : NULL;
        job->device_g_idx = copy ? &g_idx : NULL;
        result = ql_gptq_pack_tensors(job, tensors, like);
    }
    free(copy);
    ql_tensor_release(&g_idx);
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
    ql_tensor tensors[3];
    if (ql_tensors_read(tensors, values, names, 3, 2) < 0) return NULL;
    job.group_size = ql_group_columns(job.group_size, tensors[0].shape[1]);
    PyObject *result = ql_gptq_pack_indexed(&job, tensors, values[0], values[3]);
    ql_tensors_release(tensors, 3);
    return result;
}

/* One 2-D tensor in, one of the same framework out: begins the output, does the work over `chunks`, finishes. */
static PyObject *ql_gptq_recode(ql_gptq_job *job, PyObject *like, const ql_tensor *tensor, ql_dtype dtype, int64_t rows,
                                int64_t chunks, const ql_gptq_work *work) {
    ql_output output;
    const int64_t shape[] = {rows, job->input.cols};
    if (ql_output_begin_beside(&output, like, tensor, dtype, 2, shape) < 0) return NULL;
    job->output = output.view.data;
    if (!ql_is_on_gpu(tensor)) {
        ql_gptq_run(chunks, 4, work->body, job);
    } else if (ql_gptq_launch(job, like, tensor, false, work->launch) < 0) {
        ql_output_abandon(&output);
        return NULL;
    }
    return ql_output_finish(&output);
}

static PyObject *ql_gptq_pack_codes_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"codes", "bits"};
    static const ql_signature signature = {"gptq_pack_codes", 2, 1, 2, names};
    static const ql_dtype taken[] = {QL_U8};
    PyObject *values[2];
    ql_gptq_job job = {0};
    ql_tensor codes;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_bits(&job.bits, values[1]) < 0 ||
        ql_tensors_read(&codes, values, names, 1, 2) < 0)
        return NULL;
    PyObject *result = NULL;
    job.input = ql_matrix_of(&codes);
    if (ql_check_dtype(&codes, "codes", 1, taken) == 0 &&
        ql_check_codes(values[0], &codes, "codes", (int)ql_code_mask(job.bits)) == 0)
        result = ql_gptq_recode(&job, values[0], &codes, QL_I32, ql_code_words(job.input.rows, job.bits),
                                ql_group_count(job.input.rows, QL_CHUNK), &ql_pack_codes_work);
    ql_tensor_release(&codes);
    return result;
}

static PyObject *ql_gptq_unpack_codes_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"packed", "bits", "count"};
    static const ql_signature signature = {"gptq_unpack_codes", 3, 1, 3, names};
    static const ql_dtype taken[] = {QL_I32};
    PyObject *values[3];
    ql_gptq_job job = {0};
    ql_tensor packed;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_bits(&job.bits, values[1]) < 0 ||
        ql_arg_int(&job.count, values[2], "count") < 0)
        return NULL;
    if (job.count < 0)
        return PyErr_Format(PyExc_ValueError, "count must be at least 0, got %lld", (long long)job.count);
    if (ql_tensors_read(&packed, values, names, 1, 2) < 0) return NULL;
    PyObject *result = NULL;
    const int64_t shape[] = {ql_code_words(job.count, job.bits), -1};
    if (ql_check_dtype(&packed, "packed", 1, taken) == 0 && ql_check_shape(&packed, "packed", 2, shape) == 0) {
        job.input = ql_matrix_of(&packed);
        result = ql_gptq_recode(&job, values[0], &packed, QL_U8, job.count, ql_group_count(job.count, QL_CHUNK),
                                &ql_unpack_codes_work);
    }
    ql_tensor_release(&packed);
    return result;
}

static PyObject *ql_gptq_unplanar_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"packed", "bits"};
    static const ql_signature signature = {"gptq_unplanar", 2, 1, 2, names};
    static const ql_dtype taken[] = {QL_I32};
    PyObject *values[2];
    ql_gptq_job job = {0};
    ql_tensor packed;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_bits(&job.bits, values[1]) < 0 ||
        ql_tensors_read(&packed, values, names, 1, 2) < 0)
        return NULL;
    PyObject *result = NULL;
    job.input = ql_matrix_of(&packed);
    if (job.input.rows % job.bits != 0)
        PyErr_Format(PyExc_ValueError, "packed must have a multiple of %d rows for bits=%d, got %lld", job.bits,
                     job.bits, (long long)job.input.rows);
    else if (ql_check_dtype(&packed, "packed", 1, taken) == 0)
        result = ql_gptq_recode(&job, values[0], &packed, QL_I32, job.input.rows, job.input.rows / job.bits,
                                &ql_unplanar_work);
    ql_tensor_release(&packed);
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
    {"gptq_pack_codes", QL_METHOD(ql_gptq_pack_codes_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_pack_codes(codes, *, bits)\n--\n\ncodes uint8 [K, N] -> int32 [ceil(K * bits / 32), N]."},
    {"gptq_unpack_codes", QL_METHOD(ql_gptq_unpack_codes_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_unpack_codes(packed, *, bits, count)\n--\n\nint32 [ceil(count * bits / 32), N] -> uint8 [count, N]."},
    {"gptq_unplanar", QL_METHOD(ql_gptq_unplanar_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_unplanar(packed, *, bits)\n--\n\nqweight of the planar layout (gptq_p) -> the stream layout."},
    {NULL, NULL, 0, NULL},
};

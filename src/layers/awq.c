/* The type AWQLinear and the functions of AWQ's storages. */
#include "../formats/awq.h"
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "../cuda/recode.h"
#include "grouped.h"
#include "quantize.h"

#include <stdio.h>

enum { QWEIGHT, QZEROS, SCALES };

typedef struct ql_awq_config {
    int64_t group_size; /* as given: -1 or at least 1 */
} ql_awq_config;

static const ql_dtype ql_words_only[] = {QL_I32};

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

static int ql_awq_bind(ql_layer *layer) {
    static const int64_t any[] = {-1, -1};
    const ql_awq_config *config = layer->extra;
    const ql_tensor *qweight = &layer->held[QWEIGHT].tensor;
    const ql_tensor *qzeros = &layer->held[QZEROS].tensor;
    const ql_tensor *scales = &layer->held[SCALES].tensor;
    const ql_dtype zeros_taken[] = {QL_I32, scales->dtype};
    if (ql_check_dtype(qweight, "qweight", 1, ql_words_only) < 0 || ql_check_shape(qweight, "qweight", 2, any) < 0 ||
        ql_check_contiguous(qweight, "qweight") < 0 || ql_check_float(scales, "scales", false) < 0 ||
        ql_check_shape(scales, "scales", 2, any) < 0 || ql_check_contiguous(scales, "scales") < 0 ||
        ql_check_dtype(qzeros, "qzeros", 2, zeros_taken) < 0 || ql_check_contiguous(qzeros, "qzeros") < 0)
        return -1;
    int64_t k = qweight->shape[0], n = scales->shape[1];
    int64_t group_size = ql_group_columns(config->group_size, k);
    int64_t groups = ql_group_count(k, group_size);
    bool products = qzeros->dtype != QL_I32;
    const int64_t weight_shape[] = {k, ql_awq_words(n)}, scales_shape[] = {groups, n};
    const int64_t zeros_shape[] = {groups, products ? n : ql_awq_words(n)};
    if (ql_check_shape(scales, "scales", 2, scales_shape) < 0 ||
        ql_check_shape(qweight, "qweight", 2, weight_shape) < 0 || ql_check_shape(qzeros, "qzeros", 2, zeros_shape) < 0)
        return -1;
    layer->weight = (ql_weight){
        .format = QL_FORMAT_AWQ,
        .n = n,
        .k = k,
        .awq =
            {
                .qweight = qweight->data,
                .qzeros = products ? NULL : qzeros->data,
                .scales = scales->data,
                .zero_products = products ? qzeros->data : NULL,
                .scales_dtype = scales->dtype,
                .group_size = group_size,
                .groups = groups,
            },
    };
    snprintf(layer->summary, sizeof layer->summary, "bits=4, group_size=%lld", (long long)config->group_size);
    return 0;
}

static PyObject *ql_awq_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"qweight", "qzeros", "scales", "bias", "group_size"};
    static const ql_signature signature = {"AWQLinear", 5, 4, 3, names};
    PyObject *values[5];
    if (ql_args_tuple(values, &signature, args, kwargs) < 0) return NULL;
    ql_layer *layer = ql_layer_alloc(type, ql_awq_bind, sizeof(ql_awq_config));
    if (!layer) return NULL;
    ql_awq_config *config = layer->extra;
    if (ql_arg_group_size(&config->group_size, values[4], signature.function) == 0 &&
        ql_layer_hold_required(layer, values[0], names[0]) == QWEIGHT &&
        ql_layer_hold_required(layer, values[1], names[1]) == QZEROS &&
        ql_layer_hold_required(layer, values[2], names[2]) == SCALES && ql_layer_ready(layer, values[3]) == 0)
        return (PyObject *)layer;
    Py_DECREF((PyObject *)layer);
    return NULL;
}

int ql_awq_add_type(PyObject *module) {
    return ql_layer_make_type(module, "_qlinear.AWQLinear", ql_awq_new,
                              "AWQLinear(qweight, qzeros, scales, bias=None, *, group_size)\n--\n\nA linear layer of "
                              "AWQ's GEMM storage, 4 bit.",
                              NULL, NULL);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The functions */

typedef struct ql_awq_job {
    ql_matrix input;
    int64_t group_size, count;
    void *qweight, *qzeros, *scales; /* outputs, as far as the function has them */
    void (*convert)(int32_t *qweight, const ql_matrix *storage, int64_t begin, int64_t end);
    ql_cuda_storage storage; /* what `convert` reads, for a GPU */
} ql_awq_job;

static void ql_quantize_body(void *context, int64_t begin, int64_t end) {
    const ql_awq_job *job = context;
    ql_awq_quantize(job->qweight, job->qzeros, job->scales, &job->input, job->group_size, begin, end);
}

static void ql_convert_body(void *context, int64_t begin, int64_t end) {
    const ql_awq_job *job = context;
    job->convert(job->qweight, &job->input, begin, end);
}

static void ql_unpack_body(void *context, int64_t begin, int64_t end) {
    const ql_awq_job *job = context;
    ql_awq_unpack(job->qweight, job->count, &job->input, begin, end);
}

static void ql_awq_run(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), ql_awq_job *job) {
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(count, grain, body, job);
    Py_END_ALLOW_THREADS
}

/* Parameters in fp32 first, then what they give: codes, zeros and scales as they are stored. */
static int ql_quantize_on_gpu(ql_awq_job *job, PyObject *object, const ql_tensor *weight) {
    ql_cuda_place place;
    ql_output copy = {0}, params = {0};
    ql_cuda_encoding encoding = {.group_size = job->group_size, .bits = 4, .is_awq = true};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    int64_t groups = ql_group_count(job->input.cols, job->group_size), count = job->input.rows * groups;
    if (ql_place_of(&place, object, weight) == 0 &&
        ql_device_rows(&encoding.rows, &copy, &place, object, weight) == 0 &&
        ql_device_scratch(&params, object, weight, 2 * count * (int64_t)sizeof(float)) == 0) {
        float *scales = params.view.data, *zeros = scales + count;
        encoding.scales = (ql_matrix){scales, QL_F32, job->input.rows, groups, groups, 1};
        encoding.zeros = (ql_matrix){zeros, QL_F32, job->input.rows, groups, groups, 1};
        result = ql_cuda_group_params(&place, scales, zeros, &encoding.rows, job->group_size, 4, QL_CUDA_AWQ, message);
        if (result == 0) result = ql_cuda_encode(&place, job->qweight, job->qzeros, job->scales, &encoding, message);
        result = ql_cuda_result(result, message);
    }
    ql_output_abandon(&copy);
    ql_output_abandon(&params);
    return result;
}

static int ql_quantize_run(ql_awq_job *job, PyObject *object, const ql_tensor *weight) {
    if (ql_tensor_numel(weight) == 0) return 0; /* the outputs are empty as well, whatever sizes it claims */
    if (ql_is_on_gpu(weight)) return ql_quantize_on_gpu(job, object, weight);
    ql_awq_run(ql_awq_words(job->input.rows), 2, ql_quantize_body, job);
    return 0;
}

static PyObject *ql_awq_quantize_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"weight", "group_size"};
    static const ql_signature signature = {"awq_quantize", 2, 1, 2, names};
    static const ql_dtype dtypes[] = {QL_I32, QL_I32, QL_F16};
    PyObject *values[2];
    ql_awq_job job = {0};
    ql_tensor weight;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_group_size(&job.group_size, values[1], signature.function) < 0 ||
        ql_tensors_read(&weight, values, names, 1, 2) < 0)
        return NULL;
    PyObject *result = NULL;
    ql_output outputs[3];
    job.input = ql_matrix_of(&weight);
    job.group_size = ql_group_columns(job.group_size, job.input.cols);
    int64_t words = ql_awq_words(job.input.rows), groups = ql_group_count(job.input.cols, job.group_size);
    const int64_t shapes[][2] = {{job.input.cols, words}, {groups, words}, {groups, job.input.rows}};
    if (ql_check_float(&weight, "weight", true) == 0 &&
        ql_outputs_begin(outputs, values[0], &weight, 3, dtypes, shapes) == 0) {
        job.qweight = outputs[0].view.data;
        job.qzeros = outputs[1].view.data;
        job.scales = outputs[2].view.data;
        if (ql_quantize_run(&job, values[0], &weight) == 0)
            result = ql_outputs_finish(outputs, 3);
        else
            ql_outputs_abandon(outputs, 3);
    }
    ql_tensor_release(&weight);
    return result;
}

/* words [k, words of n] by job->convert, or on a GPU from job->storage. */
static int ql_awq_gather(ql_awq_job *job, PyObject *object, const ql_tensor *tensor, int64_t n, int64_t k) {
    if (n == 0 || k == 0) return 0;
    if (!ql_is_on_gpu(tensor)) {
        ql_awq_run(k, ql_row_grain(job->input.cols), ql_convert_body, job);
        return 0;
    }
    ql_cuda_place place;
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, object, tensor) < 0) return -1;
    return ql_cuda_result(ql_cuda_awq_gather(&place, job->qweight, job->storage, &job->input, n, k, message), message);
}

static PyObject *ql_awq_pack_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"codes"};
    static const ql_signature signature = {"awq_pack", 1, 1, 1, names};
    static const ql_dtype taken[] = {QL_U8};
    PyObject *values[1];
    ql_tensor codes;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_tensors_read(&codes, values, names, 1, 2) < 0)
        return NULL;
    PyObject *result = NULL;
    ql_output output;
    ql_awq_job job = {.input = ql_matrix_of(&codes), .convert = ql_awq_pack};
    const int64_t shape[] = {job.input.rows, ql_awq_words(job.input.cols)};
    /* The output comes before the codes are read: an expanded tensor claims sizes that no output can have. */
    if (ql_check_dtype(&codes, "codes", 1, taken) == 0 &&
        ql_output_begin_beside(&output, values[0], &codes, QL_I32, 2, shape) == 0) {
        job.qweight = output.view.data;
        if (ql_check_codes(values[0], &codes, "codes", QL_AWQ_MAX) == 0 &&
            ql_awq_gather(&job, values[0], &codes, job.input.cols, job.input.rows) == 0)
            result = ql_output_finish(&output);
        else
            ql_output_abandon(&output);
    }
    ql_tensor_release(&codes);
    return result;
}

static int ql_awq_unpack_codes(ql_awq_job *job, PyObject *object, const ql_tensor *packed) {
    if (ql_tensor_numel(packed) == 0) return 0;
    if (!ql_is_on_gpu(packed)) {
        ql_awq_run(job->input.rows, ql_row_grain(job->input.cols), ql_unpack_body, job);
        return 0;
    }
    ql_cuda_place place;
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, object, packed) < 0) return -1;
    return ql_cuda_result(ql_cuda_awq_unpack(&place, job->qweight, job->count, &job->input, message), message);
}

static PyObject *ql_awq_unpack_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"packed", "count"};
    static const ql_signature signature = {"awq_unpack", 2, 1, 2, names};
    PyObject *values[2];
    ql_awq_job job = {0};
    ql_tensor packed;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_int(&job.count, values[1], "count") < 0)
        return NULL;
    if (job.count < 0)
        return PyErr_Format(PyExc_ValueError, "count must be at least 0, got %lld", (long long)job.count);
    if (ql_tensors_read(&packed, values, names, 1, 2) < 0) return NULL;
    PyObject *result = NULL;
    ql_output output;
    job.input = ql_matrix_of(&packed);
    const int64_t packed_shape[] = {-1, ql_awq_words(job.count)}, shape[] = {job.input.rows, job.count};
    if (ql_check_dtype(&packed, "packed", 1, ql_words_only) == 0 &&
        ql_check_shape(&packed, "packed", 2, packed_shape) == 0 &&
        ql_output_begin_beside(&output, values[0], &packed, QL_U8, 2, shape) == 0) {
        job.qweight = output.view.data;
        if (ql_awq_unpack_codes(&job, values[0], &packed) == 0)
            result = ql_output_finish(&output);
        else
            ql_output_abandon(&output);
    }
    ql_tensor_release(&packed);
    return result;
}

/* Copies elements of one size on the CPU: element (row, col) of out from column source(col, rows) of its row; NULL takes
 * the columns as they are. */
static void ql_copy_params_on_cpu(const ql_output *output, const ql_matrix *from, int64_t (*source)(int64_t, int64_t)) {
    int64_t rows = output->view.shape[0], cols = output->view.shape[1];
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t col = 0; col < cols; col++) {
            int64_t at = row * from->row_stride + (source ? source(col, rows) : col) * from->col_stride;
            if (ql_dtype_size(from->dtype) == 2)
                ((uint16_t *)output->view.data)[row * cols + col] = ((const uint16_t *)from->data)[at];
            else
                ((uint32_t *)output->view.data)[row * cols + col] = ((const uint32_t *)from->data)[at];
        }
    }
}

/* out [rows, cols] contiguous from `from`, by rows or, where it is Marlin's, in the order of its columns. */
static int ql_copy_params(const ql_output *output, PyObject *like, const ql_matrix *from, bool is_marlin) {
    if (ql_tensor_numel(&output->view) == 0) return 0;
    if (!ql_is_on_gpu(&output->view)) {
        ql_copy_params_on_cpu(output, from, is_marlin ? ql_awq_marlin_scale_column : NULL);
        return 0;
    }
    ql_cuda_place place;
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, like, &output->view) < 0) return -1;
    return ql_cuda_result(ql_cuda_awq_params(&place, output->view.data, output->view.shape[0], output->view.shape[1],
                                             from, is_marlin, message),
                          message);
}

/* Marlin's zeros, 8 everywhere: words [groups, words of n]. */
static int ql_fill_eights(const ql_output *output, PyObject *like) {
    int32_t *words = output->view.data;
    if (!ql_is_on_gpu(&output->view)) {
        for (int64_t i = 0; i < ql_tensor_numel(&output->view); i++) words[i] = (int32_t)0x88888888u;
        return 0;
    }
    ql_cuda_place place;
    char message[QL_CUDA_MESSAGE];
    int64_t n = output->view.shape[1] * QL_AWQ_NIBBLES;
    if (ql_place_of(&place, like, &output->view) < 0) return -1;
    return ql_cuda_result(ql_cuda_awq_gather(&place, words, QL_CUDA_EIGHTS, NULL, n, output->view.shape[0], message),
                          message);
}

/* ValueError unless the tensor's dimension has at least `least` entries: storages pad their groups. */
static int ql_check_at_least(const ql_tensor *tensor, const char *name, int dimension, int64_t least) {
    if (tensor->shape[dimension] >= least) return 0;
    PyErr_Format(PyExc_ValueError, "%s must have at least %lld entries in dimension %d, got %lld", name,
                 (long long)least, dimension, (long long)tensor->shape[dimension]);
    return -1;
}

/* ValueError unless `size`, of what `text` says, is a multiple of `factor`. */
static int ql_check_multiple(const char *name, const char *text, int64_t size, int64_t factor) {
    if (size % factor == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s must have a multiple of %lld %s, got %lld", name, (long long)factor, text,
                 (long long)size);
    return -1;
}

/* K or N as `count` times `factor`. */
static int ql_awq_expand(int64_t *size, int64_t count, int64_t factor, const char *name) {
    if (!__builtin_mul_overflow(count, factor, size)) return 0;
    PyErr_Format(PyExc_ValueError, "%s is too large", name);
    return -1;
}

/* What a conversion makes: begins qweight [k, words], qzeros and scales [groups, n] and converts the codes. */
static int ql_awq_convert(ql_output *outputs, ql_awq_job *job, PyObject *like, const ql_tensor *qweight, int64_t n,
                          int64_t k, ql_dtype zeros, ql_dtype scales) {
    int64_t groups = ql_group_count(k, job->group_size), words = ql_awq_words(n);
    const ql_dtype dtypes[] = {QL_I32, zeros, scales};
    const int64_t shapes[][2] = {{k, words}, {groups, zeros == QL_I32 ? words : n}, {groups, n}};
    if (ql_outputs_begin(outputs, like, qweight, 3, dtypes, shapes) < 0) return -1;
    job->qweight = outputs[0].view.data;
    if (ql_awq_gather(job, like, qweight, n, k) == 0) return 0;
    ql_outputs_abandon(outputs, 3);
    return -1;
}

static PyObject *ql_awq_converted(ql_output *outputs, int failed) {
    if (!failed) return ql_outputs_finish(outputs, 3);
    ql_outputs_abandon(outputs, 3);
    return NULL;
}

/* GEMV's zeros, codes of the groups. */
static int ql_gemv_zeros(const ql_output *output, PyObject *like, const ql_tensor *qzeros, int64_t groups) {
    ql_awq_job job = {.input = ql_matrix_of(qzeros),
                      .convert = ql_awq_from_gemv_zeros,
                      .storage = QL_CUDA_GEMV,
                      .qweight = output->view.data};
    return ql_awq_gather(&job, like, qzeros, job.input.rows, groups);
}

static PyObject *ql_from_gemv(const ql_tensor *tensors, int64_t group_size, PyObject *like) {
    const ql_tensor *qweight = &tensors[0], *qzeros = &tensors[1], *scales = &tensors[2];
    int64_t n = qweight->shape[0], k;
    const int64_t params_shape[] = {n, -1};
    if (ql_check_dtype(qweight, "qweight", 1, ql_words_only) < 0 ||
        ql_check_dtype(qzeros, "qzeros", 1, ql_words_only) < 0 || ql_check_float(scales, "scales", false) < 0 ||
        ql_awq_expand(&k, qweight->shape[1], QL_AWQ_NIBBLES, "qweight") < 0)
        return NULL;
    ql_awq_job job = {.input = ql_matrix_of(qweight), .convert = ql_awq_from_gemv_codes, .storage = QL_CUDA_GEMV};
    job.group_size = ql_group_columns(group_size, k);
    int64_t groups = ql_group_count(k, job.group_size);
    if (ql_check_shape(qzeros, "qzeros", 2, params_shape) < 0 ||
        ql_check_at_least(qzeros, "qzeros", 1, ql_awq_words(groups)) < 0 ||
        ql_check_shape(scales, "scales", 2, params_shape) < 0 || ql_check_at_least(scales, "scales", 1, groups) < 0)
        return NULL;
    ql_output outputs[3];
    if (ql_awq_convert(outputs, &job, like, qweight, n, k, QL_I32, scales->dtype) < 0) return NULL;
    ql_matrix transposed = ql_matrix_of(scales);
    transposed.row_stride = scales->stride[1];
    transposed.col_stride = scales->stride[0];
    return ql_awq_converted(outputs, ql_gemv_zeros(&outputs[1], like, qzeros, groups) < 0 ||
                                         ql_copy_params(&outputs[2], like, &transposed, false) < 0);
}

static PyObject *ql_from_gemv_fast(const ql_tensor *tensors, int64_t group_size, PyObject *like) {
    static const ql_dtype taken[] = {QL_I16};
    const ql_tensor *qweight = &tensors[0], *qzeros = &tensors[1], *scales = &tensors[2];
    int64_t n, k = qweight->shape[1];
    if (ql_check_dtype(qweight, "qweight", 1, taken) < 0 || ql_check_float(scales, "scales", false) < 0 ||
        ql_check_dtype(qzeros, "qzeros", 1, &scales->dtype) < 0 ||
        ql_awq_expand(&n, qweight->shape[0], 4, "qweight") < 0 || ql_check_multiple("qweight", "columns", k, 64) < 0)
        return NULL;
    ql_awq_job job = {
        .input = ql_matrix_of(qweight), .convert = ql_awq_from_gemv_fast_codes, .storage = QL_CUDA_GEMV_FAST};
    job.group_size = ql_group_columns(group_size, k);
    int64_t groups = ql_group_count(k, job.group_size);
    const int64_t params_shape[] = {-1, n};
    if (ql_check_shape(qzeros, "qzeros", 2, params_shape) < 0 || ql_check_at_least(qzeros, "qzeros", 0, groups) < 0 ||
        ql_check_shape(scales, "scales", 2, params_shape) < 0 || ql_check_at_least(scales, "scales", 0, groups) < 0)
        return NULL;
    ql_output outputs[3];
    if (ql_awq_convert(outputs, &job, like, qweight, n, k, scales->dtype, scales->dtype) < 0) return NULL;
    ql_matrix zeros = ql_matrix_of(qzeros), rows = ql_matrix_of(scales);
    return ql_awq_converted(outputs, ql_copy_params(&outputs[1], like, &zeros, false) < 0 ||
                                         ql_copy_params(&outputs[2], like, &rows, false) < 0);
}

static PyObject *ql_from_marlin(const ql_tensor *tensors, int64_t group_size, PyObject *like) {
    const ql_tensor *qweight = &tensors[0], *scales = &tensors[1];
    int64_t n = qweight->shape[1] / 2, k;
    if (ql_check_dtype(qweight, "qweight", 1, ql_words_only) < 0 || ql_check_float(scales, "scales", false) < 0 ||
        ql_awq_expand(&k, qweight->shape[0], 16, "qweight") < 0 ||
        ql_check_multiple("qweight", "columns", qweight->shape[1], 128) < 0)
        return NULL;
    ql_awq_job job = {.input = ql_matrix_of(qweight), .convert = ql_awq_from_marlin_codes, .storage = QL_CUDA_MARLIN};
    job.group_size = ql_group_columns(group_size, k);
    const int64_t scales_shape[] = {ql_group_count(k, job.group_size), n};
    if (ql_check_shape(scales, "scales", 2, scales_shape) < 0) return NULL;
    ql_output outputs[3];
    if (ql_awq_convert(outputs, &job, like, qweight, n, k, QL_I32, scales->dtype) < 0) return NULL;
    ql_matrix rows = ql_matrix_of(scales);
    return ql_awq_converted(outputs, ql_fill_eights(&outputs[1], like) < 0 ||
                                         ql_copy_params(&outputs[2], like, &rows, true) < 0);
}

/* Parses `tensor_count` tensors and group_size, and hands them to the conversion. */
static PyObject *ql_awq_from(const ql_signature *signature, int tensor_count,
                             PyObject *(*convert)(const ql_tensor *, int64_t, PyObject *), PyObject *const *args,
                             Py_ssize_t nargs, PyObject *kwnames) {
    PyObject *values[4];
    int64_t group_size;
    ql_tensor tensors[3];
    if (ql_args_fast(values, signature, args, nargs, kwnames) < 0 ||
        ql_arg_group_size(&group_size, values[tensor_count], signature->function) < 0 ||
        ql_tensors_read(tensors, values, signature->names, tensor_count, 2) < 0)
        return NULL;
    PyObject *result = convert(tensors, group_size, values[0]);
    ql_tensors_release(tensors, tensor_count);
    return result;
}

static PyObject *ql_awq_from_gemv_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"qweight", "qzeros", "scales", "group_size"};
    static const ql_signature signature = {"awq_from_gemv", 4, 3, 4, names};
    return ql_awq_from(&signature, 3, ql_from_gemv, args, nargs, kwnames);
}

static PyObject *ql_awq_from_gemv_fast_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                          PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"qweight", "qzeros", "scales", "group_size"};
    static const ql_signature signature = {"awq_from_gemv_fast", 4, 3, 4, names};
    return ql_awq_from(&signature, 3, ql_from_gemv_fast, args, nargs, kwnames);
}

static PyObject *ql_awq_from_marlin_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"qweight", "scales", "group_size"};
    static const ql_signature signature = {"awq_from_marlin", 3, 2, 3, names};
    return ql_awq_from(&signature, 2, ql_from_marlin, args, nargs, kwnames);
}

PyMethodDef ql_awq_methods[] = {
    {"awq_quantize", QL_METHOD(ql_awq_quantize_py), METH_FASTCALL | METH_KEYWORDS,
     "awq_quantize(weight, *, group_size)\n--\n\nweight float [N, K] -> qweight, qzeros, scales fp16, by AWQ's min-max "
     "rule."},
    {"awq_pack", QL_METHOD(ql_awq_pack_py), METH_FASTCALL | METH_KEYWORDS,
     "awq_pack(codes)\n--\n\ncodes uint8 [R, N] -> int32 [R, ceil(N / 8)] in AWQ's nibble order."},
    {"awq_unpack", QL_METHOD(ql_awq_unpack_py), METH_FASTCALL | METH_KEYWORDS,
     "awq_unpack(packed, *, count)\n--\n\nint32 [R, ceil(count / 8)] -> uint8 [R, count]."},
    {"awq_from_gemv", QL_METHOD(ql_awq_from_gemv_py), METH_FASTCALL | METH_KEYWORDS,
     "awq_from_gemv(qweight, qzeros, scales, *, group_size)\n--\n\nThe GEMV storage -> the GEMM storage, exactly."},
    {"awq_from_gemv_fast", QL_METHOD(ql_awq_from_gemv_fast_py), METH_FASTCALL | METH_KEYWORDS,
     "awq_from_gemv_fast(qweight, qzeros, scales, *, group_size)\n--\n\nThe GEMVFast storage -> the GEMM storage, "
     "exactly; the zeros stay products -(scale * zero)."},
    {"awq_from_marlin", QL_METHOD(ql_awq_from_marlin_py), METH_FASTCALL | METH_KEYWORDS,
     "awq_from_marlin(qweight, scales, *, group_size)\n--\n\nThe Marlin storage -> the GEMM storage, exactly; every "
     "zero "
     "is 8."},
    {NULL, NULL, 0, NULL},
};

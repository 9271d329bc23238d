/* The functions on GPTQ's streams of codes: packing, unpacking, and the planar layout to the plain one. */
#include "../cpu/threads.h"
#include "../cuda/recode.h"
#include "../formats/bits.h"
#include "../formats/gptq.h"
#include "grouped.h"
#include "quantize.h"

typedef struct ql_stream_job {
    ql_matrix input;
    void *output;
    int64_t count; /* of codes in a column, where they are unpacked */
    int bits;
} ql_stream_job;

/* How it is done: on the CPU `body` takes a range of chunks of codes, on a GPU `launch` takes all. `check`, of the input's
 * contents, comes before, or is NULL. */
typedef struct ql_stream_work {
    void (*body)(void *job, int64_t begin, int64_t end);
    int (*launch)(const ql_cuda_place *place, const ql_stream_job *job, char *message);
    int (*check)(const ql_stream_job *job, PyObject *object, const ql_tensor *tensor);
} ql_stream_work;

static void ql_pack_codes_body(void *context, int64_t begin, int64_t end) {
    const ql_stream_job *job = context;
    ql_gptq_pack_codes(job->output, &job->input, job->bits, begin, end);
}

static int ql_pack_codes_launch(const ql_cuda_place *place, const ql_stream_job *job, char *message) {
    return ql_cuda_gptq_pack_codes(place, job->output, &job->input, job->bits, message);
}

static int ql_pack_codes_check(const ql_stream_job *job, PyObject *object, const ql_tensor *codes) {
    return ql_check_codes(object, codes, "codes", (int)ql_code_mask(job->bits));
}

static void ql_unpack_codes_body(void *context, int64_t begin, int64_t end) {
    const ql_stream_job *job = context;
    ql_gptq_unpack_codes(job->output, job->count, &job->input, job->bits, begin, end);
}

static int ql_unpack_codes_launch(const ql_cuda_place *place, const ql_stream_job *job, char *message) {
    return ql_cuda_gptq_unpack_codes(place, job->output, job->count, &job->input, job->bits, message);
}

static void ql_unplanar_body(void *context, int64_t begin, int64_t end) {
    const ql_stream_job *job = context;
    ql_gptq_unplanar(job->output, &job->input, job->bits, begin, end);
}

static int ql_unplanar_launch(const ql_cuda_place *place, const ql_stream_job *job, char *message) {
    return ql_cuda_gptq_unplanar(place, job->output, &job->input, job->bits, message);
}

static const ql_stream_work ql_pack_codes_work = {ql_pack_codes_body, ql_pack_codes_launch, ql_pack_codes_check};
static const ql_stream_work ql_unpack_codes_work = {ql_unpack_codes_body, ql_unpack_codes_launch, NULL};
static const ql_stream_work ql_unplanar_work = {ql_unplanar_body, ql_unplanar_launch, NULL};

static int ql_stream_run(ql_stream_job *job, PyObject *object, const ql_tensor *tensor, int64_t chunks,
                         const ql_stream_work *work) {
    if (ql_is_on_gpu(tensor)) {
        ql_cuda_place place;
        char message[QL_CUDA_MESSAGE];
        if (ql_place_of(&place, object, tensor) < 0) return -1;
        return ql_cuda_result(work->launch(&place, job, message), message);
    }
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(chunks, 4, work->body, job);
    Py_END_ALLOW_THREADS
    return 0;
}

/* One 2-D tensor in, one of the same framework and device out. It is there before anything reads the input: an expanded
 * one claims sizes that no output can have. */
static PyObject *ql_gptq_recode(ql_stream_job *job, PyObject *like, const ql_tensor *tensor, ql_dtype dtype,
                                int64_t rows, int64_t chunks, const ql_stream_work *work) {
    ql_output output;
    const int64_t shape[] = {rows, job->input.cols};
    if (ql_output_begin_beside(&output, like, tensor, dtype, 2, shape) < 0) return NULL;
    job->output = output.view.data;
    if (ql_tensor_numel(&output.view) == 0 ||
        ((!work->check || work->check(job, like, tensor) == 0) && ql_stream_run(job, like, tensor, chunks, work) == 0))
        return ql_output_finish(&output);
    ql_output_abandon(&output);
    return NULL;
}

static PyObject *ql_gptq_pack_codes_py(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const char *const names[] = {"codes", "bits"};
    static const ql_signature signature = {"gptq_pack_codes", 2, 1, 2, names};
    static const ql_dtype taken[] = {QL_U8};
    PyObject *values[2];
    ql_stream_job job = {0};
    ql_tensor codes;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_bits(&job.bits, values[1]) < 0 ||
        ql_tensors_read(&codes, values, names, 1, 2) < 0)
        return NULL;
    PyObject *result = NULL;
    job.input = ql_matrix_of(&codes);
    if (ql_check_dtype(&codes, "codes", 1, taken) == 0)
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
    ql_stream_job job = {0};
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
    ql_stream_job job = {0};
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

PyMethodDef ql_stream_methods[] = {
    {"gptq_pack_codes", QL_METHOD(ql_gptq_pack_codes_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_pack_codes(codes, *, bits)\n--\n\ncodes uint8 [K, N] -> int32 [ceil(K * bits / 32), N]."},
    {"gptq_unpack_codes", QL_METHOD(ql_gptq_unpack_codes_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_unpack_codes(packed, *, bits, count)\n--\n\nint32 [ceil(count * bits / 32), N] -> uint8 [count, N]."},
    {"gptq_unplanar", QL_METHOD(ql_gptq_unplanar_py), METH_FASTCALL | METH_KEYWORDS,
     "gptq_unplanar(packed, *, bits)\n--\n\nqweight of the planar layout (gptq_p) -> the stream layout."},
    {NULL, NULL, 0, NULL},
};

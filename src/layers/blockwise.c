/* bitsandbytes' blockwise quantizers, 4 and 8 bit, and their codes, as functions. */
#include "../cpu/threads.h"
#include "../cuda/quantize.h"
#include "../formats/dynamic_map.h"
#include "../formats/fourbit.h"
#include "blocks.h"
#include "quantize.h"

#include <stdlib.h>

/* Blocks that a thread takes at a time: enough values that starting it is nothing beside them. */
static int64_t block_grain(int64_t blocksize) { return blocksize < 65536 ? 65536 / blocksize : 1; }

/* ------------------------------------------------------------------------------------------------------------------
 * Codes as lists */

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

/* ------------------------------------------------------------------------------------------------------------------
 * Quantizers */

/* One quantization or its inverse. */
typedef struct blocks_task {
    ql_values x;
    void *out;
    float *absmax;
    const uint8_t *codes;
    const float *map; /* the code of 4 bits, or the map of 8; where codes are made, on the host */
    ql_fourbit_type type;
    ql_dtype dtype; /* of the values, where codes are decoded */
    int64_t count, blocksize;
} blocks_task;

/* On the CPU `body` takes a range of blocks; on a GPU `launch` takes all, with the values of a flat array. */
typedef struct blocks_kernel {
    void (*body)(void *task, int64_t begin, int64_t end);
    int (*launch)(const ql_cuda_place *place, const blocks_task *task, const ql_matrix *flat, char *message);
} blocks_kernel;

static void quantize_4bit_body(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_fourbit_quantize(task->out, task->absmax, &task->x, task->count, task->blocksize, task->type, begin, end);
}

static int quantize_4bit_launch(const ql_cuda_place *place, const blocks_task *task, const ql_matrix *flat,
                                char *message) {
    return ql_cuda_fourbit_quantize(place, task->out, task->absmax, flat->data, flat->dtype, task->count,
                                    task->blocksize, task->type, message);
}

static void dequantize_4bit_body(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_fourbit_dequantize(task->out, task->dtype, task->codes, task->absmax, task->map, task->count, task->blocksize,
                          begin, end);
}

static int dequantize_4bit_launch(const ql_cuda_place *place, const blocks_task *task, const ql_matrix *flat,
                                  char *message) {
    (void)flat;
    return ql_cuda_fourbit_dequantize(place, task->out, task->dtype, task->codes, task->absmax, task->map, task->count,
                                      task->blocksize, message);
}

static void quantize_8bit_body(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_blockwise_quantize(task->out, task->absmax, &task->x, task->map, task->count, task->blocksize, begin, end);
}

static int quantize_8bit_launch(const ql_cuda_place *place, const blocks_task *task, const ql_matrix *flat,
                                char *message) {
    return ql_cuda_blockwise_quantize(place, task->out, task->absmax, flat->data, flat->dtype, task->map, task->count,
                                      task->blocksize, message);
}

static void dequantize_8bit_body(void *context, int64_t begin, int64_t end) {
    const blocks_task *task = context;
    ql_blockwise_dequantize(task->out, task->dtype, task->codes, task->absmax, task->map, task->count, task->blocksize,
                            begin, end);
}

static int dequantize_8bit_launch(const ql_cuda_place *place, const blocks_task *task, const ql_matrix *flat,
                                  char *message) {
    (void)flat;
    return ql_cuda_blockwise_dequantize(place, task->out, task->dtype, task->codes, task->absmax, task->map,
                                        task->count, task->blocksize, message);
}

static const blocks_kernel quantize_4bit_kernel = {quantize_4bit_body, quantize_4bit_launch};
static const blocks_kernel dequantize_4bit_kernel = {dequantize_4bit_body, dequantize_4bit_launch};
static const blocks_kernel quantize_8bit_kernel = {quantize_8bit_body, quantize_8bit_launch};
static const blocks_kernel dequantize_8bit_kernel = {dequantize_8bit_body, dequantize_8bit_launch};

static void run_on_cpu(blocks_task *task, const blocks_kernel *kernel) {
    int64_t blocks = ql_group_count(task->count, task->blocksize);
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(blocks, block_grain(task->blocksize), kernel->body, task);
    Py_END_ALLOW_THREADS
}

/* Encodes x on the device that it is on. */
static int run_quantize(blocks_task *task, PyObject *object, const ql_tensor *x, const blocks_kernel *kernel) {
    static const int64_t one = 1;
    if (!ql_is_on_gpu(x)) {
        /* A contiguous tensor is one dimension. */
        bool is_flat = ql_tensor_is_contiguous(x);
        task->x = is_flat ? (ql_values){x->data, x->dtype, 1, &task->count, &one}
                          : (ql_values){x->data, x->dtype, x->ndim, x->shape, x->stride};
        run_on_cpu(task, kernel);
        return 0;
    }
    ql_cuda_place place;
    ql_matrix flat;
    ql_output copy = {0};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    if (ql_place_of(&place, object, x) == 0 && ql_device_flat(&flat, &copy, &place, object, x) == 0)
        result = ql_cuda_result(kernel->launch(&place, task, &flat, message), message);
    ql_output_abandon(&copy);
    return result;
}

/* Quantizes x into a tensor of `shape` uint8 and absmax; the pair of both. */
static PyObject *quantize(PyObject *object, const ql_tensor *x, blocks_task *task, int ndim, const int64_t *shape,
                          const blocks_kernel *kernel) {
    int64_t blocks = ql_group_count(task->count, task->blocksize);
    ql_output codes, absmax;
    if (ql_output_begin_beside(&codes, object, x, QL_U8, ndim, shape) < 0) return NULL;
    if (ql_output_begin_beside(&absmax, object, x, QL_F32, 1, &blocks) < 0) {
        ql_output_abandon(&codes);
        return NULL;
    }
    task->out = codes.view.data;
    task->absmax = absmax.view.data;
    PyObject *first = run_quantize(task, object, x, kernel) == 0 ? ql_output_finish(&codes) : NULL;
    PyObject *second = first ? ql_output_finish(&absmax) : NULL;
    PyObject *pair = second ? PyTuple_Pack(2, first, second) : NULL;
    ql_output_abandon(&codes);
    ql_output_abandon(&absmax);
    Py_XDECREF(first);
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
        ql_tensor_read(&x, values[0], "x") < 0)
        return NULL;
    if (check_values(&x) == 0) {
        task.type = (ql_fourbit_type)type;
        task.count = ql_tensor_numel(&x);
        result =
            quantize(values[0], &x, &task, 2, (int64_t[]){task.count / 2 + task.count % 2, 1}, &quantize_4bit_kernel);
    }
    ql_tensor_release(&x);
    return result;
}

/* A map that does not ascend has no nearest value by bisection; NaN ascends from nothing. */
static int check_map(const float *map) {
    for (int i = 0; i < QL_MAP_SIZE; i++) {
        if (map[i] >= map[i ? i - 1 : 0]) continue;
        PyErr_Format(PyExc_ValueError, "code must ascend, and does not at index %d", i);
        return -1;
    }
    return 0;
}

/* code may be on the CPU where x is on a GPU: nothing has to be waited for then. */
static PyObject *quantize_blockwise(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"x", "code", "blocksize"};
    static const ql_signature signature = {"quantize_blockwise", 3, 2, 3, names};
    PyObject *values[3], *result = NULL;
    blocks_task task = {0};
    ql_tensor tensors[2];
    (void)module;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 ||
        ql_arg_int(&task.blocksize, values[2], "blocksize") < 0 || check_blocksize(task.blocksize, "blocksize") < 0 ||
        ql_tensor_read_all(tensors, values, names, 2) < 0)
        return NULL;
    const ql_tensor *x = &tensors[0], *code = &tensors[1];
    void *copy = NULL;
    if (check_values(x) == 0 && check_flat(code, "code", taken_f32, QL_MAP_SIZE) == 0)
        task.map = ql_host_contents(&copy, values[1], code, "code");
    if (task.map && check_map(task.map) == 0) {
        task.count = ql_tensor_numel(x);
        result = quantize(values[0], x, &task, x->ndim, x->shape, &quantize_8bit_kernel);
    }
    free(copy);
    ql_tensors_release(tensors, 2);
    return result;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Their inverses */

/* The three tensors of a dequantization, of one device, to be released; or -1 and none. */
static int read_three(ql_tensor *tensors, PyObject *const *objects, const char *const *names) {
    if (ql_tensor_read_all(tensors, objects, names, 3) < 0) return -1;
    if (ql_check_same_device(&tensors[1], names[1], &tensors[0], names[0]) == 0 &&
        ql_check_same_device(&tensors[2], names[2], &tensors[0], names[0]) == 0)
        return 0;
    ql_tensors_release(tensors, 3);
    return -1;
}

static int run_dequantize(blocks_task *task, PyObject *object, const ql_tensor *codes, const blocks_kernel *kernel) {
    if (!ql_is_on_gpu(codes)) {
        run_on_cpu(task, kernel);
        return 0;
    }
    ql_cuda_place place;
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, object, codes) < 0) return -1;
    return ql_cuda_result(kernel->launch(&place, task, NULL, message), message);
}

/* Dequantizes tensors (codes, absmax, map), which have been checked but for absmax, into a tensor of `shape`. */
static PyObject *dequantize(PyObject *object, const ql_tensor *tensors, blocks_task *task, int ndim,
                            const int64_t *shape, const blocks_kernel *kernel) {
    ql_output output;
    if (check_flat(&tensors[1], "absmax", taken_f32, ql_group_count(task->count, task->blocksize)) < 0 ||
        ql_output_begin_beside(&output, object, &tensors[0], task->dtype, ndim, shape) < 0)
        return NULL;
    task->out = output.view.data;
    task->codes = tensors[0].data;
    task->absmax = tensors[1].data;
    task->map = tensors[2].data;
    if (run_dequantize(task, object, &tensors[0], kernel) == 0) return ql_output_finish(&output);
    ql_output_abandon(&output);
    return NULL;
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
        result = dequantize(values[0], tensors, &task, 1, &task.count, &dequantize_4bit_kernel);
    ql_tensors_release(tensors, 3);
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
        result = dequantize(values[0], tensors, &task, tensors[0].ndim, tensors[0].shape, &dequantize_8bit_kernel);
    ql_tensors_release(tensors, 3);
    return result;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The mean of double quantization */

typedef struct mean_task {
    const float *values;
    double *sums;
    int64_t count;
} mean_task;

static void sum_chunks(void *context, int64_t begin, int64_t end) {
    const mean_task *task = context;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t first = chunk * QL_MEAN_CHUNK, left = task->count - first;
        task->sums[chunk] = ql_chunk_sum(task->values + first, left < QL_MEAN_CHUNK ? left : QL_MEAN_CHUNK);
    }
}

static int mean_on_cpu(float *mean, const ql_tensor *x) {
    mean_task task = {.values = x->data, .count = ql_tensor_numel(x)};
    int64_t chunks = ql_group_count(task.count, QL_MEAN_CHUNK);
    task.sums = malloc(chunks ? (size_t)chunks * sizeof *task.sums : 1);
    if (!task.sums) {
        PyErr_NoMemory();
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    ql_cpu_parallel(chunks, 4, sum_chunks, &task);
    *mean = ql_mean_of_sums(task.sums, task.count);
    Py_END_ALLOW_THREADS
    free(task.sums);
    return 0;
}

static int mean_on_gpu(float *mean, PyObject *object, const ql_tensor *x) {
    ql_cuda_place place;
    ql_output sums = {0};
    char message[QL_CUDA_MESSAGE];
    int result = -1;
    int64_t count = ql_tensor_numel(x), chunks = ql_group_count(count, QL_MEAN_CHUNK);
    if (ql_place_of(&place, object, x) == 0 &&
        ql_device_scratch(&sums, object, x, chunks * (int64_t)sizeof(double)) == 0)
        result = ql_cuda_result(ql_cuda_mean(&place, mean, sums.view.data, x->data, count, message), message);
    ql_output_abandon(&sums);
    return result;
}

static PyObject *absmax_mean(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"absmax"};
    static const ql_signature signature = {"absmax_mean", 1, 1, 1, names};
    PyObject *object, *result = NULL;
    ql_tensor absmax;
    ql_output mean;
    (void)module;
    if (ql_args_fast(&object, &signature, args, nargs, kwnames) < 0 || ql_tensor_read(&absmax, object, "absmax") < 0)
        return NULL;
    if (ql_check_dtype(&absmax, "absmax", 1, taken_f32) == 0 && ql_check_contiguous(&absmax, "absmax") == 0 &&
        ql_output_begin_beside(&mean, object, &absmax, QL_F32, 0, NULL) == 0) {
        int failed =
            ql_is_on_gpu(&absmax) ? mean_on_gpu(mean.view.data, object, &absmax) : mean_on_cpu(mean.view.data, &absmax);
        if (failed)
            ql_output_abandon(&mean);
        else
            result = ql_output_finish(&mean);
    }
    ql_tensor_release(&absmax);
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
    {"absmax_mean", QL_METHOD(absmax_mean), METH_FASTCALL | METH_KEYWORDS,
     "absmax_mean(absmax)\n--\n\nThe mean of a float32 tensor, [], in fp64 and one order, rounded once: what double "
     "quantization takes off."},
    {NULL, NULL, 0, NULL},
};

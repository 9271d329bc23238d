/* A tensor as C sees it, read from any framework's object, and the outputs that calls make.
 *
 * Reading tries, in this order: the DLPack exchange API of the object's type (about 40 ns, no ownership taken), NumPy's C
 * API (NumPy arrays; also their bfloat16 and float8 of ml_dtypes, which DLPack cannot carry), __dlpack__ with a versioned
 * capsule, __dlpack__ with the old one. All functions set a Python exception when they fail, and name the argument. */
#ifndef QL_TENSOR_H
#define QL_TENSOR_H

#include "formats/dtype.h"
#include "python.h"

#include <stdbool.h>
#include <stdint.h>

enum { QL_MAX_DIMS = 16, QL_DEVICE_CPU = 1, QL_DEVICE_CUDA = 2 };

typedef struct ql_tensor {
    void *data; /* of the first element */
    int device_type, device_id;
    ql_dtype dtype;
    int ndim;
    int64_t shape[QL_MAX_DIMS];
    int64_t stride[QL_MAX_DIMS]; /* in elements; of a dimension of size 1 and of an empty tensor it means nothing */
    void *managed; /* what the producer lent, given back by ql_tensor_release; NULL where it lent nothing */
    bool versioned;
    bool borrowed; /* data stays valid only as long as the object lives and is not resized */
} ql_tensor;

/* Reads `object` into *tensor; 0, or -1 with TypeError (no tensor, dtype of no use here), ValueError (sizes out of range,
 * a tensor that torch negates lazily) or what the producer raised. On success the caller owes ql_tensor_release; the
 * object must outlive it. */
int ql_tensor_read(ql_tensor *tensor, PyObject *object, const char *name);
void ql_tensor_release(ql_tensor *tensor);
/* `count` tensors, all to be released, or none and -1. Reading runs Python code where a producer has only __dlpack__, which
 * may replace the storage of a tensor read before it: what is borrowed counts as it is after the last one was read. */
int ql_tensor_read_all(ql_tensor *tensors, PyObject *const *objects, const char *const *names, int count);
void ql_tensors_release(ql_tensor *tensors, int count);
/* Reads what was borrowed once more, from the object that it was read from; runs no Python code. 0, or -1. */
int ql_tensor_read_again(ql_tensor *tensor, PyObject *object, const char *name);

/* Number of elements. A tensor that was read has passed the check that this and its bytes fit int64. */
int64_t ql_tensor_numel(const ql_tensor *tensor);
bool ql_tensor_is_contiguous(const ql_tensor *tensor);

/* ---- checks: each returns 0, or -1 with the exception that names the argument, what came and what is taken ---- */

/* dtype is one of the `count` given. */
int ql_check_dtype(const ql_tensor *tensor, const char *name, int count, const ql_dtype *taken);
/* fp32, fp16, bf16 (and fp64 where allowed). */
int ql_check_float(const ql_tensor *tensor, const char *name, bool allow_f64);
/* ndim is `ndim` and each size is the one given; -1 takes any. */
int ql_check_shape(const ql_tensor *tensor, const char *name, int ndim, const int64_t *shape);
int ql_check_contiguous(const ql_tensor *tensor, const char *name);
/* For what only the CPU does: a tensor elsewhere is NotImplementedError. */
int ql_check_on_cpu(const ql_tensor *tensor, const char *name);
/* ValueError that names both devices where they differ. */
int ql_check_same_device(const ql_tensor *tensor, const char *name, const ql_tensor *other, const char *other_name);
/* data is aligned to its element size (a product by vector loads needs no more). */
int ql_check_aligned(const ql_tensor *tensor, const char *name);

/* "[2, 3] float16" into buffer, for messages. */
const char *ql_tensor_describe(const ql_tensor *tensor, char *buffer, size_t size);

/* The stream that the framework of `object`, a CUDA tensor read into *tensor, works on now; the legacy stream where the
 * framework has no exchange API to tell. 0, or -1. */
int ql_tensor_stream(void **stream, PyObject *object, const ql_tensor *tensor);

/* RuntimeError with the sentence that a function of cuda/ left; -1. */
int ql_cuda_failed(const char *message);

/* ---- outputs ---- */

/* A tensor under construction, in the framework of `like`: begin, write through view.data, then finish for the object or
 * abandon. View is contiguous. QL_E4M3 falls to uint8 where the framework cannot hold float8; view.dtype tells. */
typedef struct ql_output {
    ql_tensor view;
    void *pending;
    int kind;
    PyObject *like;
} ql_output;

int ql_output_begin(ql_output *output, PyObject *like, ql_dtype dtype, int ndim, const int64_t *shape);
/* As ql_output_begin, on the device of `beside`, a tensor read from `like`: from the allocator of the framework, so that
 * memory is had and given back in the order of the current stream. Abandoned, it has served as scratch. */
int ql_output_begin_beside(ql_output *output, PyObject *like, const ql_tensor *beside, ql_dtype dtype, int ndim,
                           const int64_t *shape);
PyObject *ql_output_finish(ql_output *output);
void ql_output_abandon(ql_output *output);

#endif

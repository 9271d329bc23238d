/* What the functions that quantize and recode share where their tensors are on a GPU. */
#ifndef QL_LAYERS_QUANTIZE_H
#define QL_LAYERS_QUANTIZE_H

#include "../formats/matrix.h"
#include "device.h"

static inline bool ql_is_on_gpu(const ql_tensor *tensor) { return tensor->device_type != QL_DEVICE_CPU; }

/* The values of a 2-D float tensor as contiguous rows of fp32, fp16 or bf16: themselves where they lie so, else a copy.
 * *copy, which the caller zeroed, is for ql_output_abandon in any case. 0, or -1. */
int ql_device_rows(ql_matrix *rows, ql_output *copy, const ql_cuda_place *place, PyObject *object,
                   const ql_tensor *tensor);

/* The same for a tensor of any shape as a flat array: data and dtype of a matrix of one row. */
int ql_device_flat(ql_matrix *flat, ql_output *copy, const ql_cuda_place *place, PyObject *object,
                   const ql_tensor *tensor);

/* ValueError for the first code above `largest`; codes are uint8, 2-D. On a GPU this waits for the stream. */
int ql_check_codes(PyObject *object, const ql_tensor *codes, const char *name, int largest);

/* Memory beside the tensor, to be abandoned. 0, or -1. */
int ql_device_scratch(ql_output *scratch, PyObject *object, const ql_tensor *beside, int64_t bytes);

/* What a function of cuda/ returned, as an exception where it failed: 0, or -1. */
static inline int ql_cuda_result(int result, const char *message) { return result < 0 ? ql_cuda_failed(message) : 0; }

#endif

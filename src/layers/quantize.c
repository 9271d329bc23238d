#include "quantize.h"

#include "../cuda/quantize.h"
#include "../cuda/recode.h"

static int copy_of(ql_output *copy, const ql_cuda_place *place, PyObject *object, const ql_tensor *tensor) {
    ql_dtype dtype = tensor->dtype == QL_F64 ? QL_F32 : tensor->dtype;
    char message[QL_CUDA_MESSAGE];
    if (ql_output_begin_beside(copy, object, tensor, dtype, tensor->ndim, tensor->shape) < 0) return -1;
    if (ql_tensor_numel(tensor) == 0) return 0;
    return ql_cuda_result(ql_cuda_lay_out(place, copy->view.data, tensor->data, tensor->dtype, tensor->ndim,
                                          tensor->shape, tensor->stride, message),
                          message);
}

int ql_device_rows(ql_matrix *rows, ql_output *copy, const ql_cuda_place *place, PyObject *object,
                   const ql_tensor *tensor) {
    const ql_tensor *from = tensor;
    if (tensor->dtype == QL_F64 || tensor->stride[1] != 1) {
        if (copy_of(copy, place, object, tensor) < 0) return -1;
        from = &copy->view;
    }
    *rows = (ql_matrix){from->data, from->dtype, from->shape[0], from->shape[1], from->stride[0], 1};
    return 0;
}

int ql_device_flat(ql_matrix *flat, ql_output *copy, const ql_cuda_place *place, PyObject *object,
                   const ql_tensor *tensor) {
    const ql_tensor *from = tensor;
    if (tensor->dtype == QL_F64 || !ql_tensor_is_contiguous(tensor)) {
        if (copy_of(copy, place, object, tensor) < 0) return -1;
        from = &copy->view;
    }
    int64_t count = ql_tensor_numel(tensor);
    *flat = (ql_matrix){from->data, from->dtype, 1, count, count, 1};
    return 0;
}

int ql_device_scratch(ql_output *scratch, PyObject *object, const ql_tensor *beside, int64_t bytes) {
    return ql_output_begin_beside(scratch, object, beside, QL_U8, 1, &bytes);
}

static int code_above(PyObject *object, const ql_tensor *codes, const char *name, int largest, int64_t at) {
    const uint8_t *data = codes->data;
    int64_t row = at / codes->shape[1], col = at % codes->shape[1];
    const uint8_t *place = data + row * codes->stride[0] + col * codes->stride[1];
    int code = 0;
    if (ql_is_on_gpu(codes)) {
        ql_cuda_place where;
        char message[QL_CUDA_MESSAGE];
        uint8_t read;
        if (ql_place_of(&where, object, codes) < 0) return -1;
        if (ql_cuda_read(&read, place, 1, &where, message) < 0) return ql_cuda_failed(message);
        code = read;
    } else {
        code = *place;
    }
    PyErr_Format(PyExc_ValueError, "%s must be at most %d, got %d at [%lld, %lld]", name, largest, code, (long long)row,
                 (long long)col);
    return -1;
}

/* The first code above `largest`, as row * cols + col, or -1. */
static int64_t first_above_on_cpu(const ql_tensor *codes, int largest) {
    const uint8_t *data = codes->data;
    for (int64_t row = 0; row < codes->shape[0]; row++)
        for (int64_t col = 0; col < codes->shape[1]; col++)
            if (data[row * codes->stride[0] + col * codes->stride[1]] > largest) return row * codes->shape[1] + col;
    return -1;
}

static int first_above_on_gpu(int64_t *at, PyObject *object, const ql_tensor *codes, int largest) {
    int64_t found[QL_CUDA_FOUND];
    ql_matrix matrix = {codes->data, QL_U8, codes->shape[0], codes->shape[1], codes->stride[0], codes->stride[1]};
    ql_cuda_place place;
    ql_output scratch = {0};
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, object, codes) < 0 || ql_device_scratch(&scratch, object, codes, sizeof found) < 0)
        return -1;
    int result = ql_cuda_find_above(&place, scratch.view.data, &matrix, largest, message);
    if (result == 0) {
        Py_BEGIN_ALLOW_THREADS
        result = ql_cuda_read(found, scratch.view.data, sizeof found, &place, message);
        Py_END_ALLOW_THREADS
    }
    ql_output_abandon(&scratch);
    if (result < 0) return ql_cuda_failed(message);
    *at = -1;
    for (int i = 0; i < QL_CUDA_FOUND; i++)
        if (found[i] >= 0 && (*at < 0 || found[i] < *at)) *at = found[i];
    return 0;
}

int ql_check_codes(PyObject *object, const ql_tensor *codes, const char *name, int largest) {
    int64_t at = -1;
    if (ql_tensor_numel(codes) == 0) return 0;
    if (!ql_is_on_gpu(codes))
        at = first_above_on_cpu(codes, largest);
    else if (first_above_on_gpu(&at, object, codes, largest) < 0)
        return -1;
    return at < 0 ? 0 : code_above(object, codes, name, largest, at);
}

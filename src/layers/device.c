#include "device.h"

#include <stdlib.h>

int ql_place_of(ql_cuda_place *place, PyObject *object, const ql_tensor *tensor) {
    place->device = tensor->device_id;
    return ql_tensor_stream(&place->stream, object, tensor);
}

const void *ql_host_contents(void **copy, PyObject *object, const ql_tensor *tensor, const char *name) {
    *copy = NULL;
    if (tensor->device_type == QL_DEVICE_CPU) return tensor->data;
    size_t bytes = (size_t)ql_tensor_numel(tensor) * ql_dtype_size(tensor->dtype);
    ql_cuda_place place;
    if (ql_check_contiguous(tensor, name) < 0 || ql_place_of(&place, object, tensor) < 0) return NULL;
    if (!(*copy = malloc(bytes ? bytes : 1))) return PyErr_NoMemory();
    char message[QL_CUDA_MESSAGE];
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cuda_read(*copy, tensor->data, bytes, &place, message);
    Py_END_ALLOW_THREADS
    if (result == 0) return *copy;
    free(*copy);
    *copy = NULL;
    ql_cuda_failed(message);
    return NULL;
}

const void *ql_layer_contents(const ql_layer *layer, int index, void **copy) {
    const ql_held *held = &layer->held[index];
    return ql_host_contents(copy, held->object, &held->tensor, held->name);
}

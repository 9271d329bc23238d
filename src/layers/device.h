/* Layers whose tensors are on a GPU: the place of a call there. */
#ifndef QL_LAYERS_DEVICE_H
#define QL_LAYERS_DEVICE_H

#include "../cuda/launch.h"
#include "layer.h"

/* The device of `tensor`, read from `object`, and the stream that its framework works on now. 0, or -1. */
int ql_place_of(ql_cuda_place *place, PyObject *object, const ql_tensor *tensor);

/* The contents of a contiguous tensor, read from `object`, where the host can read them: its own memory, or a copy of the
 * GPU's in *copy, for the caller to free. Waits for the stream. NULL with an exception; an empty tensor may have NULL
 * without one. */
const void *ql_host_contents(void **copy, PyObject *object, const ql_tensor *tensor, const char *name);

#endif

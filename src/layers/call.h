/* The way of one call: read the input, check it against the weight, make the output, run the engine of the device. */
#ifndef QL_LAYERS_CALL_H
#define QL_LAYERS_CALL_H

#include "layer.h"

/* x [..., K] -> [..., N], grad_output [..., N] -> [..., K], both in the dtype and the framework of the argument; the weight
 * [N, K] in `dtype` and the framework of the layer's first tensor. NULL with an exception. */
PyObject *ql_call_linear(ql_layer *layer, PyObject *x);
/* The same for an x that was read into *tensor. */
PyObject *ql_call_linear_read(ql_layer *layer, PyObject *x, const ql_tensor *tensor);
PyObject *ql_call_grad(ql_layer *layer, PyObject *grad_output);
PyObject *ql_call_dequantize(ql_layer *layer, ql_dtype dtype);

#endif

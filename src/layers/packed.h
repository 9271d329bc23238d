/* Layers packed for the GPU's kernels: how the types of checkpoints are packed, and the type that holds the result. */
#ifndef QL_LAYERS_PACKED_H
#define QL_LAYERS_PACKED_H

#include "layer.h"

/* (packed uint8 [bytes], description) in the framework and on the device of the layer's first tensor, or None where the
 * packed layout does not hold the layer. NULL with an exception. */
PyObject *ql_layer_pack(ql_layer *layer);

/* Why ql_layer_pack gives None: a sentence, empty where it does not. */
PyObject *ql_layer_pack_obstacle(ql_layer *layer);

#endif

/* An array that qlinear owns and hands out through __dlpack__: the output for frameworks that have no exchange table. */
#ifndef QL_DLPACK_ARRAY_H
#define QL_DLPACK_ARRAY_H

#include "tensor.h"

/* A new uninitialized array on a device (QL_DEVICE_CPU or QL_DEVICE_CUDA and its number) and a view of it, or NULL with an
 * exception. */
PyObject *ql_dlpack_array_new(ql_tensor *view, int device_type, int device_id, ql_dtype dtype, int ndim,
                              const int64_t *shape);

/* Creates `_qlinear.DLPackArray` and adds it to the module; 0, or -1. */
int ql_dlpack_array_add_type(PyObject *module);

/* DLPack's description of a dtype, as one DLDataType value packed little-endian: code, bits, lanes = 1. */
void ql_dlpack_dtype(ql_dtype dtype, uint8_t *code, uint8_t *bits);

#endif

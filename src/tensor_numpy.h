/* NumPy arrays through NumPy's C API, for tensor.c alone. NumPy is imported at the first array that is seen: where there
 * is no array, NumPy is not needed. */
#ifndef QL_TENSOR_NUMPY_H
#define QL_TENSOR_NUMPY_H

#include "tensor.h"

/* Whether the object is a NumPy array (false where NumPy was never imported by anybody). -1 on error. */
int ql_numpy_check(PyObject *object);

/* As ql_tensor_read, for an array. */
int ql_numpy_read(ql_tensor *tensor, PyObject *array, const char *name);

/* A new contiguous array and a view of it; QL_E4M3, QL_E5M2, QL_BF16 come from ml_dtypes, without which e4m3 and e5m2
 * become uint8 and bf16 fails. NULL with an exception. */
PyObject *ql_numpy_new(ql_tensor *view, ql_dtype dtype, int ndim, const int64_t *shape);

#endif

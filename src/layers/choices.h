/* What Python can ask and tell of the choice between kernels for packed weights. */
#ifndef QL_LAYERS_CHOICES_H
#define QL_LAYERS_CHOICES_H

#include "layer.h"

/* (code, n, k, group_size) of a packed weight: what a kernel is chosen for, beside the dtype and the rows of x. */
PyObject *ql_packed_problem(const ql_packed_spec *spec);

extern PyMethodDef ql_choice_methods[];

#endif

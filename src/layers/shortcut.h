/* The short way of a call from a torch module to the C layer that it made: a `__call__` in C, which asks whether anybody
 * wants to see the call (hooks, autograd, autocast, transforms, tracers), runs the product where nobody does, and goes
 * through torch.nn.Module.__call__ otherwise. */
#ifndef QL_LAYERS_SHORTCUT_H
#define QL_LAYERS_SHORTCUT_H

#include "../python.h"

/* Creates `_qlinear.Shortcut` and adds it to the module; 0, or -1. */
int ql_shortcut_add_type(PyObject *module);

#endif

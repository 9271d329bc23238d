/* Python.h as qlinear includes it: in module.c, tensor*, dlpack_array.c and layers/ only. */
#ifndef QL_PYTHON_H
#define QL_PYTHON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The C API keeps functions in void pointers, which POSIX allows and ISO C does not speak of. */
#define QL_SLOT(function) (__extension__(void *)(function))
#define QL_FROM_SLOT(type, pointer) (__extension__(type)(pointer))

/* A function of another signature than PyCFunction's, as its METH_ flags say. */
#define QL_METHOD(function) ((PyCFunction)(void (*)(void))(function))

#endif

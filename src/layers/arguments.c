/* The arguments of constructors and functions: matched by hand, since PyArg_Parse* formats cannot name the argument and
 * say what came and what is taken. */
#include "layer.h"

static int ql_args_find(const ql_signature *signature, PyObject *keyword) {
    for (int i = 0; i < signature->count; i++)
        if (PyUnicode_CompareWithASCIIString(keyword, signature->names[i]) == 0) return i;
    return -1;
}

static int ql_args_check_count(const ql_signature *signature, Py_ssize_t nargs) {
    if (nargs <= signature->positional) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes at most %d positional arguments, got %zd", signature->function,
                 signature->positional, nargs);
    return -1;
}

static int ql_args_keyword(PyObject **values, const ql_signature *signature, PyObject *keyword, PyObject *value) {
    int index = ql_args_find(signature, keyword);
    if (index < 0) {
        PyErr_Format(PyExc_TypeError, "%s has no argument %R", signature->function, keyword);
        return -1;
    }
    if (values[index]) {
        PyErr_Format(PyExc_TypeError, "%s got %s twice", signature->function, signature->names[index]);
        return -1;
    }
    values[index] = value;
    return 0;
}

static int ql_args_check_required(PyObject **values, const ql_signature *signature) {
    for (int i = 0; i < signature->required; i++) {
        if (!values[i]) {
            PyErr_Format(PyExc_TypeError, "%s: %s is missing", signature->function, signature->names[i]);
            return -1;
        }
    }
    return 0;
}

int ql_args_fast(PyObject **values, const ql_signature *signature, PyObject *const *args, Py_ssize_t nargs,
                 PyObject *kwnames) {
    if (ql_args_check_count(signature, nargs) < 0) return -1;
    for (Py_ssize_t i = 0; i < signature->count; i++) values[i] = i < nargs ? args[i] : NULL;
    Py_ssize_t keywords = kwnames ? PyTuple_Size(kwnames) : 0;
    for (Py_ssize_t i = 0; i < keywords; i++)
        if (ql_args_keyword(values, signature, PyTuple_GetItem(kwnames, i), args[nargs + i]) < 0) return -1;
    return ql_args_check_required(values, signature);
}

int ql_args_tuple(PyObject **values, const ql_signature *signature, PyObject *args, PyObject *kwargs) {
    Py_ssize_t nargs = PyTuple_Size(args);
    if (ql_args_check_count(signature, nargs) < 0) return -1;
    for (Py_ssize_t i = 0; i < signature->count; i++) values[i] = i < nargs ? PyTuple_GetItem(args, i) : NULL;
    PyObject *keyword, *value;
    Py_ssize_t position = 0;
    while (kwargs && PyDict_Next(kwargs, &position, &keyword, &value))
        if (ql_args_keyword(values, signature, keyword, value) < 0) return -1;
    return ql_args_check_required(values, signature);
}

/* An exception of __index__ or __float__ that says more than that the object has none: KeyboardInterrupt, for one. */
static bool ql_is_another_error(PyObject *expected) { return PyErr_Occurred() && !PyErr_ExceptionMatches(expected); }

int ql_arg_int(int64_t *value, PyObject *object, const char *name) {
    if (!object) return 0;
    /* __index__ lets NumPy's integers in and keeps floats out; True is a mistake more often than a one. */
    PyObject *index = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    if (!index) {
        if (ql_is_another_error(PyExc_TypeError)) return -1;
        PyErr_Format(PyExc_TypeError, "%s must be an int, got %R", name, object);
        return -1;
    }
    long long result = PyLong_AsLongLong(index);
    Py_DECREF(index);
    if (result == -1 && PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "%s is out of range: %R", name, object);
        return -1;
    }
    *value = result;
    return 0;
}

int ql_arg_float(double *value, PyObject *object, const char *name) {
    if (!object) return 0;
    double result = PyFloat_AsDouble(object);
    if (result == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(PyExc_ValueError, "%s is out of range: %R", name, object);
        else if (!ql_is_another_error(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s must be a float, got %R", name, object);
        return -1;
    }
    *value = result;
    return 0;
}

int ql_arg_bool(bool *value, PyObject *object, const char *name) {
    if (!object) return 0;
    if (!PyBool_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be True or False, got %R", name, object);
        return -1;
    }
    *value = object == Py_True;
    return 0;
}

int ql_arg_choice(int *value, PyObject *object, const char *name, const char *const *choices) {
    if (!object) return 0;
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a str, got %R", name, object);
        return -1;
    }
    for (int i = 0; choices[i]; i++) {
        if (PyUnicode_CompareWithASCIIString(object, choices[i]) == 0) {
            *value = i;
            return 0;
        }
    }
    PyObject *list = PyUnicode_FromString("");
    for (int i = 0; list && choices[i]; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U%s'%s'", list, i ? ", " : "", choices[i]);
        Py_DECREF(list);
        list = longer;
    }
    if (list) PyErr_Format(PyExc_ValueError, "%s must be one of %U, got %R", name, list, object);
    Py_XDECREF(list);
    return -1;
}

int ql_arg_dtype(ql_dtype *value, PyObject *object, const char *name) {
    static const char *const choices[] = {"float32", "float16", "bfloat16", NULL};
    static const ql_dtype dtypes[] = {QL_F32, QL_F16, QL_BF16};
    int index = -1;
    if (ql_arg_choice(&index, object, name, choices) < 0) return -1;
    if (index >= 0) *value = dtypes[index];
    return 0;
}

/* NumPy refuses to export ml_dtypes' bfloat16 and float8 through DLPack and the buffer protocol, but its C API reads and
 * makes them like any other array; it is also the fastest door (1 ns to read, 42 ns for a new array). */
#include "tensor_numpy.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wpedantic"
#include <numpy/arrayobject.h>
#pragma GCC diagnostic pop

/* 1 when the C API is there, 0 when nobody imported NumPy, -1 with an exception. */
static int ql_numpy_ready(void) {
    static bool ready;
    if (ready) return 1;
    /* An object can only be an array when somebody imported NumPy already. */
    PyObject *modules = PyImport_GetModuleDict();
    if (!PyDict_GetItemString(modules, "numpy")) return 0;
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    ready = true;
    return 1;
}

int ql_numpy_check(PyObject *object) {
    int ready = ql_numpy_ready();
    if (ready <= 0) return ready;
    return PyArray_Check(object);
}

/* ml_dtypes gets its type numbers at run time, so its types are known by the name of their scalar type. */
static const struct {
    const char *name;
    ql_dtype dtype;
} ql_ml_dtypes[] = {
    {"bfloat16", QL_BF16}, {"float8_e4m3fn", QL_E4M3}, {"float8_e5m2", QL_E5M2}, {"float8_e8m0fnu", QL_E8M0}};

static int ql_numpy_custom_dtype(ql_dtype *dtype, PyArray_Descr *descr) {
    PyObject *name = PyObject_GetAttrString((PyObject *)descr, "name");
    if (!name) return -1;
    int found = -1;
    for (size_t i = 0; i < sizeof ql_ml_dtypes / sizeof *ql_ml_dtypes; i++) {
        if (PyUnicode_CompareWithASCIIString(name, ql_ml_dtypes[i].name) == 0) {
            *dtype = ql_ml_dtypes[i].dtype;
            found = 0;
        }
    }
    Py_DECREF(name);
    return found;
}

static int ql_numpy_dtype(ql_dtype *dtype, PyArrayObject *array) {
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT32: *dtype = QL_F32; return 0;
    case NPY_FLOAT16: *dtype = QL_F16; return 0;
    case NPY_FLOAT64: *dtype = QL_F64; return 0;
    case NPY_INT8: *dtype = QL_I8; return 0;
    case NPY_UINT8: *dtype = QL_U8; return 0;
    case NPY_INT16: *dtype = QL_I16; return 0;
    case NPY_INT32: *dtype = QL_I32; return 0;
    case NPY_LONG:
    case NPY_LONGLONG: *dtype = QL_I64; return 0; /* two types of one size, of which NPY_INT64 is one */
    case NPY_BOOL: *dtype = QL_BOOL; return 0;
    default: return ql_numpy_custom_dtype(dtype, PyArray_DESCR(array));
    }
}

int ql_numpy_read(ql_tensor *tensor, PyObject *object, const char *name) {
    PyArrayObject *array = (PyArrayObject *)object;
    if (ql_numpy_dtype(&tensor->dtype, array) < 0) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "%s: NumPy dtype %R is of no use here", name,
                         (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: NumPy dtype %R is not in this machine's byte order", name,
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    tensor->ndim = PyArray_NDIM(array);
    if (tensor->ndim > QL_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, at most %d are taken", name, tensor->ndim, QL_MAX_DIMS);
        return -1;
    }
    int64_t size = (int64_t)ql_dtype_size(tensor->dtype);
    bool empty = PyArray_SIZE(array) == 0;
    for (int i = 0; i < tensor->ndim; i++) {
        tensor->shape[i] = PyArray_DIM(array, i);
        int64_t bytes = PyArray_STRIDE(array, i);
        if (bytes % size && tensor->shape[i] > 1 && !empty) {
            PyErr_Format(PyExc_ValueError,
                         "%s: stride of %lld bytes in dimension %d is no multiple of its %lld byte elements", name,
                         (long long)bytes, i, (long long)size);
            return -1;
        }
        tensor->stride[i] = bytes / size;
    }
    tensor->data = PyArray_DATA(array);
    tensor->device_type = QL_DEVICE_CPU;
    tensor->device_id = 0;
    return 0;
}

static PyArray_Descr *ql_numpy_ml_dtype(const char *name) {
    PyObject *module = PyImport_ImportModule("ml_dtypes");
    if (!module) return NULL;
    PyObject *type = PyObject_GetAttrString(module, name);
    Py_DECREF(module);
    if (!type) return NULL;
    PyArray_Descr *descr = NULL;
    int converted = PyArray_DescrConverter(type, &descr);
    Py_DECREF(type);
    return converted ? descr : NULL;
}

static PyArray_Descr *ql_numpy_descr(ql_dtype *dtype) {
    static const int number[QL_DTYPE_COUNT] = {
        [QL_F32] = NPY_FLOAT32, [QL_F16] = NPY_FLOAT16, [QL_F64] = NPY_FLOAT64,
        [QL_I8] = NPY_INT8,     [QL_U8] = NPY_UINT8,    [QL_I16] = NPY_INT16,
        [QL_I32] = NPY_INT32,   [QL_I64] = NPY_INT64,   [QL_BOOL] = NPY_BOOL,
    };
    if (*dtype != QL_BF16 && *dtype != QL_E4M3 && *dtype != QL_E5M2 && *dtype != QL_E8M0)
        return PyArray_DescrFromType(number[*dtype]);
    PyArray_Descr *descr = ql_numpy_ml_dtype(ql_dtype_name(*dtype));
    if (descr || *dtype == QL_BF16 || !PyErr_ExceptionMatches(PyExc_ImportError)) return descr;
    PyErr_Clear();
    *dtype = QL_U8;
    return PyArray_DescrFromType(NPY_UINT8);
}

PyObject *ql_numpy_new(ql_tensor *view, ql_dtype dtype, int ndim, const int64_t *shape) {
    npy_intp dims[QL_MAX_DIMS] = {0};
    for (int i = 0; i < ndim; i++) dims[i] = (npy_intp)shape[i];
    PyArray_Descr *descr = ql_numpy_descr(&dtype);
    if (!descr) return NULL;
    PyObject *array = PyArray_Empty(ndim, dims, descr, 0);
    if (!array) return NULL;
    if (ql_numpy_read(view, array, "output") < 0) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

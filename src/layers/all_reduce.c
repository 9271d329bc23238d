/* The type `_qlinear.AllReduce`: a GPU's end of the sums that several processes of a host make of their tensors. */
#include "../cuda/all_reduce.h"
#include "device.h"

#include <string.h>

typedef struct ql_all_reduce {
    PyObject_HEAD
    ql_cuda_reducer reducer;
    ql_cu_ipc_handle handle;
    bool is_connected;
} ql_all_reduce;

static int parse_ends(ql_cuda_reducer *reducer, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"device", "rank", "parts"};
    static const ql_signature signature = {"AllReduce", 3, 3, 3, names};
    PyObject *values[3];
    int64_t numbers[3] = {0};
    if (ql_args_tuple(values, &signature, args, kwargs) < 0) return -1;
    for (int i = 0; i < 3; i++)
        if (ql_arg_int(&numbers[i], values[i], names[i]) < 0) return -1;
    if (numbers[2] < 2 || numbers[2] > QL_ALL_REDUCE_PARTS) {
        PyErr_Format(PyExc_ValueError, "parts must be 2 to %d, got %lld", QL_ALL_REDUCE_PARTS, (long long)numbers[2]);
        return -1;
    }
    if (numbers[1] < 0 || numbers[1] >= numbers[2]) {
        PyErr_Format(PyExc_ValueError, "rank must be 0 to %lld, got %lld", (long long)numbers[2] - 1,
                     (long long)numbers[1]);
        return -1;
    }
    const bool is_ordinal = numbers[0] >= 0 && numbers[0] < QL_CUDA_MAX_DEVICES;
    *reducer = (ql_cuda_reducer){
        .device = is_ordinal ? (int)numbers[0] : -1, .rank = (int)numbers[1], .parts = (int)numbers[2]};
    return 0;
}

static PyObject *all_reduce_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    ql_cuda_reducer reducer;
    if (parse_ends(&reducer, args, kwargs) < 0) return NULL;
    ql_all_reduce *made = (ql_all_reduce *)QL_FROM_SLOT(allocfunc, PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!made) return NULL;
    made->reducer = reducer;
    char message[QL_CUDA_MESSAGE];
    if (ql_cuda_reducer_make(&made->reducer, &made->handle, message) == 0) return (PyObject *)made;
    ql_cuda_failed(message);
    Py_DECREF((PyObject *)made);
    return NULL;
}

static void all_reduce_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ql_cuda_reducer_close(&((ql_all_reduce *)self)->reducer);
    QL_FROM_SLOT(freefunc, PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* ------------------------------------------------------------------------------------------------------------------
 * Meeting */

static int parse_handles(ql_cu_ipc_handle handles[QL_ALL_REDUCE_PARTS], PyObject *object, int parts) {
    if ((!PyTuple_Check(object) && !PyList_Check(object)) || PySequence_Size(object) != parts) {
        PyErr_Format(PyExc_TypeError, "handles must be a list of %d, one of each rank, got %R", parts, object);
        return -1;
    }
    for (int i = 0; i < parts; i++) {
        char *bytes = NULL;
        Py_ssize_t size = 0;
        PyObject *item = PySequence_GetItem(object, i);
        if (!item) return -1;
        const bool is_handle = PyBytes_Check(item) && PyBytes_AsStringAndSize(item, &bytes, &size) == 0 &&
                               size == (Py_ssize_t)sizeof handles[i];
        if (is_handle) memcpy(&handles[i], bytes, sizeof handles[i]);
        if (!is_handle)
            PyErr_Format(PyExc_TypeError, "handles[%d] must be %zu bytes, got %R", i, sizeof *handles, item);
        Py_DECREF(item);
        if (!is_handle) return -1;
    }
    return 0;
}

static PyObject *all_reduce_connect(PyObject *self, PyObject *object) {
    ql_cuda_reducer *reducer = &((ql_all_reduce *)self)->reducer;
    ql_cu_ipc_handle handles[QL_ALL_REDUCE_PARTS];
    char message[QL_CUDA_MESSAGE];
    if (parse_handles(handles, object, reducer->parts) < 0) return NULL;
    if (reducer->boxes[reducer->rank == 0]) {
        PyErr_SetString(PyExc_ValueError, "the others' memory is open: connect is called once");
        return NULL;
    }
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cuda_reducer_connect(reducer, handles, message);
    Py_END_ALLOW_THREADS
    if (result < 0) {
        ql_cuda_failed(message);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *all_reduce_check(PyObject *self, PyObject *unused) {
    (void)unused;
    ql_all_reduce *own = (ql_all_reduce *)self;
    char message[QL_CUDA_MESSAGE];
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = ql_cuda_reducer_check(&own->reducer, message);
    Py_END_ALLOW_THREADS
    own->is_connected = result == 0;
    if (result < 0) {
        ql_cuda_failed(message);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Sums */

static int check_summand(const ql_all_reduce *own, const ql_tensor *x) {
    if (ql_check_float(x, "x", false) < 0 || ql_check_contiguous(x, "x") < 0 || ql_check_aligned(x, "x") < 0) return -1;
    const int64_t bytes = ql_tensor_numel(x) * (int64_t)ql_dtype_size(x->dtype);
    if (x->device_type != QL_DEVICE_CUDA || x->device_id != own->reducer.device)
        PyErr_Format(PyExc_ValueError, "x must be on GPU %d, whose sums these are", own->reducer.device);
    else if (!own->is_connected)
        PyErr_SetString(PyExc_ValueError, "the other GPUs are not connected: connect and check come first");
    else if (bytes > own->reducer.place)
        PyErr_Format(PyExc_ValueError, "x must have at most %lld bytes, got %lld", (long long)own->reducer.place,
                     (long long)bytes);
    else
        return 0;
    return -1;
}

static int sum(ql_all_reduce *own, PyObject *object, const ql_tensor *x) {
    ql_cuda_place place;
    if (check_summand(own, x) < 0 || ql_place_of(&place, object, x) < 0) return -1;
    const int64_t bytes = ql_tensor_numel(x) * (int64_t)ql_dtype_size(x->dtype);
    char message[QL_CUDA_MESSAGE];
    if (bytes == 0 || ql_cuda_all_reduce(&own->reducer, x->data, bytes, x->dtype, place.stream, message) == 0) return 0;
    return ql_cuda_failed(message);
}

static PyObject *all_reduce_call(PyObject *self, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"x"};
    static const ql_signature signature = {"AllReduce", 1, 1, 1, names};
    PyObject *object;
    ql_tensor x;
    if (ql_args_tuple(&object, &signature, args, kwargs) < 0 || ql_tensor_read(&x, object, "x") < 0) return NULL;
    const int result = sum((ql_all_reduce *)self, object, &x);
    ql_tensor_release(&x);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

static PyObject *all_reduce_handle(PyObject *self, void *unused) {
    (void)unused;
    const ql_cu_ipc_handle *handle = &((ql_all_reduce *)self)->handle;
    return PyBytes_FromStringAndSize((const char *)handle->bytes, sizeof handle->bytes);
}

static PyObject *all_reduce_most_bytes(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(((ql_all_reduce *)self)->reducer.place);
}

static PyMethodDef methods[] = {
    {"connect", all_reduce_connect, METH_O,
     "connect(handles, /)\n--\n\nOpens the memory of the others, by the handle of each rank, and leaves a greeting "
     "there."},
    {"check", all_reduce_check, METH_NOARGS,
     "check()\n--\n\nAfter all have connected: finds the others' greetings here. After all have checked, sums may "
     "begin."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"handle", all_reduce_handle, NULL, "What opens this end's memory in another process of the host.", NULL},
    {"most_bytes", all_reduce_most_bytes, NULL, "The most bytes that a tensor may have.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int ql_all_reduce_add_type(PyObject *module) {
    static PyType_Slot slots[] = {
        {Py_tp_new, QL_SLOT(all_reduce_new)},
        {Py_tp_dealloc, QL_SLOT(all_reduce_dealloc)},
        {Py_tp_call, QL_SLOT(all_reduce_call)},
        {Py_tp_methods, methods},
        {Py_tp_getset, getset},
        {Py_tp_doc, "AllReduce(device, rank, parts)\n--\n\n"
                    "A GPU's end of sums over GPUs of one host, a process each: each calls it with an x, which becomes "
                    "their sum."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "_qlinear.AllReduce",
        .basicsize = sizeof(ql_all_reduce),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);
    if (!type) return -1;
    int result = PyModule_AddObjectRef(module, "AllReduce", type);
    Py_DECREF(type);
    return result;
}

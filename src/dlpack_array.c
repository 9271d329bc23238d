/* JAX, CuPy and torch before 2.10 take an output by calling their from_dlpack on an object with __dlpack__; this is that
 * object. The memory lives until the last of it and of the capsules' consumers is gone, so it has a count of its own: a
 * consumer may drop its part from any thread and without the GIL. */
#include "dlpack_array.h"

#include "cuda/launch.h"
#include "dlpack_abi.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef struct ql_storage {
    atomic_int owners;
    int device_type, device_id;
    ql_dtype dtype;
    int ndim;
    int64_t shape[QL_MAX_DIMS], stride[QL_MAX_DIMS];
    void *data;
} ql_storage;

typedef struct {
    PyObject_HEAD
    ql_storage *storage;
} ql_dlpack_array;

static PyTypeObject *ql_dlpack_array_type;

static void ql_storage_drop(ql_storage *storage) {
    if (atomic_fetch_sub(&storage->owners, 1) != 1) return;
    if (storage->device_type == QL_DEVICE_CPU)
        free(storage->data);
    else if (storage->data)
        ql_cuda_free(storage->data, storage->device_id);
    free(storage);
}

void ql_dlpack_dtype(ql_dtype dtype, uint8_t *code, uint8_t *bits) {
    static const uint8_t codes[QL_DTYPE_COUNT] = {
        [QL_F32] = kDLFloat,
        [QL_F16] = kDLFloat,
        [QL_BF16] = kDLBfloat,
        [QL_F64] = kDLFloat,
        [QL_I8] = kDLInt,
        [QL_U8] = kDLUInt,
        [QL_I16] = kDLInt,
        [QL_I32] = kDLInt,
        [QL_I64] = kDLInt,
        [QL_BOOL] = kDLBool,
        [QL_E4M3] = kDLFloat8_e4m3fn,
        [QL_E5M2] = kDLFloat8_e5m2,
        [QL_E8M0] = kDLFloat8_e8m0fnu,
    };
    *code = codes[dtype];
    *bits = (uint8_t)(8 * ql_dtype_size(dtype));
}

static void ql_storage_describe(DLTensor *tensor, ql_storage *storage) {
    *tensor = (DLTensor){.data = storage->data,
                         .device = {storage->device_type, storage->device_id},
                         .ndim = storage->ndim,
                         .shape = storage->shape,
                         .strides = storage->stride};
    ql_dlpack_dtype(storage->dtype, &tensor->dtype.code, &tensor->dtype.bits);
    tensor->dtype.lanes = 1;
}

static void ql_delete_versioned(DLManagedTensorVersioned *managed) {
    ql_storage_drop(managed->manager_ctx);
    free(managed);
}

static void ql_delete_unversioned(DLManagedTensor *managed) {
    ql_storage_drop(managed->manager_ctx);
    free(managed);
}

/* A capsule that nobody consumed still owns its tensor. */
static void ql_capsule_destroy(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
        ql_delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    else if (PyCapsule_IsValid(capsule, "dltensor"))
        ql_delete_unversioned(PyCapsule_GetPointer(capsule, "dltensor"));
}

static PyObject *ql_capsule_versioned(ql_storage *storage) {
    DLManagedTensorVersioned *managed = calloc(1, sizeof *managed);
    if (!managed) return PyErr_NoMemory();
    managed->version = (DLPackVersion){1, 3};
    managed->manager_ctx = storage;
    managed->deleter = ql_delete_versioned;
    ql_storage_describe(&managed->dl_tensor, storage);
    PyObject *capsule = PyCapsule_New(managed, "dltensor_versioned", ql_capsule_destroy);
    if (capsule)
        atomic_fetch_add(&storage->owners, 1);
    else
        free(managed);
    return capsule;
}

static PyObject *ql_capsule_unversioned(ql_storage *storage) {
    DLManagedTensor *managed = calloc(1, sizeof *managed);
    if (!managed) return PyErr_NoMemory();
    managed->manager_ctx = storage;
    managed->deleter = ql_delete_unversioned;
    ql_storage_describe(&managed->dl_tensor, storage);
    PyObject *capsule = PyCapsule_New(managed, "dltensor", ql_capsule_destroy);
    if (capsule)
        atomic_fetch_add(&storage->owners, 1);
    else
        free(managed);
    return capsule;
}

/* What the array holds was made on the legacy stream; whatever stream a consumer names, it may start once that is done. */
static int ql_storage_wait(const ql_storage *storage) {
    ql_cuda_place place = {storage->device_id, NULL};
    char message[QL_CUDA_MESSAGE];
    if (storage->device_type == QL_DEVICE_CPU || ql_cuda_synchronize(&place, message) == 0) return 0;
    return ql_cuda_failed(message);
}

/* 1 where the array can be had there: on its own device only. -1 with an exception. */
static int ql_storage_is_on(const ql_storage *storage, PyObject *device) {
    if (!device || device == Py_None) return 1;
    PyObject *own = Py_BuildValue("(ii)", storage->device_type, storage->device_id);
    int same = own ? PyObject_RichCompareBool(device, own, Py_EQ) : -1;
    Py_XDECREF(own);
    return same;
}

/* __dlpack__(*, stream=None, max_version=None, dl_device=None, copy=None). A copy would be a second array that nobody asked
 * this object for. */
static PyObject *ql_dlpack_array_dlpack(PyObject *self, PyObject *args, PyObject *kwargs) {
    if (PyTuple_Size(args) != 0) return PyErr_Format(PyExc_TypeError, "__dlpack__ takes keyword arguments only");
    PyObject *version = kwargs ? PyDict_GetItemString(kwargs, "max_version") : NULL;
    PyObject *copy = kwargs ? PyDict_GetItemString(kwargs, "copy") : NULL;
    if (copy == Py_True) return PyErr_Format(PyExc_BufferError, "__dlpack__: copy=True is not offered");
    ql_storage *storage = ((ql_dlpack_array *)self)->storage;
    int is_there = ql_storage_is_on(storage, kwargs ? PyDict_GetItemString(kwargs, "dl_device") : NULL);
    if (is_there < 0) return NULL;
    if (!is_there) return PyErr_Format(PyExc_BufferError, "__dlpack__: dl_device is not that of the array");
    if (ql_storage_wait(storage) < 0) return NULL;
    if (!version || version == Py_None) return ql_capsule_unversioned(storage);
    PyObject *major = PySequence_GetItem(version, 0);
    if (!major) return NULL;
    long value = PyLong_AsLong(major);
    Py_DECREF(major);
    if (value == -1 && PyErr_Occurred()) return NULL;
    return value >= 1 ? ql_capsule_versioned(storage) : ql_capsule_unversioned(storage);
}

static PyObject *ql_dlpack_array_device(PyObject *self, PyObject *unused) {
    (void)unused;
    const ql_storage *storage = ((ql_dlpack_array *)self)->storage;
    return Py_BuildValue("ii", storage->device_type, storage->device_id);
}

static PyObject *ql_dlpack_array_shape(PyObject *self, void *unused) {
    (void)unused;
    ql_storage *storage = ((ql_dlpack_array *)self)->storage;
    PyObject *shape = PyTuple_New(storage->ndim);
    for (int i = 0; shape && i < storage->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(storage->shape[i]);
        if (!size || PyTuple_SetItem(shape, i, size) < 0) Py_CLEAR(shape);
    }
    return shape;
}

static void ql_dlpack_array_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ql_storage_drop(((ql_dlpack_array *)self)->storage);
    QL_FROM_SLOT(freefunc, PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* XLA takes host memory without a copy only where it is aligned to 64 bytes. NULL with an exception. */
static void *ql_storage_allocate(size_t bytes, int device_type, int device_id) {
    char message[QL_CUDA_MESSAGE];
    void *data = device_type == QL_DEVICE_CPU ? aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64)
                                              : ql_cuda_allocate(bytes, device_id, message);
    if (data) return data;
    if (device_type == QL_DEVICE_CPU) return PyErr_NoMemory();
    ql_cuda_failed(message);
    return NULL;
}

PyObject *ql_dlpack_array_new(ql_tensor *view, int device_type, int device_id, ql_dtype dtype, int ndim,
                              const int64_t *shape) {
    ql_storage *storage = calloc(1, sizeof *storage);
    if (!storage) return PyErr_NoMemory();
    atomic_init(&storage->owners, 1);
    storage->device_type = device_type;
    storage->device_id = device_id;
    storage->dtype = dtype;
    storage->ndim = ndim;
    int64_t numel = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        storage->shape[i] = shape[i];
        storage->stride[i] = numel;
        numel *= shape[i];
    }
    storage->data = ql_storage_allocate((size_t)numel * ql_dtype_size(dtype), device_type, device_id);
    ql_dlpack_array *array = storage->data ? PyObject_New(ql_dlpack_array, ql_dlpack_array_type) : NULL;
    if (!array) {
        ql_storage_drop(storage);
        return NULL;
    }
    array->storage = storage;
    *view = (ql_tensor){
        .data = storage->data, .device_type = device_type, .device_id = device_id, .dtype = dtype, .ndim = ndim};
    for (int i = 0; i < ndim; i++) {
        view->shape[i] = storage->shape[i];
        view->stride[i] = storage->stride[i];
    }
    return (PyObject *)array;
}

static PyMethodDef ql_dlpack_array_methods[] = {
    {"__dlpack__", QL_METHOD(ql_dlpack_array_dlpack), METH_VARARGS | METH_KEYWORDS, "The array as a DLPack capsule."},
    {"__dlpack_device__", ql_dlpack_array_device, METH_NOARGS,
     "DLPack's type and number of the device: (1, 0) is the host."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ql_dlpack_array_getset[] = {
    {"shape", ql_dlpack_array_shape, NULL, "The sizes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int ql_dlpack_array_add_type(PyObject *module) {
    static PyType_Slot slots[] = {
        {Py_tp_dealloc, QL_SLOT(ql_dlpack_array_dealloc)},
        {Py_tp_methods, ql_dlpack_array_methods},
        {Py_tp_getset, ql_dlpack_array_getset},
        {Py_tp_doc, "An output for a caller whose framework is not known: any from_dlpack takes it without a copy."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "_qlinear.DLPackArray",
        .basicsize = sizeof(ql_dlpack_array),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);
    if (!type) return -1;
    ql_dlpack_array_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "DLPackArray", type);
}

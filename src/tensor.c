#include "tensor.h"

#include "cuda/driver.h"
#include "dlpack_abi.h"
#include "dlpack_array.h"
#include "tensor_numpy.h"

#include <stdio.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------------
 * The exchange table of a type. Only hits are cached (a type can be given its table later, by an add-on), and the cached
 * type is kept alive: else a new type could come to lie at the address of a dead one. */

enum { QL_CACHED_TYPES = 8 };

typedef struct ql_exchange {
    PyTypeObject *type;
    const DLPackExchangeAPI *api; /* NULL: the type has none */
    bool negates;                 /* its tensors have is_neg() */
} ql_exchange;

static ql_exchange ql_exchange_cache[QL_CACHED_TYPES];
static int ql_exchange_cached;

static const DLPackExchangeAPI *ql_exchange_lookup(PyTypeObject *type) {
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (!capsule) {
        PyErr_Clear();
        return NULL;
    }
    const DLPackExchangeAPI *api = NULL;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule); /* the table itself lives as long as the process */
    for (int step = 0; api && api->header.version.major != 1 && step < 16; step++)
        api = (const DLPackExchangeAPI *)api->header.prev_api;
    return api && api->header.version.major == 1 ? api : NULL;
}

static ql_exchange ql_exchange_of(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    for (int i = 0; i < ql_exchange_cached; i++)
        if (ql_exchange_cache[i].type == type) return ql_exchange_cache[i];
    ql_exchange exchange = {.type = type, .api = ql_exchange_lookup(type)};
    if (exchange.api) exchange.negates = PyObject_HasAttrString((PyObject *)type, "is_neg");
    if (exchange.api && ql_exchange_cached < QL_CACHED_TYPES) {
        Py_INCREF((PyObject *)type);
        ql_exchange_cache[ql_exchange_cached++] = exchange;
    }
    return exchange;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Reading */

static int ql_dtype_from_dlpack(ql_dtype *dtype, DLDataType type) {
    if (type.lanes != 1) return -1;
    for (int i = 0; i < QL_DTYPE_COUNT; i++) {
        uint8_t code, bits;
        ql_dlpack_dtype((ql_dtype)i, &code, &bits);
        if (code == type.code && bits == type.bits) {
            *dtype = (ql_dtype)i;
            return 0;
        }
    }
    return -1;
}

/* Everything about a description that could lie without touching memory: rank, sizes, their product, the pointer. */
static int ql_tensor_from_dltensor(ql_tensor *tensor, const DLTensor *from, const char *name) {
    switch (from->device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: tensor->device_type = QL_DEVICE_CPU; break;
    case kDLCUDA:
    case kDLCUDAManaged: tensor->device_type = QL_DEVICE_CUDA; break;
    default:
        PyErr_Format(PyExc_NotImplementedError, "%s is on a device of DLPack type %d; CPU (1) and CUDA (2) are taken",
                     name, (int)from->device.device_type);
        return -1;
    }
    tensor->device_id = tensor->device_type == QL_DEVICE_CPU ? 0 : from->device.device_id;
    if (ql_dtype_from_dlpack(&tensor->dtype, from->dtype) < 0) {
        PyErr_Format(PyExc_TypeError, "%s has a dtype of no use here (DLPack code %d, %d bits, %d lanes)", name,
                     (int)from->dtype.code, (int)from->dtype.bits, (int)from->dtype.lanes);
        return -1;
    }
    if (from->ndim < 0 || from->ndim > QL_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, at most %d are taken", name, (int)from->ndim,
                     QL_MAX_DIMS);
        return -1;
    }
    tensor->ndim = from->ndim;
    int64_t numel = 1, bytes;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        int64_t size = from->shape[i];
        tensor->shape[i] = size;
        tensor->stride[i] = from->strides && size > 1 ? from->strides[i] : numel;
        if (size < 0 || __builtin_mul_overflow(numel, size ? size : 1, &numel)) {
            PyErr_Format(PyExc_ValueError, "%s: size %lld of dimension %d is out of range", name, (long long)size, i);
            return -1;
        }
    }
    if (__builtin_mul_overflow(numel, (int64_t)ql_dtype_size(tensor->dtype), &bytes)) {
        PyErr_Format(PyExc_ValueError, "%s: its size in bytes is out of range", name);
        return -1;
    }
    tensor->data = from->data ? (char *)from->data + from->byte_offset : NULL;
    if (!tensor->data && ql_tensor_numel(tensor) > 0) {
        PyErr_Format(PyExc_TypeError, "%s has no data: fake and meta tensors cannot be computed with", name);
        return -1;
    }
    return 0;
}

/* Whether __dlpack_device__ says that the memory is a GPU's; 0 for a producer without it. -1 with an exception. */
static int ql_producer_is_on_gpu(PyObject *object) {
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    PyObject *first = device ? PySequence_GetItem(device, 0) : NULL;
    long type = first ? PyLong_AsLong(first) : -1;
    Py_XDECREF(first);
    Py_XDECREF(device);
    if (!PyErr_Occurred()) return type == kDLCUDA || type == kDLCUDAManaged;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
}

/* Stream 1 is CUDA's legacy stream, where products on such a producer's tensors run: it makes its work wait for it. */
static PyObject *ql_call_dlpack(PyObject *object) {
    int on_gpu = ql_producer_is_on_gpu(object);
    PyObject *method = on_gpu < 0 ? NULL : PyObject_GetAttrString(object, "__dlpack__");
    PyObject *args = method ? PyTuple_New(0) : NULL;
    PyObject *kwargs = !args    ? NULL
                       : on_gpu ? Py_BuildValue("{s:(ii),s:i}", "max_version", 1, 3, "stream", 1)
                                : Py_BuildValue("{s:(ii)}", "max_version", 1, 3);
    PyObject *capsule = kwargs ? PyObject_Call(method, args, kwargs) : NULL;
    if (kwargs && !capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        /* Producers older than DLPack 1.0 know no max_version. */
        PyErr_Clear();
        if (PyDict_DelItemString(kwargs, "max_version") == 0) capsule = PyObject_Call(method, args, kwargs);
    }
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    Py_XDECREF(method);
    return capsule;
}

/* A deleter may run Python code, which must not see the exception that an error path is about to raise. */
static void ql_managed_delete(void *managed, bool versioned) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (versioned) {
        DLManagedTensorVersioned *tensor = managed;
        if (tensor->deleter) tensor->deleter(tensor);
    } else {
        DLManagedTensor *tensor = managed;
        if (tensor->deleter) tensor->deleter(tensor);
    }
    PyErr_Restore(type, value, traceback);
}

static int ql_read_capsule(ql_tensor *tensor, PyObject *object, const char *name) {
    PyObject *capsule = ql_call_dlpack(object);
    if (!capsule) return -1;
    int result = -1;
    /* The capsule is renamed before anything can fail: from there on its tensor is ours alone to give back. */
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        PyCapsule_SetName(capsule, "used_dltensor_versioned");
        tensor->managed = managed;
        tensor->versioned = true;
        if (managed->version.major != 1) {
            PyErr_Format(PyExc_ValueError, "%s: DLPack version %u.%u, major version 1 is taken", name,
                         (unsigned)managed->version.major, (unsigned)managed->version.minor);
        } else {
            result = ql_tensor_from_dltensor(tensor, &managed->dl_tensor, name);
        }
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        PyCapsule_SetName(capsule, "used_dltensor");
        tensor->managed = managed;
        result = ql_tensor_from_dltensor(tensor, &managed->dl_tensor, name);
    } else {
        PyErr_Format(PyExc_TypeError, "%s: __dlpack__ of %R returned %R, not a fresh DLPack capsule", name,
                     (PyObject *)Py_TYPE(object), (PyObject *)Py_TYPE(capsule));
    }
    Py_DECREF(capsule);
    if (result < 0) ql_tensor_release(tensor);
    return result;
}

static int ql_read_exchange(ql_tensor *tensor, const DLPackExchangeAPI *api, PyObject *object, const char *name) {
    if (api->dltensor_from_py_object_no_sync) {
        DLTensor description;
        if (api->dltensor_from_py_object_no_sync(object, &description) != 0) return -1;
        tensor->borrowed = true;
        return ql_tensor_from_dltensor(tensor, &description, name);
    }
    DLManagedTensorVersioned *managed;
    if (api->managed_tensor_from_py_object_no_sync(object, &managed) != 0) return -1;
    tensor->managed = managed;
    tensor->versioned = true;
    int result = ql_tensor_from_dltensor(tensor, &managed->dl_tensor, name);
    if (result < 0) ql_tensor_release(tensor);
    return result;
}

/* Only the fields before the arrays of sizes, which are filled as far as ndim: a call's hot path. */
static void ql_tensor_clear(ql_tensor *tensor) {
    tensor->data = tensor->managed = NULL;
    tensor->versioned = tensor->borrowed = false;
    tensor->ndim = 0;
}

/* What torch negates lazily (z.conj().imag) has the opposite of its values in memory, and its table does not tell. */
static int ql_check_not_negated(PyObject *object, const char *name) {
    static PyObject *is_neg;
    if (!is_neg && !(is_neg = PyUnicode_InternFromString("is_neg"))) return -1;
    PyObject *result = PyObject_CallMethodObjArgs(object, is_neg, NULL);
    if (!result) return -1;
    bool negated = result == Py_True;
    Py_DECREF(result);
    if (!negated) return 0;
    PyErr_Format(PyExc_ValueError, "%s is negated lazily, its memory is not its values: pass its resolve_neg()", name);
    return -1;
}

int ql_tensor_read(ql_tensor *tensor, PyObject *object, const char *name) {
    ql_tensor_clear(tensor);
    const ql_exchange exchange = ql_exchange_of(object);
    if (exchange.negates && ql_check_not_negated(object, name) < 0) return -1;
    if (exchange.api) return ql_read_exchange(tensor, exchange.api, object, name);
    int is_array = ql_numpy_check(object);
    if (is_array < 0) return -1;
    if (is_array) {
        tensor->borrowed = true;
        return ql_numpy_read(tensor, object, name);
    }
    int has = PyObject_HasAttrString(object, "__dlpack__");
    if (!has) {
        PyErr_Format(PyExc_TypeError, "%s must be a tensor (torch, NumPy, JAX, CuPy or any with __dlpack__), got %R",
                     name, (PyObject *)Py_TYPE(object));
        return -1;
    }
    if (PyObject_HasAttrString(object, "is_neg") && ql_check_not_negated(object, name) < 0) return -1;
    return ql_read_capsule(tensor, object, name);
}

int ql_tensor_read_again(ql_tensor *tensor, PyObject *object, const char *name) {
    ql_tensor_clear(tensor);
    const DLPackExchangeAPI *api = ql_exchange_of(object).api;
    if (api) return ql_read_exchange(tensor, api, object, name);
    tensor->borrowed = true;
    return ql_numpy_read(tensor, object, name);
}

void ql_tensor_release(ql_tensor *tensor) {
    void *managed = tensor->managed;
    tensor->managed = NULL;
    if (managed) ql_managed_delete(managed, tensor->versioned);
}

int ql_tensor_read_all(ql_tensor *tensors, PyObject *const *objects, const char *const *names, int count) {
    int read = 0, result = 0;
    while (read < count && ql_tensor_read(&tensors[read], objects[read], names[read]) == 0) read++;
    if (read < count) result = -1;
    for (int i = 0; i < count - 1 && result == 0; i++)
        if (tensors[i].borrowed) result = ql_tensor_read_again(&tensors[i], objects[i], names[i]);
    if (result < 0) ql_tensors_release(tensors, read);
    return result;
}

void ql_tensors_release(ql_tensor *tensors, int count) {
    for (int i = 0; i < count; i++) ql_tensor_release(&tensors[i]);
}

int64_t ql_tensor_numel(const ql_tensor *tensor) {
    int64_t numel = 1;
    for (int i = 0; i < tensor->ndim; i++) numel *= tensor->shape[i];
    return numel;
}

bool ql_tensor_is_contiguous(const ql_tensor *tensor) {
    int64_t expected = 1;
    if (ql_tensor_numel(tensor) == 0) return true;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->stride[i] != expected) return false;
        expected *= tensor->shape[i];
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Checks */

static int ql_write_shape(char *buffer, size_t size, int ndim, const int64_t *shape) {
    int used = snprintf(buffer, size, "[");
    for (int i = 0; i < ndim && used < (int)size; i++) {
        const char *comma = i ? ", " : "";
        if (shape[i] < 0)
            used += snprintf(buffer + used, size - (size_t)used, "%s*", comma);
        else
            used += snprintf(buffer + used, size - (size_t)used, "%s%lld", comma, (long long)shape[i]);
    }
    if (used < (int)size) used += snprintf(buffer + used, size - (size_t)used, "]");
    return used;
}

const char *ql_tensor_describe(const ql_tensor *tensor, char *buffer, size_t size) {
    int used = ql_write_shape(buffer, size, tensor->ndim, tensor->shape);
    if (used < (int)size) snprintf(buffer + used, size - (size_t)used, " %s", ql_dtype_name(tensor->dtype));
    return buffer;
}

int ql_check_dtype(const ql_tensor *tensor, const char *name, int count, const ql_dtype *taken) {
    for (int i = 0; i < count; i++)
        if (tensor->dtype == taken[i]) return 0;
    char list[128];
    int used = 0;
    for (int i = 0; i < count; i++) {
        const char *joint = i == 0 ? "" : i == count - 1 ? " or " : ", ";
        if (used < (int)sizeof list)
            used += snprintf(list + used, sizeof list - (size_t)used, "%s%s", joint, ql_dtype_name(taken[i]));
    }
    PyErr_Format(PyExc_TypeError, "%s must be %s, got %s", name, list, ql_dtype_name(tensor->dtype));
    return -1;
}

int ql_check_float(const ql_tensor *tensor, const char *name, bool allow_f64) {
    static const ql_dtype taken[] = {QL_F32, QL_F16, QL_BF16, QL_F64};
    return ql_check_dtype(tensor, name, allow_f64 ? 4 : 3, taken);
}

int ql_check_shape(const ql_tensor *tensor, const char *name, int ndim, const int64_t *shape) {
    bool fits = tensor->ndim == ndim;
    for (int i = 0; fits && i < ndim; i++) fits = shape[i] < 0 || tensor->shape[i] == shape[i];
    if (fits) return 0;
    char want[256], got[256];
    ql_write_shape(want, sizeof want, ndim, shape);
    ql_write_shape(got, sizeof got, tensor->ndim, tensor->shape);
    PyErr_Format(PyExc_ValueError, "%s must have shape %s, got %s", name, want, got);
    return -1;
}

int ql_check_contiguous(const ql_tensor *tensor, const char *name) {
    if (ql_tensor_is_contiguous(tensor)) return ql_check_aligned(tensor, name);
    char shape[256], stride[256];
    ql_write_shape(shape, sizeof shape, tensor->ndim, tensor->shape);
    ql_write_shape(stride, sizeof stride, tensor->ndim, tensor->stride);
    PyErr_Format(PyExc_ValueError, "%s must be contiguous, got shape %s with strides %s", name, shape, stride);
    return -1;
}

static const char *ql_device_name(const ql_tensor *tensor, char buffer[32]) {
    if (tensor->device_type == QL_DEVICE_CPU) return "the CPU";
    snprintf(buffer, 32, "cuda:%d", tensor->device_id);
    return buffer;
}

int ql_check_on_cpu(const ql_tensor *tensor, const char *name) {
    if (tensor->device_type == QL_DEVICE_CPU) return 0;
    PyErr_Format(PyExc_NotImplementedError, "%s is on cuda:%d; this is done on the CPU only", name, tensor->device_id);
    return -1;
}

int ql_check_same_device(const ql_tensor *tensor, const char *name, const ql_tensor *other, const char *other_name) {
    if (tensor->device_type == other->device_type && tensor->device_id == other->device_id) return 0;
    char buffer[32], other_buffer[32];
    PyErr_Format(PyExc_ValueError, "%s is on %s, but %s is on %s", name, ql_device_name(tensor, buffer), other_name,
                 ql_device_name(other, other_buffer));
    return -1;
}

int ql_check_aligned(const ql_tensor *tensor, const char *name) {
    size_t size = ql_dtype_size(tensor->dtype);
    if ((uintptr_t)tensor->data % size == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s: its data is not aligned to its %zu byte elements", name, size);
    return -1;
}

int ql_tensor_stream(void **stream, PyObject *object, const ql_tensor *tensor) {
    const DLPackExchangeAPI *api = ql_exchange_of(object).api;
    if (api && api->current_work_stream)
        return api->current_work_stream(kDLCUDA, tensor->device_id, stream) == 0 ? 0 : -1;
    *stream = NULL; /* ql_call_dlpack asked for the legacy stream */
    return 0;
}

int ql_cuda_failed(const char *message) {
    PyErr_Format(PyExc_RuntimeError, "CUDA: %s", message);
    return -1;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Outputs */

enum { QL_OUTPUT_EXCHANGE, QL_OUTPUT_OBJECT, QL_OUTPUT_IMPORT };

static void ql_allocator_failed(void *context, const char *kind, const char *message) {
    (void)context;
    PyErr_Format(PyExc_RuntimeError, "%s: %s", kind, message);
}

/* Only what ql_tensor_from_dltensor and the array of sizes do not set: a call's hot path. */
static void ql_output_clear(ql_output *output, PyObject *like) {
    output->like = like;
    output->pending = output->view.managed = NULL;
    output->view.versioned = output->view.borrowed = false;
}

static int ql_exchange_begin(ql_output *output, const DLPackExchangeAPI *api, DLDevice device, ql_dtype dtype, int ndim,
                             const int64_t *shape) {
    int64_t sizes[QL_MAX_DIMS];
    for (int i = 0; i < ndim; i++) sizes[i] = shape[i];
    DLTensor prototype = {.device = device, .ndim = ndim, .shape = sizes};
    ql_dlpack_dtype(dtype, &prototype.dtype.code, &prototype.dtype.bits);
    prototype.dtype.lanes = 1;
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_allocator(&prototype, &managed, NULL, ql_allocator_failed) != 0) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_MemoryError, "no memory for the output");
        return -1;
    }
    output->kind = QL_OUTPUT_EXCHANGE;
    output->pending = managed;
    int result = ql_tensor_from_dltensor(&output->view, &managed->dl_tensor, "output");
    if (result < 0) ql_output_abandon(output);
    return result;
}

static int ql_check_output_size(ql_dtype dtype, int ndim, const int64_t *shape) {
    int64_t bytes = (int64_t)ql_dtype_size(dtype);
    for (int i = 0; i < ndim; i++) {
        if (shape[i] != 0 && __builtin_mul_overflow(bytes, shape[i], &bytes)) {
            PyErr_SetString(PyExc_ValueError, "the output's size in bytes is out of range");
            return -1;
        }
    }
    return 0;
}

int ql_output_begin_beside(ql_output *output, PyObject *like, const ql_tensor *beside, ql_dtype dtype, int ndim,
                           const int64_t *shape) {
    if (beside->device_type == QL_DEVICE_CPU) return ql_output_begin(output, like, dtype, ndim, shape);
    if (ql_check_output_size(dtype, ndim, shape) < 0) return -1;
    /* Before the framework's allocator meets a driver that does not work and says less. */
    if (ql_cuda_forked()) {
        char message[QL_CUDA_MESSAGE];
        (void)ql_cuda_open(message);
        return ql_cuda_failed(message);
    }
    ql_output_clear(output, like);
    const DLPackExchangeAPI *api = ql_exchange_of(like).api;
    if (api) return ql_exchange_begin(output, api, (DLDevice){kDLCUDA, beside->device_id}, dtype, ndim, shape);
    output->kind = QL_OUTPUT_IMPORT;
    output->pending = ql_dlpack_array_new(&output->view, QL_DEVICE_CUDA, beside->device_id, dtype, ndim, shape);
    return output->pending ? 0 : -1;
}

int ql_output_begin(ql_output *output, PyObject *like, ql_dtype dtype, int ndim, const int64_t *shape) {
    if (ql_check_output_size(dtype, ndim, shape) < 0) return -1;
    ql_output_clear(output, like);
    const DLPackExchangeAPI *api = ql_exchange_of(like).api;
    if (api) return ql_exchange_begin(output, api, (DLDevice){kDLCPU, 0}, dtype, ndim, shape);
    int is_array = ql_numpy_check(like);
    if (is_array < 0) return -1;
    output->kind = is_array ? QL_OUTPUT_OBJECT : QL_OUTPUT_IMPORT;
    output->pending = is_array ? ql_numpy_new(&output->view, dtype, ndim, shape)
                               : ql_dlpack_array_new(&output->view, QL_DEVICE_CPU, 0, dtype, ndim, shape);
    return output->pending ? 0 : -1;
}

/* The from_dlpack of the framework that `like` belongs to: by the array API's namespace, else the top package of its
 * type. NULL without an exception where there is none. */
static PyObject *ql_from_dlpack_of(PyObject *like) {
    PyObject *method = PyObject_GetAttrString(like, "__array_namespace__");
    PyObject *args = method ? PyTuple_New(0) : NULL;
    PyObject *space = args ? PyObject_Call(method, args, NULL) : NULL;
    Py_XDECREF(args);
    Py_XDECREF(method);
    if (!space) {
        PyErr_Clear();
        PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(like), "__module__");
        Py_ssize_t dot =
            module && PyUnicode_Check(module) ? PyUnicode_FindChar(module, '.', 0, PyUnicode_GetLength(module), 1) : -1;
        PyObject *top = !module ? NULL : dot > 0 ? PyUnicode_Substring(module, 0, dot) : Py_NewRef(module);
        Py_XDECREF(module);
        space = top ? PyDict_GetItemWithError(PyImport_GetModuleDict(), top) : NULL;
        Py_XINCREF(space);
        Py_XDECREF(top);
    }
    PyObject *function = space ? PyObject_GetAttrString(space, "from_dlpack") : NULL;
    Py_XDECREF(space);
    if (!function) PyErr_Clear();
    return function;
}

PyObject *ql_output_finish(ql_output *output) {
    void *pending = output->pending;
    output->pending = NULL;
    if (output->kind == QL_OUTPUT_OBJECT) return pending;
    if (output->kind == QL_OUTPUT_EXCHANGE) {
        void *object = NULL;
        if (ql_exchange_of(output->like).api->managed_tensor_to_py_object_no_sync(pending, &object) != 0) return NULL;
        return object;
    }
    PyObject *function = ql_from_dlpack_of(output->like);
    if (!function) return pending;
    PyObject *result = PyObject_CallFunctionObjArgs(function, (PyObject *)pending, NULL);
    Py_DECREF(function);
    Py_DECREF((PyObject *)pending);
    return result;
}

void ql_output_abandon(ql_output *output) {
    if (!output->pending) return;
    if (output->kind == QL_OUTPUT_EXCHANGE)
        ql_managed_delete(output->pending, true);
    else
        Py_DECREF((PyObject *)output->pending);
    output->pending = NULL;
}

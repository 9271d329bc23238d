/* The module `_qlinear`: its types, the functions of the formats, and what it can tell of the machine. */
#include "cpu/engine.h"
#include "cpu/threads.h"
#include "cuda/describe.h"
#include "cuda/image.h"
#include "cuda/launch.h"
#include "dlpack_array.h"
#include "layers/choices.h"
#include "layers/layer.h"
#include "layers/shortcut.h"

static PyObject *ql_cpu_info(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return Py_BuildValue("{s:s,s:i,s:s}", "isa", ql_cpu_isa(), "threads", ql_cpu_thread_count(), "thread_runtime",
                         ql_cpu_thread_runtime());
}

static PyObject *ql_cuda_devices(const ql_cuda_description *cuda) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < cuda->device_count; i++) {
        const ql_cuda_properties *device = &cuda->devices[i];
        PyObject *entry = Py_BuildValue("{s:s,s:(ii),s:L}", "name", device->name, "capability", device->major,
                                        device->minor, "memory", (long long)device->memory);
        if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *ql_cuda_kernels(const ql_cuda_description *cuda) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < QL_KERNEL_COUNT; i++) {
        if (!cuda->kernels[i]) continue;
        PyObject *name = PyUnicode_FromString(ql_cuda_kernel_name((ql_cuda_kernel)i));
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

/* The files of kernels by name, each with what it was compiled for. */
static PyObject *ql_cuda_images(void) {
    PyObject *images = PyDict_New();
    for (int i = 0; images && i < ql_cuda_image_count(); i++) {
        ql_cuda_image image = ql_cuda_image_at(i);
        PyObject *text = PyUnicode_FromString(image.architectures);
        PyObject *names = text ? PyUnicode_Split(text, NULL, -1) : NULL;
        Py_XDECREF(text);
        if (!names || PyDict_SetItemString(images, image.name, names) < 0) Py_CLEAR(images);
        Py_XDECREF(names);
    }
    return images;
}

static PyObject *ql_cuda_info(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    ql_cuda_description cuda;
    Py_BEGIN_ALLOW_THREADS
    ql_cuda_describe(&cuda);
    Py_END_ALLOW_THREADS
    PyObject *text = PyUnicode_FromString(cuda.architectures);
    PyObject *architectures = text ? PyUnicode_Split(text, NULL, -1) : NULL;
    Py_XDECREF(text);
    PyObject *devices = architectures ? ql_cuda_devices(&cuda) : NULL;
    PyObject *kernels = devices ? ql_cuda_kernels(&cuda) : NULL;
    PyObject *images = kernels ? ql_cuda_images() : NULL;
    PyObject *version = !cuda.driver_version ? Py_NewRef(Py_None) : PyLong_FromLong(cuda.driver_version);
    if (!images || !version) {
        Py_XDECREF(architectures);
        Py_XDECREF(devices);
        Py_XDECREF(kernels);
        Py_XDECREF(images);
        Py_XDECREF(version);
        return NULL;
    }
    return Py_BuildValue("{s:O,s:N,s:N,s:L,s:z,s:N,s:N,s:N,s:s}", "built", cuda.built ? Py_True : Py_False,
                         "architectures", architectures, "images", images, "fatbin_bytes", (long long)cuda.fatbin_bytes,
                         "driver", cuda.driver, "driver_version", version, "devices", devices, "kernels", kernels,
                         "missing", cuda.missing);
}

static PyObject *ql_cuda_was_initialized(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyBool_FromLong(ql_cuda_initialized());
}

static PyObject *ql_cuda_overlap(PyObject *module, PyObject *allowed) {
    (void)module;
    if (!PyBool_Check(allowed)) {
        PyErr_SetString(PyExc_TypeError, "allowed must be True or False");
        return NULL;
    }
    return PyBool_FromLong(ql_cuda_allow_overlap(allowed == Py_True));
}

static PyMethodDef ql_module_methods[] = {
    {"cuda_info", ql_cuda_info, METH_NOARGS,
     "cuda_info()\n--\n\nThe kernels built in, and, after asking the driver, the GPUs that they can run on."},
    {"cuda_initialized", ql_cuda_was_initialized, METH_NOARGS,
     "cuda_initialized()\n--\n\nWhether this module has called cuInit. Importing it never does."},
    {"set_cuda_overlap", ql_cuda_overlap, METH_O,
     "set_cuda_overlap(allowed, /)\n--\n\nWhether products may start as the kernel before them ends; gives what held."},
    {"cpu_info", ql_cpu_info, METH_NOARGS, "cpu_info()\n--\n\nInstruction set, threads and their runtime."},
    {NULL, NULL, 0, NULL},
};

/* The types are kept in static variables, and tensors of NumPy and torch are of the main interpreter only. */
static int ql_check_interpreter(void) {
    int64_t id = PyInterpreterState_GetID(PyInterpreterState_Get());
    if (id == 0) return 0;
    if (id > 0) PyErr_SetString(PyExc_ImportError, "qlinear runs in the main interpreter, not in subinterpreters");
    return -1;
}

static int ql_module_exec(PyObject *module) {
    static int (*const add_type[])(PyObject *) = {
        ql_dlpack_array_add_type, ql_layer_add_type,    ql_eetq_add_type,       ql_gptq_add_type,
        ql_awq_add_type,          ql_int8_add_type,     ql_fourbit_add_type,    ql_fp8_add_type,
        ql_packed_add_type,       ql_shortcut_add_type, ql_all_reduce_add_type,
    };
    static PyMethodDef *const functions[] = {
        ql_eetq_methods, ql_gptq_methods,    ql_stream_methods, ql_awq_methods,
        ql_int8_methods, ql_fourbit_methods, ql_fp8_methods,    ql_choice_methods,
    };
    if (ql_check_interpreter() < 0) return -1;
    for (size_t i = 0; i < sizeof add_type / sizeof *add_type; i++)
        if (add_type[i](module) < 0) return -1;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (PyModule_AddFunctions(module, functions[i]) < 0) return -1;
    return PyModule_AddStringConstant(module, "__version__", QL_VERSION);
}

static PyModuleDef_Slot ql_module_slots[] = {
    {Py_mod_exec, QL_SLOT(ql_module_exec)},
    {0, NULL},
};

static PyModuleDef ql_module = {
    PyModuleDef_HEAD_INIT,          .m_name = "_qlinear",       .m_doc = "Quantized linear layers on DLPack tensors.",
    .m_methods = ql_module_methods, .m_slots = ql_module_slots,
};

PyMODINIT_FUNC PyInit__qlinear(void);
PyMODINIT_FUNC PyInit__qlinear(void) { return PyModuleDef_Init(&ql_module); }

#include "choices.h"

#include "../cuda/choose.h"

#include <string.h>

static const char *const codes[] = {
    [QL_CODE_INT2] = "int2",     [QL_CODE_INT3] = "int3", [QL_CODE_INT4] = "int4", [QL_CODE_INT8] = "int8",
    [QL_CODE_TABLE4] = "table4", [QL_CODE_E4M3] = "e4m3", [QL_CODE_COUNT] = NULL,
};

PyObject *ql_packed_problem(const ql_packed_spec *spec) {
    return Py_BuildValue("(sLLL)", codes[spec->code], (long long)spec->n, (long long)spec->k,
                         (long long)spec->group_size);
}

enum { DEVICE, CODE, N, K, GROUP_SIZE, DTYPE, M, PROBLEM_COUNT };
enum { KERNEL = PROBLEM_COUNT, PARAMETER, CHOICE_COUNT };
static const char *const names[CHOICE_COUNT] = {"device", "code", "n",      "k",        "group_size",
                                                "dtype",  "m",    "kernel", "parameter"};

static int at_least_one(int64_t *value, PyObject *object, const char *name) {
    if (ql_arg_int(value, object, name) < 0) return -1;
    if (*value >= 1) return 0;
    PyErr_Format(PyExc_ValueError, "%s must be positive, got %lld", name, (long long)*value);
    return -1;
}

/* The problem of the first PROBLEM_COUNT values, and its device, made ready. NULL with an exception. */
static const ql_cuda_device *parse_problem(ql_cuda_problem *problem, PyObject *const *values) {
    int64_t ordinal = 0;
    ql_dtype dtype = QL_F16;
    int code = 0;
    if (ql_arg_int(&ordinal, values[DEVICE], names[DEVICE]) < 0 ||
        ql_arg_choice(&code, values[CODE], names[CODE], codes) < 0 || at_least_one(&problem->n, values[N], "n") < 0 ||
        at_least_one(&problem->k, values[K], "k") < 0 ||
        at_least_one(&problem->group_size, values[GROUP_SIZE], "group_size") < 0 ||
        ql_arg_dtype(&dtype, values[DTYPE], names[DTYPE]) < 0 || at_least_one(&problem->m, values[M], "m") < 0)
        return NULL;
    problem->code = code;
    problem->x_type = (int32_t)dtype;
    char message[QL_CUDA_MESSAGE];
    const ql_cuda_device *device =
        ql_cuda_device_get(ordinal < 0 || ordinal >= QL_CUDA_MAX_DEVICES ? -1 : (int)ordinal, message);
    if (!device) ql_cuda_failed(message);
    return device;
}

static PyObject *ql_choice_bucket(PyObject *module, PyObject *object) {
    (void)module;
    int64_t m = 0;
    if (at_least_one(&m, object, "m") < 0) return NULL;
    return PyLong_FromLongLong(ql_cuda_choice_bucket(m));
}

static PyObject *ql_candidates(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const ql_signature signature = {"candidates", PROBLEM_COUNT, PROBLEM_COUNT, PROBLEM_COUNT, names};
    PyObject *values[PROBLEM_COUNT];
    ql_cuda_problem problem = {0};
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0) return NULL;
    const ql_cuda_device *device = parse_problem(&problem, values);
    if (!device) return NULL;
    ql_cuda_choice found[QL_CUDA_MOST_CANDIDATES];
    int count = ql_cuda_candidates(found, device, &problem);
    PyObject *list = PyList_New(count);
    for (int i = 0; list && i < count; i++) {
        PyObject *entry = Py_BuildValue("(si)", ql_cuda_kernel_name(found[i].kernel), (int)found[i].parameter);
        if (!entry || PyList_SetItem(list, i, entry) < 0) Py_CLEAR(list);
    }
    return list;
}

/* The candidate whose kernel has this name. */
static int find_kernel(ql_cuda_choice *choice, const char *name, const ql_cuda_device *device,
                       const ql_cuda_problem *problem) {
    ql_cuda_choice found[QL_CUDA_MOST_CANDIDATES];
    int count = ql_cuda_candidates(found, device, problem);
    for (int i = 0; i < count; i++) {
        if (strcmp(ql_cuda_kernel_name(found[i].kernel), name) != 0) continue;
        choice->kernel = found[i].kernel;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "kernel must be one that runs such a product on GPU %d, got %.80s", device->ordinal,
                 name);
    return -1;
}

static PyObject *ql_set_choice(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    (void)module;
    static const ql_signature signature = {"set_choice", CHOICE_COUNT, CHOICE_COUNT, CHOICE_COUNT, names};
    PyObject *values[CHOICE_COUNT];
    ql_cuda_problem problem = {0};
    int64_t parameter = 0;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0) return NULL;
    const ql_cuda_device *device = parse_problem(&problem, values);
    if (!device || ql_arg_int(&parameter, values[PARAMETER], names[PARAMETER]) < 0) return NULL;
    if (parameter < INT32_MIN || parameter > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "parameter must fit 32 bits, got %lld", (long long)parameter);
        return NULL;
    }
    ql_cuda_choice choice = {.parameter = (int32_t)parameter};
    bool removes = ql_arg_is_none(values[KERNEL]);
    if (!removes) {
        if (!PyUnicode_Check(values[KERNEL])) {
            PyErr_Format(PyExc_TypeError, "kernel must be a string or None");
            return NULL;
        }
        const char *name = PyUnicode_AsUTF8AndSize(values[KERNEL], NULL);
        if (!name || find_kernel(&choice, name, device, &problem) < 0) return NULL;
    }
    char message[QL_CUDA_MESSAGE];
    if (ql_cuda_choice_set(device->ordinal, &problem, removes ? NULL : &choice, message) < 0) {
        PyErr_SetString(PyExc_ValueError, message);
        return NULL;
    }
    Py_RETURN_NONE;
}

PyMethodDef ql_choice_methods[] = {
    {"choice_bucket", ql_choice_bucket, METH_O,
     "choice_bucket(m, /)\n--\n\nThe rows up to which a choice for m rows of x counts."},
    {"candidates", QL_METHOD(ql_candidates), METH_FASTCALL | METH_KEYWORDS,
     "candidates(device, code, n, k, group_size, dtype, m)\n--\n\nWhat can run such products: [(kernel, parameter)],\n"
     "the table's own choice first."},
    {"set_choice", QL_METHOD(ql_set_choice), METH_FASTCALL | METH_KEYWORDS,
     "set_choice(device, code, n, k, group_size, dtype, m, kernel, parameter)\n--\n\nFrom now on such products run "
     "so;\n"
     "kernel None: as the table says."},
    {NULL, NULL, 0, NULL},
};

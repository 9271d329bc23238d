/* Everything is asked anew at each call: nothing here remembers an answer. What to ask is torch's, so it comes from
 * Python, as callables and as names in modules; what a module keeps in its __dict__ is named here.
 *
 * The object stands in the class as `__call__`. To the interpreter, which calls what it finds there without binding it
 * (Py_TPFLAGS_METHOD_DESCRIPTOR), it is the short way; to whoever asks for the attribute, as torch.compile does, it is
 * torch.nn.Module's own. */
#include "shortcut.h"

#include "call.h"
#include "layer.h"

#include <stddef.h>

/* What torch.nn.Module and qlinear's own modules keep in an instance's __dict__. */
enum { MADE, PARAMETERS, BUFFERS, CAST, COMPILED, FORWARD, FIRST_HOOKS, LAST_HOOKS = FIRST_HOOKS + 3, KEY_COUNT };
static const char *const ql_key_names[KEY_COUNT] = {
    [MADE] = "_made",
    [PARAMETERS] = "_parameters",
    [BUFFERS] = "_buffers",
    [CAST] = "compute_dtype",
    [COMPILED] = "_compiled_call_impl",
    [FORWARD] = "forward",
    [FIRST_HOOKS] = "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
};

/* An entry of `empty` or `constant`; the tuples keep its objects alive. */
typedef struct ql_watched {
    PyObject *dict, *name, *value; /* value NULL: a dict, to be empty */
} ql_watched;

enum { MOST_WATCHED = 16, MOST_SILENT = 8 };

typedef struct ql_shortcut {
    PyObject_HEAD
    PyObject *module;              /* torch.nn.Module */
    PyObject *types;               /* of x, exactly one of them */
    PyObject *forwards;            /* list: what a class may have as forward */
    PyObject *empty;               /* ((dict, name), ...): dicts, to be empty */
    PyObject *constant;            /* ((dict, name, value), ...): to have that value */
    PyObject *silent;              /* callables, to give None, False or 0 */
    PyObject *is_grad_enabled;     /* () -> bool */
    PyObject *is_autocast_enabled; /* (device type) -> bool; without one, of CUDA */
    PyObject *keys[KEY_COUNT], *call, *dtype, *requires_grad, *cpu;
    /* The same once more, to be walked without a call for each element. */
    int watched_count, silent_count;
    ql_watched watched[MOST_WATCHED];
    PyObject *silent_calls[MOST_SILENT];
} ql_shortcut;

/* 1 where the call may go on, 0 where somebody wants to see it, -1 with an exception. */
typedef int ql_free;

static ql_free ql_call_is_false(PyObject *result) {
    if (!result) return -1;
    int truth = result == Py_None || result == Py_False ? 0 : PyObject_IsTrue(result);
    Py_DECREF(result);
    return truth < 0 ? -1 : !truth;
}

static ql_free ql_nobody_watches(const ql_shortcut *shortcut) {
    for (int i = 0; i < shortcut->watched_count; i++) {
        const ql_watched *watched = &shortcut->watched[i];
        PyObject *found = PyDict_GetItemWithError(watched->dict, watched->name);
        if (!found) return PyErr_Occurred() ? -1 : 0;
        if (watched->value) {
            int same = found == watched->value ? 1 : PyObject_RichCompareBool(found, watched->value, Py_EQ);
            if (same != 1) return same;
        } else if (!PyDict_Check(found) || PyDict_Size(found) != 0) {
            return 0;
        }
    }
    for (int i = 0; i < shortcut->silent_count; i++) {
        ql_free goes = ql_call_is_false(PyObject_CallNoArgs(shortcut->silent_calls[i]));
        if (goes != 1) return goes;
    }
    return 1;
}

static ql_free ql_needs_no_gradient(const ql_shortcut *shortcut, PyObject *x) {
    ql_free disabled = ql_call_is_false(PyObject_CallNoArgs(shortcut->is_grad_enabled));
    return disabled ? disabled : ql_call_is_false(PyObject_GetAttr(x, shortcut->requires_grad));
}

static bool ql_is_plain_type(const ql_shortcut *shortcut, PyObject *x) {
    for (Py_ssize_t i = 0, count = PyTuple_Size(shortcut->types); i < count; i++)
        if (PyTuple_GetItem(shortcut->types, i) == (PyObject *)Py_TYPE(x)) return true;
    return false;
}

static PyObject *ql_own(const ql_shortcut *shortcut, PyObject *dict, int key) {
    return PyDict_GetItemWithError(dict, shortcut->keys[key]);
}

/* The class's forward is one that stands for the product and nothing else. */
static ql_free ql_forward_is_plain(const ql_shortcut *shortcut, PyTypeObject *type) {
    PyObject *forward = PyObject_GetAttr((PyObject *)type, shortcut->keys[FORWARD]);
    Py_XDECREF(forward); /* the class has it */
    for (Py_ssize_t i = 0, count = PyList_Size(shortcut->forwards); forward && i < count; i++)
        if (PyList_GetItem(shortcut->forwards, i) == forward) return 1;
    return forward ? 0 : -1;
}

/* The module's call is its forward and nothing else. */
static ql_free ql_module_is_plain(const ql_shortcut *shortcut, PyObject *module, PyObject *dict) {
    for (int key = FIRST_HOOKS; key <= LAST_HOOKS; key++) {
        PyObject *hooks = ql_own(shortcut, dict, key);
        if (!hooks) return PyErr_Occurred() ? -1 : 0;
        if (!PyDict_Check(hooks) || PyDict_Size(hooks) != 0) return 0;
    }
    PyObject *compiled = ql_own(shortcut, dict, COMPILED);
    if ((compiled && compiled != Py_None) || ql_own(shortcut, dict, FORWARD)) return 0;
    return PyErr_Occurred() ? -1 : ql_forward_is_plain(shortcut, Py_TYPE(module));
}

/* Some modules cast x first. */
static ql_free ql_needs_no_cast(const ql_shortcut *shortcut, PyObject *dict, PyObject *x) {
    PyObject *wanted = ql_own(shortcut, dict, CAST);
    if (!wanted || wanted == Py_None) return PyErr_Occurred() ? -1 : 1;
    PyObject *dtype = PyObject_GetAttr(x, shortcut->dtype);
    Py_XDECREF(dtype); /* one object for each dtype, which torch keeps */
    return dtype ? dtype == wanted : -1;
}

/* Whether dict holds the tensors from *at on, in this order; *at goes past them. */
static bool ql_holds_same(PyObject *dict, PyObject *tensors, Py_ssize_t *at) {
    PyObject *value;
    Py_ssize_t position = 0, count = PyTuple_Size(tensors);
    while (PyDict_Next(dict, &position, NULL, &value)) {
        if (*at == count || PyTuple_GetItem(tensors, *at) != value) return false;
        (*at)++;
    }
    return true;
}

/* The C layer that the module made of the tensors that it holds now (borrowed), or NULL, perhaps with an exception. */
static ql_layer *ql_layer_made(const ql_shortcut *shortcut, PyObject *dict) {
    PyObject *made = ql_own(shortcut, dict, MADE);
    if (!made || !PyTuple_Check(made) || PyTuple_Size(made) != 2) return NULL;
    PyObject *tensors = PyTuple_GetItem(made, 1);
    PyObject *parameters = ql_own(shortcut, dict, PARAMETERS), *buffers = ql_own(shortcut, dict, BUFFERS);
    if (!parameters || !buffers || !PyDict_Check(parameters) || !PyDict_Check(buffers) || !PyTuple_Check(tensors))
        return NULL;
    Py_ssize_t at = 0;
    bool same = ql_holds_same(parameters, tensors, &at) && ql_holds_same(buffers, tensors, &at);
    return same && at == PyTuple_Size(tensors) ? ql_layer_check(PyTuple_GetItem(made, 0)) : NULL;
}

/* Torch takes a call without a device for one about CUDA, and answers it in half the time: it has no name to parse. */
static ql_free ql_autocast_is_off(const ql_shortcut *shortcut, const ql_tensor *x) {
    PyObject *device = x->device_type == QL_DEVICE_CPU ? shortcut->cpu : NULL;
    return ql_call_is_false(PyObject_CallFunctionObjArgs(shortcut->is_autocast_enabled, device, NULL));
}

/* The product; NULL without an exception where x is not for C to read, or autocast is to see it. */
static PyObject *ql_shortcut_run(const ql_shortcut *shortcut, ql_layer *layer, PyObject *x) {
    ql_tensor tensor;
    if (ql_tensor_read(&tensor, x, "x") < 0) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *result = NULL;
    if (ql_autocast_is_off(shortcut, &tensor) == 1) result = ql_call_linear_read(layer, x, &tensor);
    ql_tensor_release(&tensor);
    return result;
}

/* The product, or NULL, without an exception where the call is to go the long way. */
static PyObject *ql_shortcut_try(const ql_shortcut *shortcut, PyObject *module, PyObject *x) {
    if (!ql_is_plain_type(shortcut, x)) return NULL;
    PyObject *dict = PyObject_GenericGetDict(module, NULL);
    if (!dict) return NULL;
    ql_free goes = ql_module_is_plain(shortcut, module, dict);
    if (goes == 1) goes = ql_nobody_watches(shortcut);
    if (goes == 1) goes = ql_needs_no_gradient(shortcut, x);
    if (goes == 1) goes = ql_needs_no_cast(shortcut, dict, x);
    ql_layer *layer = goes == 1 ? ql_layer_made(shortcut, dict) : NULL;
    PyObject *result = NULL;
    if (layer) {
        Py_INCREF((PyObject *)layer); /* a thread may make the module's layer anew while the GIL is away */
        result = ql_shortcut_run(shortcut, layer, x);
        Py_DECREF((PyObject *)layer);
    }
    Py_DECREF(dict);
    return result;
}

/* module(x), or whatever else torch.nn.Module.__call__ takes: args begins with the module. */
static PyObject *ql_shortcut_call(PyObject *self, PyObject *args, PyObject *kwargs) {
    const ql_shortcut *shortcut = (const ql_shortcut *)self;
    if (PyTuple_Size(args) == 2 && (!kwargs || PyDict_Size(kwargs) == 0)) {
        PyObject *result = ql_shortcut_try(shortcut, PyTuple_GetItem(args, 0), PyTuple_GetItem(args, 1));
        if (result || PyErr_Occurred()) return result;
    }
    PyObject *call = PyObject_GetAttr(shortcut->module, shortcut->call);
    PyObject *result = call ? PyObject_Call(call, args, kwargs) : NULL;
    Py_XDECREF(call);
    return result;
}

/* torch.nn.Module.__call__, bound to the module where there is one. */
static PyObject *ql_shortcut_get(PyObject *self, PyObject *module, PyObject *type) {
    (void)type;
    const ql_shortcut *shortcut = (const ql_shortcut *)self;
    PyObject *call = PyObject_GetAttr(shortcut->module, shortcut->call);
    if (!call || !module || module == Py_None) return call;
    PyObject *bound = PyObject_CallMethod(call, "__get__", "O", module);
    Py_DECREF(call);
    return bound;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

/* Takes the entries of a tuple, of `size` objects each, into watched; false where they are not such entries. */
static bool ql_shortcut_watch(ql_shortcut *shortcut, PyObject *tuple, Py_ssize_t size) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); i++) {
        PyObject *entry = PyTuple_GetItem(tuple, i);
        if (shortcut->watched_count == MOST_WATCHED || !PyTuple_Check(entry) || PyTuple_Size(entry) != size ||
            !PyDict_Check(PyTuple_GetItem(entry, 0)))
            return false;
        shortcut->watched[shortcut->watched_count++] = (ql_watched){
            PyTuple_GetItem(entry, 0), PyTuple_GetItem(entry, 1), size == 3 ? PyTuple_GetItem(entry, 2) : NULL};
    }
    return true;
}

static PyObject **ql_shortcut_fields(ql_shortcut *shortcut, int index) {
    PyObject **const fields[] = {
        &shortcut->module,   &shortcut->types,  &shortcut->forwards,        &shortcut->empty,
        &shortcut->constant, &shortcut->silent, &shortcut->is_grad_enabled, &shortcut->is_autocast_enabled,
    };
    return fields[index];
}

enum { MODULE, TYPES, FORWARDS, EMPTY, CONSTANT, SILENT, IS_GRAD_ENABLED, IS_AUTOCAST_ENABLED, FIELD_COUNT };

static int ql_shortcut_take(ql_shortcut *shortcut, PyObject **values) {
    bool right = PyTuple_Check(values[TYPES]) && PyList_Check(values[FORWARDS]) && PyTuple_Check(values[EMPTY]) &&
                 PyTuple_Check(values[CONSTANT]) && PyTuple_Check(values[SILENT]) &&
                 PyTuple_Size(values[SILENT]) <= MOST_SILENT && ql_shortcut_watch(shortcut, values[EMPTY], 2) &&
                 ql_shortcut_watch(shortcut, values[CONSTANT], 3);
    if (!right) {
        PyErr_SetString(PyExc_TypeError, "types, empty, constant and silent must be tuples, forwards a list; empty has "
                                         "pairs (dict, name), constant triples (dict, name, value)");
        return -1;
    }
    for (; shortcut->silent_count < PyTuple_Size(values[SILENT]); shortcut->silent_count++)
        shortcut->silent_calls[shortcut->silent_count] = PyTuple_GetItem(values[SILENT], shortcut->silent_count);
    for (int i = 0; i < FIELD_COUNT; i++) *ql_shortcut_fields(shortcut, i) = Py_NewRef(values[i]);
    return 0;
}

static PyObject *ql_shortcut_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const char *const names[FIELD_COUNT] = {
        "module", "types", "forwards", "empty", "constant", "silent", "is_grad_enabled", "is_autocast_enabled",
    };
    static const ql_signature signature = {"Shortcut", FIELD_COUNT, 0, FIELD_COUNT, names};
    PyObject *values[FIELD_COUNT];
    if (ql_args_tuple(values, &signature, args, kwargs) < 0) return NULL;
    ql_shortcut *made = (ql_shortcut *)QL_FROM_SLOT(allocfunc, PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!made) return NULL;
    bool complete = ql_shortcut_take(made, values) == 0 && (made->call = PyUnicode_InternFromString("__call__")) &&
                    (made->dtype = PyUnicode_InternFromString("dtype")) &&
                    (made->requires_grad = PyUnicode_InternFromString("requires_grad")) &&
                    (made->cpu = PyUnicode_InternFromString("cpu"));
    for (int i = 0; i < KEY_COUNT && complete; i++)
        complete = (made->keys[i] = PyUnicode_InternFromString(ql_key_names[i])) != NULL;
    if (complete) return (PyObject *)made;
    Py_DECREF(made);
    return NULL;
}

static int ql_shortcut_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < FIELD_COUNT; i++) Py_VISIT(*ql_shortcut_fields((ql_shortcut *)self, i));
    return 0;
}

static int ql_shortcut_clear(PyObject *self) {
    for (int i = 0; i < FIELD_COUNT; i++) Py_CLEAR(*ql_shortcut_fields((ql_shortcut *)self, i));
    return 0;
}

static void ql_shortcut_dealloc(PyObject *self) {
    ql_shortcut *shortcut = (ql_shortcut *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)ql_shortcut_clear(self);
    for (int i = 0; i < KEY_COUNT; i++) Py_CLEAR(shortcut->keys[i]);
    Py_CLEAR(shortcut->cpu);
    Py_CLEAR(shortcut->call);
    Py_CLEAR(shortcut->dtype);
    Py_CLEAR(shortcut->requires_grad);
    QL_FROM_SLOT(freefunc, PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

int ql_shortcut_add_type(PyObject *module) {
    static PyType_Slot slots[] = {
        {Py_tp_new, QL_SLOT(ql_shortcut_new)},
        {Py_tp_traverse, QL_SLOT(ql_shortcut_traverse)},
        {Py_tp_clear, QL_SLOT(ql_shortcut_clear)},
        {Py_tp_dealloc, QL_SLOT(ql_shortcut_dealloc)},
        {Py_tp_call, QL_SLOT(ql_shortcut_call)},
        {Py_tp_descr_get, QL_SLOT(ql_shortcut_get)},
        {Py_tp_doc, "A module's __call__: the short way to its C layer, where nobody wants to see the call."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "_qlinear.Shortcut",
        .basicsize = sizeof(ql_shortcut),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_METHOD_DESCRIPTOR,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);
    if (!type) return -1;
    int result = PyModule_AddObjectRef(module, "Shortcut", type);
    Py_DECREF(type);
    return result;
}

#include "layer.h"

#include "call.h"
#include "packed.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

static PyTypeObject *ql_layer_base;

/* ------------------------------------------------------------------------------------------------------------------
 * The tensors held */

ql_layer *ql_layer_alloc(PyTypeObject *type, int (*bind)(ql_layer *), size_t extra_size) {
    ql_layer *layer = (ql_layer *)QL_FROM_SLOT(allocfunc, PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!layer) return NULL;
    /* Until it is ready: gc.get_objects would hand it out without its tensors. */
    PyObject_GC_UnTrack(layer);
    layer->bind = bind;
    layer->bias = -1;
    if (extra_size && !(layer->extra = calloc(1, extra_size))) {
        Py_DECREF(layer);
        PyErr_NoMemory();
        return NULL;
    }
    return layer;
}

int ql_layer_hold(ql_layer *layer, PyObject *object, const char *name) {
    int index = layer->held_count;
    ql_held *held = &layer->held[index];
    held->name = name;
    if (!ql_arg_is_none(object)) {
        if (ql_tensor_read(&held->tensor, object, name) < 0) return -1;
        held->object = Py_NewRef(object);
    }
    layer->held_count++;
    return index;
}

static int ql_layer_check_devices(const ql_layer *layer) {
    /* A first tensor that is missing is bind's to complain of. */
    for (int i = 1; layer->held[0].object && i < layer->held_count; i++) {
        const ql_tensor *tensor = ql_layer_tensor(layer, i);
        if (tensor &&
            ql_check_same_device(tensor, layer->held[i].name, ql_layer_device(layer), layer->held[0].name) < 0)
            return -1;
    }
    return 0;
}

static int ql_layer_check_bias(const ql_layer *layer) {
    const ql_tensor *bias = layer->bias < 0 ? NULL : ql_layer_tensor(layer, layer->bias);
    if (!bias) return 0;
    if (ql_check_float(bias, "bias", bias->device_type == QL_DEVICE_CPU) < 0 || ql_check_aligned(bias, "bias") < 0)
        return -1;
    return ql_check_shape(bias, "bias", 1, &layer->weight.n);
}

ql_kept *ql_kept_new(size_t bytes) {
    ql_kept *made = malloc(sizeof *made + bytes);
    if (!made) {
        PyErr_NoMemory();
        return NULL;
    }
    *made = (ql_kept){.bytes = bytes};
    return made;
}

const void *ql_layer_keep(ql_layer *layer, ql_kept *made) {
    ql_kept *newest = layer->kept;
    if (newest && newest->bytes == made->bytes && memcmp(newest->data, made->data, made->bytes) == 0) {
        free(made);
        return newest->data;
    }
    made->older = newest;
    layer->kept = made;
    return made->data;
}

static void ql_kept_free(ql_kept *kept) {
    while (kept) {
        ql_kept *older = kept->older;
        free(kept);
        kept = older;
    }
}

/* After a bind, whose weight reads the newest if any. */
static void ql_layer_drop_older(ql_layer *layer) {
    if (!layer->kept || layer->running) return;
    ql_kept_free(layer->kept->older);
    layer->kept->older = NULL;
}

/* A producer that was read later ran Python code, which may have replaced the storage of what was borrowed before. */
static int ql_layer_read_again(ql_layer *layer) {
    for (int i = 0; i < layer->held_count; i++) {
        ql_held *held = &layer->held[i];
        if (held->object && held->tensor.borrowed && ql_tensor_read_again(&held->tensor, held->object, held->name) < 0)
            return -1;
    }
    return 0;
}

int ql_layer_ready(ql_layer *layer, PyObject *bias) {
    layer->bias = ql_layer_hold(layer, bias, "bias");
    if (layer->bias < 0 || ql_layer_read_again(layer) < 0 || ql_layer_check_devices(layer) < 0 ||
        layer->bind(layer) < 0 || ql_layer_check_bias(layer) < 0)
        return -1;
    PyObject_GC_Track(layer);
    return 0;
}

static bool ql_tensor_same(const ql_tensor *a, const ql_tensor *b) {
    size_t bytes = (size_t)a->ndim * sizeof *a->shape;
    return a->data == b->data && a->dtype == b->dtype && a->ndim == b->ndim && a->device_type == b->device_type &&
           memcmp(a->shape, b->shape, bytes) == 0 && memcmp(a->stride, b->stride, bytes) == 0;
}

/* One bit for each tensor that is no longer as the layer has it. 0, or -1. */
static int ql_layer_find_changes(uint32_t *changed, const ql_layer *layer) {
    *changed = 0;
    for (int i = 0; i < layer->held_count; i++) {
        const ql_held *held = &layer->held[i];
        if (!held->object || !held->tensor.borrowed) continue;
        ql_tensor now;
        if (ql_tensor_read_again(&now, held->object, held->name) < 0) return -1;
        if (!ql_tensor_same(&now, &held->tensor)) *changed |= 1u << i;
    }
    return 0;
}

static int ql_layer_bind_draft(ql_layer *draft, uint32_t changed) {
    for (int i = 0; i < draft->held_count; i++) {
        ql_held *held = &draft->held[i];
        if (changed & 1u << i && ql_tensor_read(&held->tensor, held->object, held->name) < 0) return -1;
    }
    if (ql_layer_check_devices(draft) < 0 || draft->bind(draft) < 0) return -1;
    return ql_layer_check_bias(draft);
}

static void ql_layer_publish(ql_layer *layer, const ql_layer *draft) {
    memcpy(layer->held, draft->held, sizeof layer->held);
    memcpy(layer->summary, draft->summary, sizeof layer->summary);
    layer->weight = draft->weight;
    layer->kept = draft->kept;
    layer->copies_values = draft->copies_values;
    layer->binds++;
    ql_layer_drop_older(layer);
}

/* In a draft: bind gives the GIL away while it reads from a GPU, and a thread that calls the layer then sees it as it was.
 * Of several that bind it at once the first has its way: 1 for that one, 0 for the others, or -1. */
static int ql_layer_bind_anew(ql_layer *layer, uint32_t changed) {
    ql_layer draft = *layer;
    const ql_kept *before = layer->kept;
    layer->running++; /* the draft may take what was kept before for its own */
    int result = ql_layer_bind_draft(&draft, changed);
    layer->running--;
    if (result == 0 && layer->binds == draft.binds) {
        ql_layer_publish(layer, &draft);
        return 1;
    }
    while (draft.kept != before) {
        ql_kept *made = draft.kept;
        draft.kept = made->older;
        free(made);
    }
    return result;
}

int ql_layer_refresh(ql_layer *layer) {
    bool bound = false;
    for (;;) {
        uint32_t changed;
        if (ql_layer_find_changes(&changed, layer) < 0) return -1;
        if (!changed && (bound || !layer->copies_values)) return 0;
        int result = ql_layer_bind_anew(layer, changed);
        if (result < 0) return -1;
        bound = result == 1;
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 * The base type */

static PyObject *ql_layer_call(PyObject *self, PyObject *args, PyObject *kwargs) {
    Py_ssize_t count = PyTuple_Size(args), keywords = kwargs ? PyDict_Size(kwargs) : 0;
    if (count == 1 && keywords == 0) return ql_call_linear((ql_layer *)self, PyTuple_GetItem(args, 0));
    return PyErr_Format(PyExc_TypeError, "a layer is called with one tensor x, got %zd arguments", count + keywords);
}

static PyObject *ql_layer_grad_input(PyObject *self, PyObject *grad_output) {
    return ql_call_grad((ql_layer *)self, grad_output);
}

static PyObject *ql_layer_dequantize(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static const char *const names[] = {"dtype"};
    static const ql_signature signature = {"dequantize", 1, 1, 0, names};
    PyObject *values[1];
    ql_dtype dtype = QL_F32;
    if (ql_args_fast(values, &signature, args, nargs, kwnames) < 0 || ql_arg_dtype(&dtype, values[0], "dtype") < 0)
        return NULL;
    return ql_call_dequantize((ql_layer *)self, dtype);
}

static PyObject *ql_layer_pack_method(PyObject *self, PyObject *unused) {
    (void)unused;
    return ql_layer_pack((ql_layer *)self);
}

static PyObject *ql_layer_obstacle(PyObject *self, void *unused) {
    (void)unused;
    return ql_layer_pack_obstacle((ql_layer *)self);
}

static PyObject *ql_layer_in_features(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(((ql_layer *)self)->weight.k);
}

static PyObject *ql_layer_out_features(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(((ql_layer *)self)->weight.n);
}

static PyObject *ql_layer_nbytes(PyObject *self, void *unused) {
    (void)unused;
    ql_layer *layer = (ql_layer *)self;
    int64_t bytes = 0;
    for (int i = 0; i < layer->held_count; i++) {
        const ql_tensor *tensor = ql_layer_tensor(layer, i);
        if (tensor) bytes += ql_tensor_numel(tensor) * (int64_t)ql_dtype_size(tensor->dtype);
    }
    return PyLong_FromLongLong(bytes);
}

static PyObject *ql_layer_repr(PyObject *self) {
    ql_layer *layer = (ql_layer *)self;
    PyObject *name = PyObject_GetAttrString((PyObject *)Py_TYPE(self), "__name__");
    if (!name) return NULL;
    PyObject *repr =
        PyUnicode_FromFormat("%U(in_features=%lld, out_features=%lld, %s%sbias=%s)", name, (long long)layer->weight.k,
                             (long long)layer->weight.n, layer->summary, layer->summary[0] ? ", " : "",
                             ql_layer_tensor(layer, layer->bias) ? "True" : "False");
    Py_DECREF(name);
    return repr;
}

static int ql_layer_traverse(PyObject *self, visitproc visit, void *arg) {
    ql_layer *layer = (ql_layer *)self;
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < layer->held_count; i++) Py_VISIT(layer->held[i].object);
    return 0;
}

/* Python objects are dropped at deallocation only: a layer cannot be called without its tensors, and a cycle through one
 * goes through its tensors' attributes, which their own collector clears. */
static void ql_layer_dealloc(PyObject *self) {
    ql_layer *layer = (ql_layer *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (layer->weakrefs) PyObject_ClearWeakRefs(self);
    for (int i = 0; i < layer->held_count; i++) {
        if (layer->held[i].object) ql_tensor_release(&layer->held[i].tensor);
        Py_CLEAR(layer->held[i].object);
    }
    ql_kept_free(layer->kept);
    free(layer->extra);
    QL_FROM_SLOT(freefunc, PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef ql_layer_methods[] = {
    {"grad_input", ql_layer_grad_input, METH_O,
     "grad_input(grad_output)\n--\n\nThe gradient to the input: [..., out_features] -> [..., in_features]."},
    {"dequantize", QL_METHOD(ql_layer_dequantize), METH_FASTCALL | METH_KEYWORDS,
     "dequantize(dtype='float32')\n--\n\nThe weight [out_features, in_features]."},
    {"pack", ql_layer_pack_method, METH_NOARGS,
     "pack()\n--\n\n(packed, spec) for PackedLinear, or None where its layout does not hold this layer."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ql_layer_getset[] = {
    {"in_features", ql_layer_in_features, NULL, "K, the size of the input's last dimension.", NULL},
    {"out_features", ql_layer_out_features, NULL, "N, the size of the output's last dimension.", NULL},
    {"nbytes", ql_layer_nbytes, NULL, "Bytes of all the tensors held.", NULL},
    {"pack_obstacle", ql_layer_obstacle, NULL, "Why pack() gives None; empty where it does not.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef ql_layer_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ql_layer, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

int ql_layer_add_type(PyObject *module) {
    static PyType_Slot slots[] = {
        {Py_tp_call, QL_SLOT(ql_layer_call)},
        {Py_tp_repr, QL_SLOT(ql_layer_repr)},
        {Py_tp_traverse, QL_SLOT(ql_layer_traverse)},
        {Py_tp_dealloc, QL_SLOT(ql_layer_dealloc)},
        {Py_tp_methods, ql_layer_methods},
        {Py_tp_getset, ql_layer_getset},
        {Py_tp_members, ql_layer_members},
        {Py_tp_doc, "What the six quantized linear layers share."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "_qlinear.Layer",
        .basicsize = sizeof(ql_layer),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION |
                 Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpec(&spec);
    if (!type) return -1;
    ql_layer_base = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "Layer", type);
}

ql_layer *ql_layer_check(PyObject *object) {
    return PyObject_TypeCheck(object, ql_layer_base) ? (ql_layer *)object : NULL;
}

int ql_layer_make_type(PyObject *module, const char *name, newfunc new, const char *doc, PyMethodDef *methods,
                       PyGetSetDef *getset) {
    static PyGetSetDef none[] = {{NULL, NULL, NULL, NULL, NULL}};
    static PyMethodDef no_methods[] = {{NULL, NULL, 0, NULL}};
    PyType_Slot slots[] = {
        {Py_tp_new, QL_SLOT(new)},
        {Py_tp_doc, (void *)(uintptr_t)doc},
        {Py_tp_methods, methods ? methods : no_methods},
        {Py_tp_getset, getset ? getset : none},
        {Py_tp_traverse, QL_SLOT(ql_layer_traverse)},
        {Py_tp_dealloc, QL_SLOT(ql_layer_dealloc)},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = name,
        .basicsize = sizeof(ql_layer),
        /* Else a layer's __class__ could be set to another format's type, whose methods would misread its weight. */
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    PyObject *type = PyType_FromSpecWithBases(&spec, (PyObject *)ql_layer_base);
    if (!type) return -1;
    int result = PyModule_AddObjectRef(module, strchr(name, '.') + 1, type);
    Py_DECREF(type);
    return result;
}

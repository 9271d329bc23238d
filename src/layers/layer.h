/* What the six layer types share: the tensors they hold, arguments, the way of a call.
 *
 * A layer keeps the Python objects of its tensors. Where a tensor's type has the DLPack exchange API it is read anew at
 * each call (40 ns), so replaced storage is seen; other tensors are read once and lent for the layer's life. `bind` turns
 * the tensors into a ql_weight with every check, at construction and whenever a tensor's description changed. */
#ifndef QL_LAYERS_LAYER_H
#define QL_LAYERS_LAYER_H

#include "../formats/weight.h"
#include "../tensor.h"

enum { QL_MAX_HELD = 8, QL_MAX_ARGS = 16 };

typedef struct ql_held {
    PyObject *object; /* NULL: the argument was None */
    const char *name;
    ql_tensor tensor;
} ql_held;

/* What bind made out of tensors for the weight to read. One that a later bind replaced stays until no product runs, as
 * one on another thread may still read it. */
typedef struct ql_kept {
    struct ql_kept *older;
    size_t bytes;
    _Alignas(8) unsigned char data[];
} ql_kept;

typedef struct ql_layer ql_layer;

struct ql_layer {
    PyObject_HEAD
    PyObject *weakrefs;
    int (*bind)(ql_layer *layer); /* fills weight from held; -1 with an exception, nothing changed then */
    char summary[96];             /* of the repr, after the sizes: "bits=4, group_size=128", or empty */
    void *extra;                  /* the type's own configuration, malloc'ed, freed by ql_layer's dealloc */
    ql_weight weight;
    ql_kept *kept;      /* the newest first */
    int running;        /* calls and binds that hold a copy of weight while they may give the GIL away */
    unsigned binds;     /* how often the layer was bound anew */
    bool copies_values; /* weight has values read out of tensors: bound anew at each call, to see them change */
    int bias;           /* index into held, or -1 */
    int held_count;
    ql_held held[QL_MAX_HELD];
};

/* ---- making a layer; each tp_new goes: parse, alloc, hold..., ready ---- */

/* A new layer of `type` with extra_size zeroed bytes at `extra` (none for 0). */
ql_layer *ql_layer_alloc(PyTypeObject *type, int (*bind)(ql_layer *), size_t extra_size);

/* Reads and holds one tensor argument; its index in held, or -1 with an exception. NULL and None are held as absent. */
int ql_layer_hold(ql_layer *layer, PyObject *object, const char *name);

/* Holds the bias, binds, and checks that all tensors share a device and that the bias is a float [n]. 0, or -1. */
int ql_layer_ready(ql_layer *layer, PyObject *bias);

/* Room of `bytes` for bind, to be filled and then kept or freed; NULL with MemoryError. */
ql_kept *ql_kept_new(size_t bytes);
/* Gives it to the layer, or frees it where the newest has the same contents; what the weight is to read. */
const void *ql_layer_keep(ql_layer *layer, ql_kept *made);

/* A tensor's storage can be replaced under the object that is held (`weight.data = ...`, resize_), so what was borrowed is
 * read again before each call; a change binds anew, and one that does not fit leaves the layer as it was. It may give the
 * GIL away, but not between the last look at the tensors and its return. 0, or -1. */
int ql_layer_refresh(ql_layer *layer);

/* Where the layer's tensors are: with the first one. */
static inline const ql_tensor *ql_layer_device(const ql_layer *layer) { return &layer->held[0].tensor; }

/* The contents of a contiguous tensor that is held, where the host can read them: its own memory, or a copy from the GPU
 * in *copy, for the caller to free. For the few values that bind must see. NULL with an exception. */
const void *ql_layer_contents(const ql_layer *layer, int index, void **copy);

/* The tensor at `index` of held, or NULL where it is absent. */
static inline const ql_tensor *ql_layer_tensor(const ql_layer *layer, int index) {
    return layer->held[index].object ? &layer->held[index].tensor : NULL;
}

/* The object as a layer, or NULL without an exception where it is none. */
ql_layer *ql_layer_check(PyObject *object);

/* Makes the heap type `name` ("_qlinear.QuantLinear") as a subclass of Layer and adds it to the module; methods and getset
 * of its own, or NULL. 0, or -1. */
int ql_layer_make_type(PyObject *module, const char *name, newfunc new, const char *doc, PyMethodDef *methods,
                       PyGetSetDef *getset);

/* ---- arguments ---- */

/* What a function takes: `names`, of which the first `positional` may come by position and the first `required` must
 * come; the rest may be missing. */
typedef struct ql_signature {
    const char *function;
    int count, positional, required;
    const char *const *names;
} ql_signature;

/* Fill values[0..count) with borrowed references, NULL where missing; 0, or -1 with TypeError. One takes what METH_FASTCALL
 * | METH_KEYWORDS brings, the other what tp_new brings. */
int ql_args_fast(PyObject **values, const ql_signature *signature, PyObject *const *args, Py_ssize_t nargs,
                 PyObject *kwnames);
int ql_args_tuple(PyObject **values, const ql_signature *signature, PyObject *args, PyObject *kwargs);

/* Each stores into *value and returns 0, or -1 with an exception that names the argument; a missing argument (NULL)
 * leaves *value as it was. */
int ql_arg_int(int64_t *value, PyObject *object, const char *name);
int ql_arg_float(double *value, PyObject *object, const char *name);
int ql_arg_bool(bool *value, PyObject *object, const char *name);
/* The index of the string in `choices`, which NULL ends; ValueError lists them. */
int ql_arg_choice(int *value, PyObject *object, const char *name, const char *const *choices);
/* "float32", "float16" or "bfloat16". */
int ql_arg_dtype(ql_dtype *value, PyObject *object, const char *name);

static inline bool ql_arg_is_none(PyObject *object) { return !object || object == Py_None; }

/* ---- the module's parts: each type with the functions of its format ---- */

int ql_layer_add_type(PyObject *module);
int ql_eetq_add_type(PyObject *module);
int ql_gptq_add_type(PyObject *module);
int ql_awq_add_type(PyObject *module);
int ql_int8_add_type(PyObject *module);
int ql_fourbit_add_type(PyObject *module);
int ql_fp8_add_type(PyObject *module);
int ql_packed_add_type(PyObject *module);
int ql_all_reduce_add_type(PyObject *module);

extern PyMethodDef ql_eetq_methods[];
extern PyMethodDef ql_gptq_methods[];
extern PyMethodDef ql_stream_methods[];
extern PyMethodDef ql_awq_methods[];
extern PyMethodDef ql_int8_methods[];
extern PyMethodDef ql_fourbit_methods[];
extern PyMethodDef ql_fp8_methods[];

#endif

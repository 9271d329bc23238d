/* PackedLinear, and what makes one of the types that hold a checkpoint's tensors. */
#include "packed.h"

#include "../cuda/pack.h"
#include "../formats/dynamic_map.h"
#include "../formats/packed.h"
#include "choices.h"
#include "device.h"
#include "grouped.h"

#include <stdio.h>
#include <stdlib.h>

enum { HELD_PACKED };

/* Index of g_idx among what QuantLinear holds. */
enum { HELD_G_IDX = 3 };

/* ------------------------------------------------------------------------------------------------------------------
 * Packing */

/* The groups of an act-order weight, the layer's, where the host can read them, in *copy for the caller to free where that
 * takes one; NULL where there are none. -1 with an exception. */
static int read_g_idx(const int32_t **g_idx, void **copy, const ql_layer *layer, const ql_weight *weight) {
    *g_idx = NULL;
    *copy = NULL;
    if (weight->format != QL_FORMAT_GPTQ || !weight->gptq.g_idx) return 0;
    if (ql_layer_device(layer)->device_type == QL_DEVICE_CPU) {
        *g_idx = weight->gptq.g_idx;
        return 0;
    }
    const ql_held *held = &layer->held[HELD_G_IDX];
    const ql_tensor tensor = held->tensor; /* the GIL is away while it is read, and a bind may change what is held */
    *g_idx = ql_host_contents(copy, held->object, &tensor, held->name);
    return *g_idx ? 0 : -1;
}

/* On a GPU the kernels read elements, and EETQ's bytes as words, which a tensor that was cut out of another need not be
 * aligned to. */
static bool is_aligned(const ql_layer *layer) {
    bool words = layer->weight.format == QL_FORMAT_EETQ && (uintptr_t)layer->held[0].tensor.data % sizeof(uint32_t);
    for (int i = 0; i < layer->held_count; i++) {
        const ql_tensor *tensor = ql_layer_tensor(layer, i);
        if (tensor && i != layer->bias && (uintptr_t)tensor->data % ql_dtype_size(tensor->dtype)) return false;
    }
    return !words;
}

/* 1 with a description of the weight, 0 with a reason why there is none, -1 with an exception. */
static int describe(ql_packed_spec *spec, const ql_layer *layer, const ql_weight *weight,
                    char reason[QL_PACKED_REASON]) {
    const int32_t *g_idx;
    void *copy;
    bool aligned = is_aligned(layer);
    if (read_g_idx(&g_idx, &copy, layer, weight) < 0) return -1;
    int result = ql_packed_describe(spec, weight, g_idx, reason) == 0;
    free(copy);
    if (result == 1 && !aligned) {
        snprintf(reason, QL_PACKED_REASON, "a tensor's data is not aligned");
        result = 0;
    }
    return result;
}

static int run_pack(ql_tensor *packed, PyObject *object, const ql_packed_spec *spec, const ql_packed_layout *layout,
                    const ql_weight *weight) {
    ql_cuda_place place = {0};
    char message[QL_CUDA_MESSAGE];
    bool on_cpu = packed->device_type == QL_DEVICE_CPU;
    int result = 0;
    if (!on_cpu && ql_place_of(&place, object, packed) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    if (on_cpu)
        ql_packed_pack(packed->data, spec, layout, weight);
    else
        result = ql_cuda_pack(&place, packed->data, spec, layout, weight, message);
    Py_END_ALLOW_THREADS
    return result < 0 ? ql_cuda_failed(message) : 0;
}

static PyObject *numbers_of(const ql_packed_spec *spec) {
    int64_t numbers[QL_PACKED_NUMBERS];
    ql_packed_to_numbers(numbers, spec);
    PyObject *tuple = PyTuple_New(QL_PACKED_NUMBERS);
    for (int i = 0; tuple && i < QL_PACKED_NUMBERS; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (!number || PyTuple_SetItem(tuple, i, number) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* (packed, numbers of the spec), or None; the weight is a copy of the layer's. */
static PyObject *pack_weight(const ql_layer *layer, const ql_weight *weight) {
    ql_packed_spec spec;
    ql_packed_layout layout;
    char reason[QL_PACKED_REASON];
    PyObject *object = layer->held[0].object;
    int found = describe(&spec, layer, weight, reason);
    if (found < 0) return NULL;
    if (found == 0 || ql_packed_lay_out(&layout, &spec, reason) < 0) Py_RETURN_NONE;
    ql_output output;
    if (ql_output_begin_beside(&output, object, ql_layer_device(layer), QL_U8, 1, &layout.bytes) < 0) return NULL;
    if (run_pack(&output.view, object, &spec, &layout, weight) < 0) {
        ql_output_abandon(&output);
        return NULL;
    }
    PyObject *packed = ql_output_finish(&output);
    PyObject *numbers = packed ? numbers_of(&spec) : NULL;
    PyObject *pair = numbers ? PyTuple_Pack(2, packed, numbers) : NULL;
    Py_XDECREF(packed);
    Py_XDECREF(numbers);
    return pair;
}

PyObject *ql_layer_pack(ql_layer *layer) {
    if (ql_layer_refresh(layer) < 0) return NULL;
    const ql_weight weight = layer->weight;
    layer->running++;
    PyObject *result = pack_weight(layer, &weight);
    layer->running--;
    return result;
}

PyObject *ql_layer_pack_obstacle(ql_layer *layer) {
    ql_packed_spec spec;
    ql_packed_layout layout;
    char reason[QL_PACKED_REASON] = "";
    if (ql_layer_refresh(layer) < 0) return NULL;
    const ql_weight weight = layer->weight;
    layer->running++;
    int found = describe(&spec, layer, &weight, reason);
    layer->running--;
    if (found < 0) return NULL;
    if (found == 1 && ql_packed_lay_out(&layout, &spec, reason) == 0) reason[0] = '\0';
    return PyUnicode_FromString(reason);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The type */

static int packed_bind(ql_layer *layer) {
    static const ql_dtype bytes[] = {QL_U8};
    const ql_packed_spec *spec = layer->extra;
    const ql_tensor *packed = &layer->held[HELD_PACKED].tensor;
    ql_packed_layout layout;
    char reason[QL_PACKED_REASON];
    if (ql_packed_lay_out(&layout, spec, reason) < 0) {
        PyErr_Format(PyExc_ValueError, "spec describes no packed weight: %s", reason);
        return -1;
    }
    if (ql_check_dtype(packed, "packed", 1, bytes) < 0 || ql_check_shape(packed, "packed", 1, &layout.bytes) < 0 ||
        ql_check_contiguous(packed, "packed") < 0)
        return -1;
    if ((uintptr_t)packed->data % 16) {
        PyErr_SetString(PyExc_ValueError, "packed must begin at a multiple of 16 bytes");
        return -1;
    }
    layer->weight = ql_packed_weight(spec, &layout, packed->data);
    static const char *const sources[] = {
        [QL_FORMAT_GPTQ] = "GPTQ", [QL_FORMAT_AWQ] = "AWQ", [QL_FORMAT_EETQ] = "EETQ", [QL_FORMAT_FOURBIT] = "4 bit"};
    snprintf(layer->summary, sizeof layer->summary, "source='%s', bits=%d, group_size=%lld%s", sources[spec->source],
             ql_packed_bits(spec), (long long)spec->group_size, spec->has_order ? ", act_order" : "");
    return 0;
}

/* The description from any sequence of ints, as torch hands out lists for tuples. */
static int parse_spec(ql_packed_spec *spec, PyObject *object) {
    int64_t numbers[QL_PACKED_NUMBERS];
    char reason[QL_PACKED_REASON];
    if ((!PyTuple_Check(object) && !PyList_Check(object)) || PySequence_Size(object) != QL_PACKED_NUMBERS) {
        PyErr_Format(PyExc_TypeError, "spec must be a tuple of %d ints, got %R", QL_PACKED_NUMBERS, object);
        return -1;
    }
    for (int i = 0; i < QL_PACKED_NUMBERS; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        if (!item) return -1;
        int result = ql_arg_int(&numbers[i], item, "a number of spec");
        Py_DECREF(item);
        if (result < 0) return -1;
    }
    if (ql_packed_from_numbers(spec, numbers, reason) == 0) return 0;
    PyErr_Format(PyExc_ValueError, "spec describes no packed weight: %s", reason);
    return -1;
}

static PyObject *packed_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const char *const names[] = {"packed", "spec", "bias"};
    static const ql_signature signature = {"PackedLinear", 3, 3, 2, names};
    PyObject *values[3];
    ql_packed_spec spec;
    if (ql_args_tuple(values, &signature, args, kwargs) < 0 || parse_spec(&spec, values[1]) < 0) return NULL;
    ql_layer *layer = ql_layer_alloc(type, packed_bind, sizeof spec);
    if (!layer) return NULL;
    *(ql_packed_spec *)layer->extra = spec;
    if (ql_layer_hold_required(layer, values[0], names[0]) == HELD_PACKED && ql_layer_ready(layer, values[2]) == 0)
        return (PyObject *)layer;
    Py_DECREF((PyObject *)layer);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Unpacking */

enum { MOST_TENSORS = 5 };

/* The tensors of the checkpoint, in the order that their type takes them: how many, begun as outputs. */
static int begin_unpacked(ql_output outputs[MOST_TENSORS], ql_unpacked *out, const ql_layer *layer) {
    const ql_packed_spec *spec = &layer->weight.packed.spec;
    const ql_unpacked_sizes sizes = ql_packed_sizes(spec);
    const bool fourbit = spec->source == QL_FORMAT_FOURBIT, eetq = spec->source == QL_FORMAT_EETQ;
    const bool nested = spec->nested_blocksize != 0;
    ql_dtype words = fourbit ? QL_U8 : eetq ? QL_I8 : QL_I32;
    struct {
        ql_dtype dtype;
        int ndim;
        int64_t shape[2];
    } wanted[MOST_TENSORS] = {{words, 2, {sizes.words[0], sizes.words[1]}}};
    int count = 1, scales;
    if (fourbit) {
        scales = count++;
        wanted[scales].dtype = nested ? QL_U8 : QL_F32;
        wanted[scales].ndim = 1;
        wanted[scales].shape[0] = sizes.scales[0] * sizes.scales[1];
        const int64_t lengths[] = {16, sizes.nested_absmax, QL_MAP_SIZE}; /* code, nested_absmax, nested_code */
        for (int i = 0; i < (nested ? 3 : 1); i++, count++) {
            wanted[count].dtype = QL_F32;
            wanted[count].ndim = 1;
            wanted[count].shape[0] = lengths[i];
        }
    } else {
        if (!eetq) {
            wanted[count].dtype = QL_I32;
            wanted[count].ndim = 2;
            wanted[count].shape[0] = sizes.zeros[0];
            wanted[count++].shape[1] = sizes.zeros[1];
        }
        scales = count++;
        wanted[scales].dtype = spec->scales_dtype;
        wanted[scales].ndim = eetq ? 1 : 2;
        wanted[scales].shape[0] = eetq ? spec->n : sizes.scales[0];
        wanted[scales].shape[1] = sizes.scales[1];
    }
    for (int i = 0; i < count; i++) {
        if (ql_output_begin_beside(&outputs[i], layer->held[HELD_PACKED].object, ql_layer_device(layer),
                                   wanted[i].dtype, wanted[i].ndim, wanted[i].shape) == 0)
            continue;
        while (i-- > 0) ql_output_abandon(&outputs[i]);
        return -1;
    }
    *out = (ql_unpacked){.words = outputs[0].view.data, .scales = outputs[scales].view.data};
    if (scales == 2) out->zeros = outputs[1].view.data;
    if (fourbit) out->table = outputs[2].view.data;
    if (nested) {
        out->nested_absmax = outputs[3].view.data;
        out->nested_table = outputs[4].view.data;
    }
    return count;
}

static int run_unpack(const ql_unpacked *out, const ql_layer *layer) {
    const ql_held *first = &layer->held[HELD_PACKED];
    ql_weight weight = layer->weight;
    if (first->tensor.device_type == QL_DEVICE_CPU) {
        Py_BEGIN_ALLOW_THREADS
        ql_packed_unpack(out, &weight);
        Py_END_ALLOW_THREADS
        return 0;
    }
    ql_cuda_place place;
    char message[QL_CUDA_MESSAGE];
    if (ql_place_of(&place, first->object, &first->tensor) < 0) return -1;
    return ql_cuda_unpack(&place, out, &weight, message) < 0 ? ql_cuda_failed(message) : 0;
}

static PyObject *packed_unpack(PyObject *self, PyObject *unused) {
    (void)unused;
    ql_layer *layer = (ql_layer *)self;
    ql_output outputs[MOST_TENSORS];
    ql_unpacked out;
    if (ql_layer_refresh(layer) < 0) return NULL;
    int count = begin_unpacked(outputs, &out, layer);
    if (count < 0) return NULL;
    if (run_unpack(&out, layer) == 0) return ql_outputs_finish(outputs, count);
    for (int i = 0; i < count; i++) ql_output_abandon(&outputs[i]);
    return NULL;
}

static PyObject *packed_problem(PyObject *self, void *unused) {
    (void)unused;
    return ql_packed_problem(&((ql_layer *)self)->weight.packed.spec);
}

static PyObject *packed_zero_format(PyObject *self, void *unused) {
    (void)unused;
    const ql_packed_spec *spec = &((ql_layer *)self)->weight.packed.spec;
    if (spec->source == QL_FORMAT_GPTQ) return PyUnicode_FromString(spec->zero_offset ? "gptq" : "gptq_v2");
    PyErr_SetString(PyExc_AttributeError, "only a layer of the GPTQ family has a zero_format");
    return NULL;
}

static PyGetSetDef packed_getset[] = {
    {"zero_format", packed_zero_format, NULL, "QuantLinear's, where the layer was one.", NULL},
    {"problem", packed_problem, NULL,
     "(code, n, k, group_size): what a kernel is chosen for, beside the dtype and the rows of x.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int ql_packed_add_type(PyObject *module) {
    static PyMethodDef methods[] = {
        {"unpack", packed_unpack, METH_NOARGS,
         "unpack()\n--\n\nThe checkpoint's tensors, bit for bit: (qweight, qzeros, scales), (weight, weight_scales),\n"
         "or (weight, absmax, code[, nested_absmax, nested_code])."},
        {NULL, NULL, 0, NULL},
    };
    return ql_layer_make_type(
        module, "_qlinear.PackedLinear", packed_new,
        "PackedLinear(packed, spec, bias=None)\n--\n\nA linear layer as pack() of the other types "
        "left it: in the layout of the GPU's kernels. A CPU reads it slowly.",
        methods, packed_getset);
}

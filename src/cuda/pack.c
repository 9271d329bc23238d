#include "pack.h"

#include "../../kernels/params.h"
#include "../formats/dynamic_map.h"
#include "../formats/matrix.h"
#include "engine.h"

static int32_t scale_size(const ql_packed_spec *spec) {
    return spec->nested_blocksize ? 1 : (int32_t)ql_dtype_size(spec->scales_dtype);
}

static ql_pack_params params_of(const ql_packed_spec *spec) {
    return (ql_pack_params){.n = spec->n,
                            .k = spec->k,
                            .group_size = spec->group_size,
                            .groups = spec->groups,
                            .format = (int32_t)spec->source,
                            .code = spec->code,
                            .scale_size = scale_size(spec),
                            .zero_offset = spec->zero_offset};
}

/* The kernels only read what they are given as a source; the struct serves both directions. */
static void *unconst(const void *pointer) { return (void *)(uintptr_t)pointer; }

/* The checkpoint's tensors in p; the words and the zeros that have tails are int32. */
static void add_source(ql_pack_params *p, const ql_weight *weight) {
    switch (weight->format) {
    case QL_FORMAT_GPTQ:
        p->words = unconst(weight->gptq.qweight);
        p->zeros = unconst(weight->gptq.qzeros);
        p->scales = unconst(weight->gptq.scales);
        p->g_idx = weight->gptq.g_idx;
        break;
    case QL_FORMAT_AWQ:
        p->words = unconst(weight->awq.qweight);
        p->zeros = unconst(weight->awq.qzeros);
        p->scales = unconst(weight->awq.scales);
        break;
    case QL_FORMAT_EETQ:
        p->words = unconst(weight->eetq.weight);
        p->scales = unconst(weight->eetq.scales);
        break;
    default: {
        const ql_fourbit *fourbit = &weight->fourbit;
        p->words = unconst(fourbit->packed);
        p->scales = unconst(fourbit->nested ? (const void *)fourbit->nested : fourbit->absmax);
    }
    }
}

/* Launches a kernel of `count` items, each thread going on by the grid's size. */
static int launch(const ql_cuda_guard *guard, void *stream, ql_cuda_kernel kernel, int64_t count,
                  const ql_pack_params *p, char message[QL_CUDA_MESSAGE]) {
    int64_t blocks = ql_group_count(count, QL_LINEAR_THREADS);
    ql_cuda_grid grid = {.x = blocks < 1 << 24 ? blocks : 1 << 24, .y = 1, .threads = QL_LINEAR_THREADS};
    return ql_cuda_launch(guard, kernel, stream, &grid, p, message);
}

/* `count` elements of 4 bytes, `stride` apart. */
static int copy_words(const ql_cuda_place *place, void *out, const void *from, int64_t count, int64_t stride,
                      char message[QL_CUDA_MESSAGE]) {
    return ql_cuda_copy(place, out, from, QL_F32, 1, &count, &stride, message);
}

static int pack_tails(const ql_cuda_place *place, const ql_pack_params *p, char message[QL_CUDA_MESSAGE],
                      const ql_packed_spec *spec) {
    const ql_unpacked_sizes sizes = ql_packed_sizes(spec);
    const bool awq = spec->source == QL_FORMAT_AWQ;
    const int32_t *words = p->words;
    const int64_t last = sizes.words[awq ? 1 : 0] - 1;
    if (p->word_tail && copy_words(place, p->word_tail, words + (awq ? last : last * spec->n), awq ? spec->k : spec->n,
                                   awq ? sizes.words[1] : 1, message) < 0)
        return -1;
    if (!p->zero_tail) return 0;
    return copy_words(place, p->zero_tail, p->zeros + sizes.zeros[1] - 1, spec->groups, sizes.zeros[1], message);
}

static int pack_tables(const ql_cuda_place *place, const ql_packed *packed, const ql_fourbit *fourbit,
                       char message[QL_CUDA_MESSAGE]) {
    if (copy_words(place, unconst(packed->table), fourbit->code, 16, 1, message) < 0) return -1;
    if (!fourbit->nested) return 0;
    int64_t blocks = ql_packed_sizes(&packed->spec).nested_absmax;
    if (copy_words(place, unconst(packed->nested_table), fourbit->nested_code, QL_MAP_SIZE, 1, message) < 0) return -1;
    return copy_words(place, unconst(packed->nested_absmax), fourbit->absmax, blocks, 1, message);
}

static int launch_pack(const ql_cuda_place *place, const ql_pack_params *p, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    int64_t warps = ql_group_count(p->n, QL_STRIP) * ql_group_count(p->k, QL_TILE_K(p->code));
    int64_t places = QL_GROUP_PLACES(p->n, p->groups);
    int result = 0;
    if (p->order) result = launch(&guard, place->stream, QL_KERNEL_ql_pack_order, p->k, p, message);
    if (p->order && result == 0)
        result = launch(&guard, place->stream, QL_KERNEL_ql_pack_places, 32 * p->groups, p, message);
    if (result == 0) result = launch(&guard, place->stream, QL_KERNEL_ql_pack_codes, 32 * warps, p, message);
    if (result == 0) result = launch(&guard, place->stream, QL_KERNEL_ql_pack_entries, places / 2, p, message);
    ql_cuda_leave(&guard);
    return result;
}

int ql_cuda_pack(const ql_cuda_place *place, uint8_t *data, const ql_packed_spec *spec, const ql_packed_layout *layout,
                 const ql_weight *weight, char message[QL_CUDA_MESSAGE]) {
    const ql_weight made = ql_packed_weight(spec, layout, data);
    const ql_packed *packed = &made.packed;
    ql_pack_params p = params_of(spec);
    add_source(&p, weight);
    p.codes = unconst(packed->codes);
    p.packed_scales = unconst(packed->scales);
    p.packed_zeros = unconst(packed->zeros);
    p.order = unconst(packed->order);
    p.inverse = unconst(packed->inverse);
    p.word_tail = unconst(packed->word_tail);
    p.zero_tail = unconst(packed->zero_tail);
    if (launch_pack(place, &p, message) < 0 || pack_tails(place, &p, message, spec) < 0) return -1;
    if (spec->source == QL_FORMAT_FOURBIT && pack_tables(place, packed, &weight->fourbit, message) < 0) return -1;
    return ql_cuda_synchronize(place, message);
}

int ql_cuda_unpack(const ql_cuda_place *place, const ql_unpacked *out, const ql_weight *weight,
                   char message[QL_CUDA_MESSAGE]) {
    const ql_packed *packed = &weight->packed;
    const ql_packed_spec *spec = &packed->spec;
    const ql_unpacked_sizes sizes = ql_packed_sizes(spec);
    const bool bytes = spec->source == QL_FORMAT_EETQ || spec->source == QL_FORMAT_FOURBIT;
    ql_pack_params p = params_of(spec);
    p.words = out->words;
    p.zeros = out->zeros;
    p.scales = out->scales;
    p.codes = unconst(packed->codes);
    p.packed_scales = unconst(packed->scales);
    p.packed_zeros = unconst(packed->zeros);
    p.inverse = unconst(packed->inverse);
    p.word_tail = unconst(packed->word_tail);
    p.zero_tail = unconst(packed->zero_tail);
    int64_t words = sizes.words[0] * sizes.words[1] / (bytes ? 4 : 1);
    int64_t entries = sizes.scales[0] * sizes.scales[1] + (out->zeros ? sizes.zeros[0] * sizes.zeros[1] : 0);
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    int result = launch(&guard, place->stream, QL_KERNEL_ql_unpack_words, words, &p, message);
    if (result == 0) result = launch(&guard, place->stream, QL_KERNEL_ql_unpack_entries, entries, &p, message);
    ql_cuda_leave(&guard);
    if (result < 0) return -1;
    if (out->table && copy_words(place, out->table, packed->table, 16, 1, message) < 0) return -1;
    if (!out->nested_table) return 0;
    if (copy_words(place, out->nested_table, packed->nested_table, QL_MAP_SIZE, 1, message) < 0) return -1;
    return copy_words(place, out->nested_absmax, packed->nested_absmax, sizes.nested_absmax, 1, message);
}

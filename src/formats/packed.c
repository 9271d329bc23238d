#include "packed.h"

#include "../../kernels/packed.h"
#include "awq.h"
#include "bits.h"
#include "dynamic_map.h"
#include "eetq.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------------------------
 * The description */

__attribute__((format(printf, 2, 3))) static int refuse(char reason[QL_PACKED_REASON], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, QL_PACKED_REASON, format, arguments);
    va_end(arguments);
    return -1;
}

/* Whether a source can have this code. */
static bool is_code_of(int code, ql_format source) {
    switch (source) {
    case QL_FORMAT_GPTQ:
        return code == QL_CODE_INT2 || code == QL_CODE_INT3 || code == QL_CODE_INT4 || code == QL_CODE_INT8;
    case QL_FORMAT_AWQ: return code == QL_CODE_INT4;
    case QL_FORMAT_EETQ: return code == QL_CODE_INT8;
    case QL_FORMAT_FOURBIT: return code == QL_CODE_TABLE4;
    default: return false;
    }
}

static bool is_power_of_two(int64_t size) { return size > 0 && (size & (size - 1)) == 0; }

/* What every description keeps, wherever it comes from. */
static int check(const ql_packed_spec *spec, char reason[QL_PACKED_REASON]) {
    const bool fourbit = spec->source == QL_FORMAT_FOURBIT, eetq = spec->source == QL_FORMAT_EETQ;
    if (!is_code_of(spec->code, spec->source)) return refuse(reason, "format and code do not go together");
    if (spec->n < 1 || spec->k < 1) return refuse(reason, "the weight is empty");
    if (spec->group_size < 1 || spec->groups != ql_group_count(spec->k, spec->group_size) ||
        (spec->groups == 1 && spec->group_size != spec->k))
        return refuse(reason, "the groups do not divide the columns as they say");
    if (spec->groups > 1 && spec->group_size % QL_STEP != 0)
        return refuse(reason, "its groups have %lld columns, and those of a packed weight a multiple of %d",
                      (long long)spec->group_size, QL_STEP);
    if (eetq && (spec->groups > 1 || spec->k % QL_EETQ_TILE || spec->n % 2))
        return refuse(reason, "EETQ has one group, in_features in multiples of 64 and out_features of 2");
    if (fourbit && (!is_power_of_two(spec->group_size) || spec->group_size < 32 || spec->k % spec->group_size))
        return refuse(reason, "its rows are no whole number of blocks");
    if (spec->scales_dtype != QL_F32 && (fourbit || (spec->scales_dtype != QL_F16 && spec->scales_dtype != QL_BF16)))
        return refuse(reason, "its scales are of a dtype that no format has");
    if (spec->has_zeros && (fourbit || eetq)) return refuse(reason, "its format has no zeros");
    if (spec->source == QL_FORMAT_AWQ && !spec->has_zeros) return refuse(reason, "AWQ has zeros");
    if (spec->zero_offset != 0 && (spec->zero_offset != 1 || spec->source != QL_FORMAT_GPTQ))
        return refuse(reason, "its zeros are stored as in no format");
    if (spec->has_order && (spec->source != QL_FORMAT_GPTQ || spec->groups == 1))
        return refuse(reason, "only GPTQ with several groups has an order of columns");
    if (spec->nested_blocksize && (!fourbit || !is_power_of_two(spec->nested_blocksize)))
        return refuse(reason, "only FOURBIT has a nested absmax, in blocks of a power of two");
    return 0;
}

/* Sorted by their groups, the columns must fall into the groups that columns without g_idx have. */
static int check_order(const int32_t *g_idx, int64_t k, int64_t groups, int64_t group_size,
                       char reason[QL_PACKED_REASON]) {
    if (groups != ql_group_count(k, group_size)) return refuse(reason, "it has a part of the columns of its groups");
    int64_t *count = calloc((size_t)groups, sizeof *count);
    if (!count) return refuse(reason, "there is no memory to count the columns of its groups");
    bool even = true;
    for (int64_t col = 0; col < k; col++) {
        even = even && g_idx[col] >= 0 && g_idx[col] < groups;
        if (even) count[g_idx[col]]++;
    }
    for (int64_t group = 0; group < groups; group++)
        even = even && count[group] == (group < groups - 1 ? group_size : k - group * group_size);
    free(count);
    return even ? 0 : refuse(reason, "act-order gives its groups different numbers of columns");
}

static int describe_gptq(ql_packed_spec *spec, const ql_weight *weight, const int32_t *g_idx,
                         char reason[QL_PACKED_REASON]) {
    const ql_gptq *gptq = &weight->gptq;
    spec->code = gptq->bits == 2   ? QL_CODE_INT2
                 : gptq->bits == 3 ? QL_CODE_INT3
                 : gptq->bits == 4 ? QL_CODE_INT4
                                   : QL_CODE_INT8;
    spec->group_size = gptq->group_size;
    spec->groups = gptq->groups;
    spec->scales_dtype = gptq->scales_dtype;
    spec->has_zeros = true;
    spec->zero_offset = gptq->zero_offset;
    spec->has_order = g_idx != NULL && gptq->groups > 1;
    return spec->has_order ? check_order(g_idx, weight->k, gptq->groups, gptq->group_size, reason) : 0;
}

int ql_packed_describe(ql_packed_spec *spec, const ql_weight *weight, const int32_t *g_idx,
                       char reason[QL_PACKED_REASON]) {
    *spec = (ql_packed_spec){.source = weight->format, .n = weight->n, .k = weight->k};
    switch (weight->format) {
    case QL_FORMAT_GPTQ:
        if (describe_gptq(spec, weight, g_idx, reason) < 0) return -1;
        break;
    case QL_FORMAT_AWQ:
        if (weight->awq.zero_products) return refuse(reason, "its zeros are products with the scales");
        spec->code = QL_CODE_INT4;
        spec->group_size = weight->awq.group_size;
        spec->groups = weight->awq.groups;
        spec->scales_dtype = weight->awq.scales_dtype;
        spec->has_zeros = true;
        break;
    case QL_FORMAT_EETQ:
        spec->code = QL_CODE_INT8;
        spec->group_size = weight->k;
        spec->groups = 1;
        spec->scales_dtype = weight->eetq.scales_dtype;
        break;
    case QL_FORMAT_FOURBIT:
        spec->code = QL_CODE_TABLE4;
        spec->group_size = weight->fourbit.blocksize;
        spec->groups = ql_group_count(weight->k, spec->group_size);
        spec->scales_dtype = QL_F32;
        if (weight->k % spec->group_size) return refuse(reason, "its rows are no whole number of blocks");
        if (weight->fourbit.nested) {
            spec->nested_blocksize = weight->fourbit.nested_blocksize;
            spec->nested_offset = weight->fourbit.offset;
        }
        break;
    case QL_FORMAT_INT8:
    case QL_FORMAT_FP8: return refuse(reason, "its format is not one that only quantizes the weight");
    case QL_FORMAT_PACKED: return refuse(reason, "it is packed already");
    }
    return check(spec, reason);
}

void ql_packed_to_numbers(int64_t numbers[QL_PACKED_NUMBERS], const ql_packed_spec *spec) {
    const int64_t made[QL_PACKED_NUMBERS] = {
        QL_PACKED_VERSION,
        (int64_t)spec->source,
        spec->code,
        spec->n,
        spec->k,
        spec->group_size,
        spec->groups,
        (int64_t)spec->scales_dtype,
        spec->has_zeros,
        spec->zero_offset,
        spec->has_order,
        spec->nested_blocksize,
        (int64_t)ql_bits_from_f32(spec->nested_offset),
    };
    memcpy(numbers, made, sizeof made);
}

int ql_packed_from_numbers(ql_packed_spec *spec, const int64_t numbers[QL_PACKED_NUMBERS],
                           char reason[QL_PACKED_REASON]) {
    static const int64_t most[QL_PACKED_NUMBERS] = {QL_PACKED_VERSION,
                                                    QL_FORMAT_FP8,
                                                    QL_CODE_COUNT - 1,
                                                    INT64_MAX,
                                                    INT64_MAX,
                                                    INT64_MAX,
                                                    INT64_MAX,
                                                    QL_BF16,
                                                    1,
                                                    1,
                                                    1,
                                                    INT64_MAX,
                                                    UINT32_MAX};
    if (numbers[0] != QL_PACKED_VERSION)
        return refuse(reason, "version %lld of the packed layout, and this is %d", (long long)numbers[0],
                      QL_PACKED_VERSION);
    for (int i = 1; i < QL_PACKED_NUMBERS; i++)
        if (numbers[i] < 0 || numbers[i] > most[i])
            return refuse(reason, "number %d of the description is out of range: %lld", i, (long long)numbers[i]);
    *spec = (ql_packed_spec){
        .source = (ql_format)numbers[1],
        .code = (int)numbers[2],
        .n = numbers[3],
        .k = numbers[4],
        .group_size = numbers[5],
        .groups = numbers[6],
        .scales_dtype = (ql_dtype)numbers[7],
        .has_zeros = numbers[8] != 0,
        .zero_offset = (int)numbers[9],
        .has_order = numbers[10] != 0,
        .nested_blocksize = numbers[11],
        .nested_offset = ql_f32_from_bits((uint32_t)numbers[12]),
    };
    return check(spec, reason);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The layout */

int ql_packed_bits(const ql_packed_spec *spec) { return QL_CODE_BITS(spec->code); }

static bool has_nibbles(const ql_packed_spec *spec) { return spec->code != QL_CODE_INT8; }

/* Words of the checkpoint, and whether codes or zeros end inside one. */
static bool has_word_tail(const ql_packed_spec *spec) {
    if (spec->source == QL_FORMAT_AWQ) return spec->n % QL_AWQ_NIBBLES != 0;
    return spec->source == QL_FORMAT_GPTQ && spec->k % QL_CHUNK * QL_CODE_BITS(spec->code) % 32 != 0;
}

static bool has_zero_tail(const ql_packed_spec *spec) {
    return spec->has_zeros && spec->n % QL_CHUNK * QL_CODE_BITS(spec->code) % 32 != 0;
}

ql_unpacked_sizes ql_packed_sizes(const ql_packed_spec *spec) {
    const int64_t n = spec->n, k = spec->k, groups = spec->groups;
    const int bits = QL_CODE_BITS(spec->code);
    ql_unpacked_sizes sizes = {.scales = {groups, n}};
    if (spec->source == QL_FORMAT_GPTQ) {
        sizes.words[0] = ql_code_words(k, bits), sizes.words[1] = n;
        sizes.zeros[0] = groups, sizes.zeros[1] = ql_code_words(n, bits);
    } else if (spec->source == QL_FORMAT_AWQ) {
        sizes.words[0] = k, sizes.words[1] = ql_awq_words(n);
        sizes.zeros[0] = groups, sizes.zeros[1] = ql_awq_words(n);
    } else if (spec->source == QL_FORMAT_EETQ) {
        sizes.words[0] = k, sizes.words[1] = n;
    } else {
        sizes.words[0] = n * k / 2, sizes.words[1] = 1;
        if (spec->nested_blocksize) sizes.nested_absmax = ql_group_count(n * groups, spec->nested_blocksize);
    }
    return sizes;
}

/* Whether all sizes in bytes fit int64: the weight in fp32, tiles included, is larger than any of them. */
static bool sizes_fit(const ql_packed_spec *spec) {
    int64_t rows, cols, count;
    return !__builtin_add_overflow(spec->n, (int64_t)QL_STRIP, &rows) &&
           !__builtin_add_overflow(spec->k, (int64_t)QL_TILE_K(QL_CODE_INT2), &cols) &&
           !__builtin_mul_overflow(rows, cols, &count) && !__builtin_mul_overflow(count, (int64_t)64, &count);
}

int ql_packed_lay_out(ql_packed_layout *layout, const ql_packed_spec *spec, char reason[QL_PACKED_REASON]) {
    if (check(spec, reason) < 0) return -1;
    if (!sizes_fit(spec)) return refuse(reason, "its sizes are out of range");
    const int64_t n = spec->n, k = spec->k, places = QL_GROUP_PLACES(n, spec->groups);
    const int64_t tiles = ql_group_count(n, QL_STRIP) * ql_group_count(k, QL_TILE_K(spec->code));
    const bool fourbit = spec->source == QL_FORMAT_FOURBIT, nested = spec->nested_blocksize != 0;
    int64_t *size = layout->size;
    size[QL_SECTION_CODES] = tiles * QL_TILE_BYTES(spec->code);
    size[QL_SECTION_SCALES] = places * (nested ? 1 : (int64_t)ql_dtype_size(spec->scales_dtype));
    size[QL_SECTION_ZEROS] = !spec->has_zeros ? 0 : has_nibbles(spec) ? places / 2 : places;
    size[QL_SECTION_TABLE] = fourbit ? 16 * (int64_t)sizeof(float) : 0;
    size[QL_SECTION_NESTED_TABLE] = nested ? QL_MAP_SIZE * (int64_t)sizeof(float) : 0;
    size[QL_SECTION_NESTED_ABSMAX] = ql_packed_sizes(spec).nested_absmax * (int64_t)sizeof(float);
    size[QL_SECTION_ORDER] = size[QL_SECTION_INVERSE] = spec->has_order ? k * (int64_t)sizeof(int32_t) : 0;
    size[QL_SECTION_WORD_TAIL] =
        has_word_tail(spec) ? (spec->source == QL_FORMAT_AWQ ? k : n) * (int64_t)sizeof(int32_t) : 0;
    size[QL_SECTION_ZERO_TAIL] = has_zero_tail(spec) ? spec->groups * (int64_t)sizeof(int32_t) : 0;
    layout->bytes = 0;
    for (int i = 0; i < QL_SECTION_COUNT; i++) {
        layout->offset[i] = layout->bytes;
        layout->bytes += ql_group_count(size[i], QL_SECTION_ALIGNMENT) * QL_SECTION_ALIGNMENT;
    }
    return 0;
}

static const void *section(const ql_packed_layout *layout, const uint8_t *data, ql_section which) {
    return layout->size[which] ? data + layout->offset[which] : NULL;
}

ql_weight ql_packed_weight(const ql_packed_spec *spec, const ql_packed_layout *layout, const uint8_t *data) {
    return (ql_weight){
        .format = QL_FORMAT_PACKED,
        .n = spec->n,
        .k = spec->k,
        .packed =
            {
                .spec = *spec,
                .codes = section(layout, data, QL_SECTION_CODES),
                .scales = section(layout, data, QL_SECTION_SCALES),
                .zeros = section(layout, data, QL_SECTION_ZEROS),
                .table = section(layout, data, QL_SECTION_TABLE),
                .nested_table = section(layout, data, QL_SECTION_NESTED_TABLE),
                .nested_absmax = section(layout, data, QL_SECTION_NESTED_ABSMAX),
                .order = section(layout, data, QL_SECTION_ORDER),
                .inverse = section(layout, data, QL_SECTION_INVERSE),
                .word_tail = section(layout, data, QL_SECTION_WORD_TAIL),
                .zero_tail = section(layout, data, QL_SECTION_ZERO_TAIL),
            },
    };
}

/* ------------------------------------------------------------------------------------------------------------------
 * One element */

/* The lane's 16 bytes that hold code (row, col), as words. */
static int64_t tile_at(const ql_packed_spec *spec, int64_t row, int64_t col) {
    int64_t tiles = ql_group_count(spec->k, QL_TILE_K(spec->code));
    return (row / QL_STRIP * tiles + col / QL_TILE_K(spec->code)) * QL_TILE_BYTES(spec->code);
}

static uint32_t *low_word(uint8_t *codes, const ql_packed_spec *spec, int64_t row, int64_t col) {
    uint8_t *lane = codes + tile_at(spec, row, col) + 16 * QL_PACKED_LANE(row, col);
    return (uint32_t *)(void *)lane + QL_PACKED_WORD(spec->code, col);
}

static uint32_t *high_word(uint8_t *codes, const ql_packed_spec *spec, int64_t row, int64_t col) {
    uint8_t *lane = codes + tile_at(spec, row, col) + 512 + 8 * QL_PACKED_LANE(row, col);
    return (uint32_t *)(void *)lane + QL_PACKED_HIGH_WORD(col);
}

static void put_code(uint8_t *codes, const ql_packed_spec *spec, int64_t row, int64_t col, uint32_t code) {
    uint32_t low = spec->code == QL_CODE_INT3 ? code & 3u : code;
    *low_word(codes, spec, row, col) |= low << QL_PACKED_BIT(spec->code, row, col);
    if (spec->code == QL_CODE_INT3) *high_word(codes, spec, row, col) |= code >> 2 << QL_PACKED_HIGH_BIT(row, col);
}

static uint32_t get_code(const ql_packed *packed, int64_t row, int64_t col) {
    const ql_packed_spec *spec = &packed->spec;
    uint8_t *codes = (uint8_t *)(uintptr_t)packed->codes;
    uint32_t low = *low_word(codes, spec, row, col) >> QL_PACKED_BIT(spec->code, row, col);
    if (spec->code != QL_CODE_INT3) return low & ql_code_mask(QL_CODE_BITS(spec->code));
    return (low & 3u) | (*high_word(codes, spec, row, col) >> QL_PACKED_HIGH_BIT(row, col) & 1u) << 2;
}

static uint32_t get_zero(const ql_packed *packed, int64_t place) {
    const ql_packed_spec *spec = &packed->spec;
    if (!packed->zeros) return 1u << (QL_CODE_BITS(spec->code) - 1);
    if (!has_nibbles(spec)) return packed->zeros[place];
    return (uint32_t)packed->zeros[place / 2] >> place % 2 * 4 & 15u;
}

/* Where the packed weight keeps column `col` of the checkpoint. An order is not trusted with the bounds. */
static int64_t packed_column(const ql_packed *packed, int64_t col) {
    if (!packed->inverse) return col;
    int64_t at = packed->inverse[col];
    return at < 0 ? 0 : at >= packed->spec.k ? packed->spec.k - 1 : at;
}

float ql_packed_at(const ql_weight *weight, int64_t row, int64_t col) {
    const ql_packed *packed = &weight->packed;
    const ql_packed_spec *spec = &packed->spec;
    int64_t at = packed_column(packed, col), group = at / spec->group_size;
    int64_t place = QL_GROUP_PLACE(row, group, spec->groups);
    uint32_t code = get_code(packed, row, at);
    if (spec->code != QL_CODE_TABLE4)
        return ((float)code - (float)get_zero(packed, place)) * ql_f32_load(packed->scales, spec->scales_dtype, place);
    float absmax = packed->nested_table
                       ? packed->nested_table[((const uint8_t *)packed->scales)[place]] *
                                 packed->nested_absmax[(row * spec->groups + group) / spec->nested_blocksize] +
                             spec->nested_offset
                       : ((const float *)packed->scales)[place];
    return packed->table[code] * absmax;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Packing */

static uint32_t source_code(const ql_weight *weight, int64_t row, int64_t col) {
    switch (weight->format) {
    case QL_FORMAT_GPTQ: return ql_code_get(weight->gptq.qweight + row, weight->n, weight->gptq.bits, col);
    case QL_FORMAT_AWQ:
        return (uint32_t)weight->awq.qweight[col * ql_awq_words(weight->n) + row / QL_AWQ_NIBBLES] >>
                   4 * ql_awq_nibble(row) &
               15u;
    case QL_FORMAT_EETQ: return weight->eetq.weight[ql_eetq_offset(col, row, weight->k)];
    default: {
        uint8_t byte = weight->fourbit.packed[(row * weight->k + col) / 2];
        return col % 2 ? byte & 15u : byte >> 4;
    }
    }
}

static uint32_t source_zero(const ql_weight *weight, int64_t row, int64_t group) {
    if (weight->format == QL_FORMAT_AWQ)
        return (uint32_t)weight->awq.qzeros[group * ql_awq_words(weight->n) + row / QL_AWQ_NIBBLES] >>
                   4 * ql_awq_nibble(row) &
               15u;
    const ql_gptq *gptq = &weight->gptq;
    const int32_t *words = gptq->qzeros + group * ql_code_words(weight->n, gptq->bits);
    return (ql_code_get(words, 1, gptq->bits, row) + (uint32_t)gptq->zero_offset) & ql_code_mask(gptq->bits);
}

/* The scales as the checkpoint has them, and where element (row, group) is. */
static const void *source_scales(const ql_weight *weight) {
    switch (weight->format) {
    case QL_FORMAT_GPTQ: return weight->gptq.scales;
    case QL_FORMAT_AWQ: return weight->awq.scales;
    case QL_FORMAT_EETQ: return weight->eetq.scales;
    default: return weight->fourbit.nested ? (const void *)weight->fourbit.nested : weight->fourbit.absmax;
    }
}

static int64_t scale_index(const ql_packed_spec *spec, int64_t row, int64_t group) {
    return spec->source == QL_FORMAT_FOURBIT ? row * spec->groups + group : group * spec->n + row;
}

static size_t scale_size(const ql_packed_spec *spec) {
    return spec->nested_blocksize ? 1 : ql_dtype_size(spec->scales_dtype);
}

/* The columns of a group, which has places `first` to `end` - 1, by QL_ORDER_CLASS: first those that have places of their class,
 * then the others. */
static void place_columns(int32_t *order, int32_t *inverse, const int32_t *g_idx, int64_t k, int32_t group,
                          int64_t first, int64_t end) {
    for (int64_t at = first; at < end; at++) order[at] = -1;
    int64_t bare = first;
    for (int others = 0; others < 2; others++) {
        int64_t next[QL_ORDER_CLASSES];
        for (int i = 0; i < QL_ORDER_CLASSES; i++) next[i] = first + i;
        for (int64_t col = 0; col < k; col++) {
            if (g_idx[col] != group) continue;
            int64_t at = next[QL_ORDER_CLASS(col)];
            next[QL_ORDER_CLASS(col)] += QL_ORDER_CLASSES;
            if ((at >= end) != (others == 1)) continue;
            if (others == 1) {
                while (order[bare] >= 0) bare++;
                at = bare;
            }
            order[at] = (int32_t)col;
            inverse[col] = (int32_t)at;
        }
    }
}

static void sort_columns(int32_t *order, int32_t *inverse, const int32_t *g_idx, const ql_packed_spec *spec) {
    for (int64_t group = 0; group < spec->groups; group++) {
        const int64_t first = group * spec->group_size, end = first + spec->group_size;
        place_columns(order, inverse, g_idx, spec->k, (int32_t)group, first, end < spec->k ? end : spec->k);
    }
}

static void pack_tails(uint8_t *data, const ql_packed_spec *spec, const ql_packed_layout *layout,
                       const ql_weight *weight) {
    const ql_unpacked_sizes sizes = ql_packed_sizes(spec);
    const bool awq = spec->source == QL_FORMAT_AWQ;
    const int32_t *words = awq ? weight->awq.qweight : weight->gptq.qweight;
    const int32_t *zeros = awq ? weight->awq.qzeros : weight->gptq.qzeros;
    int32_t *word_tail = (int32_t *)(void *)(data + layout->offset[QL_SECTION_WORD_TAIL]);
    int32_t *zero_tail = (int32_t *)(void *)(data + layout->offset[QL_SECTION_ZERO_TAIL]);
    if (has_word_tail(spec) && awq)
        for (int64_t col = 0; col < spec->k; col++) word_tail[col] = words[(col + 1) * sizes.words[1] - 1];
    else if (has_word_tail(spec))
        memcpy(word_tail, words + (sizes.words[0] - 1) * spec->n, (size_t)layout->size[QL_SECTION_WORD_TAIL]);
    if (has_zero_tail(spec))
        for (int64_t group = 0; group < spec->groups; group++)
            zero_tail[group] = zeros[(group + 1) * sizes.zeros[1] - 1];
}

void ql_packed_pack(uint8_t *data, const ql_packed_spec *spec, const ql_packed_layout *layout,
                    const ql_weight *weight) {
    memset(data, 0, (size_t)layout->bytes);
    const int32_t *order = NULL;
    if (spec->has_order) {
        int32_t *made = (int32_t *)(void *)(data + layout->offset[QL_SECTION_ORDER]);
        sort_columns(made, (int32_t *)(void *)(data + layout->offset[QL_SECTION_INVERSE]), weight->gptq.g_idx, spec);
        order = made;
    }
    uint8_t *zeros = data + layout->offset[QL_SECTION_ZEROS], *scales = data + layout->offset[QL_SECTION_SCALES];
    const char *from = source_scales(weight);
    const size_t size = scale_size(spec);
    for (int64_t row = 0; row < spec->n; row++) {
        for (int64_t col = 0; col < spec->k; col++)
            put_code(data + layout->offset[QL_SECTION_CODES], spec, row, col,
                     source_code(weight, row, order ? order[col] : col));
        for (int64_t group = 0; group < spec->groups; group++) {
            int64_t place = QL_GROUP_PLACE(row, group, spec->groups);
            memcpy(scales + (size_t)place * size, from + (size_t)scale_index(spec, row, group) * size, size);
            if (!spec->has_zeros) continue;
            uint32_t zero = source_zero(weight, row, group);
            if (has_nibbles(spec))
                zeros[place / 2] = (uint8_t)(zeros[place / 2] | zero << place % 2 * 4);
            else
                zeros[place] = (uint8_t)zero;
        }
    }
    pack_tails(data, spec, layout, weight);
    if (spec->source != QL_FORMAT_FOURBIT) return;
    const ql_fourbit *fourbit = &weight->fourbit;
    memcpy(data + layout->offset[QL_SECTION_TABLE], fourbit->code, (size_t)layout->size[QL_SECTION_TABLE]);
    if (!fourbit->nested) return;
    memcpy(data + layout->offset[QL_SECTION_NESTED_TABLE], fourbit->nested_code,
           (size_t)layout->size[QL_SECTION_NESTED_TABLE]);
    memcpy(data + layout->offset[QL_SECTION_NESTED_ABSMAX], fourbit->absmax,
           (size_t)layout->size[QL_SECTION_NESTED_ABSMAX]);
}

static void put_source_code(const ql_unpacked *out, const ql_packed_spec *spec, int64_t row, int64_t col,
                            uint32_t code) {
    int32_t *words = out->words;
    uint8_t *bytes = out->words;
    switch (spec->source) {
    case QL_FORMAT_GPTQ: ql_code_put(words + row, spec->n, QL_CODE_BITS(spec->code), col, code); break;
    case QL_FORMAT_AWQ: {
        int32_t *word = &words[col * ql_awq_words(spec->n) + row / QL_AWQ_NIBBLES];
        *word = (int32_t)((uint32_t)*word | code << 4 * ql_awq_nibble(row));
        break;
    }
    case QL_FORMAT_EETQ: bytes[ql_eetq_offset(col, row, spec->k)] = (uint8_t)code; break;
    default: {
        uint8_t *byte = &bytes[(row * spec->k + col) / 2];
        *byte = (uint8_t)(*byte | code << (col % 2 ? 0 : 4));
    }
    }
}

static void put_source_zero(const ql_unpacked *out, const ql_packed_spec *spec, int64_t row, int64_t group,
                            uint32_t zero) {
    const int bits = QL_CODE_BITS(spec->code);
    uint32_t stored = (zero - (uint32_t)spec->zero_offset) & ql_code_mask(bits);
    if (spec->source == QL_FORMAT_GPTQ) {
        ql_code_put(out->zeros + group * ql_code_words(spec->n, bits), 1, bits, row, stored);
        return;
    }
    int32_t *word = &out->zeros[group * ql_awq_words(spec->n) + row / QL_AWQ_NIBBLES];
    *word = (int32_t)((uint32_t)*word | stored << 4 * ql_awq_nibble(row));
}

static void unpack_tails(const ql_unpacked *out, const ql_packed *packed, const ql_unpacked_sizes *sizes) {
    const ql_packed_spec *spec = &packed->spec;
    int32_t *words = out->words;
    if (packed->word_tail && spec->source == QL_FORMAT_AWQ)
        for (int64_t col = 0; col < spec->k; col++) words[(col + 1) * sizes->words[1] - 1] = packed->word_tail[col];
    else if (packed->word_tail)
        memcpy(words + (sizes->words[0] - 1) * spec->n, packed->word_tail, (size_t)spec->n * sizeof *words);
    if (packed->zero_tail)
        for (int64_t group = 0; group < spec->groups; group++)
            out->zeros[(group + 1) * sizes->zeros[1] - 1] = packed->zero_tail[group];
}

void ql_packed_unpack(const ql_unpacked *out, const ql_weight *weight) {
    const ql_packed *packed = &weight->packed;
    const ql_packed_spec *spec = &packed->spec;
    const ql_unpacked_sizes sizes = ql_packed_sizes(spec);
    const bool bytes = spec->source == QL_FORMAT_EETQ || spec->source == QL_FORMAT_FOURBIT;
    const size_t size = scale_size(spec);
    memset(out->words, 0, (size_t)(sizes.words[0] * sizes.words[1]) * (bytes ? 1 : sizeof(int32_t)));
    if (out->zeros) memset(out->zeros, 0, (size_t)(sizes.zeros[0] * sizes.zeros[1]) * sizeof(int32_t));
    for (int64_t row = 0; row < spec->n; row++) {
        for (int64_t col = 0; col < spec->k; col++)
            put_source_code(out, spec, row, col, get_code(packed, row, packed_column(packed, col)));
        for (int64_t group = 0; group < spec->groups; group++) {
            int64_t place = QL_GROUP_PLACE(row, group, spec->groups);
            memcpy((char *)out->scales + (size_t)scale_index(spec, row, group) * size,
                   (const char *)packed->scales + (size_t)place * size, size);
            if (out->zeros) put_source_zero(out, spec, row, group, get_zero(packed, place));
        }
    }
    unpack_tails(out, packed, &sizes);
    if (out->table) memcpy(out->table, packed->table, 16 * sizeof(float));
    if (out->nested_table) memcpy(out->nested_table, packed->nested_table, QL_MAP_SIZE * sizeof(float));
    if (out->nested_absmax)
        memcpy(out->nested_absmax, packed->nested_absmax, (size_t)sizes.nested_absmax * sizeof(float));
}

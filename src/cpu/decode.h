/* From a checkpoint's bytes to vectors of floats. Part of the kernels (see vector.h).
 *
 * Two orientations, after how the formats lie in memory: in EETQ, INT8, FOURBIT and FP8 a vector holds columns of one row
 * ("k lanes"); in GPTQ and AWQ it holds rows at one column ("n lanes"). The cheap way to unpack words leaves lanes in an
 * order of the format's own; k_order and n_order tell it, and the caller reorders the activations or the sums. */
#ifndef QL_CPU_DECODE_H
#define QL_CPU_DECODE_H

#include "kernels.h"
#include "vector.h"

INLINE bool has_n_lanes(const ql_weight *weight) {
    return weight->format == QL_FORMAT_GPTQ || weight->format == QL_FORMAT_AWQ;
}

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- k lanes ---- */

/* A row's BLOCK columns are 8 vectors: of one load of LANES words for 4-bit codes (vector j is nibble j of each word), of
 * two loads for bytes (vector 4 * load + j is byte j of each word). */
INLINE int words_loads(ql_format format) { return format == QL_FORMAT_FOURBIT ? 1 : 2; }

/* order[position] = column within the block. */
static void k_order(int16_t order[BLOCK], ql_format format) {
    for (int position = 0; position < BLOCK; position++) {
        int vector = position / LANES, lane = position % LANES;
        int base = vector / 4 * 4 * LANES, part = vector % 4, byte = 4 * lane + part;
        switch (format) {
        case QL_FORMAT_FOURBIT: order[position] = (int16_t)(8 * lane + (vector ^ 1)); break;
        case QL_FORMAT_EETQ:
            order[position] = (int16_t)(base + (byte & ~15) + ((byte & 15) >> 1) + ((byte & 1) << 3));
            break;
#ifdef QL_AVX512
        case QL_FORMAT_FP8: /* as unpacking the bytes of 16-byte lanes leaves them */
            order[position] = (int16_t)(base + lane / 4 * 16 + lane % 4 * 2 + (part & 1) + (part >> 1) * 8);
            break;
#endif
        default: order[position] = (int16_t)(base + byte); break;
        }
    }
}

typedef struct k_decoder {
    vtable code; /* of FOURBIT */
#ifdef QL_AVX512
    __m512i high[2], low[2]; /* of FP8: the upper 16 bits of the fp32 value of each magnitude */
#endif
} k_decoder;

static void k_decoder_init(k_decoder *decoder, const ql_weight *weight) {
    memset(decoder, 0, sizeof *decoder);
    if (weight->format == QL_FORMAT_FOURBIT) decoder->code = vtable_load(weight->fourbit.code);
#ifdef QL_AVX512
    uint8_t high[128], low[128];
    for (int magnitude = 0; magnitude < 128; magnitude++) {
        uint32_t bits = ql_bits_from_f32(ql_f32_from_e4m3((uint8_t)magnitude));
        high[magnitude] = (uint8_t)(bits >> 24);
        low[magnitude] = (uint8_t)(bits >> 16);
    }
    memcpy(decoder->high, high, sizeof high);
    memcpy(decoder->low, low, sizeof low);
#endif
}

/* Words as loaded, made ready for k_value. */
typedef struct k_words {
    vi part[2];
} k_words;

INLINE k_words k_open(const k_decoder *decoder, vi words, const ql_format format) {
    k_words open = {{words, words}};
    (void)decoder;
    if (format == QL_FORMAT_INT8) open.part[0] = words ^ (int32_t)0x80808080;
#ifdef QL_AVX512
    if (format == QL_FORMAT_FP8) {
        __m512i high = _mm512_permutex2var_epi8(decoder->high[0], (__m512i)words, decoder->high[1]);
        __m512i low = _mm512_permutex2var_epi8(decoder->low[0], (__m512i)words, decoder->low[1]);
        /* high | (words & 0x80) in each byte */
        high = _mm512_ternarylogic_epi32(high, (__m512i)words, _mm512_set1_epi8((char)0x80), 0xf8);
        open.part[0] = (vi)_mm512_unpacklo_epi8(low, high);
        open.part[1] = (vi)_mm512_unpackhi_epi8(low, high);
    }
#endif
    return open;
}

#ifndef QL_AVX512
/* e4m3 in the low byte of each word. */
INLINE vf e4m3_value(vi words) {
    vi magnitude = words & 0x7f;
    vi subnormal = (magnitude < 8);
    /* A subnormal m / 8 * 2^-6 is (1 + m / 8) * 2^-6 less 2^-6. */
    vi bits = (magnitude << 20) + (120 << 23) + (subnormal & (1 << 23));
    vf value = (vf)bits - (vf)(subnormal & (121 << 23));
    vi nan = (magnitude == 0x7f) & 0x7fc00000;
    return (vf)((vi)value | nan | ((words & 0x80) << 24));
}
#endif

/* Vector j of the words: 8 of FOURBIT, 4 of the others. */
INLINE vf k_value(const k_decoder *decoder, const k_words *words, int j, const ql_format format) {
    if (format == QL_FORMAT_FOURBIT) return vtable_at(&decoder->code, vi_shift(words->part[0], 4 * j));
    if (format == QL_FORMAT_FP8) {
#ifdef QL_AVX512
        vi pair = words->part[j >> 1];
        return (vf)(j & 1 ? pair & (int32_t)0xffff0000 : pair << 16);
#else
        return e4m3_value(vi_shift(words->part[0], 8 * j));
#endif
    }
    return vf_biased_byte(words->part[0], j) - (BYTE_BIAS + 128.0f);
}

/* The bytes of row `row` from column `col` (a multiple of 4 * LANES) on, for formats whose rows are contiguous bytes. */
INLINE const uint8_t *k_row(const ql_weight *weight, int64_t row, int64_t col, const ql_format format) {
    switch (format) {
    case QL_FORMAT_FOURBIT: return weight->fourbit.packed + (row * weight->k + col) / 2;
    case QL_FORMAT_EETQ:
        return weight->eetq.weight + (row >> 1) * 2 * weight->k + (row & 1) * 64 + (col >> 6) * 128 + (col & 63);
    case QL_FORMAT_INT8: return (const uint8_t *)weight->int8.codes + row * weight->k + col;
    default: return weight->fp8.weight + row * weight->fp8.row_stride + col;
    }
}

/* Up to LANES words of which `bytes` bytes are there, the rest 0. */
INLINE vi k_load(const uint8_t *from, int64_t bytes) {
    if (bytes >= 4 * LANES) return vi_load(from);
    vi words = {0};
    if (bytes > 0) memcpy(&words, from, (size_t)bytes);
    return words;
}

/* Rows read side by side are 2 to 4 KB apart: left to itself the processor fetches ahead in each, out of the order of
 * memory. With the load at `byte` of row `row` of `rows`, this fetches the rows after them, `next`, in that order.
 * `near`: into the first cache, where it has room for them beside the activations. */
INLINE void prefetch_rows(const void *next, int64_t byte, int row, const int rows, const bool near) {
    const void *line = (const void *)((uintptr_t)next + (uintptr_t)(byte * rows + 4 * LANES * row));
    if (near)
        __builtin_prefetch(line);
    else
        __builtin_prefetch(line, 0, 2);
}

/* absmax of `count` blocks from `first` on, of a nested one a second-level block at a time. */
static void fourbit_absmax(float *out, const ql_fourbit *fourbit, int64_t first, int64_t count) {
    if (!fourbit->nested) {
        memcpy(out, fourbit->absmax + first, (size_t)count * sizeof *out);
        return;
    }
    int64_t outer = first / fourbit->nested_blocksize;
    while (count > 0) {
        int64_t here = min_of(count, (outer + 1) * fourbit->nested_blocksize - first);
        const uint8_t *nested = fourbit->nested + first;
        const float absmax = fourbit->absmax[outer], *code = fourbit->nested_code, offset = fourbit->offset;
        for (int64_t i = 0; i < here; i++) out[i] = code[nested[i]] * absmax + offset;
        out += here, first += here, count -= here, outer++;
    }
}

/* The scale of each word of a load: absmax of the blocks from the one where the load begins, `inside` elements after its
 * start; `left` blocks may be read. */
INLINE vf fourbit_scale(const float *absmax, int64_t left, int64_t inside, int log2_blocksize) {
    vi block = vi_shift(vi_set((int32_t)inside) + 8 * vi_lane(), log2_blocksize);
    return (vf)vi_permute(vi_load_some(absmax, left), block);
}

/* As fourbit_scale where the load begins a block and has `count` of them, all there. */
INLINE vf fourbit_even_scale(const float *absmax, int64_t count, int log2_blocksize) {
#if defined(QL_AVX512)
    return fourbit_scale(absmax, count, 0, log2_blocksize);
#else
    if (count == 1) return vf_set(*absmax);
    vi second = vi_shift(8 * vi_lane(), log2_blocksize) != 0; /* fewer than 16 lanes meet two blocks at most */
    return (vf)(((vi)vf_set(absmax[0]) & ~second) | ((vi)vf_set(absmax[1]) & second));
#endif
}

/* Whether a block can start inside a word, so that no vector decode applies. */
INLINE bool fourbit_is_ragged(const ql_weight *weight) { return weight->k % 8 != 0; }

/* One row of a ragged FOURBIT weight, or of one that is packed for a GPU, in k_order. */
static void plain_row(float *out, const ql_weight *weight, int64_t row, int64_t col, int64_t cols,
                      const int16_t *order) {
    float natural[BLOCK] = {0};
    for (int64_t i = 0; i < cols; i++) natural[i] = ql_weight_at(weight, row, col + i);
    for (int i = 0; i < BLOCK; i++) out[i] = natural[order[i]];
}

INLINE void k_block_row(float *out, const ql_weight *weight, const k_decoder *decoder, int64_t row, int64_t col,
                        int64_t cols, const ql_format format, vf scale, vf second) {
    const uint8_t *from = k_row(weight, row, col, format);
    uint8_t gathered[BLOCK];
    if (format == QL_FORMAT_FP8 && weight->fp8.col_stride != 1) {
        from = weight->fp8.weight + row * weight->fp8.row_stride + col * weight->fp8.col_stride;
        for (int64_t i = 0; i < cols; i++) gathered[i] = from[i * weight->fp8.col_stride];
        from = gathered;
    }
    const int loads = words_loads(format), vectors = 8 / loads;
    UNROLL
    for (int load = 0; load < loads; load++) {
        /* EETQ's columns come 64 at a time. */
        if (format == QL_FORMAT_EETQ && load) from = k_row(weight, row, col + 4 * LANES, format);
        int64_t bytes = format == QL_FORMAT_FOURBIT ? cols / 2 : cols - load * 4 * LANES;
        from += format == QL_FORMAT_EETQ ? 0 : load * 4 * LANES;
        vi words = k_load(from, bytes);
        /* Rows lie too far apart for the processor to foresee the next block's lines. */
        __builtin_prefetch(
            (const void *)((uintptr_t)from + (format == QL_FORMAT_EETQ ? 2u : 1u) * 4 * LANES * (uintptr_t)loads));
        k_words open = k_open(decoder, words, format);
        UNROLL
        for (int j = 0; j < vectors; j++) {
            vf value = k_value(decoder, &open, j, format) * scale;
            if (format == QL_FORMAT_INT8) value = value * second;
            vf_store(out + (load * vectors + j) * LANES, value);
        }
    }
}

/* fp8's scales of a row's block, where they change inside it. */
static void fp8_scales(float *out, const ql_weight *weight, int64_t row, int64_t col, int64_t cols) {
    const ql_fp8 *fp8 = &weight->fp8;
    const float *scale = fp8->scale + row / fp8->block_n * fp8->scale_stride;
    for (int64_t i = 0; i < cols; i++) out[i] = scale[(col + i) / fp8->block_k];
}

/* Whether one scale holds for all of each block of BLOCK columns. */
INLINE bool fp8_scale_is_even(const ql_weight *weight) {
    return weight->fp8.block_k >= weight->k || weight->fp8.block_k % BLOCK == 0;
}

/* out[rows][BLOCK], rows PANEL_STRIDE apart, = W[row + i][col + order[j]], for col a multiple of BLOCK and `cols`
 * columns there; what lies beyond them is finite or not, but nobody's. */
static void k_block(float *out, const ql_weight *weight, const k_decoder *decoder, const int16_t *order, int64_t row,
                    int64_t rows, int64_t col, int64_t cols) {
    const vf second = vf_set(1.0f / 127.0f);
    for (int64_t i = 0; i < rows; i++, out += PANEL_STRIDE) {
        switch (weight->format) {
        case QL_FORMAT_EETQ: {
            vf scale = vf_set(ql_f32_load(weight->eetq.scales, weight->eetq.scales_dtype, row + i));
            k_block_row(out, weight, decoder, row + i, col, cols, QL_FORMAT_EETQ, scale, second);
            break;
        }
        case QL_FORMAT_INT8: {
            vf scale = vf_set(weight->int8.absmax[row + i]);
            k_block_row(out, weight, decoder, row + i, col, cols, QL_FORMAT_INT8, scale, second);
            break;
        }
        case QL_FORMAT_FP8: {
            if (fp8_scale_is_even(weight)) {
                const ql_fp8 *fp8 = &weight->fp8;
                vf scale = vf_set(fp8->scale[(row + i) / fp8->block_n * fp8->scale_stride + col / fp8->block_k]);
                k_block_row(out, weight, decoder, row + i, col, cols, QL_FORMAT_FP8, scale, second);
                break;
            }
            float scales[BLOCK] = {0};
            fp8_scales(scales, weight, row + i, col, cols);
            k_block_row(out, weight, decoder, row + i, col, cols, QL_FORMAT_FP8, vf_set(1.0f), second);
            for (int j = 0; j < BLOCK; j++) out[j] *= scales[order[j]];
            break;
        }
        default: {
            if (weight->format == QL_FORMAT_PACKED || fourbit_is_ragged(weight)) {
                plain_row(out, weight, row + i, col, cols, order);
                break;
            }
            const ql_fourbit *fourbit = &weight->fourbit;
            int64_t flat = (row + i) * weight->k + col, first = flat / fourbit->blocksize;
            int64_t count = (flat + cols - 1) / fourbit->blocksize - first + 1;
            float absmax[LANES];
            fourbit_absmax(absmax, fourbit, first, count);
            vf scale =
                fourbit_scale(absmax, count, flat % fourbit->blocksize, __builtin_ctzll((uint64_t)fourbit->blocksize));
            k_block_row(out, weight, decoder, row + i, col, cols, QL_FORMAT_FOURBIT, scale, second);
            break;
        }
        }
    }
}

/* ---- n lanes ---- */

/* order[position] = row within the block; GPTQ's is the natural one. */
static void n_order(int16_t order[BLOCK], ql_format format) {
    static const int8_t row_of_nibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    for (int position = 0; position < BLOCK; position++)
        order[position] =
            (int16_t)(format == QL_FORMAT_AWQ ? 8 * (position % LANES) + row_of_nibble[position / LANES] : position);
}

/* A unit is the least number of codes that fills whole words. */
INLINE int unit_words(int bits) { return bits == 3 ? 3 : 1; }
INLINE int unit_codes(int bits) { return 32 * unit_words(bits) / bits; }

typedef struct n_decoder {
    vtable code; /* the integers, by their low `bits` bits */
} n_decoder;

static void n_decoder_init(n_decoder *decoder, int bits) {
    float code[16];
    for (int i = 0; i < 16; i++) code[i] = (float)(bits < 4 ? i & ((1 << bits) - 1) : i);
    decoder->code = vtable_load(code);
}

/* What n_code adds to a code; it is added to the zeros too, and leaves exactly in the difference. */
INLINE float n_bias(int bits) { return bits == 8 ? BYTE_BIAS : 0.0f; }

/* Code `index` of each lane's unit, plus n_bias. */
INLINE vf n_code(const n_decoder *decoder, const vi *words, int index, const int bits) {
    if (bits == 8) return vf_biased_byte(words[0], index);
    int bit = bits * index, offset = bit & 31;
    vu value = (vu)words[bit >> 5] >> offset;
    if (offset + bits > 32) value |= (vu)words[(bit >> 5) + 1] << (32 - offset);
#if defined(QL_AVX512)
    return vtable_at(&decoder->code, (vi)value);
#else
    (void)decoder;
    return vf_from_int((vi)(value & ((1u << bits) - 1u)));
#endif
}

/* The zeros and scales of group `group` for BLOCK rows from `row` on, in n_order. */
INLINE void gptq_group(float *zeros, float *scales, const ql_weight *weight, int64_t group, int64_t row) {
    const ql_gptq *gptq = &weight->gptq;
    int64_t words = (weight->n * gptq->bits + 31) / 32;
    for (int v = 0; v < 8; v++, row += LANES) {
        int64_t bit = row * gptq->bits;
        vi position = vi_set((int32_t)(bit & 31)) + vi_lane() * gptq->bits;
        vi packed = vi_load_some(gptq->qzeros + group * words + (bit >> 5), words - (bit >> 5));
        vu low = (vu)vi_permute(packed, position >> 5);
        vu high = (vu)vi_permute(packed, (position >> 5) + 1);
        vu inside = (vu)position & 31u;
        vi zero = (vi)(low >> inside | high << (31u - inside) << 1);
        zero = (zero + gptq->zero_offset) & ((1 << gptq->bits) - 1);
        vf_store(zeros + v * LANES, vf_from_int(zero) + n_bias(gptq->bits));
        vf_store(scales + v * LANES,
                 vf_convert(gptq->scales, gptq->scales_dtype, group * weight->n + row, weight->n - row));
    }
}

/* BLOCK values in n_order of AWQ: three rounds that part even from odd positions leave position 8 * lane + r in vector r. */
INLINE void awq_reorder(float *out, const void *array, ql_dtype dtype, int64_t index, int64_t count) {
    static const int8_t row_of_nibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    vf row[8], next[8];
    UNROLL
    for (int v = 0; v < 8; v++) row[v] = vf_convert(array, dtype, index + v * LANES, count - v * LANES);
    for (int round = 0; round < 3; round++) {
        UNROLL
        for (int v = 0; v < 4; v++) {
            next[v] = __builtin_shuffle(row[2 * v], row[2 * v + 1], 2 * vi_lane());
            next[4 + v] = __builtin_shuffle(row[2 * v], row[2 * v + 1], 2 * vi_lane() + 1);
        }
        UNROLL
        for (int v = 0; v < 8; v++) row[v] = next[v];
    }
    UNROLL
    for (int v = 0; v < 8; v++) vf_store(out + v * LANES, row[row_of_nibble[v]]);
}

/* As gptq_group, one at a time; AWQ's zeros are those of qzeros. */
INLINE void awq_scales(float *scales, const ql_weight *weight, int64_t group, int64_t row) {
    awq_reorder(scales, weight->awq.scales, weight->awq.scales_dtype, group * weight->n + row, weight->n - row);
}

INLINE void awq_zeros(float *zeros, const ql_weight *weight, const n_decoder *decoder, int64_t group, int64_t row) {
    int64_t words = (weight->n + 7) / 8;
    vi packed = vi_load_some(weight->awq.qzeros + group * words + row / 8, words - row / 8);
    UNROLL
    for (int p = 0; p < 8; p++) vf_store(zeros + p * LANES, n_code(decoder, &packed, p, 4));
}

/* As gptq_group; where the zeros are products, `zeros` are those. */
static void awq_group(float *zeros, float *scales, const ql_weight *weight, const n_decoder *decoder, int64_t group,
                      int64_t row) {
    const ql_awq *awq = &weight->awq;
    awq_scales(scales, weight, group, row);
    if (awq->zero_products)
        awq_reorder(zeros, awq->zero_products, awq->scales_dtype, group * weight->n + row, weight->n - row);
    else
        awq_zeros(zeros, weight, decoder, group, row);
}

/* The groups that one block of rows has met, so that a group index of any order costs a lookup a column. */
typedef struct group_cache {
    int64_t slots; /* a power of two */
    int64_t *tags; /* [slots], -1 where empty */
    float *values; /* [slots][2][BLOCK]: zeros, scales */
} group_cache;

enum { MAX_GROUP_SLOTS = 128 };

static int64_t group_slots(const ql_weight *weight) {
    if (!has_n_lanes(weight)) return 0;
    int64_t groups = weight->format == QL_FORMAT_GPTQ ? weight->gptq.groups : weight->awq.groups, slots = 1;
    while (slots < groups && slots < MAX_GROUP_SLOTS) slots *= 2;
    return slots;
}

static void group_cache_clear(group_cache *cache) {
    for (int64_t i = 0; i < cache->slots; i++) cache->tags[i] = -1;
}

INLINE const float *group_cache_get(group_cache *cache, const ql_weight *weight, const n_decoder *decoder,
                                    int64_t group, int64_t row) {
    int64_t slot = group & (cache->slots - 1);
    float *values = cache->values + slot * 2 * BLOCK;
    if (cache->tags[slot] != group) {
        if (weight->format == QL_FORMAT_GPTQ)
            gptq_group(values, values + BLOCK, weight, group, row);
        else
            awq_group(values, values + BLOCK, weight, decoder, group, row);
        cache->tags[slot] = group;
    }
    return values;
}

/* out[cols][BLOCK], rows PANEL_STRIDE apart, = W[row + i][col + j] for j in [0, cols); `col` begins a unit. */
INLINE void gptq_block(float *out, const ql_weight *weight, const n_decoder *decoder, group_cache *cache, int64_t row,
                       int64_t col, int64_t cols, const int bits) {
    const ql_gptq *gptq = &weight->gptq;
    const int codes = unit_codes(bits), words = unit_words(bits);
    int64_t group = col / gptq->group_size, next_group = (group + 1) * gptq->group_size;
    for (int64_t unit = 0; unit * codes < cols; unit++) {
        int64_t first = unit * codes, left = (weight->k * bits + 31) / 32 - (col + first) * bits / 32;
        const int32_t *from = gptq->qweight + (col + first) * bits / 32 * weight->n + row;
        vi packed[8][3];
        UNROLL
        for (int v = 0; v < 8; v++) {
            UNROLL
            for (int w = 0; w < words; w++)
                packed[v][w] =
                    vi_load_some(from + w * weight->n + v * LANES, w < left ? weight->n - row - v * LANES : 0);
        }
        UNROLL
        for (int c = 0; c < codes; c++) {
            int64_t column = first + c;
            if (column >= cols) break;
            if (gptq->g_idx) {
                group = gptq->g_idx[col + column];
            } else if (col + column >= next_group) {
                group++;
                next_group += gptq->group_size;
            }
            const float *values = group_cache_get(cache, weight, decoder, group, row);
            UNROLL
            for (int v = 0; v < 8; v++) {
                vf code = n_code(decoder, packed[v], c, bits) - vf_load(values + v * LANES);
                vf_store(out + column * PANEL_STRIDE + v * LANES, code * vf_load(values + BLOCK + v * LANES));
            }
        }
    }
}

static void awq_block(float *out, const ql_weight *weight, const n_decoder *decoder, group_cache *cache, int64_t row,
                      int64_t col, int64_t cols) {
    const ql_awq *awq = &weight->awq;
    const int64_t words = (weight->n + 7) / 8;
    for (int64_t column = 0; column < cols; column++, out += PANEL_STRIDE) {
        const float *values = group_cache_get(cache, weight, decoder, (col + column) / awq->group_size, row);
        vi packed = vi_load_some(awq->qweight + (col + column) * words + row / 8, words - row / 8);
        UNROLL
        for (int p = 0; p < 8; p++) {
            vf code = n_code(decoder, &packed, p, 4), zero = vf_load(values + p * LANES);
            vf scale = vf_load(values + BLOCK + p * LANES);
            vf_store(out + p * LANES, awq->zero_products ? vf_fma_once(code, scale, zero) : (code - zero) * scale);
        }
    }
}

/* Not inlined: one copy of each width. */
static __attribute__((noinline)) void gptq_block_2(float *out, const ql_weight *weight, const n_decoder *decoder,
                                                   group_cache *cache, int64_t row, int64_t col, int64_t cols) {
    gptq_block(out, weight, decoder, cache, row, col, cols, 2);
}

static __attribute__((noinline)) void gptq_block_3(float *out, const ql_weight *weight, const n_decoder *decoder,
                                                   group_cache *cache, int64_t row, int64_t col, int64_t cols) {
    gptq_block(out, weight, decoder, cache, row, col, cols, 3);
}

static __attribute__((noinline)) void gptq_block_4(float *out, const ql_weight *weight, const n_decoder *decoder,
                                                   group_cache *cache, int64_t row, int64_t col, int64_t cols) {
    gptq_block(out, weight, decoder, cache, row, col, cols, 4);
}

static __attribute__((noinline)) void gptq_block_8(float *out, const ql_weight *weight, const n_decoder *decoder,
                                                   group_cache *cache, int64_t row, int64_t col, int64_t cols) {
    gptq_block(out, weight, decoder, cache, row, col, cols, 8);
}

/* out[cols][BLOCK], rows PANEL_STRIDE apart, = W[row + order[i]][col + j], for `row` and `col` multiples of BLOCK. */
static void n_block(float *out, const ql_weight *weight, const n_decoder *decoder, group_cache *cache, int64_t row,
                    int64_t col, int64_t cols) {
    if (weight->format == QL_FORMAT_AWQ) {
        awq_block(out, weight, decoder, cache, row, col, cols);
        return;
    }
    switch (weight->gptq.bits) {
    case 2: gptq_block_2(out, weight, decoder, cache, row, col, cols); break;
    case 3: gptq_block_3(out, weight, decoder, cache, row, col, cols); break;
    case 4: gptq_block_4(out, weight, decoder, cache, row, col, cols); break;
    default: gptq_block_8(out, weight, decoder, cache, row, col, cols); break;
    }
}

#endif

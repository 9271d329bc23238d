/* Products with few rows of bf16 on processors that multiply pairs of bf16 (AVX512_BF16): as in fused.h, two columns of
 * x an operation. Part of the AVX-512 kernels (see vector.h).
 *
 * EETQ's codes and e4m3 are numbers that bf16 holds exactly: tables give the two bytes of each. FOURBIT's code is rounded
 * once to bf16. Nothing that the instruction would flush can arise (see dense_bf16.h): activations are zero or at least
 * BF16_LEAST or e4m3 themselves, EETQ's integers at least 1, e4m3 at least 2^-9, FOURBIT's codes at least LEAST_CODE. */
#ifndef QL_CPU_FUSED_BF16_H
#define QL_CPU_FUSED_BF16_H

#include "fused.h"
#include "fused_n_bf16.h"

/* ---- decoding to pairs ---- */

#define LEAST_CODE 0x1p-20f
#define MOST_CODE 0x1p20f

typedef struct pairs_tables {
    vi code;                 /* of FOURBIT: bf16, twice: the fifth bit of an index is the next code's */
    __m512i high[2], low[2]; /* of EETQ and FP8: the bytes of the bf16 of each magnitude; EETQ's 0 stands for 128 */
} pairs_tables;

static void pairs_tables_init(pairs_tables *tables, const ql_weight *weight) {
    memset(tables, 0, sizeof *tables);
    if (weight->format == QL_FORMAT_FOURBIT) {
        uint16_t code[32];
        for (int i = 0; i < 32; i++) code[i] = ql_bf16_from_f32(weight->fourbit.code[i % 16]);
        memcpy(&tables->code, code, sizeof code);
        return;
    }
    uint8_t high[128], low[128];
    for (int magnitude = 0; magnitude < 128; magnitude++) {
        float value = (float)(magnitude ? magnitude : 128);
        if (weight->format == QL_FORMAT_FP8) value = ql_f32_from_e4m3((uint8_t)magnitude);
        uint16_t bits = ql_bf16_from_f32(value);
        high[magnitude] = (uint8_t)(bits >> 8);
        low[magnitude] = (uint8_t)bits;
    }
    memcpy(tables->high, high, sizeof high);
    memcpy(tables->low, low, sizeof low);
}

/* A step's BLOCK columns are 4 vectors of pairs: of one load of FOURBIT's words (pair j: nibbles j and j + 4 of each), of
 * two loads of bytes, whose halves of 16-byte lanes unpack into two vectors. order[position] = column within the block. */
static void pairs_order(int16_t order[BLOCK], ql_format format) {
    for (int position = 0; position < BLOCK; position++) {
        int vector = position / 32, element = position % 32;
        int byte = 16 * (element / 8) + 8 * (vector & 1) + element % 8, base = vector / 2 * 64;
        switch (format) {
        case QL_FORMAT_FOURBIT:
            order[position] = (int16_t)(8 * (element / 2) + ((vector + 4 * (element & 1)) ^ 1));
            break;
        case QL_FORMAT_EETQ:
            order[position] = (int16_t)(base + (byte & ~15) + ((byte & 15) >> 1) + ((byte & 1) << 3));
            break;
        default: order[position] = (int16_t)(base + byte); break;
        }
    }
}

INLINE k_words pairs_open(const pairs_tables *tables, vi words, const ql_format format) {
    if (format == QL_FORMAT_FOURBIT) return (k_words){{words, words}};
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i index = (__m512i)words, signs = index, high;
    if (format == QL_FORMAT_EETQ) {
        signs = _mm512_xor_si512(signs, sign); /* the bytes are codes plus 128 */
        index = _mm512_abs_epi8(signs);
        high = _mm512_maskz_permutex2var_epi8(_mm512_test_epi8_mask(signs, signs), tables->high[0], index,
                                              tables->high[1]);
    } else {
        high = _mm512_permutex2var_epi8(tables->high[0], index, tables->high[1]);
    }
    __m512i low = _mm512_permutex2var_epi8(tables->low[0], index, tables->low[1]);
    high = _mm512_ternarylogic_epi32(high, signs, sign, 0xf8); /* high | (signs & 0x80) in each byte */
    return (k_words){{(vi)_mm512_unpacklo_epi8(low, high), (vi)_mm512_unpackhi_epi8(low, high)}};
}

INLINE vi pairs_value(const pairs_tables *tables, const k_words *words, int j, const ql_format format) {
    if (format == QL_FORMAT_FOURBIT) return pair_at(tables->code, vi_shift(words->part[0], 4 * j));
    return words->part[j];
}

/* ---- products ---- */

typedef struct k_pairs {
    const ql_product *product;
    const uint16_t *x; /* [m][steps * BLOCK] in pairs_order, zeros beyond K and beyond the product's rows */
    pairs_tables tables;
    int64_t steps;
} k_pairs;

/* As k_fused_step. */
INLINE void k_pairs_step(const k_pairs *work, const pairs_tables *tables, vf sum[4][MAX_FUSED_ROWS],
                         const k_stream *streams, const k_scales *scales, int64_t step, const bool whole,
                         const bool even, const bool scaled, const ql_format format, const int row_count,
                         const int m_count) {
    const int loads = words_loads(format), vectors = 4 / loads;
    const int64_t k = work->product->weight->k, x_stride = work->steps * BLOCK;
    const uint16_t *x = work->x + step * BLOCK;
    vf part[4][MAX_FUSED_ROWS];
    UNROLL
    for (int load = 0; load < loads; load++) {
        k_words words[4];
        int64_t bytes = whole ? 4 * LANES : k_step_bytes(k, step, load, format);
        UNROLL
        for (int r = 0; r < row_count; r++) {
            vi loaded = k_load(streams[r].bytes + k_step_offset(step, load, format), bytes);
            words[r] = pairs_open(tables, loaded, format);
            prefetch_rows(streams[0].ahead, 4 * LANES * (step * loads + load), r, row_count,
                          format == QL_FORMAT_FOURBIT && m_count == 1);
        }
        UNROLL
        for (int j = 0; j < vectors; j++) {
            vi value[4];
            UNROLL
            for (int r = 0; r < row_count; r++) value[r] = pairs_value(tables, &words[r], j, format);
            UNROLL
            for (int m = 0; m < m_count; m++) {
                vi activation = vi_load(x + m * x_stride + (load * vectors + j) * 2 * LANES);
                UNROLL
                for (int r = 0; r < row_count; r++)
                    part[r][m] = dot_pairs(load + j ? part[r][m] : vf_set(0), value[r], activation);
            }
            forget_memory();
        }
    }
    const float *groups = format == QL_FORMAT_FP8 && scaled ? work->product->group_scales : NULL;
    int64_t scale_index = format == QL_FORMAT_FP8 ? (uint32_t)step / (uint32_t)scales->steps_a_scale : 0;
    UNROLL
    for (int r = 0; r < row_count; r++) {
        vf scale = vf_set(1.0f);
        if (scaled && format == QL_FORMAT_FP8) scale = vf_set(streams[r].scales[scale_index]);
        if (scaled && format == QL_FORMAT_FOURBIT) scale = k_fourbit_scale(&streams[r], scales, step, whole && even);
        UNROLL
        for (int m = 0; m < m_count; m++) {
            /* A fourth row that stands in for none has no scales either. */
            if (groups)
                sum[r][m] = vf_fma(part[r][m] * vf_set(groups[min_of(m, work->product->m - 1) * work->steps + step]),
                                   scale, sum[r][m]);
            else
                sum[r][m] = scaled ? vf_fma(part[r][m], scale, sum[r][m]) : sum[r][m] + part[r][m];
        }
    }
}

INLINE void k_pairs_rows(const k_pairs *work, int64_t row, float *sums, const bool scaled, const ql_format format,
                         const int row_count, const int m_count) {
    const ql_weight *weight = work->product->weight;
    const int64_t whole = weight->k / BLOCK;
    const k_scales scales = k_scales_of(weight, format);
    const pairs_tables tables = work->tables;
    vf sum[4][MAX_FUSED_ROWS];
    k_stream streams[4];
    float expanded[4][MAX_FUSED_BLOCKS];
    UNROLL
    for (int r = 0; r < row_count; r++) {
        streams[r] = k_stream_open(weight, row + r, &scales, expanded[r], format, row_count);
        UNROLL
        for (int m = 0; m < m_count; m++) sum[r][m] = vf_set(0);
    }
    if (scales.even || format != QL_FORMAT_FOURBIT)
        for (int64_t step = 0; step < whole; step++)
            k_pairs_step(work, &tables, sum, streams, &scales, step, true, true, scaled, format, row_count, m_count);
    else
        for (int64_t step = 0; step < whole; step++)
            k_pairs_step(work, &tables, sum, streams, &scales, step, true, false, scaled, format, row_count, m_count);
    if (whole < work->steps)
        k_pairs_step(work, &tables, sum, streams, &scales, whole, false, false, scaled, format, row_count, m_count);
    UNROLL
    for (int r = 0; r < row_count; r++) {
        const float scale = scaled ? 1.0f : k_row_scale(weight, &streams[r], row + r, format);
        UNROLL
        for (int m = 0; m < m_count; m++) sums[m * LANES + r] = vf_sum(sum[r][m]) * scale;
    }
}

/* Items are runs of LANES rows. */
INLINE void k_pairs_range(const k_pairs *work, int64_t begin, int64_t end, const bool scaled, const ql_format format,
                          const int m_count) {
    const ql_product *product = work->product;
    const int64_t n = product->weight->n;
    const int rows = k_rows(m_count, format);
    for (int64_t row = begin * LANES; row < min_of(end * LANES, n); row += LANES) {
        float sums[MAX_FUSED_ROWS * LANES] = {0};
        int64_t count = min_of(LANES, n - row), r = 0;
        for (; r + rows <= count; r += rows) k_pairs_rows(work, row + r, sums + r, scaled, format, rows, m_count);
        for (; r < count; r++) k_pairs_rows(work, row + r, sums + r, scaled, format, 1, m_count);
        for (int64_t m = 0; m < product->m; m++) store_outputs(product, m, row, vf_load(sums + m * LANES), count);
    }
}

/* Three rows of x are four, one of them zeros: code of their own would be a third more of it. */
#define K_PAIRS_BODY(name, scaled, format, m_count)                                                                    \
    static void name(void *context, int64_t begin, int64_t end) {                                                      \
        k_pairs_range(context, begin, end, scaled, format, m_count);                                                   \
    }
#define K_PAIRS_BODIES(name, scaled, format)                                                                           \
    K_PAIRS_BODY(name##_1, scaled, format, 1)                                                                          \
    K_PAIRS_BODY(name##_2, scaled, format, 2)                                                                          \
    K_PAIRS_BODY(name##_4, scaled, format, 4)
#define K_PAIRS(name) {name##_1, name##_2, name##_4, name##_4}

K_PAIRS_BODIES(fourbit_pairs, true, QL_FORMAT_FOURBIT)
K_PAIRS_BODIES(eetq_pairs, false, QL_FORMAT_EETQ)
K_PAIRS_BODIES(fp8_pairs, false, QL_FORMAT_FP8)
K_PAIRS_BODIES(fp8_blocks_pairs, true, QL_FORMAT_FP8)

static bool k_pairs_fits(const ql_weight *weight) {
    if (!k_fused_fits(weight)) return false;
    if (weight->format != QL_FORMAT_FOURBIT) return true;
    for (int i = 0; i < 16; i++) {
        float magnitude = fabsf(weight->fourbit.code[i]);
        if (magnitude != 0 && !(magnitude >= LEAST_CODE && magnitude <= MOST_CODE)) return false;
    }
    return true;
}

static int k_pairs_linear(const ql_product *product) {
    static loop_body *const bodies[4][MAX_FUSED_ROWS] = {K_PAIRS(fourbit_pairs), K_PAIRS(eetq_pairs),
                                                         K_PAIRS(fp8_pairs), K_PAIRS(fp8_blocks_pairs)};
    const ql_weight *weight = product->weight;
    const int64_t k = weight->k, steps = (k + BLOCK - 1) / BLOCK;
    const int kind = weight->format == QL_FORMAT_FOURBIT ? 0 : weight->format == QL_FORMAT_EETQ ? 1 : 2;
    const bool scaled = kind == 2 && (weight->fp8.block_k < k || product->group_scales);
    k_pairs work = {.product = product, .steps = steps};
    pairs_tables_init(&work.tables, weight);
    int16_t order[BLOCK];
    pairs_order(order, weight->format);
    uint16_t *x = calloc((size_t)((product->m == 3 ? 4 : product->m) * steps), BLOCK * sizeof *x);
    if (!x) return -1;
    for (int64_t m = 0; m < product->m; m++) {
        const uint16_t *from = product->x_bf16 + m * product->x_stride;
        uint16_t *to = x + m * steps * BLOCK;
        for (int64_t col = 0; col < k; col += BLOCK, to += BLOCK) {
            if (col + BLOCK <= k)
                for (int i = 0; i < BLOCK; i++) to[i] = from[col + order[i]];
            else
                for (int i = 0; i < BLOCK; i++) to[i] = col + order[i] < k ? from[col + order[i]] : 0;
        }
    }
    work.x = x;
    ql_cpu_parallel((weight->n + LANES - 1) / LANES, k_grain(weight->n), bodies[kind + scaled][product->m - 1], &work);
    free(x);
    return 0;
}

static bool pairs_fit(const ql_weight *weight) {
    if (weight->k == 0) return false;
    return has_n_lanes(weight) ? n_pairs_fits(weight) : k_pairs_fits(weight);
}

/* Any number of rows, MAX_FUSED_ROWS a pass. */
static int pairs_linear(const ql_product *product) {
    const size_t out_row = (size_t)product->weight->n * ql_dtype_size(product->dtype);
    for (int64_t m = 0; m < product->m; m += MAX_FUSED_ROWS) {
        ql_product pass = *product;
        pass.m = min_of(product->m - m, MAX_FUSED_ROWS);
        pass.out = (char *)product->out + (size_t)m * out_row;
        pass.x_bf16 = product->x_bf16 + m * product->x_stride;
        if (product->row_scale) pass.row_scale = product->row_scale + m;
        if (product->group_scales) pass.group_scales = product->group_scales + m * ((product->weight->k + 127) / 128);
        if (has_n_lanes(product->weight) ? n_pairs_linear(&pass) : k_pairs_linear(&pass)) return -1;
    }
    return 0;
}

#endif

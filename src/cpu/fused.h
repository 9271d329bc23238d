/* Products with few rows of x: weights are decoded in registers and multiplied there, so that a call is one walk over the
 * checkpoint's bytes. Part of the kernels (see vector.h). MAX_FUSED_ROWS rows at most; more go through dense.h. Here the
 * formats whose rows are contiguous bytes ("k lanes"); fused_n.h has the others. */
#ifndef QL_CPU_FUSED_H
#define QL_CPU_FUSED_H

#include "fused_n.h"

/* ---- k lanes: EETQ, FOURBIT and FP8 ---- */

enum { MAX_FUSED_BLOCKS = 2048 }; /* of FOURBIT's absmax in one row */

typedef struct k_fused {
    const ql_product *product;
    const float *x; /* [m][steps * BLOCK] in k_order, zeros beyond K */
    k_decoder decoder;
    int64_t steps;
} k_fused;

/* What one row of W is read with. */
typedef struct k_stream {
    const uint8_t *bytes;
    const uint8_t *ahead; /* where the row `row_count` rows on begins, to prefetch */
    const float *scales;  /* FOURBIT: absmax from the row's first block on; FP8: the row of scales */
    int64_t inside;       /* FOURBIT: elements of the first block before the row */
    int64_t blocks;       /* FOURBIT: in the row */
} k_stream;

/* How a row's blocks lie to its steps, the same for all rows. */
typedef struct k_scales {
    bool even;             /* the row begins a block: whole steps meet their blocks at the same words */
    int log2_blocksize;    /* of FOURBIT */
    int64_t blocks_a_step; /* of FOURBIT, at least 1 */
    int64_t steps_a_scale; /* of FP8 */
} k_scales;

INLINE k_scales k_scales_of(const ql_weight *weight, const ql_format format) {
    k_scales scales = {.even = true, .steps_a_scale = 1};
    if (format == QL_FORMAT_FOURBIT) {
        scales.even = weight->k % weight->fourbit.blocksize == 0;
        scales.log2_blocksize = __builtin_ctzll((uint64_t)weight->fourbit.blocksize);
        scales.blocks_a_step = BLOCK >> scales.log2_blocksize ? BLOCK >> scales.log2_blocksize : 1;
    } else if (format == QL_FORMAT_FP8) {
        const int64_t steps = (weight->k + BLOCK - 1) / BLOCK;
        scales.steps_a_scale = weight->fp8.block_k < weight->k ? weight->fp8.block_k / BLOCK : steps;
    }
    return scales;
}

/* Of a row of FOURBIT. `even`: the step is whole, the row begins a block. */
INLINE vf k_fourbit_scale(const k_stream *stream, const k_scales *scales, int64_t step, const bool even) {
    int64_t at = stream->inside + step * BLOCK, block = at >> scales->log2_blocksize;
    const float *from = stream->scales + block;
    if (even) return fourbit_even_scale(from, scales->blocks_a_step, scales->log2_blocksize);
    return fourbit_scale(from, stream->blocks - block, at & ((1 << scales->log2_blocksize) - 1),
                         scales->log2_blocksize);
}

/* Row `row`, read with `row_count` others; `expanded`: room for MAX_FUSED_BLOCKS nested absmax. */
INLINE k_stream k_stream_open(const ql_weight *weight, int64_t row, const k_scales *scales, float *expanded,
                              const ql_format format, const int row_count) {
    const int64_t k = weight->k;
    k_stream stream = {.bytes = k_row(weight, row, 0, format)};
    stream.ahead = stream.bytes + row_count * (format == QL_FORMAT_FOURBIT ? k / 2 : k);
    if (format == QL_FORMAT_FOURBIT) {
        const ql_fourbit *fourbit = &weight->fourbit;
        int64_t flat = row * k, first = flat >> scales->log2_blocksize;
        stream.blocks = ((flat + k - 1) >> scales->log2_blocksize) - first + 1;
        stream.inside = flat & (fourbit->blocksize - 1);
        stream.scales = fourbit->absmax + first;
        if (fourbit->nested) {
            fourbit_absmax(expanded, fourbit, first, stream.blocks);
            stream.scales = expanded;
        }
    } else if (format == QL_FORMAT_FP8) {
        stream.scales = weight->fp8.scale + row / weight->fp8.block_n * weight->fp8.scale_stride;
    }
    return stream;
}

/* Where load `load` of step `step` begins in a row: EETQ's rows have 64 of each 128 bytes. */
INLINE int64_t k_step_offset(int64_t step, int load, const ql_format format) {
    int64_t col = step * BLOCK + load * 4 * LANES;
    if (format == QL_FORMAT_FOURBIT) return col / 2;
    return format == QL_FORMAT_EETQ ? (col >> 6) * 128 + (col & 63) : col;
}

/* What is there of the load, where the step is not whole. */
INLINE int64_t k_step_bytes(int64_t k, int64_t step, int load, const ql_format format) {
    int64_t left = k - step * BLOCK - load * 4 * LANES;
    return format == QL_FORMAT_FOURBIT ? left / 2 : left;
}

/* The scale of a row that has one. */
INLINE float k_row_scale(const ql_weight *weight, const k_stream *stream, int64_t row, const ql_format format) {
    if (format == QL_FORMAT_EETQ) return ql_f32_load(weight->eetq.scales, weight->eetq.scales_dtype, row);
    return stream->scales[0];
}

/* A step's products are summed by themselves and then scaled, where the scale belongs to less than the row; that is also
 * the better order of a long sum. `whole`: all of the step's BLOCK columns are there. `even`: as in k_scales. */
INLINE void k_fused_step(const k_decoder *decoder, vf sum[4][MAX_FUSED_ROWS], const k_stream *streams,
                         const k_scales *scales, int64_t step, const float *x, int64_t x_stride, int64_t k,
                         const bool whole, const bool even, const bool scaled, const ql_format format,
                         const int row_count, const int m_count) {
    const int loads = words_loads(format), vectors = 8 / loads;
    vf part[4][MAX_FUSED_ROWS];
    x += step * BLOCK;
    UNROLL
    for (int load = 0; load < loads; load++) {
        k_words words[4];
        int64_t offset = k_step_offset(step, load, format);
        int64_t bytes = whole ? 4 * LANES : k_step_bytes(k, step, load, format);
        UNROLL
        for (int r = 0; r < row_count; r++) {
            words[r] = k_open(decoder, k_load(streams[r].bytes + offset, bytes), format);
            prefetch_rows(streams[0].ahead, 4 * LANES * (step * loads + load), r, row_count,
                          format == QL_FORMAT_FOURBIT && m_count == 1);
        }
        UNROLL
        for (int j = 0; j < vectors; j++) {
            vf value[4];
            UNROLL
            for (int r = 0; r < row_count; r++) value[r] = k_value(decoder, &words[r], j, format);
            UNROLL
            for (int m = 0; m < m_count; m++) {
                vf activation = vf_load(x + m * x_stride + (load * vectors + j) * LANES);
                UNROLL
                for (int r = 0; r < row_count; r++)
                    part[r][m] = load + j == 0 ? value[r] * activation : vf_fma(value[r], activation, part[r][m]);
            }
            forget_memory();
        }
    }
    int64_t scale_index = !scaled || format == QL_FORMAT_FOURBIT ? 0 : (uint32_t)step / (uint32_t)scales->steps_a_scale;
    UNROLL
    for (int r = 0; r < row_count; r++) {
        vf scale = vf_set(1.0f);
        if (scaled && format == QL_FORMAT_FP8) scale = vf_set(streams[r].scales[scale_index]);
        if (scaled && format == QL_FORMAT_FOURBIT) scale = k_fourbit_scale(&streams[r], scales, step, even && whole);
        UNROLL
        for (int m = 0; m < m_count; m++)
            sum[r][m] = scaled ? vf_fma(part[r][m], scale, sum[r][m]) : sum[r][m] + part[r][m];
    }
}

/* The sums of `row_count` rows from `row` on, with each of m_count rows of x. */
INLINE void k_fused_rows(const k_fused *work, int64_t row, float *sums, const bool scaled, const ql_format format,
                         const int row_count, const int m_count) {
    const ql_weight *weight = work->product->weight;
    const int64_t k = weight->k, x_stride = work->steps * BLOCK, whole = k / BLOCK;
    /* Copies, so that they stay in registers whatever memory does. */
    const k_decoder decoder = work->decoder;
    const k_scales scales = k_scales_of(weight, format);
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
            k_fused_step(&decoder, sum, streams, &scales, step, work->x, x_stride, k, true, true, scaled, format,
                         row_count, m_count);
    else
        for (int64_t step = 0; step < whole; step++)
            k_fused_step(&decoder, sum, streams, &scales, step, work->x, x_stride, k, true, false, scaled, format,
                         row_count, m_count);
    if (whole < work->steps)
        k_fused_step(&decoder, sum, streams, &scales, whole, work->x, x_stride, k, false, false, scaled, format,
                     row_count, m_count);
    UNROLL
    for (int r = 0; r < row_count; r++) {
        const float scale = scaled ? 1.0f : k_row_scale(weight, &streams[r], row + r, format);
        UNROLL
        for (int m = 0; m < m_count; m++) sums[m * LANES + r] = vf_sum(sum[r][m]) * scale;
    }
}

/* Rows of W at a time: their activations are loaded once, which counts where x is larger than the first cache. */
INLINE int k_rows(int m_count, ql_format format) {
    if (LANES == 16) return m_count == 1 || format != QL_FORMAT_FOURBIT ? 2 : 4;
    if (m_count == 1) return 4;
    return m_count == 2 ? 2 : 1;
}

/* Of items of LANES rows: a few ranges a thread. */
static int64_t k_grain(int64_t n) {
    int64_t grain = (n + LANES - 1) / LANES / (8 * ql_cpu_thread_count());
    return grain < 1 ? 1 : grain;
}

/* Items are runs of LANES rows. */
INLINE void k_fused_range(const k_fused *work, int64_t begin, int64_t end, const bool scaled, const ql_format format,
                          const int m_count) {
    const int64_t n = work->product->weight->n;
    const int rows = k_rows(m_count, format);
    for (int64_t row = begin * LANES; row < min_of(end * LANES, n); row += LANES) {
        float sums[MAX_FUSED_ROWS * LANES] = {0};
        int64_t count = min_of(LANES, n - row), r = 0;
        for (; r + rows <= count; r += rows) k_fused_rows(work, row + r, sums + r, scaled, format, rows, m_count);
        for (; r < count; r++) k_fused_rows(work, row + r, sums + r, scaled, format, 1, m_count);
        for (int m = 0; m < m_count; m++) store_outputs(work->product, m, row, vf_load(sums + m * LANES), count);
    }
}

#define K_FUSED_BODY(name, scaled, format, m_count)                                                                    \
    static void name(void *context, int64_t begin, int64_t end) {                                                      \
        k_fused_range(context, begin, end, scaled, format, m_count);                                                   \
    }
#define K_FUSED_BODIES(name, scaled, format)                                                                           \
    K_FUSED_BODY(name##_1, scaled, format, 1)                                                                          \
    K_FUSED_BODY(name##_2, scaled, format, 2)                                                                          \
    K_FUSED_BODY(name##_3, scaled, format, 3)                                                                          \
    K_FUSED_BODY(name##_4, scaled, format, 4)

K_FUSED_BODIES(eetq_fused, false, QL_FORMAT_EETQ)
K_FUSED_BODIES(fourbit_fused, true, QL_FORMAT_FOURBIT)
K_FUSED_BODIES(fp8_fused, false, QL_FORMAT_FP8)
K_FUSED_BODIES(fp8_blocks_fused, true, QL_FORMAT_FP8)

static bool k_fused_fits(const ql_weight *weight) {
    if (weight->format == QL_FORMAT_FP8) return weight->fp8.col_stride == 1 && fp8_scale_is_even(weight);
    if (weight->format == QL_FORMAT_FOURBIT)
        return !fourbit_is_ragged(weight) &&
               (!weight->fourbit.nested || weight->k / weight->fourbit.blocksize + 2 <= MAX_FUSED_BLOCKS);
    return weight->format == QL_FORMAT_EETQ;
}

static int k_fused_linear(const ql_product *product) {
    static loop_body *const bodies[4][MAX_FUSED_ROWS] = {BODIES(eetq_fused), BODIES(fourbit_fused), BODIES(fp8_fused),
                                                         BODIES(fp8_blocks_fused)};
    const ql_weight *weight = product->weight;
    k_fused work = {.product = product, .steps = (weight->k + BLOCK - 1) / BLOCK};
    k_decoder_init(&work.decoder, weight);
    int16_t order[BLOCK];
    k_order(order, weight->format);
    float *x = calloc((size_t)(product->m * work.steps), BLOCK * sizeof(float));
    if (!x) return -1;
    for (int64_t m = 0; m < product->m; m++) {
        const float *from = product->x + m * product->x_stride;
        float *to = x + m * work.steps * BLOCK;
        for (int64_t col = 0; col < weight->k; col += BLOCK, to += BLOCK) {
            if (col + BLOCK <= weight->k)
                for (int i = 0; i < BLOCK; i++) to[i] = from[col + order[i]];
            else
                for (int i = 0; i < BLOCK; i++) to[i] = col + order[i] < weight->k ? from[col + order[i]] : 0.0f;
        }
    }
    work.x = x;
    int kind = weight->format == QL_FORMAT_EETQ ? 0 : weight->format == QL_FORMAT_FOURBIT ? 1 : 2;
    if (kind == 2 && weight->fp8.block_k < weight->k) kind = 3;
    ql_cpu_parallel((weight->n + LANES - 1) / LANES, k_grain(weight->n), bodies[kind][product->m - 1], &work);
    free(x);
    return 0;
}

#endif

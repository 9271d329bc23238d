/* Products with few rows of x and a GPTQ or AWQ weight: rows of W lie side by side in a row of words, so that lanes are
 * rows of W ("n lanes"). Part of the kernels (see vector.h). MAX_FUSED_ROWS rows at most; more go through dense.h.
 *
 * An item of work is a part of K by a strip of rows of W. Rows of words are far apart, and what the processor fetches
 * ahead of a run is of use only where the run goes on: strips are wide (all of N, as long as parts are enough items), and
 * their words are met in the order of memory, or fetched in it a little ahead. */
#ifndef QL_CPU_FUSED_N_H
#define QL_CPU_FUSED_N_H

#include "decode.h"
#include "threads.h"

#include <stdlib.h>

enum { MAX_FUSED_ROWS = 4 };

INLINE void store_outputs(const ql_product *product, int64_t m, int64_t n, vf sums, int64_t count) {
    if (count <= 0) return;
    if (product->row_scale) sums = sums * vf_set(product->row_scale[m]);
    if (product->bias) sums = sums + vf_convert(product->bias, QL_F32, n, count);
    vf_store_as(product->out, product->dtype, m * product->weight->n + n, sums, count);
}

/* ---- parts of K, strips of rows of W ---- */

enum { N_PARTS = 8, MAX_CHUNK = 128 };

/* The work of a call; the parts' sums are added in the order of K, whatever thread made them. */
typedef struct n_parts {
    const ql_product *product;
    int16_t order[BLOCK];
    int64_t part, parts;   /* columns of K a part, a multiple of MAX_CHUNK; it depends on K alone */
    int64_t strip, strips; /* rows of W a strip, a multiple of BLOCK; sums do not depend on it */
    int64_t width;         /* rows of W in whole blocks */
    float *sums;           /* [parts][m + 1][width] in n_order; a part's last row holds scales of AWQ's group at hand */
} n_parts;

typedef struct n_item {
    int64_t col, col_end; /* of K */
    int64_t row, row_end; /* of W */
    float *sums;          /* [m][width], of the part */
    float *scales;        /* [width], of the part */
} n_item;

static n_item n_item_of(const n_parts *parts, int64_t index) {
    const ql_product *product = parts->product;
    const int64_t part = index / parts->strips, col = part * parts->part, row = index % parts->strips * parts->strip;
    float *sums = parts->sums + part * (product->m + 1) * parts->width;
    n_item item = {.col = col,
                   .col_end = min_of(col + parts->part, product->weight->k),
                   .row = row,
                   .row_end = min_of(row + parts->strip, product->weight->n),
                   .sums = sums,
                   .scales = sums + product->m * parts->width};
    for (int64_t m = 0; m < product->m; m++)
        memset(sums + m * parts->width + row, 0,
               (size_t)(min_of(row + parts->strip, parts->width) - row) * sizeof *sums);
    return item;
}

/* Blocks [begin, end) of the outputs. */
static void n_store(void *context, int64_t begin, int64_t end) {
    const n_parts *parts = context;
    const ql_product *product = parts->product;
    const int64_t n = product->weight->n, next_part = (product->m + 1) * parts->width;
    for (int64_t block = begin; block < end; block++) {
        for (int64_t m = 0; m < product->m; m++) {
            const float *from = parts->sums + m * parts->width + block * BLOCK;
            float natural[BLOCK];
            for (int v = 0; v < 8; v++) {
                float lane[LANES];
                vf sum = vf_set(0);
                for (int64_t part = 0; part < parts->parts; part++)
                    sum = sum + vf_load(from + part * next_part + v * LANES);
                vf_store(lane, sum);
                for (int i = 0; i < LANES; i++) natural[parts->order[v * LANES + i]] = lane[i];
            }
            for (int v = 0; v < 8; v++)
                store_outputs(product, m, block * BLOCK + v * LANES, vf_load(natural + v * LANES),
                              n - block * BLOCK - v * LANES);
        }
    }
}

/* `body` takes items of parts->product, context is the struct that begins with *parts. */
static int n_parts_run(n_parts *parts, void (*body)(void *context, int64_t begin, int64_t end)) {
    const ql_product *product = parts->product;
    const ql_weight *weight = product->weight;
    const int64_t blocks = (weight->n + BLOCK - 1) / BLOCK;
    n_order(parts->order, weight->format);
    parts->part = ((weight->k + N_PARTS - 1) / N_PARTS + MAX_CHUNK - 1) / MAX_CHUNK * MAX_CHUNK;
    parts->parts = (weight->k + parts->part - 1) / parts->part;
    int64_t strips = min_of(1 + (2 * ql_cpu_thread_count() - 1) / parts->parts, blocks);
    parts->strip = (blocks + strips - 1) / strips * BLOCK;
    parts->width = blocks * BLOCK;
    parts->strips = (parts->width + parts->strip - 1) / parts->strip;
    parts->sums = malloc((size_t)(parts->parts * (product->m + 1) * parts->width) * sizeof *parts->sums);
    if (!parts->sums) return -1;
    ql_cpu_parallel(parts->parts * parts->strips, 1, body, parts);
    ql_cpu_parallel(blocks, 1 + blocks / (2 * ql_cpu_thread_count()), n_store, parts);
    free(parts->sums);
    return 0;
}

/* ---- what is fetched ahead ---- */

/* The rows of words after those at hand, a line at a time in the order of memory. */
typedef struct n_ahead {
    uintptr_t line, run_end, run, pitch;
} n_ahead;

INLINE n_ahead n_ahead_from(const void *row, int64_t bytes, int64_t pitch) {
    uintptr_t at = (uintptr_t)row;
    return (n_ahead){at, at + (uintptr_t)bytes, (uintptr_t)bytes, (uintptr_t)pitch};
}

/* Into the second cache: it is used only after all of the rows at hand. */
INLINE void n_fetch(n_ahead *ahead) {
    __builtin_prefetch((const void *)ahead->line, 0, 2);
    ahead->line += 64;
    if (ahead->line >= ahead->run_end) {
        ahead->run_end += ahead->pitch;
        ahead->line = ahead->run_end - ahead->run;
    }
}

/* ---- the end of a group of columns ---- */

/* sums[m][v] += scales[v] * sum[v][m]; rows of sums are `width` apart. */
INLINE void n_scale(float *sums, int64_t width, vf sum[8][MAX_FUSED_ROWS], const float *scales, const int vectors,
                    const int m_count) {
    UNROLL
    for (int v = 0; v < vectors; v++) {
        vf scale = vf_load(scales + v * LANES);
        UNROLL
        for (int m = 0; m < m_count; m++) {
            float *to = sums + m * width + v * LANES;
            vf_store(to, vf_fma(sum[v][m], scale, vf_load(to)));
        }
    }
}

/* ---- GPTQ ---- */

/* Columns of a chunk: about 16 rows of words, as many runs as the processor follows at once. */
INLINE int64_t gptq_chunk(const int bits) { return bits == 8 ? MAX_CHUNK / 2 : MAX_CHUNK; }

/* Columns that share a group are summed as (q - z) * x, which is exact but for the sum, and scaled once.
 * `whole`: all `vectors` are inside the rows of W; `rows` of them otherwise. `ahead`: bytes to the words to fetch. */
INLINE void n_gptq_chunk(float *sums, int64_t width, const int32_t *from, int64_t n, int64_t rows, uintptr_t ahead,
                         const float *x, int64_t x_stride, int64_t cols, const float *zeros, const float *scales,
                         const n_decoder *decoder, const int bits, const bool whole, const int vectors,
                         const int m_count) {
    const int codes = unit_codes(bits), words = unit_words(bits);
    vf sum[8][MAX_FUSED_ROWS], zero[8];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        zero[v] = vf_load(zeros + v * LANES);
        UNROLL
        for (int m = 0; m < m_count; m++) sum[v][m] = vf_set(0);
    }
    int64_t unit = 0;
    for (; (unit + 1) * codes <= cols; unit++, from += words * n) {
        const float *at = x + unit * codes;
        UNROLL
        for (int v = 0; v < vectors; v++) {
            vi packed[3];
            forget_memory();
            UNROLL
            for (int w = 0; w < words; w++) {
                const int32_t *here = from + w * n + v * LANES;
                packed[w] = whole ? vi_load(here) : vi_load_some(here, rows - v * LANES);
                __builtin_prefetch((const void *)((uintptr_t)here + ahead));
            }
            UNROLL
            for (int c = 0; c < codes; c++) {
                vf code = n_code(decoder, packed, c, bits) - zero[v];
                UNROLL
                for (int m = 0; m < m_count; m++) sum[v][m] = vf_fma(vf_set(at[m * x_stride + c]), code, sum[v][m]);
            }
        }
    }
    if (unit * codes < cols) { /* the last unit of K, in part: the codes that are not there meet zeros */
        float tail[MAX_FUSED_ROWS][32] = {{0}};
        int64_t left = ((cols - unit * codes) * bits + 31) / 32;
        for (int m = 0; m < m_count; m++)
            memcpy(tail[m], x + m * x_stride + unit * codes, (size_t)(cols - unit * codes) * sizeof(float));
        UNROLL
        for (int v = 0; v < vectors; v++) {
            vi packed[3];
            UNROLL
            for (int w = 0; w < words; w++)
                packed[w] = vi_load_some(from + (w < left ? w : 0) * n + v * LANES, rows - v * LANES);
            UNROLL
            for (int c = 0; c < codes; c++) {
                vf code = n_code(decoder, packed, c, bits) - zero[v];
                UNROLL
                for (int m = 0; m < m_count; m++) sum[v][m] = vf_fma(vf_set(tail[m][c]), code, sum[v][m]);
            }
        }
    }
    n_scale(sums, width, sum, scales, vectors, m_count);
}

/* Bytes from a piece of `vectors` vectors to the next: on along the rows of words, or to the next chunk's rows. */
INLINE uintptr_t gptq_ahead(const n_item *item, int64_t row, int64_t rows_down, int64_t n, const int vectors) {
    if (row + vectors * LANES < item->row_end) return (uintptr_t)vectors * LANES * 4;
    return (uintptr_t)(rows_down * n * 4) - (uintptr_t)((row - item->row) * 4);
}

/* Vectors of sums that fit the registers beside the zeros, for m_count rows. */
INLINE int gptq_vectors(int m_count) {
    if (LANES == 16 || m_count == 1) return 4;
    return m_count == 2 ? 2 : 1;
}

/* The columns of K from `col` to the end of its group, its part, or `chunk` columns. */
INLINE int64_t n_cols(const n_item *item, int64_t col, int64_t group_size, int64_t chunk) {
    int64_t left = group_size - col % group_size;
    return min_of(min_of(left, chunk), item->col_end - col);
}

typedef struct n_fused {
    n_parts parts;
    n_decoder decoder;
} n_fused;

/* Columns of one group by all of the item's rows. */
INLINE void gptq_fused_chunk(const n_fused *work, const n_item *item, int64_t col, int64_t cols, const int bits,
                             const int m_count) {
    const ql_product *product = work->parts.product;
    const ql_weight *weight = product->weight;
    const int64_t n = weight->n, width = work->parts.width;
    const int vectors = gptq_vectors(m_count);
    const float *x = product->x + col;
    float zeros[BLOCK], scales[BLOCK];
    for (int64_t at = item->row; at < item->row_end; at += BLOCK) {
        gptq_group(zeros, scales, weight, col / weight->gptq.group_size, at);
        for (int v = 0; v < 8 && at + v * LANES < n; v += vectors) {
            const int64_t row = at + v * LANES;
            const int32_t *from = weight->gptq.qweight + col * bits / 32 * n + row;
            const uintptr_t ahead = gptq_ahead(item, row, cols * bits / 32, n, vectors);
            if (row + vectors * LANES <= n) {
                n_gptq_chunk(item->sums + row, width, from, n, n - row, ahead, x, product->x_stride, cols,
                             zeros + v * LANES, scales + v * LANES, &work->decoder, bits, true, vectors, m_count);
                continue;
            }
            for (int i = 0; i < vectors && row + i * LANES < n; i++)
                n_gptq_chunk(item->sums + row + i * LANES, width, from + i * LANES, n, n - row - i * LANES, ahead, x,
                             product->x_stride, cols, zeros + (v + i) * LANES, scales + (v + i) * LANES, &work->decoder,
                             bits, false, 1, m_count);
        }
    }
}

INLINE void gptq_fused_item(const n_fused *work, int64_t index, const int bits, const int m_count) {
    const n_item item = n_item_of(&work->parts, index);
    const int64_t group_size = work->parts.product->weight->gptq.group_size;
    for (int64_t col = item.col, cols; col < item.col_end; col += cols) {
        cols = n_cols(&item, col, group_size, gptq_chunk(bits));
        gptq_fused_chunk(work, &item, col, cols, bits, m_count);
    }
}

/* ---- AWQ ---- */

INLINE void n_awq_chunk(float *sums, int64_t width, const int32_t *from, int64_t words, int64_t left, n_ahead *ahead,
                        const float *x, int64_t x_stride, int64_t cols, const float *zeros, const float *scales,
                        const n_decoder *decoder, const int first, const int vectors, const int m_count) {
    vf sum[8][MAX_FUSED_ROWS], zero[8];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        zero[v] = vf_load(zeros + (first + v) * LANES);
        UNROLL
        for (int m = 0; m < m_count; m++) sum[v][m] = vf_set(0);
    }
    for (int64_t col = 0; col < cols; col++, from += words) {
        vi packed = vi_load_some(from, left);
        if (first == 0) n_fetch(ahead);
        UNROLL
        for (int v = 0; v < vectors; v++) {
            vf code = n_code(decoder, &packed, first + v, 4) - zero[v];
            UNROLL
            for (int m = 0; m < m_count; m++) sum[v][m] = vf_fma(vf_set(x[m * x_stride + col]), code, sum[v][m]);
        }
    }
    n_scale(sums + first * LANES, width, sum, scales + first * LANES, vectors, m_count);
}

/* Columns of a chunk: the longer, the fewer times sums are read and written; the next must fit the second cache. */
INLINE int64_t awq_chunk(int m_count) { return m_count == 1 ? 16 : 64; }

/* Of the vectors of a row of words, 8 times as many codes. */
INLINE int awq_vectors(int m_count) {
#if LANES == 16
    return m_count <= 2 ? 8 : 4;
#else
    return m_count == 1 ? 4 : m_count == 2 ? 2 : 1;
#endif
}

/* The item's words of the rows after the `cols` at hand. */
INLINE n_ahead awq_ahead(const n_item *item, const int32_t *qweight, int64_t words, int64_t col) {
    const int64_t first = item->row / 8, end = min_of((item->row_end + 7) / 8, words);
    return n_ahead_from(qweight + col * words + first, (end - first) * 4, words * 4);
}

/* As gptq_fused_chunk; `new_group`: the item's scales are not yet those of this group. */
INLINE void awq_fused_chunk(const n_fused *work, const n_item *item, int64_t col, int64_t cols, bool new_group,
                            const int m_count) {
    const ql_product *product = work->parts.product;
    const ql_weight *weight = product->weight;
    const ql_awq *awq = &weight->awq;
    const int64_t words = (weight->n + 7) / 8, width = work->parts.width, group = col / awq->group_size;
    const int vectors = awq_vectors(m_count);
    n_ahead ahead = awq_ahead(item, awq->qweight, words, col + cols);
    float zeros[BLOCK];
    for (int64_t at = item->row; at < item->row_end; at += BLOCK) {
        float *scales = item->scales + at;
        if (new_group) awq_scales(scales, weight, group, at);
        awq_zeros(zeros, weight, &work->decoder, group, at);
        UNROLL
        for (int first = 0; first < 8; first += vectors)
            n_awq_chunk(item->sums + at, width, awq->qweight + col * words + at / 8, words, words - at / 8, &ahead,
                        product->x + col, product->x_stride, cols, zeros, scales, &work->decoder, first, vectors,
                        m_count);
    }
}

INLINE void awq_fused_item(const n_fused *work, int64_t index, const int m_count) {
    const n_item item = n_item_of(&work->parts, index);
    const int64_t group_size = work->parts.product->weight->awq.group_size;
    for (int64_t col = item.col, cols; col < item.col_end; col += cols) {
        const bool new_group = col == item.col || col % group_size == 0;
        cols = n_cols(&item, col, group_size, awq_chunk(m_count));
        awq_fused_chunk(work, &item, col, cols, new_group, m_count);
    }
}

#define N_BODY(name, call)                                                                                             \
    static void name(void *context, int64_t begin, int64_t end) {                                                      \
        const n_fused *work = context;                                                                                 \
        for (int64_t i = begin; i < end; i++) call;                                                                    \
    }
#define GPTQ_FUSED_BODIES(name, bits)                                                                                  \
    N_BODY(name##_1, gptq_fused_item(work, i, bits, 1))                                                                \
    N_BODY(name##_2, gptq_fused_item(work, i, bits, 2))                                                                \
    N_BODY(name##_3, gptq_fused_item(work, i, bits, 3))                                                                \
    N_BODY(name##_4, gptq_fused_item(work, i, bits, 4))
#define BODIES(name) {name##_1, name##_2, name##_3, name##_4}

GPTQ_FUSED_BODIES(gptq2_fused, 2)
GPTQ_FUSED_BODIES(gptq3_fused, 3)
GPTQ_FUSED_BODIES(gptq4_fused, 4)
GPTQ_FUSED_BODIES(gptq8_fused, 8)
N_BODY(awq_fused_1, awq_fused_item(work, i, 1))
N_BODY(awq_fused_2, awq_fused_item(work, i, 2))
N_BODY(awq_fused_3, awq_fused_item(work, i, 3))
N_BODY(awq_fused_4, awq_fused_item(work, i, 4))

typedef void loop_body(void *context, int64_t begin, int64_t end);

static bool n_fused_fits(const ql_weight *weight) {
    if (weight->format == QL_FORMAT_AWQ) return weight->awq.qzeros != NULL;
    const ql_gptq *gptq = &weight->gptq;
    return !gptq->g_idx && (gptq->group_size >= weight->k || gptq->group_size % unit_codes(gptq->bits) == 0);
}

static int n_fused_linear(const ql_product *product) {
    static loop_body *const gptq_bodies[4][MAX_FUSED_ROWS] = {BODIES(gptq2_fused), BODIES(gptq3_fused),
                                                              BODIES(gptq4_fused), BODIES(gptq8_fused)};
    static loop_body *const awq_bodies[MAX_FUSED_ROWS] = BODIES(awq_fused);
    const bool awq = product->weight->format == QL_FORMAT_AWQ;
    const int bits = awq ? 4 : product->weight->gptq.bits;
    n_fused work = {.parts = {.product = product}};
    n_decoder_init(&work.decoder, bits);
    return n_parts_run(&work.parts,
                       awq ? awq_bodies[product->m - 1] : gptq_bodies[bits == 8 ? 3 : bits - 2][product->m - 1]);
}

#endif

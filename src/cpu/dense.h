/* Products with many rows of x, gradients and dequantization: weights are decoded into a panel of BLOCK x BLOCK floats,
 * turned where its lanes have to run the other way, and multiplied by a register-blocked kernel. Part of the kernels
 * (see vector.h). */
#ifndef QL_CPU_DENSE_H
#define QL_CPU_DENSE_H

#include "fused.h"
#include "fused_n_planes.h"

#include <stdatomic.h>
#include <stdlib.h>

/* The register tile: TILE_ROWS rows of x by TILE_VECTORS vectors of the panel. */
#if LANES == 16
enum { TILE_ROWS = 6, TILE_VECTORS = 4 };
#else
enum { TILE_ROWS = 6, TILE_VECTORS = 2 };
#endif
enum { ROWS_AT_ONCE = 256 }; /* rows of x whose sums a thread keeps */

/* ---- scratch: as many buffers as threads, each taken by one running range at a time ---- */

typedef struct scratch {
    float *panel;  /* [BLOCK][PANEL_STRIDE] */
    float *turned; /* [BLOCK][PANEL_STRIDE] */
    float *sums;   /* [ROWS_AT_ONCE][BLOCK] */
    group_cache cache;
} scratch;

typedef struct scratch_pool {
    int count;
    void *memory;
    scratch *all;
    atomic_bool *taken;
} scratch_pool;

static int scratch_pool_make(scratch_pool *pool, const ql_weight *weight, int64_t ranges, int64_t m) {
    pool->count = (int)min_of(ql_cpu_thread_count(), ranges < 1 ? 1 : ranges);
    int64_t slots = group_slots(weight), block = (int64_t)BLOCK * PANEL_STRIDE, rows = min_of(m, ROWS_AT_ONCE);
    int64_t floats = 2 * block + rows * BLOCK + slots * 2 * BLOCK;
    int64_t each = floats * 4 + (slots * 8 + 63) / 64 * 64;
    int64_t heads = (pool->count * (int64_t)(sizeof(scratch) + sizeof(atomic_bool)) + 63) / 64 * 64;
    pool->memory = aligned_alloc(64, (size_t)(heads + pool->count * each));
    if (!pool->memory) return -1;
    memset(pool->memory, 0, (size_t)(heads + pool->count * each));
    char *at = (char *)pool->memory + heads;
    pool->all = pool->memory;
    pool->taken = (atomic_bool *)(pool->all + pool->count);
    for (int i = 0; i < pool->count; i++, at += each) {
        scratch *own = &pool->all[i];
        own->panel = (float *)at;
        own->turned = own->panel + block;
        own->sums = own->turned + block;
        own->cache.values = own->sums + rows * BLOCK;
        own->cache.tags = (int64_t *)(own->cache.values + slots * 2 * BLOCK);
        own->cache.slots = slots;
        atomic_init(&pool->taken[i], false);
    }
    return 0;
}

static scratch *scratch_take(scratch_pool *pool, int *index) {
    for (int i = 0;; i = (i + 1) % pool->count)
        if (!atomic_exchange(&pool->taken[i], true)) {
            *index = i;
            return &pool->all[i];
        }
}

static void scratch_give(scratch_pool *pool, int index) { atomic_store(&pool->taken[index], false); }

/* ---- turning ---- */

/* to[order ? order[i] : i][row of from] = from[row][i], rows of both PANEL_STRIDE apart, for `rows` rows, a multiple of
 * LANES (the last may be nobody's). */
static void turn_block(float *to, const float *from, int64_t rows, const int16_t *order) {
    for (int64_t row = 0; row < rows; row += LANES) {
        for (int first = 0; first < BLOCK; first += LANES) {
            vf tile[LANES];
            UNROLL
            for (int i = 0; i < LANES; i++) tile[i] = vf_load(from + (row + i) * PANEL_STRIDE + first);
            vf_transpose(tile);
            UNROLL
            for (int i = 0; i < LANES; i++)
                vf_store(to + (order ? order[first + i] : first + i) * PANEL_STRIDE + row, tile[i]);
        }
    }
}

/* ---- the dense kernel: sums[m][BLOCK] += sum_i x[m][i] * panel[i][BLOCK] ---- */

INLINE void dense_tile(float *sums, const float *x, int64_t x_stride, const float *panel, int64_t depth,
                       const int rows) {
    vf sum[TILE_ROWS][TILE_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = vf_load(sums + r * BLOCK + v * LANES);
    }
    for (int64_t i = 0; i < depth; i++, panel += PANEL_STRIDE) {
        vf weight[TILE_VECTORS];
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) weight[v] = vf_load(panel + v * LANES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vf activation = vf_set(x[r * x_stride + i]);
            UNROLL
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = vf_fma(activation, weight[v], sum[r][v]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) vf_store(sums + r * BLOCK + v * LANES, sum[r][v]);
    }
}

static __attribute__((noinline)) void dense(float *sums, const float *x, int64_t x_stride, int64_t m,
                                            const float *panel, int64_t depth) {
    for (int v = 0; v < 8; v += TILE_VECTORS) {
        for (int64_t row = 0; row < m; row += TILE_ROWS) {
            float *to = sums + row * BLOCK + v * LANES;
            const float *from = x + row * x_stride, *weight = panel + v * LANES;
            switch (m - row) {
            case 1: dense_tile(to, from, x_stride, weight, depth, 1); break;
            case 2: dense_tile(to, from, x_stride, weight, depth, 2); break;
            case 3: dense_tile(to, from, x_stride, weight, depth, 3); break;
            case 4: dense_tile(to, from, x_stride, weight, depth, 4); break;
            case 5: dense_tile(to, from, x_stride, weight, depth, 5); break;
            default: dense_tile(to, from, x_stride, weight, depth, TILE_ROWS); break;
            }
        }
    }
}

/* ---- blocks of either orientation ---- */

typedef struct decoder {
    k_decoder k;
    n_decoder n;
    int16_t order[BLOCK];
    bool n_lanes;
} decoder;

static void decoder_init(decoder *decode, const ql_weight *weight) {
    decode->n_lanes = has_n_lanes(weight);
    if (decode->n_lanes) {
        n_decoder_init(&decode->n, weight->format == QL_FORMAT_AWQ ? 4 : weight->gptq.bits);
        n_order(decode->order, weight->format);
    } else {
        k_decoder_init(&decode->k, weight);
        k_order(decode->order, weight->format);
    }
}

typedef struct dense_work {
    const ql_product *product; /* of linear and grad */
    void *out;                 /* of dequantize */
    ql_dtype dtype;
    const ql_weight *weight;
    decoder decode;
    scratch_pool pool;
} dense_work;

/* sums[rows][BLOCK], lanes in `order` where that is given -> out[row][first...] with scale and bias. */
static void store_sums(const ql_product *product, int64_t m, int64_t rows, int64_t n, const float *sums,
                       const int16_t *order, int64_t first) {
    float natural[BLOCK];
    for (int64_t i = 0; i < rows; i++, sums += BLOCK) {
        const float *from = sums;
        if (order) {
            for (int j = 0; j < BLOCK; j++) natural[order[j]] = sums[j];
            from = natural;
        }
        for (int v = 0; v < 8 && first + v * LANES < n; v++) {
            vf sum = vf_load(from + v * LANES);
            int64_t count = n - first - v * LANES;
            if (product->row_scale) sum = sum * vf_set(product->row_scale[m + i]);
            if (product->bias) sum = sum + vf_convert(product->bias, QL_F32, first + v * LANES, count);
            vf_store_as(product->out, product->dtype, (m + i) * n + first + v * LANES, sum, count);
        }
    }
}

static void linear_range(void *context, int64_t begin, int64_t end) {
    dense_work *work = context;
    const ql_product *product = work->product;
    const ql_weight *weight = work->weight;
    int index;
    scratch *own = scratch_take(&work->pool, &index);
    for (int64_t row = begin * BLOCK; row < min_of(end * BLOCK, weight->n); row += BLOCK) {
        group_cache_clear(&own->cache);
        for (int64_t m = 0, rows; m < product->m; m += rows) {
            rows = min_of(product->m - m, ROWS_AT_ONCE);
            memset(own->sums, 0, (size_t)(rows * BLOCK) * sizeof(float));
            for (int64_t col = 0; col < weight->k; col += BLOCK) {
                int64_t cols = min_of(weight->k - col, BLOCK), there = min_of(weight->n - row, BLOCK);
                const float *panel = own->panel;
                if (work->decode.n_lanes) {
                    n_block(own->panel, weight, &work->decode.n, &own->cache, row, col, cols);
                } else {
                    k_block(own->panel, weight, &work->decode.k, work->decode.order, row, there, col, cols);
                    turn_block(own->turned, own->panel, there, work->decode.order);
                    panel = own->turned;
                }
                dense(own->sums, product->x + m * product->x_stride + col, product->x_stride, rows, panel, cols);
            }
            store_sums(product, m, rows, weight->n, own->sums,
                       weight->format == QL_FORMAT_AWQ ? work->decode.order : NULL, row);
        }
    }
    scratch_give(&work->pool, index);
}

static void grad_range(void *context, int64_t begin, int64_t end) {
    dense_work *work = context;
    const ql_product *product = work->product;
    const ql_weight *weight = work->weight;
    int index;
    scratch *own = scratch_take(&work->pool, &index);
    for (int64_t col = begin * BLOCK; col < min_of(end * BLOCK, weight->k); col += BLOCK) {
        int64_t cols = min_of(weight->k - col, BLOCK);
        for (int64_t m = 0, rows; m < product->m; m += rows) {
            rows = min_of(product->m - m, ROWS_AT_ONCE);
            memset(own->sums, 0, (size_t)(rows * BLOCK) * sizeof(float));
            for (int64_t row = 0; row < weight->n; row += BLOCK) {
                int64_t there = min_of(weight->n - row, BLOCK);
                const float *panel = own->panel;
                if (work->decode.n_lanes) {
                    group_cache_clear(&own->cache);
                    n_block(own->panel, weight, &work->decode.n, &own->cache, row, col, cols);
                    turn_block(own->turned, own->panel, cols, work->decode.order);
                    panel = own->turned;
                } else {
                    k_block(own->panel, weight, &work->decode.k, work->decode.order, row, there, col, cols);
                }
                dense(own->sums, product->x + m * product->x_stride + row, product->x_stride, rows, panel, there);
            }
            store_sums(product, m, rows, weight->k, own->sums, work->decode.n_lanes ? NULL : work->decode.order, col);
        }
    }
    scratch_give(&work->pool, index);
}

static void dequantize_range(void *context, int64_t begin, int64_t end) {
    dense_work *work = context;
    const ql_weight *weight = work->weight;
    int index;
    scratch *own = scratch_take(&work->pool, &index);
    for (int64_t row = begin * BLOCK; row < min_of(end * BLOCK, weight->n); row += BLOCK) {
        int64_t there = min_of(weight->n - row, BLOCK);
        group_cache_clear(&own->cache);
        for (int64_t col = 0; col < weight->k; col += BLOCK) {
            int64_t cols = min_of(weight->k - col, BLOCK);
            if (work->decode.n_lanes) {
                n_block(own->panel, weight, &work->decode.n, &own->cache, row, col, cols);
                turn_block(own->turned, own->panel, cols, work->decode.order);
            } else {
                k_block(own->panel, weight, &work->decode.k, work->decode.order, row, there, col, cols);
                for (int64_t i = 0; i < there; i++)
                    for (int j = 0; j < BLOCK; j++)
                        own->turned[i * PANEL_STRIDE + work->decode.order[j]] = own->panel[i * PANEL_STRIDE + j];
            }
            for (int64_t i = 0; i < there; i++)
                for (int64_t j = 0; j < cols; j += LANES)
                    vf_store_as(work->out, work->dtype, (row + i) * weight->k + col + j,
                                vf_load(own->turned + i * PANEL_STRIDE + j), cols - j);
        }
    }
    scratch_give(&work->pool, index);
}

static int dense_run(dense_work *work, loop_body *body, int64_t items, int64_t m) {
    decoder_init(&work->decode, work->weight);
    if (scratch_pool_make(&work->pool, work->weight, items, m)) return -1;
    ql_cpu_parallel(items, 1, body, work);
    free(work->pool.memory);
    return 0;
}

/* Up to here, passes over the weight with MAX_FUSED_ROWS rows of x each are quicker than making panels. */
enum { MAX_PASS_ROWS_K = 16, MAX_PASS_ROWS_N = 12 };

static bool fused_fits(const ql_weight *weight, int64_t m) {
    if (weight->k == 0) return false;
    if (has_n_lanes(weight)) return m <= MAX_PASS_ROWS_N && n_fused_fits(weight);
    return m <= MAX_PASS_ROWS_K && k_fused_fits(weight);
}

static int fused_linear(const ql_product *product) {
    const size_t out_row = (size_t)product->weight->n * ql_dtype_size(product->dtype);
    for (int64_t m = 0; m < product->m; m += MAX_FUSED_ROWS) {
        ql_product pass = *product;
        pass.m = min_of(product->m - m, MAX_FUSED_ROWS);
        pass.out = (char *)product->out + (size_t)m * out_row;
        pass.x = product->x + m * product->x_stride;
        if (product->row_scale) pass.row_scale = product->row_scale + m;
        if (has_n_lanes(product->weight) ? n_linear(&pass) : k_fused_linear(&pass)) return -1;
    }
    return 0;
}

static int linear(const ql_product *product) {
    if (fused_fits(product->weight, product->m)) return fused_linear(product);
    dense_work work = {.product = product, .weight = product->weight};
    return dense_run(&work, linear_range, (product->weight->n + BLOCK - 1) / BLOCK, product->m);
}

static int grad(const ql_product *product) {
    dense_work work = {.product = product, .weight = product->weight};
    return dense_run(&work, grad_range, (product->weight->k + BLOCK - 1) / BLOCK, product->m);
}

static int dequantize(void *out, ql_dtype dtype, const ql_weight *weight) {
    dense_work work = {.out = out, .dtype = dtype, .weight = weight};
    return dense_run(&work, dequantize_range, (weight->n + BLOCK - 1) / BLOCK, 0);
}

static void to_f32(float *out, const void *x, ql_dtype dtype, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) vf_store(out + i, vf_convert(x, dtype, i, LANES));
    for (; i < count; i++) out[i] = ql_f32_load(x, dtype, i);
}

#endif

/* Products with many rows of bf16 on processors that multiply pairs of bf16 (AVX512_BF16): panels as in dense.h, rounded
 * once to bf16. Twice the rate of fp32.
 *
 * The instruction reads denormal numbers as zero and flushes what becomes one. So that nothing is lost, activations and
 * weights here are zero or at least BF16_LEAST in magnitude; the engine sees to the
 * activations, and a panel with a smaller weight is multiplied in fp32. Part of the AVX-512 kernels (see vector.h). */
#ifndef QL_CPU_DENSE_BF16_H
#define QL_CPU_DENSE_BF16_H

#include "dense.h"
#include "fused_bf16.h"

/* 0xffffffff for zero, else the magnitude's bits above the sign, less one: smallest for the smallest number. */
INLINE vu bf16_rank(vf value) { return ((vu)value << 1) - 1u; }

/* pairs[i / 2][lane] = bf16 of panel[i][lane] and panel[i + 1][lane], `depth` rows, an even number; false where a weight
 * is too small. */
static bool pack_pairs(float *pairs, const float *panel, int64_t depth) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i least = _mm512_set1_epi32(-1);
    for (int64_t i = 0; i < depth; i += 2, panel += 2 * PANEL_STRIDE, pairs += PANEL_STRIDE) {
        UNROLL
        for (int v = 0; v < 8; v++) {
            vf even = vf_load(panel + v * LANES), odd = vf_load(panel + PANEL_STRIDE + v * LANES);
            least = _mm512_min_epu32(least, (__m512i)bf16_rank(even));
            least = _mm512_min_epu32(least, (__m512i)bf16_rank(odd));
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            vf_store(pairs + v * LANES, (vf)_mm512_permutexvar_epi16(interleave, both));
        }
    }
    return _mm512_reduce_min_epu32(least) >= (ql_bits_from_f32(BF16_LEAST) << 1) - 1u;
}

INLINE void pairs_tile(float *sums, const uint16_t *x, int64_t x_stride, const float *pairs, int64_t depth,
                       const int rows) {
    vf sum[TILE_ROWS][TILE_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = vf_load(sums + r * BLOCK + v * LANES);
    }
    for (int64_t i = 0; i < depth; i += 2, pairs += PANEL_STRIDE) {
        vf weight[TILE_VECTORS];
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) weight[v] = vf_load(pairs + v * LANES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + i, sizeof pair);
            vi activation = vi_set(pair);
            UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[r][v] = (vf)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)activation, (__m512bh)weight[v]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) vf_store(sums + r * BLOCK + v * LANES, sum[r][v]);
    }
}

/* sums[m][BLOCK] += sum_i x[m][i] * pairs[i / 2][BLOCK][i % 2] */
static void dense_pairs(float *sums, const uint16_t *x, int64_t x_stride, int64_t m, const float *pairs,
                        int64_t depth) {
    for (int v = 0; v < 8; v += TILE_VECTORS) {
        for (int64_t row = 0; row < m; row += TILE_ROWS) {
            float *to = sums + row * BLOCK + v * LANES;
            const uint16_t *from = x + row * x_stride;
            const float *weight = pairs + v * LANES;
            switch (m - row) {
            case 1: pairs_tile(to, from, x_stride, weight, depth, 1); break;
            case 2: pairs_tile(to, from, x_stride, weight, depth, 2); break;
            case 3: pairs_tile(to, from, x_stride, weight, depth, 3); break;
            case 4: pairs_tile(to, from, x_stride, weight, depth, 4); break;
            case 5: pairs_tile(to, from, x_stride, weight, depth, 5); break;
            default: pairs_tile(to, from, x_stride, weight, depth, TILE_ROWS); break;
            }
        }
    }
}

/* The fp32 product of a panel whose weights are too small for pairs: a few rows of x at a time as fp32. */
static void dense_small(float *sums, const uint16_t *x, int64_t x_stride, int64_t m, const float *panel,
                        int64_t depth) {
    float values[TILE_ROWS * BLOCK];
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = min_of(m - row, TILE_ROWS);
        for (int64_t i = 0; i < rows; i++) to_f32(values + i * BLOCK, x + (row + i) * x_stride, QL_BF16, depth);
        dense(sums + row * BLOCK, values, BLOCK, rows, panel, depth);
    }
}

static void bf16_range(void *context, int64_t begin, int64_t end) {
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
                const uint16_t *x = product->x_bf16 + m * product->x_stride + col;
                float *panel = own->panel, *pairs = own->turned;
                if (work->decode.n_lanes) {
                    n_block(panel, weight, &work->decode.n, &own->cache, row, col, cols);
                } else {
                    panel = own->turned, pairs = own->panel;
                    k_block(pairs, weight, &work->decode.k, work->decode.order, row, there, col, cols);
                    turn_block(panel, pairs, there, work->decode.order);
                }
                if (pack_pairs(pairs, panel, cols))
                    dense_pairs(own->sums, x, product->x_stride, rows, pairs, cols);
                else
                    dense_small(own->sums, x, product->x_stride, rows, panel, cols);
            }
            store_sums(product, m, rows, weight->n, own->sums,
                       weight->format == QL_FORMAT_AWQ ? work->decode.order : NULL, row);
        }
    }
    scratch_give(&work->pool, index);
}

/* Fewer rows than BF16_FUSED_ROWS in fp32, where pairs do not suit the format: panels would have to be made in either
 * case. One row, and two of GPTQ, are quicker by planes. */
static bool bf16_suits(const ql_weight *weight, int64_t m) {
    if (m > BF16_FUSED_ROWS) return true;
    if (has_n_lanes(weight) && n_planes_fits(weight) && m <= (weight->format == QL_FORMAT_GPTQ ? 2 : 1)) return false;
    return pairs_fit(weight);
}

static int bf16_linear(const ql_product *product) {
    if (product->m <= BF16_FUSED_ROWS) return pairs_linear(product);
    dense_work work = {.product = product, .weight = product->weight};
    return dense_run(&work, bf16_range, (product->weight->n + BLOCK - 1) / BLOCK, product->m);
}

#endif

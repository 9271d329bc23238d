/* The product of LLM.int8(): int8 rows against int8 rows, exact in int32, outlier columns in fp32 beside it. Part of the
 * kernels (see vector.h). */
#ifndef QL_CPU_INT8_H
#define QL_CPU_INT8_H

#include "dense.h"

#include <stdlib.h>

/* A sum of products below 127 * 128 fits int32 up to this many (a multiple of the load); longer rows go in segments. */
enum { INT8_SEGMENT = 1 << 17, INT8_TILE_N = 4, INT8_TILE_M = LANES == 16 ? 4 : 2 };

/* What a vector of weights becomes before products, and what a sum of such products has too much of, per activation:
 * VNNI multiplies unsigned bytes by signed ones, so codes go in plus 128. */
#ifdef QL_AVX512
enum { INT8_EXCESS = 128 };
#else
enum { INT8_EXCESS = 0 };
#endif

INLINE vi int8_weight(vi words) {
#ifdef QL_AVX512
    return words ^ (int32_t)0x80808080;
#else
    return words;
#endif
}

/* sum + products of the 4 * LANES bytes, in lanes of any grouping. */
INLINE vi int8_dot(vi sum, vi weight, vi activation) {
#if defined(QL_AVX512)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, (__m512i)activation);
#elif defined(QL_AVX2)
    for (int half = 0; half < 2; half++) {
        __m128i w = half ? _mm256_extracti128_si256((__m256i)weight, 1) : _mm256_castsi256_si128((__m256i)weight);
        __m128i x =
            half ? _mm256_extracti128_si256((__m256i)activation, 1) : _mm256_castsi256_si128((__m256i)activation);
        sum += (vi)_mm256_madd_epi16(_mm256_cvtepi8_epi16(w), _mm256_cvtepi8_epi16(x));
    }
    return sum;
#else
    /* Products as floats are exact, and so is the sum of four: baseline x86-64 multiplies no 32-bit integers. */
    vf products = {0};
    UNROLL
    for (int byte = 0; byte < 4; byte++)
        products += vf_from_int((vi)((vu)weight << (24 - 8 * byte)) >> 24) *
                    vf_from_int((vi)((vu)activation << (24 - 8 * byte)) >> 24);
    return sum + __builtin_convertvector(products, vi);
#endif
}

INLINE int32_t vi_sum(vi value) {
    int32_t lane[LANES];
    memcpy(lane, &value, sizeof lane);
    uint32_t sum = 0; /* it may wrap on the way, and comes out right */
    UNROLL
    for (int i = 0; i < LANES; i++) sum += (uint32_t)lane[i];
    return (int32_t)sum;
}

typedef struct int8_work {
    const ql_int8_product *product;
    const int64_t *excess; /* [m][segments]: INT8_EXCESS times the sum of the row's codes */
    int64_t segments;
} int8_work;

/* sums[m * LANES + r] for rows [row, row + n_count) of W and [m, m + m_count) of x, without the scales of W's rows. */
INLINE void int8_tile(const int8_work *work, float *sums, int64_t row, int64_t m, const int n_count,
                      const int m_count) {
    const ql_int8_product *product = work->product;
    const ql_weight *weight = product->weight;
    const int64_t k = weight->k;
    const int8_t *w = weight->int8.codes + row * k, *x = product->codes + m * product->codes_stride;
    int64_t total[INT8_TILE_M][INT8_TILE_N] = {{0}};
    for (int64_t segment = 0; segment < work->segments; segment++) {
        int64_t col = segment * INT8_SEGMENT, end = min_of(col + INT8_SEGMENT, k);
        vi sum[INT8_TILE_M][INT8_TILE_N];
        UNROLL
        for (int i = 0; i < m_count; i++) {
            UNROLL
            for (int r = 0; r < n_count; r++) sum[i][r] = vi_set(0);
        }
        for (; col < end; col += 4 * LANES) {
            vi codes[INT8_TILE_N];
            UNROLL
            for (int r = 0; r < n_count; r++) {
                codes[r] = int8_weight(k_load((const uint8_t *)w + r * k + col, end - col));
                if (n_count > 1) prefetch_rows(w + n_count * k, col, r, n_count, false);
            }
            UNROLL
            for (int i = 0; i < m_count; i++) {
                vi activation = vi_load(x + i * product->codes_stride + col);
                UNROLL
                for (int r = 0; r < n_count; r++) sum[i][r] = int8_dot(sum[i][r], codes[r], activation);
            }
        }
        UNROLL
        for (int i = 0; i < m_count; i++) {
            /* The excess is taken off before the sum is read as signed: with it, a sum may not fit. */
            uint32_t excess = (uint32_t)work->excess[(m + i) * work->segments + segment];
            UNROLL
            for (int r = 0; r < n_count; r++) total[i][r] += (int32_t)((uint32_t)vi_sum(sum[i][r]) - excess);
        }
    }
    for (int i = 0; i < m_count; i++)
        for (int r = 0; r < n_count; r++)
            /* No factor is denormal before it meets the sum: a token's absmax may be as small as it likes. */
            sums[i * LANES + r] = (float)total[i][r] * (1.0f / 127.0f) * product->x_absmax[m + i];
}

static void int8_outliers(const ql_int8_product *product, float *sums, int64_t row, int64_t count, int64_t m) {
    const ql_weight *weight = product->weight;
    const float *x = product->outliers + m * product->outlier_count;
    for (int64_t r = 0; r < count; r++) {
        const int8_t *codes = weight->int8.codes + (row + r) * weight->k;
        float sum = 0.0f;
        for (int64_t j = 0; j < product->outlier_count; j++) sum += x[j] * (float)codes[product->columns[j]];
        sums[r] += sum;
    }
}

INLINE void int8_rows(const int8_work *work, int64_t row, int64_t m, const int m_count) {
    const ql_int8_product *product = work->product;
    const ql_weight *weight = product->weight;
    int64_t count = min_of(weight->n - row, LANES), r = 0;
    float sums[INT8_TILE_M * LANES] = {0};
    if (m_count >
        1) /* one row of W after the other is the order of memory, and with one row of x there is nothing to share */
        for (; r + INT8_TILE_N <= count; r += INT8_TILE_N) int8_tile(work, sums + r, row + r, m, INT8_TILE_N, m_count);
    for (; r < count; r++) int8_tile(work, sums + r, row + r, m, 1, m_count);
    const vf row_scale = vf_convert(weight->int8.absmax, QL_F32, row, count) * vf_set(1.0f / 127.0f);
    for (int i = 0; i < m_count; i++) {
        float *own = sums + i * LANES;
        if (product->outlier_count) int8_outliers(product, own, row, count, m + i);
        /* A NaN absmax makes the row NaN in any product with it; an infinite one has to be told. */
        if (!isfinite(product->x_absmax[m + i]))
            for (int64_t j = 0; j < count; j++) own[j] = NAN;
        vf sum = vf_load(own) * row_scale;
        if (product->bias) sum = sum + vf_convert(product->bias, QL_F32, row, count);
        vf_store_as(product->out, product->dtype, (m + i) * weight->n + row, sum, count);
    }
}

enum { INT8_BLOCK = BLOCK }; /* rows of W an item: they stay in the cache while all of x meets them */

static void int8_range(void *context, int64_t begin, int64_t end) {
    const int8_work *work = context;
    const int64_t n = work->product->weight->n, m_count = work->product->m;
    for (int64_t block = begin * LANES; block < min_of(end * LANES, n); block += INT8_BLOCK) {
        int64_t block_end = min_of(min_of(block + INT8_BLOCK, end * LANES), n);
        for (int64_t m = 0; m < m_count; m += INT8_TILE_M) {
            for (int64_t row = block; row < block_end; row += LANES) {
                switch (min_of(m_count - m, INT8_TILE_M)) {
                case 1: int8_rows(work, row, m, 1); break;
                case 2: int8_rows(work, row, m, 2); break;
#if LANES == 16
                case 3: int8_rows(work, row, m, 3); break;
                default: int8_rows(work, row, m, 4); break;
#else
                default: break;
#endif
                }
            }
        }
    }
}

static int int8_linear(const ql_int8_product *product) {
    const int64_t k = product->weight->k, n = product->weight->n;
    int8_work work = {.product = product, .segments = (k + INT8_SEGMENT - 1) / INT8_SEGMENT};
    int64_t *excess = calloc((size_t)(product->m * work.segments + 1), sizeof *excess);
    if (!excess) return -1;
    if (INT8_EXCESS) {
        for (int64_t m = 0; m < product->m; m++)
            for (int64_t col = 0; col < k; col++)
                excess[m * work.segments + col / INT8_SEGMENT] +=
                    INT8_EXCESS * product->codes[m * product->codes_stride + col];
    }
    work.excess = excess;
    int64_t items = (n + LANES - 1) / LANES, grain = items / (8 * ql_cpu_thread_count());
    ql_cpu_parallel(items, grain < 1 ? 1 : min_of(grain, 8), int8_range, &work);
    free(excess);
    return 0;
}

#endif

/* Products with few rows of bf16 and a GPTQ weight of 4 bits or an AWQ weight, on processors that multiply pairs of bf16
 * (AVX512_BF16): as in fused_n.h, two columns of x an operation. Part of the AVX-512 kernels (see vector.h).
 *
 * `vpermw` looks up 32 values of 16 bits, so one permutation turns two codes of a word into a pair of bf16. Codes less
 * their zeros are integers that bf16 holds exactly; their sums are scaled in fp32. As dense_bf16.h says, the instruction
 * flushes denormal numbers; none can arise here: activations are zero or at least BF16_LEAST, integers at least 1. */
#ifndef QL_CPU_FUSED_N_BF16_H
#define QL_CPU_FUSED_N_BF16_H

#include "fused_n.h"

INLINE vf dot_pairs(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

/* table[i] for the low five bits of each 16-bit lane. */
INLINE vi pair_at(vi table, vi index) { return (vi)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table); }

typedef struct n_pairs {
    n_parts parts;
    const int32_t *x; /* [pairs][m]: columns 8u + j and 8u + j + 4 in pair 4u + j (GPTQ), 2i and 2i + 1 in i (AWQ) */
    vi table;         /* of the 32 integers of five bits, signed */
} n_pairs;

/* Nibble j of each half of the words, less its zero, for j = 0..3. zeros[0]: bytes to subtract from the even nibbles,
 * zeros[1]: from the odd ones. */
INLINE void n_pair_values(vi value[4], vi words, const vi *zeros, vi table) {
    const vi nibbles = vi_set(0x0f0f0f0f);
    vi even = (vi)_mm512_sub_epi8((__m512i)(words & nibbles), (__m512i)zeros[0]);
    vi odd = (vi)_mm512_sub_epi8((__m512i)(vi_shift(words, 4) & nibbles), (__m512i)zeros[1]);
    value[0] = pair_at(table, even);
    value[1] = pair_at(table, odd);
    value[2] = pair_at(table, vi_shift(even, 8));
    value[3] = pair_at(table, vi_shift(odd, 8));
}

/* `whole`, `ahead`: as in n_gptq_chunk. */
INLINE void n_pairs_gptq_chunk(float *sums, int64_t width, const int32_t *from, int64_t n, int64_t rows,
                               uintptr_t ahead, const int32_t *x, int64_t units, const float *zeros,
                               const float *scales, vi table, const bool whole, const int vectors, const int m_count) {
    vf sum[8][MAX_FUSED_ROWS];
    vi zero[8];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        zero[v] = __builtin_convertvector(vf_load(zeros + v * LANES), vi) * 0x01010101;
        UNROLL
        for (int m = 0; m < m_count; m++) sum[v][m] = vf_set(0);
    }
    for (int64_t unit = 0; unit < units; unit++, from += n, x += 4 * m_count) {
        UNROLL
        for (int v = 0; v < vectors; v++) {
            if (v == 0 || m_count > 1) forget_memory(); /* the activations of one row stay in registers */
            vi words = whole ? vi_load(from + v * LANES) : vi_load_some(from + v * LANES, rows - v * LANES), value[4];
            __builtin_prefetch((const void *)((uintptr_t)(from + v * LANES) + ahead));
            n_pair_values(value, words, (const vi[2]){zero[v], zero[v]}, table);
            UNROLL
            for (int j = 0; j < 4; j++) {
                UNROLL
                for (int m = 0; m < m_count; m++)
                    sum[v][m] = dot_pairs(sum[v][m], value[j], vi_set(x[j * m_count + m]));
            }
        }
    }
    n_scale(sums, width, sum, scales, vectors, m_count);
}

INLINE void gptq_pairs_item(const n_pairs *work, int64_t index, const int m_count) {
    const ql_weight *weight = work->parts.product->weight;
    const int64_t n = weight->n, width = work->parts.width, group_size = weight->gptq.group_size;
    const int vectors = gptq_vectors(m_count);
    const vi table = work->table;
    const n_item item = n_item_of(&work->parts, index);
    float zeros[BLOCK], scales[BLOCK];
    for (int64_t col = item.col, cols; col < item.col_end; col += cols) {
        cols = n_cols(&item, col, group_size, MAX_CHUNK);
        const int32_t *x = work->x + col / 2 * m_count;
        const int64_t units = (cols + 7) / 8;
        for (int64_t at = item.row; at < item.row_end; at += BLOCK) {
            gptq_group(zeros, scales, weight, col / group_size, at);
            for (int v = 0; v < 8 && at + v * LANES < n; v += vectors) {
                const int64_t row = at + v * LANES;
                const int32_t *from = weight->gptq.qweight + col / 8 * n + row;
                const uintptr_t ahead = gptq_ahead(&item, row, units, n, vectors);
                if (row + vectors * LANES <= n) {
                    n_pairs_gptq_chunk(item.sums + row, width, from, n, n - row, ahead, x, units, zeros + v * LANES,
                                       scales + v * LANES, table, true, vectors, m_count);
                    continue;
                }
                for (int i = 0; i < vectors && row + i * LANES < n; i++)
                    n_pairs_gptq_chunk(item.sums + row + i * LANES, width, from + i * LANES, n, n - row - i * LANES,
                                       ahead, x, units, zeros + (v + i) * LANES, scales + (v + i) * LANES, table, false,
                                       1, m_count);
            }
        }
    }
}

/* zeros[half][parity]: what n_pair_values subtracts from the words of that half. */
INLINE void n_pairs_awq_zeros(vi zeros[2][2], const ql_awq *awq, int64_t words, int64_t group, int64_t row) {
    vi packed = vi_load_some(awq->qzeros + group * words + row / 8, words - row / 8);
    UNROLL
    for (int parity = 0; parity < 2; parity++) {
        vi bytes = vi_shift(packed, 4 * parity) & 0x0f0f0f0f;
        zeros[0][parity] = (bytes & 0xffff) | bytes << 16;
        zeros[1][parity] = vi_shift(bytes, 16) | (bytes & (int32_t)0xffff0000);
    }
}

/* Nibbles 4 * first_half and on, `vectors` of them, 4 or 8. */
INLINE void n_pairs_awq_chunk(float *sums, int64_t width, const int32_t *from, int64_t words, int64_t left,
                              n_ahead *ahead, const int32_t *x, int64_t cols, vi zeros[2][2], const float *scales,
                              vi table, const int first_half, const int vectors, const int m_count) {
    vf sum[8][MAX_FUSED_ROWS];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        UNROLL
        for (int m = 0; m < m_count; m++) sum[v][m] = vf_set(0);
    }
    for (int64_t col = 0; col < cols; col += 2, from += 2 * words, x += m_count) {
        vi one = vi_load_some(from, left), two = vi_load_some(from + words, left);
        if (first_half == 0) {
            n_fetch(ahead);
            n_fetch(ahead);
        }
        UNROLL
        for (int h = 0; h < vectors / 4; h++) {
            const int half = first_half + h;
            vi halves = half ? (vi)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)vi_shift(one, 16), (__m512i)two)
                             : (vi)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)one, (__m512i)(two << 16));
            vi value[4];
            n_pair_values(value, halves, zeros[half], table);
            UNROLL
            for (int j = 0; j < 4; j++) {
                UNROLL
                for (int m = 0; m < m_count; m++)
                    sum[4 * h + j][m] = dot_pairs(sum[4 * h + j][m], value[j], vi_set(x[m]));
            }
        }
    }
    n_scale(sums, width, sum, scales, vectors, m_count);
}

INLINE void awq_pairs_item(const n_pairs *work, int64_t index, const int m_count) {
    const ql_weight *weight = work->parts.product->weight;
    const ql_awq *awq = &weight->awq;
    const int64_t words = (weight->n + 7) / 8, width = work->parts.width;
    const int vectors = awq_vectors(m_count);
    const vi table = work->table;
    const n_item item = n_item_of(&work->parts, index);
    for (int64_t col = item.col, cols; col < item.col_end; col += cols) {
        const int64_t group = col / awq->group_size;
        const bool new_group = col == item.col || col % awq->group_size == 0;
        cols = n_cols(&item, col, awq->group_size, awq_chunk(m_count));
        n_ahead ahead = awq_ahead(&item, awq->qweight, words, col + cols);
        for (int64_t at = item.row; at < item.row_end; at += BLOCK) {
            float *scales = item.scales + at;
            vi zeros[2][2];
            if (new_group) awq_scales(scales, weight, group, at);
            n_pairs_awq_zeros(zeros, awq, words, group, at);
            UNROLL
            for (int first = 0; first < 8; first += vectors)
                n_pairs_awq_chunk(item.sums + at + first * LANES, width, awq->qweight + col * words + at / 8, words,
                                  words - at / 8, &ahead, work->x + col / 2 * m_count, cols, zeros,
                                  scales + first * LANES, table, first / 4, vectors, m_count);
        }
    }
}

#define N_PAIRS_BODY(name, item, m_count)                                                                              \
    static void name(void *context, int64_t begin, int64_t end) {                                                      \
        for (int64_t i = begin; i < end; i++) item(context, i, m_count);                                               \
    }
#define N_PAIRS_BODIES(name, item)                                                                                     \
    N_PAIRS_BODY(name##_1, item, 1)                                                                                    \
    N_PAIRS_BODY(name##_2, item, 2)                                                                                    \
    N_PAIRS_BODY(name##_3, item, 3)                                                                                    \
    N_PAIRS_BODY(name##_4, item, 4)

N_PAIRS_BODIES(gptq4_pairs, gptq_pairs_item)
N_PAIRS_BODIES(awq_pairs, awq_pairs_item)

/* Pairs of columns must not straddle groups. */
static bool n_pairs_fits(const ql_weight *weight) {
    if (!n_fused_fits(weight)) return false;
    if (weight->format == QL_FORMAT_GPTQ) return weight->gptq.bits == 4;
    return weight->awq.group_size >= weight->k || weight->awq.group_size % 2 == 0;
}

static int n_pairs_linear(const ql_product *product) {
    static loop_body *const bodies[2][MAX_FUSED_ROWS] = {BODIES(gptq4_pairs), BODIES(awq_pairs)};
    const ql_weight *weight = product->weight;
    const bool awq = weight->format == QL_FORMAT_AWQ;
    const int64_t m_count = product->m, units = (weight->k + 7) / 8;
    uint16_t *x = calloc((size_t)(units * m_count), 8 * sizeof *x);
    if (!x) return -1;
    for (int64_t m = 0; m < m_count; m++) {
        const uint16_t *from = product->x_bf16 + m * product->x_stride;
        for (int64_t col = 0; col < weight->k; col++) {
            int64_t pair = awq ? col / 2 : col / 8 * 4 + col % 4, side = awq ? col % 2 : col / 4 % 2;
            x[(pair * m_count + m) * 2 + side] = from[col];
        }
    }
    n_pairs work = {.parts = {.product = product}, .x = (const int32_t *)(const void *)x};
    uint16_t table[32];
    for (int i = 0; i < 32; i++) table[i] = ql_bf16_from_f32((float)(i < 16 ? i : i - 32));
    memcpy(&work.table, table, sizeof table);
    int status = n_parts_run(&work.parts, bodies[awq][m_count - 1]);
    free(x);
    return status;
}

#endif

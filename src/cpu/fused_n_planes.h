/* Products with few rows of x and a weight of GPTQ with 4 or 8 bits or of AWQ by VNNI: four columns of K an operation,
 * codes as they are in the checkpoint's bytes. Part of the kernels (see vector.h); others than AVX-512's use fused_n.h.
 *
 * The columns of a chunk of x are integers times one power of two, where the least of them lies within 2^22 (or 2^30)
 * of the largest: bf16 and fp16 seldom reach further in 64 columns. Such integers are written in three (or four) digits
 * of base 256 from -128 to 127, a plane each. Sums of codes times digits, less zeros times the sum of digits, are exact
 * in int32; what is rounded is their sum over planes, by 2^-24 of at most three times |q - z| |x|. Chunks that reach
 * further, are not finite, or lie where powers of two would overflow go the way of fused_n.h. */
#ifndef QL_CPU_FUSED_N_PLANES_H
#define QL_CPU_FUSED_N_PLANES_H

#include "fused_n.h"

#ifdef QL_AVX512

enum { PLANES = 4, PLANES_CHUNK = 64 };

/* A chunk of x. */
typedef struct n_planes {
    /* [quads][m][PLANES]: a word has a plane's digits of 4 columns */
    int32_t digits[PLANES_CHUNK / 4 * MAX_FUSED_ROWS * PLANES];
    int32_t minus_sum[MAX_FUSED_ROWS][PLANES]; /* less the sum of a plane's digits: fits 16 bits */
    float unit[MAX_FUSED_ROWS];                /* x = unit * sum_p 256^p digit[p] */
} n_planes;

/* Where a word's four columns come from: those of a quad, or the even and the odd ones of eight (GPTQ's nibbles). */
INLINE vi quad_columns(const bool nibbles) {
    if (!nibbles) return vi_lane();
    return (vi){0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
}

/* The largest of |x|, as bits: not finite is more than all others. */
INLINE uint32_t largest_bits(const float *x, int64_t cols) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t col = 0; col < cols; col += LANES)
        most = _mm512_max_epu32(most, (__m512i)(vi_load_some(x + col, cols - col) & 0x7fffffff));
    return _mm512_reduce_max_epu32(most);
}

/* Row m's digits in `planes` planes, whose integers are at most `limit`; false where they cannot hold it. */
INLINE bool n_digits(n_planes *to, const float *x, int64_t cols, int m, const int m_count, const bool nibbles,
                     const int planes) {
    const float limit = planes == 3 ? 0x7f7f7fp0f : 0x7f7f7fp8f;
    const uint32_t most = largest_bits(x, cols);
    /* 2^64 and more; 2^-64 and less */
    if (most >= (127 + 64) << 23 || (most && most < (127 - 64) << 23)) return false;
    int32_t exponent = 8 * planes - 2 - ((int32_t)(most >> 23) - 127);
    if (!most) exponent = 0;
    if (ql_f32_from_bits(most) * ql_f32_from_bits((uint32_t)(127 + exponent) << 23) > limit) exponent--;
    const vf up = vf_set(ql_f32_from_bits((uint32_t)(127 + exponent) << 23));
    const vu bias = (vu)vi_set(planes == 3 ? 0x808080 : (int32_t)0x80808080u);
    const __m512i turn = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    __m512i sums = _mm512_setzero_si512();
    __mmask16 inexact = 0;
    for (int64_t col = 0; col < cols; col += LANES) {
        vf scaled = (vf)vi_permute(vi_load_some(x + col, cols - col), quad_columns(nibbles)) * up;
        vi whole = (vi)_mm512_cvtps_epi32((__m512)scaled);
        inexact |= _mm512_cmp_ps_mask((__m512)scaled, (__m512)vf_from_int(whole), _CMP_NEQ_UQ);
        /* Bytes of the sum less 128 each, as signed ones, are the digits. */
        __m512i digits = _mm512_shuffle_epi8((__m512i)(((vu)whole + bias) ^ bias), turn);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), digits);
        for (int quad = 0; quad < LANES / 4; quad++) {
            int32_t lane[LANES];
            memcpy(lane, &digits, sizeof lane);
            memcpy(to->digits + ((col / 4 + quad) * m_count + m) * PLANES, lane + 4 * quad, 4 * sizeof *lane);
        }
    }
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i *)(void *)to->minus_sum[m], _mm_sub_epi32(_mm_setzero_si128(), sum));
    to->unit[m] = ql_f32_from_bits((uint32_t)(127 - exponent) << 23);
    return !inexact;
}

/* The number of planes that hold the chunk, 3 or 4, or 0 where none do. */
INLINE int n_planes_of(n_planes *to, const float *x, int64_t x_stride, int64_t cols, const bool nibbles,
                       const int m_count) {
    int planes = 3;
    for (int m = 0; m < m_count && planes == 3; m++)
        if (!n_digits(to, x + m * x_stride, cols, m, m_count, nibbles, 3)) planes = 4;
    for (int m = 0; m < m_count && planes == 4; m++)
        if (!n_digits(to, x + m * x_stride, cols, m, m_count, nibbles, 4)) planes = 0;
    return planes;
}

INLINE vi dot_bytes(vi sum, vi unsigned_bytes, vi signed_bytes) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
}

/* sums[m] += scales * unit[m] / divisor * sum_p 256^p (sum[m][p] - zero * the sum of digits) */
INLINE void n_planes_scale(float *sums, int64_t width, vi sum[MAX_FUSED_ROWS][PLANES], vi zero, vf scale,
                           const n_planes *x, float divisor, const int planes, const int m_count) {
    UNROLL
    for (int m = 0; m < m_count; m++) {
        vf total = vf_set(0);
        UNROLL
        for (int p = planes - 1; p >= 0; p--) {
            vf part = vf_from_int(
                (vi)_mm512_dpwssd_epi32((__m512i)sum[m][p], (__m512i)zero, (__m512i)vi_set(x->minus_sum[m][p])));
            total = p == planes - 1 ? part : vf_fma(total, vf_set(256.0f), part);
        }
        float *to = sums + m * width;
        vf_store(to, vf_fma(total * vf_set(x->unit[m] / divisor), scale, vf_load(to)));
    }
}

/* Vectors of rows of W whose sums fit the registers. */
INLINE int n_planes_vectors(const int planes, const int m_count) {
    return 4 * m_count * planes <= 24 ? 4 : 2 * m_count * planes <= 24 ? 2 : 1;
}

/* ---- GPTQ ---- */

/* The zeros of group `group` for LANES rows from `row` on, a multiple of LANES. */
INLINE vi gptq_zeros(const ql_gptq *gptq, int64_t n, int64_t group, int64_t row, const int bits) {
    const int64_t words = (n * bits + 31) / 32, word = row * bits / 32;
    vi packed = vi_load_some(gptq->qzeros + group * words + word, words - word);
    vi zero;
    if (bits == 8)
        zero = (vi)_mm512_cvtepu8_epi32(_mm512_castsi512_si128((__m512i)packed));
    else
        zero = (vi)((vu)vi_permute(packed, vi_lane() >> 3) >> (vu)((vi_lane() & 7) << 2));
    return (zero + gptq->zero_offset) & ((1 << bits) - 1);
}

/* `whole`, `ahead`: as in n_gptq_chunk. */
INLINE void n_planes_gptq_chunk(float *sums, int64_t width, const ql_weight *weight, int64_t group, int64_t col,
                                int64_t row, uintptr_t ahead, const n_planes *x, int64_t units, const int bits,
                                const bool whole, const int vectors, const int planes, const int m_count) {
    const ql_gptq *gptq = &weight->gptq;
    const int64_t n = weight->n, rows = n - row;
    const int32_t *from = gptq->qweight + col * bits / 32 * n + row;
    const vi nibbles = vi_set(0x0f0f0f0f);
    const int words = 8 / bits;
    vi sum[4][MAX_FUSED_ROWS][PLANES];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        UNROLL
        for (int m = 0; m < m_count; m++) {
            UNROLL
            for (int p = 0; p < planes; p++) sum[v][m][p] = vi_set(0);
        }
    }
    const int32_t *digits = x->digits;
    for (int64_t unit = 0; unit < units; unit++, from += n, digits += words * m_count * PLANES) {
        UNROLL
        for (int v = 0; v < vectors; v++) {
            if (v == 0 || m_count > 1) forget_memory(); /* the activations of one row stay in registers */
            const int32_t *here = from + v * LANES;
            vi packed = whole ? vi_load(here) : vi_load_some(here, rows - v * LANES);
            __builtin_prefetch((const void *)((uintptr_t)here + ahead));
            UNROLL
            for (int w = 0; w < words; w++) {
                vi codes = bits == 8 ? packed : vi_shift(packed, 4 * w) & nibbles;
                UNROLL
                for (int m = 0; m < m_count; m++) {
                    UNROLL
                    for (int p = 0; p < planes; p++)
                        sum[v][m][p] = dot_bytes(sum[v][m][p], codes, vi_set(digits[(w * m_count + m) * PLANES + p]));
                }
            }
        }
    }
    UNROLL
    for (int v = 0; v < vectors; v++) {
        const int64_t at = row + v * LANES;
        vi zero = gptq_zeros(gptq, n, group, at, bits);
        vf scale = vf_convert(gptq->scales, gptq->scales_dtype, group * n + at, n - at);
        n_planes_scale(sums + at, width, sum[v], zero, scale, x, 1.0f, planes, m_count);
    }
}

/* The chunk's columns by all of the item's rows. */
INLINE void gptq_planes_chunk(const n_fused *work, const n_item *item, int64_t col, int64_t cols, const n_planes *x,
                              const int bits, const int planes, const int m_count) {
    const ql_weight *weight = work->parts.product->weight;
    const int64_t n = weight->n, width = work->parts.width, units = (cols * bits + 31) / 32;
    const int vectors = n_planes_vectors(planes, m_count);
    const int64_t group = col / weight->gptq.group_size;
    for (int64_t row = item->row; row < min_of(item->row_end, n); row += vectors * LANES) {
        const uintptr_t ahead = gptq_ahead(item, row, units, n, vectors);
        if (row + vectors * LANES <= n) {
            n_planes_gptq_chunk(item->sums, width, weight, group, col, row, ahead, x, units, bits, true, vectors,
                                planes, m_count);
            continue;
        }
        for (int64_t at = row; at < n; at += LANES)
            n_planes_gptq_chunk(item->sums, width, weight, group, col, at, ahead, x, units, bits, false, 1, planes,
                                m_count);
    }
}

INLINE void gptq_planes_item(const n_fused *work, int64_t index, const int bits, const int m_count) {
    const ql_product *product = work->parts.product;
    const n_item item = n_item_of(&work->parts, index);
    n_planes x;
    for (int64_t col = item.col, cols; col < item.col_end; col += cols) {
        /* Eight rows of words: 16 runs are more than the processor follows, by a quarter of the time. */
        cols = n_cols(&item, col, product->weight->gptq.group_size, 8 * (32 / bits));
        switch (n_planes_of(&x, product->x + col, product->x_stride, cols, bits == 4, m_count)) {
        case 3: gptq_planes_chunk(work, &item, col, cols, &x, bits, 3, m_count); break;
        case 4: gptq_planes_chunk(work, &item, col, cols, &x, bits, 4, m_count); break;
        default: gptq_fused_chunk(work, &item, col, cols, bits, m_count); break;
        }
    }
}

/* ---- AWQ ---- */

/* byte[b] lane i = byte b of word i of each of four columns, for b in [first, first + bytes). */
INLINE void quad_bytes(vi byte[4], const vi column[4], const int first, const int bytes) {
    const vi word = (vi_lane() & 3) * 0x04040404; /* of 16 bytes, where bytes 0, 0 to 3, 3 are taken from below */
    const __m512i even = (__m512i)(word + 0x02020000), odd = (__m512i)(word + 0x03030101);
    const __m512i low = (__m512i)(word + 0x01000100), high = (__m512i)(word + 0x03020302);
    vi part[2][2]; /* [columns 2i, 2i + 1][parity]: bytes parity and parity + 2 of each */
    UNROLL
    for (int i = 0; i < 2; i++) {
        __m512i one = (__m512i)column[2 * i], two = (__m512i)column[2 * i + 1];
        part[i][0] = (vi)_mm512_mask_shuffle_epi8(one, 0xaaaaaaaaaaaaaaaau, two, even);
        part[i][1] = (vi)_mm512_mask_shuffle_epi8(two, 0x5555555555555555u, one, odd);
    }
    UNROLL
    for (int b = first; b < first + bytes; b++) {
        __m512i one = (__m512i)part[0][b & 1], two = (__m512i)part[1][b & 1];
        byte[b] = (vi)(b < 2 ? _mm512_mask_shuffle_epi8(one, 0xccccccccccccccccu, two, low)
                             : _mm512_mask_shuffle_epi8(two, 0x3333333333333333u, one, high));
    }
}

/* Four lines by n_fetch. */
INLINE void n_fetch_quad(n_ahead *ahead) {
    if (ahead->run_end - ahead->line <= 4 * 64) {
        UNROLL
        for (int i = 0; i < 4; i++) n_fetch(ahead);
        return;
    }
    UNROLL
    for (int i = 0; i < 4; i++) __builtin_prefetch((const void *)(ahead->line + 64u * (unsigned)i), 0, 2);
    ahead->line += 4 * 64;
}

/* Bytes [first, first + bytes) of each word: of two rows of W each, 2 * bytes vectors of sums. The lower nibble's sum
 * is what the byte's has over sixteen times the upper one's. */
INLINE void n_planes_awq_quad(vi sum[8][MAX_FUSED_ROWS][PLANES], const int32_t *from, int64_t words, __mmask16 there,
                              int64_t cols, const int32_t *digits, const int first, const int bytes, const int planes,
                              const int m_count) {
    const vi upper = vi_set((int32_t)0xf0f0f0f0u);
    vi column[4], byte[4];
    UNROLL
    for (int c = 0; c < 4; c++)
        column[c] = c < cols ? (vi)_mm512_maskz_loadu_epi32(there, from + c * words) : vi_set(0);
    quad_bytes(byte, column, first, bytes);
    UNROLL
    for (int b = 0; b < bytes; b++) {
        vi codes = byte[first + b];
        UNROLL
        for (int m = 0; m < m_count; m++) {
            UNROLL
            for (int p = 0; p < planes; p++) {
                vi digit = vi_set(digits[m * PLANES + p]);
                sum[2 * b][m][p] = dot_bytes(sum[2 * b][m][p], codes, digit);
                sum[2 * b + 1][m][p] = dot_bytes(sum[2 * b + 1][m][p], codes & upper, digit);
            }
        }
    }
}

INLINE void n_planes_awq_chunk(float *sums, int64_t width, const int32_t *from, int64_t words, int64_t left,
                               n_ahead *ahead, const n_planes *x, int64_t cols, vi zeros, const float *scales,
                               const int first, const int bytes, const int planes, const int m_count) {
    const __mmask16 there = (__mmask16)(left >= LANES ? 0xffffu : left > 0 ? (1u << left) - 1u : 0u);
    vi sum[8][MAX_FUSED_ROWS][PLANES];
    UNROLL
    for (int v = 0; v < 2 * bytes; v++) {
        UNROLL
        for (int m = 0; m < m_count; m++) {
            UNROLL
            for (int p = 0; p < planes; p++) sum[v][m][p] = vi_set(0);
        }
    }
    const int32_t *digits = x->digits;
    for (; cols >= 4; cols -= 4, from += 4 * words, digits += m_count * PLANES) {
        if (first == 0) n_fetch_quad(ahead);
        n_planes_awq_quad(sum, from, words, there, 4, digits, first, bytes, planes, m_count);
    }
    if (cols) n_planes_awq_quad(sum, from, words, there, cols, digits, first, bytes, planes, m_count);
    UNROLL
    for (int b = 0; b < bytes; b++) {
        const int v = 2 * (first + b);
        UNROLL
        for (int m = 0; m < m_count; m++) {
            UNROLL
            for (int p = 0; p < planes; p++) sum[2 * b][m][p] -= sum[2 * b + 1][m][p];
        }
        vi both = vi_shift(zeros, 8 * (first + b));
        n_planes_scale(sums + v * LANES, width, sum[2 * b], both & 0x0f, vf_load(scales + v * LANES), x, 1.0f, planes,
                       m_count);
        n_planes_scale(sums + (v + 1) * LANES, width, sum[2 * b + 1], both & 0xf0, vf_load(scales + (v + 1) * LANES), x,
                       16.0f, planes, m_count);
    }
}

INLINE void awq_planes_chunk(const n_fused *work, const n_item *item, int64_t col, int64_t cols, bool new_group,
                             const n_planes *x, const int planes, const int m_count) {
    const ql_weight *weight = work->parts.product->weight;
    const ql_awq *awq = &weight->awq;
    const int64_t words = (weight->n + 7) / 8, width = work->parts.width, group = col / awq->group_size;
    const int bytes = planes * m_count <= 3 ? 4 : planes * m_count <= 6 ? 2 : 1;
    n_ahead ahead = awq_ahead(item, awq->qweight, words, col + cols);
    for (int64_t at = item->row; at < item->row_end; at += BLOCK) {
        const vi zeros = vi_load_some(awq->qzeros + group * words + at / 8, words - at / 8);
        float *scales = item->scales + at;
        if (new_group) awq_scales(scales, weight, group, at);
        UNROLL
        for (int first = 0; first < 4; first += bytes)
            n_planes_awq_chunk(item->sums + at, width, awq->qweight + col * words + at / 8, words, words - at / 8,
                               &ahead, x, cols, zeros, scales, first, bytes, planes, m_count);
    }
}

INLINE void awq_planes_item(const n_fused *work, int64_t index, const int m_count) {
    const ql_product *product = work->parts.product;
    const int64_t group_size = product->weight->awq.group_size;
    const n_item item = n_item_of(&work->parts, index);
    n_planes x;
    for (int64_t col = item.col, cols; col < item.col_end; col += cols) {
        const bool new_group = col == item.col || col % group_size == 0;
        cols = n_cols(&item, col, group_size, PLANES_CHUNK);
        switch (n_planes_of(&x, product->x + col, product->x_stride, cols, false, m_count)) {
        case 3: awq_planes_chunk(work, &item, col, cols, new_group, &x, 3, m_count); break;
        case 4: awq_planes_chunk(work, &item, col, cols, new_group, &x, 4, m_count); break;
        default: awq_fused_chunk(work, &item, col, cols, new_group, m_count); break;
        }
    }
}

#define PLANES_BODIES(name, call)                                                                                      \
    N_BODY(name##_1, call(1))                                                                                          \
    N_BODY(name##_2, call(2))                                                                                          \
    N_BODY(name##_3, call(3))                                                                                          \
    N_BODY(name##_4, call(4))
#define GPTQ4_ITEM(m_count) gptq_planes_item(work, i, 4, m_count)
#define GPTQ8_ITEM(m_count) gptq_planes_item(work, i, 8, m_count)
#define AWQ_ITEM(m_count) awq_planes_item(work, i, m_count)
PLANES_BODIES(gptq4_planes, GPTQ4_ITEM)
PLANES_BODIES(gptq8_planes, GPTQ8_ITEM)
PLANES_BODIES(awq_planes, AWQ_ITEM)

/* Words of four columns must not straddle groups. */
static bool n_planes_fits(const ql_weight *weight) {
    if (!n_fused_fits(weight)) return false;
    if (weight->format == QL_FORMAT_GPTQ) return weight->gptq.bits == 4 || weight->gptq.bits == 8;
    return weight->awq.group_size >= weight->k || weight->awq.group_size % 4 == 0;
}

static int n_planes_linear(const ql_product *product) {
    static loop_body *const bodies[3][MAX_FUSED_ROWS] = {BODIES(gptq4_planes), BODIES(gptq8_planes),
                                                         BODIES(awq_planes)};
    const bool awq = product->weight->format == QL_FORMAT_AWQ;
    const int bits = awq ? 4 : product->weight->gptq.bits;
    n_fused work = {.parts = {.product = product}};
    n_decoder_init(&work.decoder, bits);
    return n_parts_run(&work.parts, bodies[awq ? 2 : bits / 4 - 1][product->m - 1]);
}

static int n_linear(const ql_product *product) {
    return n_planes_fits(product->weight) ? n_planes_linear(product) : n_fused_linear(product);
}

#else

static int n_linear(const ql_product *product) { return n_fused_linear(product); }

#endif

#endif

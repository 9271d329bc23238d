/* Outputs of the 8-bit product on wgmma: what scales the sums of a tile, and how they are stored. */
#ifndef QL_KERNELS_W8A8_OUTPUTS_CUH
#define QL_KERNELS_W8A8_OUTPUTS_CUH

#include "int8_output.cuh"
#include "w8a8_frame.cuh"

enum {
    MOST_SUMS = 128,
    OUTPUT_BARRIER = 1, /* and the next: a warpgroup each */
    OUTPUT_TOKENS = 16,
    OUTPUT_BYTES = OUTPUT_TOKENS * 128 /* of 64 rows: a warpgroup has two of them */
};

/* A multiplying warp's place: its sums are WIDTH / 2 registers. */
typedef struct reader {
    const ql_w8a8_wgmma_params *q;
    const layout *l;
    ring stage, scales;
    uint32_t slots;       /* parities of outlier slots */
    uint32_t rows, width; /* descriptors in the first stage: the warpgroup's rows, and what they are multiplied with */
    uint32_t pair;        /* turned: scales of the lane's tokens in the first stage */
    int turn;             /* which of the two buffers of outputs is next: its place */
    int column;           /* the lane's of the listed outlier columns */
} reader;

static __device__ __forceinline__ int lane_of(void) { return (int)threadIdx.x % WARP; }

/* ---- outputs ---- */

/* Of the lane's rows g and g + 8. */
typedef struct row_terms {
    float scale[2], bias[2];
} row_terms;

static __device__ __forceinline__ float load_row_scale(const ql_w8a8_params *p, int64_t row, shape k) {
    const int64_t index = p->w_rows == 1 ? row : p->w_rows == QL_W8A8_GROUP ? row / QL_W8A8_GROUP : 0;
    /* Those of blocks come with the stages. */
    if (row >= p->n || (k.grouped && p->w_rows == QL_W8A8_GROUP)) return 1.0f;
    const float scale = p->w_scales[index * p->w_row_stride];
    return k.code == QL_W8A8_INT8 ? scale * (1.0f / 127.0f) : scale;
}

static __device__ __forceinline__ float load_row_bias(const ql_w8a8_params *p, int64_t row) {
    return row < p->n ? BIAS_AT(p, row) : 0.0f;
}

static __device__ __forceinline__ row_terms load_row_terms(const ql_w8a8_params *p, int row, shape k) {
    row_terms r;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r.scale[i] = load_row_scale(p, row + 8 * i, k);
        r.bias[i] = load_row_bias(p, row + 8 * i);
    }
    return r;
}

/* Of two neighbouring tokens of two groups of eight: sums 8 j to 8 j + 7 belong to tokens (c / 4, c % 2), rows c / 2 % 2. */
typedef struct token_scales {
    float scale[4];
} token_scales;

static __device__ __forceinline__ token_scales load_token_scales(const reader *d, int j, shape k) {
    const uint4 four = load_shared_16(d->l->tile_scales + d->scales.slot * k.tokens * 4 + j * 64 + lane_of() % 4 * 16);
    const token_scales s = {
        {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)}};
    return s;
}

static __device__ __forceinline__ void await_scales(const reader *d) {
    barrier_wait(d->l->scales_full + 8 * d->scales.slot, d->scales.parity);
}

static __device__ __forceinline__ void leave_scales(reader *d) {
    __syncwarp();
    if (lane_of() == 0) barrier_arrive(d->l->scales_empty + 8 * d->scales.slot);
    advance(&d->scales, 2);
}

/* Sums become fp32, times the tokens' scales, in the order of w8a8.h. */
static __device__ __forceinline__ void scale_by_tokens(uint32_t *sums, reader *d, shape k) {
    await_scales(d);
#pragma unroll
    for (int j = 0; j < k.tokens / 16; j++) {
        const token_scales tokens = load_token_scales(d, j, k);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            uint32_t *sum = sums + 8 * j + c;
            const float scale = tokens.scale[c / 4 * 2 + c % 2];
            *sum = __float_as_uint(k.code == QL_W8A8_INT8 ? int8_by_token((float)(int32_t)*sum, scale)
                                                          : __uint_as_float(*sum) * scale);
        }
    }
    leave_scales(d);
}

/* A sum of row g + 8 * h, times its token's scale, as an output. */
static __device__ __forceinline__ float finished(uint32_t sum, const row_terms *rows, int h, shape k) {
    const float value = __uint_as_float(sum);
    return k.code == QL_W8A8_INT8 ? int8_by_row(value, rows->scale[h], rows->bias[h])
                                  : __fmaf_rn(value, rows->scale[h], rows->bias[h]);
}

/* 64 rows as they are in registers: 32 bytes along a row of out. */
static __device__ __forceinline__ void store_wide(const uint32_t *sums, const ql_w8a8_params *p, const row_terms *rows,
                                                  int row, int token, shape k) {
#pragma unroll
    for (int c = 0; c < k.tokens / 2; c++) {
        const int64_t m = token + c / 4 * 8 + lane_of() % 4 * 2 + c % 2, at = row + c / 2 % 2 * 8;
        if (m < p->m && at < p->n) ((float *)p->out)[m * p->n + at] = finished(sums[c], rows, c / 2 % 2, k);
    }
}

/* A warp's 16 rows, OUTPUT_TOKENS tokens, as a quarter of each of the buffer's lines of 128 bytes; their pieces of 16 bytes
 * are swizzled by the token. */
static __device__ __forceinline__ void turn_over(const uint32_t *sums, uint32_t buffer, const row_terms *rows, int type,
                                                 shape k) {
    const int lane = lane_of(), warp = (int)threadIdx.x / WARP % 4;
    const int token = lane / 16 * 8 + lane % 8, piece = (2 * warp + lane / 8 % 2) ^ lane % 8;
    uint32_t m[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t *s = sums + 4 * (i / 2) + 2 * (i % 2);
        m[i] = round16_pair(finished(s[0], rows, i % 2, k), finished(s[1], rows, i % 2, k), type);
    }
    store_matrices_transposed(buffer + token * 128 + piece * 16, m);
}

static __device__ __forceinline__ void store_ragged(uint16_t *to, uint4 v, int count) {
#pragma unroll 1
    for (int c = 0; c < count; c++) {
        to[c] = (uint16_t)v.x;
        v = make_uint4(__funnelshift_r(v.x, v.y, 16), __funnelshift_r(v.y, v.z, 16), __funnelshift_r(v.z, v.w, 16),
                       v.w >> 16);
    }
}

/* A warpgroup's 64 rows from `row` on, OUTPUT_TOKENS tokens at a time: its warps turn them over in shared memory, so that
 * whole lines of out are written, by eight lanes a line; 32 bytes of 16 lines an instruction, as a warp has by itself, take
 * four times as long. The two buffers take turns, across tiles as well, so that one barrier a turn says both that a buffer
 * is full and that the other is free; the next one is filled while the one before is read. */
static __device__ __forceinline__ void store_narrow(const uint32_t *sums, reader *d, const row_terms *rows, int row,
                                                    int token, shape k) {
    const ql_w8a8_params *p = &d->q->product;
    const int wg = (int)threadIdx.x / 128, thread = (int)threadIdx.x % 128, line = thread / 8, piece = thread % 8;
    const int n = (int)p->n, tokens = (int)p->m - token, columns = min(8, n - (row + piece * 8));
    const int own_tokens = columns > 0 ? tokens - line : 0;
    const bool whole = HAS_WHOLE_PIECES(p);
    const uint32_t buffers = d->l->outputs + wg * 4 * QL_W8A8_WARP_BYTES;
    const uint32_t from = buffers + line * 128 + (piece ^ line % 8) * 16;
    uint16_t *to = (uint16_t *)p->out + (int64_t)(token + line) * n + row + piece * 8;
#pragma unroll
    for (int first = 0; first <= k.tokens; first += OUTPUT_TOKENS) {
        const int before = first - OUTPUT_TOKENS;
        const bool more = first < k.tokens && first < tokens;
        uint4 v;
        if (first > 0) {
            named_barrier(OUTPUT_BARRIER + wg, 128);
            v = load_shared_16(from + d->turn);
            d->turn ^= OUTPUT_BYTES;
        }
        if (more) turn_over(sums + first / 2, buffers + d->turn, rows, p->out_type, k);
        if (first > 0) {
            if (before < own_tokens && whole) store_global_16(to, v);
            if (before < own_tokens && !whole) store_ragged(to, v, columns);
            to += (int64_t)OUTPUT_TOKENS * n;
        }
        if (!more) break;
    }
}

/* ---- outputs, turned: sums 4 j to 4 j + 3 of a sub are rows g and g + 8 of x by columns 8 j + 2 t and the next ---- */

static __device__ __forceinline__ void finish_columns(uint32_t *sums, const ql_w8a8_params *p, int64_t first, shape k) {
    const bool scaled = p->w_rows != QL_W8A8_GROUP;
    if (!scaled && !p->bias) return;
#pragma unroll
    for (int j = 0; j < WIDTH(k) / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int64_t row = first + 8 * j + lane_of() % 4 * 2 + e;
            const float scale = load_row_scale(p, row, k), bias = load_row_bias(p, row);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t *sum = sums + 4 * j + i * 2 + e;
                *sum = __float_as_uint(__fadd_rn(__fmul_rn(__uint_as_float(*sum), scale), bias));
            }
        }
}

static __device__ __forceinline__ void store_wide_turned(const uint32_t *sums, const ql_w8a8_params *p, int64_t row,
                                                         int64_t token, shape k) {
#pragma unroll
    for (int c = 0; c < WIDTH(k) / 2; c++) {
        const int64_t m = token + lane_of() / 4 + c / 2 % 2 * 8, at = row + c / 4 * 8 + lane_of() % 4 * 2 + c % 2;
        if (m < p->m && at < p->n) ((float *)p->out)[m * p->n + at] = __uint_as_float(sums[c]);
    }
}

/* A warp's 16 tokens, 64 rows of the weight at a time, through shared memory, so that whole lines of out are written, by
 * eight lanes a line. */
static __device__ __forceinline__ void store_narrow_turned(const uint32_t *sums, const ql_w8a8_params *p,
                                                           uint32_t buffer, int row, int token, shape k) {
    enum { ROWS = 64 };
    const int lane = lane_of(), line = lane / 8, piece = lane % 8;
    const int n = (int)p->n, own_tokens = (int)p->m - token - line;
    const bool whole = HAS_WHOLE_PIECES(p);
#pragma unroll
    for (int from = 0; from < WIDTH(k); from += ROWS) {
        const int col = row + from + piece * 8, columns = min(8, n - col);
        uint16_t *to = (uint16_t *)p->out + (int64_t)(token + line) * n + col;
        if (row + from >= n) break;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < ROWS / 8; j += 2) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t *s = sums + 4 * (from / 8 + j + i / 2) + 2 * (i % 2);
                m[i] = round16_pair(__uint_as_float(s[0]), __uint_as_float(s[1]), p->out_type);
            }
            store_matrices(buffer + lane % 16 * 128 + ((j + lane / 16) ^ lane % 8) * 16, m);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i += 4, to += 4 * (int64_t)n) {
            const uint4 v = load_shared_16(buffer + (line + i) * 128 + (piece ^ (line + i) % 8) * 16);
            if (i >= own_tokens || columns <= 0) continue;
            if (whole)
                store_global_16(to, v);
            else
                store_ragged(to, v, columns);
        }
    }
}

static __device__ __forceinline__ void finish_turned(uint32_t *sums, const reader *d, int row, int token, shape k) {
    const ql_w8a8_params *p = &d->q->product;
    const int wg = (int)threadIdx.x / 128, warp = (int)threadIdx.x / WARP % 4;
    const int first = token + wg * 64 + warp * 16;
    if (first >= p->m) return;
    finish_columns(sums, p, row, k);
    if (p->out_type == QL_VALUE_F32)
        store_wide_turned(sums, p, row, first, k);
    else
        store_narrow_turned(sums, p, d->l->outputs + (wg * 4 + warp) * QL_W8A8_TURNED_BYTES, row, first, k);
}

static __device__ __forceinline__ void finish_tile(const uint32_t *sums, reader *d, const row_terms *rows, int row,
                                                   int token, shape k) {
    const ql_w8a8_params *p = &d->q->product;
    const int warp = (int)threadIdx.x / WARP, first = row + warp * 16;
    if (p->out_type == QL_VALUE_F32)
        store_wide(sums, p, rows, first + lane_of() / 4, token, k);
    else
        store_narrow(sums, d, rows, row + warp / 4 * 64, token, k);
}

#endif

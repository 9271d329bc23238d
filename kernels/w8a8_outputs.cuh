/* Outputs of the 8-bit product on wgmma: what scales the sums of a tile, and how they are stored. */
#ifndef QL_KERNELS_W8A8_OUTPUTS_CUH
#define QL_KERNELS_W8A8_OUTPUTS_CUH

#include "w8a8_frame.cuh"

enum { MOST_SUMS = 128 };

/* A multiplying warp's place: its sums are WIDTH / 2 registers for each of SUBS. */
typedef struct reader {
    const ql_w8a8_wgmma_params *q;
    const layout *l;
    ring stage, scales, slots;
    uint32_t ready;       /* barriers of stages that may be multiplied */
    uint32_t rows, width; /* in a stage: the warpgroup's rows, and what they are multiplied with */
    bool outliers;
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
    return k.code == QL_W8A8_INT8 ? p->w_scales[index * p->w_row_stride] * (1.0f / 127.0f)
                                  : p->w_scales[index * p->w_row_stride];
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

/* sums become outputs without bias, where no token's scale is in them yet. */
static __device__ __forceinline__ void scale_by_tokens_and_rows(uint32_t *sums, reader *d, const row_terms *rows,
                                                                shape k) {
    await_scales(d);
#pragma unroll
    for (int j = 0; j < k.tokens / 16; j++) {
        const token_scales tokens = load_token_scales(d, j, k);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            uint32_t *sum = sums + 8 * j + c;
            const float row = rows->scale[c / 2 % 2], token = tokens.scale[c / 4 * 2 + c % 2];
            *sum = __float_as_uint(k.code == QL_W8A8_INT8 ? (float)(int32_t)*sum * (1.0f / 127.0f) * row * token
                                                          : __uint_as_float(*sum) * token * row);
        }
    }
    leave_scales(d);
}

static __device__ __forceinline__ void scale_by_rows(uint32_t *sums, const row_terms *rows, shape k) {
#pragma unroll
    for (int i = 0; i < k.tokens / 2; i++) sums[i] = __float_as_uint(__uint_as_float(sums[i]) * rows->scale[i / 2 % 2]);
}

/* Integers become fp32, times the tokens' scales. */
static __device__ __forceinline__ void scale_by_tokens(uint32_t *sums, reader *d, shape k) {
    await_scales(d);
#pragma unroll
    for (int j = 0; j < k.tokens / 16; j++) {
        const token_scales tokens = load_token_scales(d, j, k);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            uint32_t *sum = sums + 8 * j + c;
            *sum = __float_as_uint((float)(int32_t)*sum * (1.0f / 127.0f) * tokens.scale[c / 4 * 2 + c % 2]);
        }
    }
    leave_scales(d);
}

/* 64 rows as they are in registers: 32 bytes along a row of out. */
static __device__ __forceinline__ void store_wide(const uint32_t *sums, const ql_w8a8_params *p, const float *bias,
                                                  int row, int token, shape k) {
#pragma unroll
    for (int c = 0; c < k.tokens / 2; c++) {
        const int64_t m = token + c / 4 * 8 + lane_of() % 4 * 2 + c % 2, at = row + c / 2 % 2 * 8;
        if (m < p->m && at < p->n) ((float *)p->out)[m * p->n + at] = __uint_as_float(sums[c]) + bias[c / 2 % 2];
    }
}

/* Eight outputs along a row of out from shared memory; where it has no whole pieces, `count` of them one by one. */
static __device__ __forceinline__ void store_piece(uint16_t *to, uint32_t from, bool whole, int count) {
    if (whole) {
        *(uint4 *)to = load_shared_16(from);
        return;
    }
#pragma unroll 1
    for (int c = 0; c < count; c++) to[c] = load_shared_2(from + 2 * c);
}

/* A warp's 16 rows, 32 tokens at a time: turned over in shared memory, so that 16 bytes go along a row of out. */
static __device__ __forceinline__ void store_narrow(const uint32_t *sums, const ql_w8a8_params *p, const float *bias,
                                                    uint32_t buffer, int row, int token, shape k) {
    enum { TOKENS = 32 };
    const int lane = lane_of(), type = p->out_type;
    const bool whole = HAS_WHOLE_PIECES(p);
    const int count = (int)min((int64_t)8, p->n - (row + lane % 2 * 8));
#pragma unroll
    for (int from = 0; from < k.tokens; from += TOKENS) {
        if (token + from >= p->m) break;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t *s = sums + 4 * (from / 8 + j + i / 2) + 2 * (i % 2);
                m[i] = round16_pair(__uint_as_float(s[0]) + bias[i % 2], __uint_as_float(s[1]) + bias[i % 2], type);
            }
            const int at = 8 * (j + lane / 16) + lane % 8, half = lane / 8 % 2 ^ (at >> 2 & 1);
            store_matrices_transposed(buffer + at * 32 + half * 16, m);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            const int at = i * 16 + lane / 2;
            const uint32_t from_at = buffer + at * 32 + (lane % 2 ^ (at >> 2 & 1)) * 16;
            const int64_t m = token + from + at;
            if (m >= p->m || count <= 0) continue;
            uint16_t *to = (uint16_t *)p->out + m * p->n + row + lane % 2 * 8;
            store_piece(to, from_at, whole, count);
        }
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
            for (int i = 0; i < 2 * SUBS(k); i++) {
                uint32_t *sum = sums + i / 2 * WIDTH(k) / 2 + 4 * j + i % 2 * 2 + e;
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

/* A warp's 16 tokens, 32 rows of the weight at a time, through shared memory, so that 64 bytes go along a row of out. */
static __device__ __forceinline__ void store_narrow_turned(const uint32_t *sums, const ql_w8a8_params *p,
                                                           uint32_t buffer, int64_t row, int64_t token, shape k) {
    enum { ROWS = 32 };
    const int lane = lane_of(), type = p->out_type;
    const bool whole = HAS_WHOLE_PIECES(p);
#pragma unroll
    for (int from = 0; from < WIDTH(k); from += ROWS) {
        if (row + from >= p->n) break;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < ROWS / 8; j += 2) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t *s = sums + 4 * (from / 8 + j + i / 2) + 2 * (i % 2);
                m[i] = round16_pair(__uint_as_float(s[0]), __uint_as_float(s[1]), type);
            }
            const int at = lane % 16, piece = j + lane / 16;
            store_matrices(buffer + at * 64 + (piece ^ (at >> 1 & 3)) * 16, m);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = i * 8 + lane / 4, piece = lane % 4;
            const uint32_t from_at = buffer + at * 64 + (piece ^ (at >> 1 & 3)) * 16;
            const int64_t m = token + at, col = row + from + piece * 8;
            if (m >= p->m || col >= p->n) continue;
            uint16_t *to = (uint16_t *)p->out + m * p->n + col;
            store_piece(to, from_at, whole, (int)min((int64_t)8, p->n - col));
        }
    }
}

static __device__ __forceinline__ void finish_turned(uint32_t *sums, const reader *d, int row, int token, shape k) {
    const ql_w8a8_params *p = &d->q->product;
    const int wg = (int)threadIdx.x / 128, warp = (int)threadIdx.x / WARP % 4;
    finish_columns(sums, p, row, k);
#pragma unroll
    for (int i = 0; i < SUBS(k); i++) {
        const int first = token + (wg * SUBS(k) + i) * 64 + warp * 16;
        if (first >= p->m) break;
        if (p->out_type == QL_VALUE_F32)
            store_wide_turned(sums + i * WIDTH(k) / 2, p, row, first, k);
        else
            store_narrow_turned(sums + i * WIDTH(k) / 2, p, d->l->outputs + (wg * 4 + warp) * QL_W8A8_WARP_BYTES, row,
                                first, k);
    }
}

static __device__ __forceinline__ void finish_tile(uint32_t *sums, reader *d, const row_terms *rows, int row, int token,
                                                   shape k) {
    const ql_w8a8_params *p = &d->q->product;
    const int warp = (int)threadIdx.x / WARP, first = row + warp * 16;
    if (k.grouped || d->outliers)
        scale_by_rows(sums, rows, k);
    else
        scale_by_tokens_and_rows(sums, d, rows, k);
    if (p->out_type == QL_VALUE_F32)
        store_wide(sums, p, rows->bias, first + lane_of() / 4, token, k);
    else
        store_narrow(sums, p, rows->bias, d->l->outputs + warp * QL_W8A8_WARP_BYTES, first, token, k);
}

#endif

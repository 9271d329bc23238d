/* How the decode kernel's blocks bring activations into shared memory: codes, scales, the mask of outliers and what outliers
 * were. Either the codes are there already, or the block makes them. */
#ifndef QL_KERNELS_W8A8_STAGE_CUH
#define QL_KERNELS_W8A8_STAGE_CUH

#include "ptx.cuh"
#include "w8a8_activation.cuh"
#include "w8a8_decode.h"

enum { COLUMNS = QL_W8A8_GROUP, OWN_TOKENS = QL_W8A8_OWN_TOKENS };

extern __shared__ __align__(128) uint8_t shared[];

static __device__ __forceinline__ float *scales_of(const ql_w8a8_decode_params *p) {
    return (float *)(shared + p->scales_at);
}

/* What a thread asks for of the activations before it needs any of it, and before the rest of the ring is asked for, which
 * memory would serve first. */
enum { HELD_MORE = 2 };
typedef struct ql_held {
    uint4 bytes[QL_W8A8_HELD];
    float scale[HELD_MORE];
    uint32_t mask[HELD_MORE];
} ql_held;

/* Where piece `i` of the thread is among the pieces of rows, which are rounded up to whole warps. */
typedef struct ql_held_place {
    int token, piece;
} ql_held_place;

static __device__ __forceinline__ ql_held_place held_place(const ql_w8a8_decode_params *p, int i) {
    const int at = i * (int)blockDim.x + (int)threadIdx.x, token = (int)__umulhi((uint32_t)at, p->per_row);
    return (ql_held_place){token, at - token * p->row_pieces};
}

/* ---- codes that are there already ---- */

static __device__ __forceinline__ uint4 load_codes(const ql_w8a8_decode_params *p, ql_held_place at, int64_t first) {
    const ql_w8a8_params *w = &p->product;
    const int64_t col = first + at.piece * 16;
    if (at.token >= (int)w->m || at.piece >= p->span / 16 || col >= w->x_pitch) return make_uint4(0, 0, 0, 0);
    return *(const uint4 *)(w->x_codes + at.token * w->x_pitch + col);
}

static __device__ __forceinline__ void store_codes(const ql_w8a8_decode_params *p, ql_held_place at, uint4 codes) {
    if (at.token < (int)p->product.m && at.piece < p->span / 16)
        *(uint4 *)(shared + at.token * p->x_pitch + at.piece * 16) = codes;
}

/* Scale `i` of those in shared memory, [tokens] or by group [., tokens]. */
static __device__ __forceinline__ float load_scale(const ql_w8a8_decode_params *p, int tokens, int64_t first, int i) {
    const ql_w8a8_params *w = &p->product;
    const int64_t group = first / COLUMNS + i / tokens, token = i % tokens;
    const bool inside = token < w->m && group < w->x_pitch / COLUMNS;
    return inside ? w->x_scales[token * w->x_token_stride + group * w->x_group_stride] : 0.0f;
}

static __device__ __forceinline__ uint32_t load_mask(const ql_w8a8_decode_params *p, int64_t first, int i) {
    return first + i * 32 < p->product.x_pitch ? p->product.outliers[first / 32 + i] : 0;
}

static __device__ __forceinline__ int scale_count(const ql_w8a8_decode_params *p, bool groups, int tokens) {
    return groups ? p->span / COLUMNS * tokens : tokens;
}

static __device__ __forceinline__ int mask_count(const ql_w8a8_decode_params *p) {
    return p->product.outliers ? p->span / 32 : 0;
}

static __device__ __forceinline__ void hold_codes(ql_held *held, const ql_w8a8_decode_params *p, bool groups,
                                                  int tokens, int64_t first) {
#pragma unroll
    for (int i = 0; i < HELD_MORE; i++) {
        const int at = i * (int)blockDim.x + (int)threadIdx.x;
        held->scale[i] = at < scale_count(p, groups, tokens) ? load_scale(p, tokens, first, at) : 0.0f;
        held->mask[i] = at < mask_count(p) ? load_mask(p, first, at) : 0;
    }
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) held->bytes[i] = load_codes(p, held_place(p, i), first);
}

/* Codes, scales and mask, of the columns from `first` on. */
static __device__ __forceinline__ void copy_activations(const ql_held *held, const ql_w8a8_decode_params *p,
                                                        bool groups, int tokens, int64_t first) {
    const int m = (int)p->product.m, threads = (int)blockDim.x;
    uint32_t *mask = (uint32_t *)(shared + p->mask_at);
#pragma unroll
    for (int i = 0; i < HELD_MORE; i++) {
        const int at = i * threads + (int)threadIdx.x;
        if (at < scale_count(p, groups, tokens)) scales_of(p)[at] = held->scale[i];
        if (at < mask_count(p)) mask[at] = held->mask[i];
    }
    for (int at = HELD_MORE * threads + (int)threadIdx.x; at < scale_count(p, groups, tokens); at += threads)
        scales_of(p)[at] = load_scale(p, tokens, first, at);
    for (int at = HELD_MORE * threads + (int)threadIdx.x; at < mask_count(p); at += threads)
        mask[at] = load_mask(p, first, at);
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) store_codes(p, held_place(p, i), held->bytes[i]);
#pragma unroll 4
    for (int i = QL_W8A8_HELD; i * threads < m * p->row_pieces; i++)
        store_codes(p, held_place(p, i), load_codes(p, held_place(p, i), first));
}

/* ---- codes that the block makes itself, of 16-bit values, all of which are held ---- */

static __device__ __forceinline__ void hold_values(ql_held *held, const ql_w8a8_decode_params *p) {
    const ql_w8a8_quantize_params *q = &p->quantize;
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) {
        const ql_held_place at = held_place(p, i);
        const bool inside = at.token < (int)q->m && at.piece * QL_RUN < q->k;
        held->bytes[i] = inside ? *(const uint4 *)((const uint16_t *)q->x + at.token * q->x_stride + at.piece * QL_RUN)
                                : make_uint4(0, 0, 0, 0);
    }
}

static __device__ __forceinline__ void store_own(const ql_w8a8_decode_params *p, ql_held_place at, uint2 codes) {
    *(uint2 *)(shared + at.token * p->x_pitch + at.piece * QL_RUN) = codes;
}

/* Groups of 128 columns, 16 lanes each. */
static __device__ __forceinline__ void quantize_own_groups(const ql_held *held, const ql_w8a8_decode_params *p,
                                                           int tokens) {
    const int m = (int)p->product.m;
    for (int i = (int)threadIdx.x; i < p->span / COLUMNS * tokens; i += (int)blockDim.x)
        if (i % tokens >= m) scales_of(p)[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) {
        const ql_held_place at = held_place(p, i);
        if (at.token >= m) break; /* so has the whole warp */
        float run[QL_RUN];
        unpack_run(run, held->bytes[i], p->quantize.x_type);
        const uint32_t most = lanes_max(run_magnitude(0, run), COLUMNS / QL_RUN);
        const float scale = e4m3_scale(__uint_as_float(most));
        const ql_encoder e = e4m3_encoder(scale, most, false);
        if (at.piece >= p->span / QL_RUN) continue;
        store_own(p, at, e4m3_run(run, &e));
        if (at.piece % (COLUMNS / QL_RUN) == 0) scales_of(p)[at.piece / (COLUMNS / QL_RUN) * tokens + at.token] = scale;
    }
}

static __device__ __forceinline__ uint32_t *magnitudes_of(const ql_w8a8_decode_params *p) {
    return (uint32_t *)(shared + p->most_at);
}

static __device__ __forceinline__ ql_encoder *encoders_of(const ql_w8a8_decode_params *p) {
    return (ql_encoder *)(shared + p->encoders_at);
}

/* What is added to below. */
static __device__ __forceinline__ void clear_own(const ql_w8a8_decode_params *p, int code) {
    if (threadIdx.x < OWN_TOKENS) magnitudes_of(p)[threadIdx.x] = 0;
    for (int i = (int)threadIdx.x; code == QL_W8A8_INT8 && i < p->span / 32; i += (int)blockDim.x)
        ((uint32_t *)(shared + p->mask_at))[i] = 0;
}

/* The largest of eight 16-bit magnitudes. */
static __device__ __forceinline__ uint32_t most_of_eight(uint4 bytes) {
    const uint32_t most = __vmaxu2(__vmaxu2(bytes.x & 0x7fff7fffu, bytes.y & 0x7fff7fffu),
                                   __vmaxu2(bytes.z & 0x7fff7fffu, bytes.w & 0x7fff7fffu));
    return max(most & 0xffffu, most >> 16);
}

/* What decides a row's codes; writes its scale. */
static __device__ __forceinline__ ql_encoder make_encoder(const ql_w8a8_decode_params *p, int code, int token) {
    const ql_w8a8_quantize_params *q = &p->quantize;
    const uint32_t most = magnitudes_of(p)[q->mode == QL_W8A8_TENSOR ? 0 : token];
    const float scale = code == QL_W8A8_INT8        ? __uint_as_float(most)
                        : q->mode == QL_W8A8_STATIC ? q->input_scale
                        : q->mode == QL_W8A8_TENSOR ? e4m3_scale(__uint_as_float(most))
                                                    : token_scale(most, q->upper_bound, q->least_scale);
    scales_of(p)[token] = scale;
    return code == QL_W8A8_INT8 ? int8_encoder(most) : e4m3_encoder(scale, most, q->mode != QL_W8A8_TOKEN);
}

/* Scales of whole rows, or of all of x. clear_own was before, and a barrier. */
static __device__ __forceinline__ void quantize_own_rows(const ql_held *held, const ql_w8a8_decode_params *p, int code,
                                                         int tokens) {
    const ql_w8a8_quantize_params *q = &p->quantize;
    const int m = (int)p->product.m;
    const uint32_t limit = outlier_limit(q->threshold);
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) {
        const ql_held_place at = held_place(p, i);
        if (at.token >= m) break;
        uint32_t most = widened(most_of_eight(held->bytes[i]), q->x_type);
        if (code == QL_W8A8_INT8 && most >= limit) {
            float run[QL_RUN];
            unpack_run(run, held->bytes[i], q->x_type);
            const uint32_t marked = outliers_of(run, limit);
            most = inlier_magnitude(0, run, marked);
            if (marked) atomicOr((uint32_t *)(shared + p->mask_at) + at.piece / 4, marked << at.piece % 4 * 8);
        }
        most = __reduce_max_sync(ALL_LANES, most);
        if (threadIdx.x % 32 == 0) atomicMax(magnitudes_of(p) + (q->mode == QL_W8A8_TENSOR ? 0 : at.token), most);
    }
    __syncthreads();
    if ((int)threadIdx.x < m)
        encoders_of(p)[threadIdx.x] = make_encoder(p, code, (int)threadIdx.x);
    else if ((int)threadIdx.x < tokens)
        scales_of(p)[threadIdx.x] = 0.0f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) {
        const ql_held_place at = held_place(p, i);
        if (at.token >= m) break;
        if (at.piece >= p->span / QL_RUN) continue;
        const ql_encoder e = encoders_of(p)[at.token];
        float run[QL_RUN];
        unpack_run(run, held->bytes[i], q->x_type);
        store_own(p, at, code == QL_W8A8_INT8 ? int8_run(run, &e, shared[p->mask_at + at.piece]) : e4m3_run(run, &e));
    }
}

/* ---- what outliers were ---- */

/* The place of each chunk of 64 columns that has marked ones among those kept in shared memory, NOT_KEPT of others; how
 * many chunks are marked. The whole block is here, and the mask complete. */
enum { NOT_KEPT = 255 };
static __device__ __forceinline__ int place_outliers(const ql_w8a8_decode_params *p) {
    int *count = (int *)magnitudes_of(p) + OWN_TOKENS;
    const uint2 *mask = (const uint2 *)(shared + p->mask_at);
    if (threadIdx.x < 32) {
        int before = 0;
        for (int base = 0; base < p->span / 64; base += 32) {
            const int chunk = base + (int)threadIdx.x;
            const bool marked = chunk < p->span / 64 && (mask[chunk].x | mask[chunk].y);
            const uint32_t all = __ballot_sync(ALL_LANES, marked);
            const int place = before + __popc(all & ((1u << threadIdx.x) - 1));
            if (chunk < p->span / 64)
                shared[p->places_at + chunk] = marked && place < p->kept ? (uint8_t)place : NOT_KEPT;
            if (marked && place < p->kept) ((uint16_t *)(shared + p->chunks_at))[place] = (uint16_t)chunk;
            before += __popc(all);
        }
        if (threadIdx.x == 0) *count = before;
    }
    __syncthreads();
    return *count;
}

/* Pieces of 16 bit that a value is the sum of. */
static __device__ __forceinline__ int pieces_of(int x_type) { return x_type == QL_VALUE_F32 ? 3 : 1; }

/* The next piece of a value, which becomes what is left; of infinities and NaN nothing is. */
static __device__ __forceinline__ uint32_t next_pieces(float value[2], int type) {
    const uint32_t pair = round16_pair(value[0], value[1], type);
#pragma unroll
    for (int i = 0; type == QL_VALUE_BF16 && i < 2; i++) {
        const float taken = __uint_as_float(pair >> 16 * i << 16);
        value[i] = fabsf(taken) < __uint_as_float(INFINITY_BITS) ? __fsub_rn(value[i], taken) : 0.0f;
    }
    return pair;
}

/* 0 where it is not marked. */
static __device__ __forceinline__ float outlier_at(const ql_w8a8_params *p, int token, int64_t col, bool marked) {
    return marked ? load_value(p->x, p->x_type, token * p->x_stride + col) : 0.0f;
}

/* [place, piece, token, 64], 16 bit. */
static __device__ __forceinline__ uint8_t *kept_at(const ql_w8a8_decode_params *p, int place, int piece, int token) {
    return shared + p->kept_at + ((place * pieces_of(p->product.x_type) + piece) * (int)p->product.m + token) * 128;
}

static __device__ __forceinline__ void keep_outliers(const ql_w8a8_decode_params *p, int chunks, int64_t first) {
    const ql_w8a8_params *w = &p->product;
    const int m = (int)w->m, type = w->x_type == QL_VALUE_F16 ? QL_VALUE_F16 : QL_VALUE_BF16;
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < min(chunks, p->kept) * m * 32; i += (int)blockDim.x) {
        const int pair = i % 32, token = i / 32 % m, place = i / 32 / m;
        const int col = ((const uint16_t *)(shared + p->chunks_at))[place] * 64 + pair * 2;
        const uint32_t marked = shared[p->mask_at + col / 8] >> col % 8;
        float value[2] = {outlier_at(w, token, first + col, marked & 1),
                          outlier_at(w, token, first + col + 1, marked & 2)};
        for (int piece = 0; piece < pieces_of(w->x_type); piece++)
            *(uint32_t *)(kept_at(p, place, piece, token) + pair * 4) = next_pieces(value, type);
    }
}

/* The same from what is held. */
static __device__ __forceinline__ void keep_own_outliers(const ql_held *held, const ql_w8a8_decode_params *p) {
#pragma unroll
    for (int i = 0; i < QL_W8A8_HELD; i++) {
        const ql_held_place at = held_place(p, i);
        if (at.token >= (int)p->product.m) break;
        if (at.piece >= p->span / QL_RUN) continue;
        const int place = shared[p->places_at + at.piece / 8];
        if (place == NOT_KEPT) continue;
        const uint32_t marked = shared[p->mask_at + at.piece];
        uint32_t word[4] = {held->bytes[i].x, held->bytes[i].y, held->bytes[i].z, held->bytes[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            word[j] &= (marked >> 2 * j & 1) * 0xffffu | (marked >> (2 * j + 1) & 1) * 0xffff0000u;
        *(uint4 *)(kept_at(p, place, 0, at.token) + at.piece % 8 * 16) = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

#endif

/* How the decode kernel's blocks bring activations into shared memory: codes, scales, the mask of outliers and what outliers
 * were. Either the codes are there already, or the block makes them. */
#ifndef QL_KERNELS_W8A8_STAGE_CUH
#define QL_KERNELS_W8A8_STAGE_CUH

#include "ptx.cuh"
#include "w8a8_activation.cuh"
#include "w8a8_decode.h"

enum { COLUMNS = QL_W8A8_GROUP };

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

/* ---- what outliers were ---- */

/* The place of each chunk of 64 columns that has marked ones among those kept in shared memory, NOT_KEPT of others, and how
 * many chunks are marked: by one warp, when the mask is complete. */
enum { NOT_KEPT = 255 };
static __device__ __forceinline__ void place_chunks(const ql_w8a8_decode_params *p) {
    const uint2 *mask = (const uint2 *)(shared + p->mask_at);
    const int lane = (int)threadIdx.x % 32;
    int before = 0;
    for (int base = 0; base < p->span / 64; base += 32) {
        const int chunk = base + lane;
        const bool marked = chunk < p->span / 64 && (mask[chunk].x | mask[chunk].y);
        const uint32_t all = __ballot_sync(ALL_LANES, marked);
        const int place = before + __popc(all & ((1u << lane) - 1));
        if (chunk < p->span / 64) shared[p->places_at + chunk] = marked && place < p->kept ? (uint8_t)place : NOT_KEPT;
        if (marked && place < p->kept) ((uint16_t *)(shared + p->chunks_at))[place] = (uint16_t)chunk;
        before += __popc(all);
    }
    if (lane == 0) *(int *)(shared + p->marked_at) = before;
}

/* How many chunks are marked. The whole block is here, and the mask complete. */
static __device__ __forceinline__ int place_outliers(const ql_w8a8_decode_params *p) {
    if (threadIdx.x < 32) place_chunks(p);
    __syncthreads();
    return *(const int *)(shared + p->marked_at);
}

/* Pieces of 16 bit that a value is the sum of. */
static __device__ __forceinline__ int pieces_of(int x_type) { return x_type == QL_VALUE_F32 ? 3 : 1; }

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

#endif

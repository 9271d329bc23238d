/* How the decode kernel's blocks quantize few rows of activations themselves: 16-bit values, all of which the block's threads
 * hold, 8 at a time. */
#ifndef QL_KERNELS_W8A8_OWN_CUH
#define QL_KERNELS_W8A8_OWN_CUH

#include "e4m3.cuh"
#include "w8a8_stage.cuh"

typedef struct ql_own_values {
    uint4 bytes[QL_W8A8_OWN_HELD];
} ql_own_values;

/* As held_place. A column with outliers has them in most rows, so rows of int8 are turned against each other: what outliers
 * take is done by as many warps then. */
static __device__ __forceinline__ ql_held_place own_place(const ql_w8a8_decode_params *p, int code, int i) {
    ql_held_place at = held_place(p, i);
    if (code != QL_W8A8_INT8) return at;
    at.piece += at.token * p->turn;
    if (at.piece >= p->row_pieces) at.piece -= p->row_pieces;
    return at;
}

static __device__ __forceinline__ void hold_values(ql_own_values *held, const ql_w8a8_decode_params *p, int code) {
    const char *x = (const char *)p->quantize.x;
    const int m = (int)p->product.m, pieces = (int)p->product.k / QL_RUN;
#pragma unroll
    for (int i = 0; i < QL_W8A8_OWN_HELD; i++) {
        const ql_held_place at = own_place(p, code, i);
        if (at.token >= m) break; /* so has the whole warp */
        held->bytes[i] = make_uint4(0, 0, 0, 0);
        if (at.piece < pieces)
            held->bytes[i] = *(const uint4 *)(x + (int64_t)at.token * p->x_row_bytes + at.piece * (QL_RUN * 2));
    }
}

/* Rare, and long: as e4m3_run. */
static __device__ __noinline__ uint2 exact_codes(uint4 bytes, int type, float scale, float factor, bool quotient) {
    const ql_encoder e = {scale, factor, quotient, true};
    float run[QL_RUN];
    unpack_run(run, bytes, type);
    return e4m3_run(run, &e);
}

static __device__ __forceinline__ uint2 own_e4m3(uint4 bytes, int type, const ql_encoder *e) {
    if (e->exact) return exact_codes(bytes, type, e->scale, e->factor, e->quotient);
    float run[QL_RUN];
    unpack_run(run, bytes, type);
    return e4m3_quick_run(run, e);
}

/* e4m3's as the fp16 that the products take, so that they are not converted for each strip anew. */
static __device__ __forceinline__ void store_own_e4m3(const ql_w8a8_decode_params *p, ql_held_place at, uint2 codes) {
    uint32_t low[2], high[2];
    halves_of_e4m3(low, codes.x);
    halves_of_e4m3(high, codes.y);
    *(uint4 *)(shared + at.token * p->x_pitch + at.piece * (QL_RUN * 2)) = make_uint4(low[0], low[1], high[0], high[1]);
}

static __device__ __forceinline__ void store_own_int8(const ql_w8a8_decode_params *p, ql_held_place at, uint2 codes) {
    *(uint2 *)(shared + at.token * p->x_pitch + at.piece * QL_RUN) = codes;
}

/* Groups of 128 columns, 16 lanes each. */
static __device__ __forceinline__ void quantize_own_groups(const ql_own_values *held, const ql_w8a8_decode_params *p,
                                                           int tokens) {
    const int m = (int)p->product.m;
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < p->span / COLUMNS * tokens; i += (int)blockDim.x)
        if (i % tokens >= m) scales_of(p)[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < QL_W8A8_OWN_HELD; i++) {
        const ql_held_place at = held_place(p, i);
        if (at.token >= m) break;
        const uint32_t most =
            lanes_max(widened(larger_of(pair_magnitude(held->bytes[i])), p->quantize.x_type), COLUMNS / QL_RUN);
        if (at.piece >= p->span / QL_RUN) continue;
        float scale;
        store_own_e4m3(p, at, group_codes(&scale, held->bytes[i], most, p->quantize.x_type));
        if (at.piece % (COLUMNS / QL_RUN) == 0) scales_of(p)[at.piece / (COLUMNS / QL_RUN) * tokens + at.token] = scale;
    }
}

/* The largest magnitude of each warp's pieces, [piece, warp]: those of a row follow each other. */
static __device__ __forceinline__ uint32_t *magnitudes_of(const ql_w8a8_decode_params *p) {
    return (uint32_t *)(shared + p->most_at);
}

static __device__ __forceinline__ void clear_own_mask(const ql_w8a8_decode_params *p) {
    uint32_t *mask = (uint32_t *)(shared + p->mask_at);
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < p->span / 32; i += (int)blockDim.x) mask[i] = 0;
}

/* Leaves the magnitudes of the warp's pieces, without outliers, and marks the columns of these; whether the thread has
 * any. */
static __device__ __forceinline__ bool leave_magnitudes(const ql_own_values *held, const ql_w8a8_decode_params *p,
                                                        int code) {
    const ql_w8a8_quantize_params *q = &p->quantize;
    const uint32_t limit = outlier_limit(q->threshold);
    bool found = false;
#pragma unroll
    for (int i = 0; i < QL_W8A8_OWN_HELD; i++) {
        const ql_held_place at = own_place(p, code, i);
        if (at.token >= (int)q->m) break;
        uint32_t most = widened(larger_of(pair_magnitude(held->bytes[i])), q->x_type);
        if (code == QL_W8A8_INT8 && most >= limit) {
            float run[QL_RUN];
            unpack_run(run, held->bytes[i], q->x_type);
            const uint32_t marked = outliers_of(run, limit);
            most = inlier_magnitude(0, run, marked);
            if (marked) atomicOr((uint32_t *)(shared + p->mask_at) + at.piece / 4, marked << at.piece % 4 * 8);
            found |= marked != 0;
        }
        most = __reduce_max_sync(ALL_LANES, most);
        if (threadIdx.x % 32 == 0) magnitudes_of(p)[(i * (int)blockDim.x + (int)threadIdx.x) / 32] = most;
    }
    return found;
}

static __device__ __forceinline__ ql_encoder *encoders_of(const ql_w8a8_decode_params *p) {
    return (ql_encoder *)(shared + p->encoders_at);
}

/* The encoder of each row and its scale, by a warp each. */
static __device__ __forceinline__ void make_encoders(const ql_w8a8_decode_params *p, int code) {
    const ql_w8a8_quantize_params *q = &p->quantize;
    const int lane = (int)threadIdx.x % 32, m = (int)q->m;
    const bool tensor = q->mode == QL_W8A8_TENSOR;
    const int each = p->row_pieces / 32, count = tensor ? m * each : each;
    for (int token = (int)threadIdx.x / 32; token < m; token += (int)blockDim.x / 32) {
        const uint32_t *magnitudes = magnitudes_of(p) + (tensor ? 0 : token * each);
        uint32_t most = 0;
#pragma unroll 1
        for (int i = lane; i < count; i += 32) most = max(most, magnitudes[i]);
        most = __reduce_max_sync(ALL_LANES, most);
        const float scale = code == QL_W8A8_INT8        ? __uint_as_float(most)
                            : q->mode == QL_W8A8_STATIC ? q->input_scale
                            : tensor                    ? e4m3_scale(__uint_as_float(most))
                                                        : token_scale(most, q->upper_bound, q->least_scale);
        const ql_encoder e =
            code == QL_W8A8_INT8 ? int8_encoder(most) : e4m3_encoder(scale, most, q->mode != QL_W8A8_TOKEN);
        if (lane != 0) continue;
        scales_of(p)[token] = scale;
        encoders_of(p)[token] = e;
    }
}

/* What outliers of a piece were, if the chunk is one of those kept. */
static __device__ __forceinline__ void keep_own_outliers(const ql_w8a8_decode_params *p, ql_held_place at, uint4 bytes,
                                                         uint32_t marked) {
    const int place = shared[p->places_at + at.piece / 8];
    if (place == NOT_KEPT) return;
    uint32_t word[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int j = 0; j < 4; j++) word[j] &= (marked >> 2 * j & 1) * 0xffffu | (marked >> (2 * j + 1) & 1) * 0xffff0000u;
    *(uint4 *)(kept_at(p, place, 0, at.token) + at.piece % 8 * 16) = make_uint4(word[0], word[1], word[2], word[3]);
}

/* Scales of whole rows, or of all of x; whether there are outliers. The next barrier tells all threads of them. */
static __device__ __forceinline__ bool scale_own_rows(const ql_own_values *held, const ql_w8a8_decode_params *p,
                                                      int code) {
    if (code == QL_W8A8_INT8 && p->product.outliers) {
        clear_own_mask(p);
        __syncthreads();
    }
    const bool found = __syncthreads_or(leave_magnitudes(held, p, code));
    make_encoders(p, code);
    if (code == QL_W8A8_INT8 && found && threadIdx.x + 32 >= blockDim.x) place_chunks(p);
    return found;
}

static __device__ __forceinline__ void quantize_own_rows(const ql_own_values *held, const ql_w8a8_decode_params *p,
                                                         bool found, int code) {
#pragma unroll
    for (int i = 0; i < QL_W8A8_OWN_HELD; i++) {
        const ql_held_place at = own_place(p, code, i);
        if (at.token >= (int)p->product.m) break;
        if (at.piece >= p->span / QL_RUN) continue;
        const ql_encoder e = encoders_of(p)[at.token];
        if (code == QL_W8A8_E4M3) {
            store_own_e4m3(p, at, own_e4m3(held->bytes[i], p->quantize.x_type, &e));
            continue;
        }
        const uint32_t marked = found ? shared[p->mask_at + at.piece] : 0;
        float run[QL_RUN];
        unpack_run(run, held->bytes[i], p->quantize.x_type);
        store_own_int8(p, at, int8_run(run, &e, marked));
        if (found) keep_own_outliers(p, at, held->bytes[i], marked);
    }
}

#endif

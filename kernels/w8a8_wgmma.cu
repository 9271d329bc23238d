/* The product of 8-bit activations with an 8-bit weight on sm_90a, for more than a few tokens: Y^T = W X^T, both operands
 * as bytes in shared memory, sums in fp32 or int32.
 *
 * A thread block has two warpgroups that multiply, each 64 or 128 rows of the weight with all tokens of a tile, and one
 * that feeds them: a thread copies codes into a ring of stages of 128 columns, three warps fetch scales and outliers.
 * w8a8_wgmma.h says how tiles are shared among thread blocks, w8a8.h what is computed.
 *
 * Grouped kernels sum 128 columns at a time and add them, times their scales, in fp32. The others leave all sums to the
 * tensor cores, whose sums of e4m3 products have fewer bits than fp32, and scale outputs. */
#include "variants.h"
#include "w8a8_frame.cuh"

enum { MOST_SUMS = 128, OUTPUT_BARRIER = 1, TURN_BARRIER = 3 /* each: of two, one a warpgroup */ };

/* A multiplying warp's place: its sums are `subs` times tokens / 2 registers. */
typedef struct reader {
    const ql_w8a8_wgmma_params *q;
    const layout *l;
    ring stage, scales, slots;
    uint32_t ready;   /* barriers of stages that may be multiplied */
    uint32_t rows_at; /* of the warpgroup's rows in a stage */
    bool outliers;
} reader;

static __device__ __forceinline__ int lane_of(void) { return (int)threadIdx.x % WARP; }

static __device__ __forceinline__ void release_stage(const reader *d, int slot, shape k) {
    const uint32_t empty = d->l->empty + 8 * slot;
    if (k.cluster == 1) {
        if (lane_of() == 0) barrier_arrive(empty);
    } else {
        if (lane_of() < k.cluster) barrier_arrive_at(empty, (uint32_t)lane_of());
    }
}

/* 128 columns of 64 rows, on top of sums or, without `add`, in their place. */
static __device__ __forceinline__ void multiply_stage(uint32_t *sums, uint32_t w, uint32_t x, int add, shape k) {
    const uint32_t a = rows_descriptor(w), b = rows_descriptor(x);
#pragma unroll
    for (int step = 0; step < K / 32; step++)
        multiply_codes(sums, descriptor_at(a, step * 32), descriptor_at(b, step * 32), add || step > 0, k.tokens,
                       k.code);
}

static __device__ __forceinline__ void sum_plain(uint32_t *sums, reader *d, int blocks, shape k) {
    int before = -1; /* the stage whose products may still run */
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const uint32_t stage = stage_at(d->l, d->stage.slot, k);
        barrier_wait(d->ready + 8 * d->stage.slot, d->stage.parity);
        warpgroup_fence();
#pragma unroll
        for (int i = 0; i < k.subs; i++)
            multiply_stage(sums + i * k.tokens / 2, stage + d->rows_at + i * 64 * K, stage + QL_W8A8_ROWS(k.subs) * K,
                           1, k);
        warpgroup_commit();
        WARPGROUP_WAIT(1);
        if (before >= 0) release_stage(d, before, k);
        before = d->stage.slot;
        advance(&d->stage, d->q->stages);
    }
    WARPGROUP_WAIT(0);
    settle_bits(sums, k.subs * k.tokens / 2);
    release_stage(d, before, k);
}

/* sums += part * the tokens' scales. */
static __device__ __forceinline__ void add_scaled(uint32_t *sums, const uint32_t *part, uint32_t scales, shape k) {
    scales += lane_of() % 4 * 16;
#pragma unroll
    for (int j = 0; j < k.tokens / 16; j++) {
        const uint4 four = load_shared_16(scales + j * 64);
        const float scale[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                                __uint_as_float(four.w)};
#pragma unroll
        for (int c = 0; c < 8; c++)
            sums[8 * j + c] = __float_as_uint(__fmaf_rn(__uint_as_float(part[8 * j + c]), scale[c / 4 * 2 + c % 2],
                                                        __uint_as_float(sums[8 * j + c])));
    }
}

/* The warpgroups take turns: one adds a part to its sums while the other's products run. */
static __device__ __forceinline__ void sum_grouped(uint32_t *sums, reader *d, int blocks, shape k) {
    const int wg = (int)threadIdx.x / 128;
    uint32_t part[MOST_SUMS / 2];
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const uint32_t stage = stage_at(d->l, d->stage.slot, k);
        const uint32_t scales = d->l->more + d->stage.slot * QL_W8A8_SCALE_BYTES(k.subs, k.tokens);
        barrier_wait(d->ready + 8 * d->stage.slot, d->stage.parity);
#pragma unroll
        for (int i = 0; i < k.subs; i++) {
            named_barrier(TURN_BARRIER + wg, 256);
            warpgroup_fence();
            multiply_stage(part, stage + d->rows_at + i * 64 * K, stage + QL_W8A8_ROWS(k.subs) * K, 0, k);
            warpgroup_commit();
            named_barrier_arrive(TURN_BARRIER + 1 - wg, 256);
            WARPGROUP_WAIT(0);
            settle_bits(part, k.tokens / 2);
            add_scaled(sums + i * k.tokens / 2, part, scales + (k.subs == 2 ? wg : 0) * k.tokens * 4, k);
        }
        __syncwarp();
        release_stage(d, d->stage.slot, k);
        advance(&d->stage, d->q->stages);
    }
}

/* ---- tiles that several clusters share ---- */

static __device__ __forceinline__ int64_t place_of_partials(int range, int rank, shape k) {
    return (int64_t)range * k.cluster + rank;
}

/* In batches, for registers are too few to have them all on their way. */
static __device__ __forceinline__ void add_bits(uint32_t *sums, const uint4 *from, bool integers, int count) {
    enum { BATCH = 8 };
#pragma unroll
    for (int first = 0; first < count / 4; first += BATCH) {
        uint4 v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH && first + i < count / 4; i++) v[i] = __ldcg(from + (first + i) * 256);
#pragma unroll
        for (int i = 0; i < BATCH && first + i < count / 4; i++) {
            const uint32_t four[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
            for (int c = 0; c < 4; c++) {
                uint32_t *sum = sums + 4 * (first + i) + c;
                *sum = integers ? *sum + four[c] : __float_as_uint(__uint_as_float(*sum) + __uint_as_float(four[c]));
            }
        }
        asm volatile("" ::: "memory");
    }
}

static __device__ __forceinline__ void add_partials(uint32_t *sums, const ql_w8a8_wgmma_params *q, int end, int rank,
                                                    bool integers, shape k) {
    const int warp = (int)threadIdx.x / WARP, count = k.subs * k.tokens / 2;
    int range = own_range(k);
    while (end < q->k_blocks) {
        range++;
        end += range_start(q, range + 1) - range_start(q, range);
        const int64_t place = place_of_partials(range, rank, k);
        uint64_t *flag = q->flags + place * QL_W8A8_WARPS + warp;
        if (lane_of() == 0) {
            while (load_acquire(flag) != q->nonce) {
            }
            *flag = 0; /* so that the launch may be repeated as it is, by a graph */
        }
        __syncwarp();
        const uint4 *from = (const uint4 *)q->partials + place * (count / 4 * 256) + threadIdx.x;
        if (integers)
            add_bits(sums, from, true, count);
        else
            add_bits(sums, from, false, count);
    }
}

static __device__ __forceinline__ void leave_partials(const uint32_t *sums, const ql_w8a8_wgmma_params *q, int rank,
                                                      shape k) {
    const int count = k.subs * k.tokens / 2;
    const int64_t place = place_of_partials(own_range(k), rank, k);
    uint4 *to = (uint4 *)q->partials + place * (count / 4 * 256) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < count / 4; i++)
        __stcg(to + i * 256, make_uint4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    __syncwarp();
    if (lane_of() == 0) store_release(q->flags + place * QL_W8A8_WARPS + (int)threadIdx.x / WARP, q->nonce);
}

/* ---- outputs ---- */

/* Of the lane's rows g and g + 8 of each 64. */
typedef struct row_terms {
    float scale[4], bias[4];
} row_terms;

static __device__ __forceinline__ row_terms load_row_terms(const ql_w8a8_params *p, int row, shape k) {
    row_terms r;
#pragma unroll
    for (int i = 0; i < 2 * k.subs; i++) {
        const int64_t at = row + i / 2 * 64 + i % 2 * 8;
        const bool inside = at < p->n;
        const int64_t index = p->w_rows == 1 ? at : p->w_rows == QL_W8A8_GROUP ? at / QL_W8A8_GROUP : 0;
        /* Those of blocks come with the stages. */
        const bool counts = inside && !(k.grouped && p->w_rows == QL_W8A8_GROUP);
        r.scale[i] = counts ? p->w_scales[index * p->w_row_stride] : 1.0f;
        if (k.code == QL_W8A8_INT8) r.scale[i] *= 1.0f / 127.0f;
        r.bias[i] = inside && p->bias ? load_value(p->bias, p->bias_type, at * p->bias_stride) : 0.0f;
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
        for (int i = 0; i < k.subs; i++)
#pragma unroll
            for (int c = 0; c < 8; c++) {
                uint32_t *sum = sums + i * k.tokens / 2 + 8 * j + c;
                const float row = rows->scale[2 * i + c / 2 % 2], token = tokens.scale[c / 4 * 2 + c % 2];
                *sum = __float_as_uint(k.code == QL_W8A8_INT8 ? (float)(int32_t)*sum * (1.0f / 127.0f) * row * token
                                                              : __uint_as_float(*sum) * token * row);
            }
    }
    leave_scales(d);
}

static __device__ __forceinline__ void scale_by_rows(uint32_t *sums, const row_terms *rows, shape k) {
#pragma unroll
    for (int i = 0; i < k.subs * k.tokens / 2; i++)
        sums[i] = __float_as_uint(__uint_as_float(sums[i]) * rows->scale[2 * (i / (k.tokens / 2)) + i / 2 % 2]);
}

/* Integers become fp32, times the tokens' scales. */
static __device__ __forceinline__ void scale_by_tokens(uint32_t *sums, reader *d, shape k) {
    await_scales(d);
#pragma unroll
    for (int j = 0; j < k.tokens / 16; j++) {
        const token_scales tokens = load_token_scales(d, j, k);
#pragma unroll
        for (int i = 0; i < k.subs; i++)
#pragma unroll
            for (int c = 0; c < 8; c++) {
                uint32_t *sum = sums + i * k.tokens / 2 + 8 * j + c;
                *sum = __float_as_uint((float)(int32_t)*sum * (1.0f / 127.0f) * tokens.scale[c / 4 * 2 + c % 2]);
            }
    }
    leave_scales(d);
}

/* Adds the segment's outlier columns. */
static __device__ __forceinline__ void add_slots(uint32_t *sums, reader *d, shape k) {
    const int type = d->q->product.x_type, rows = (int)threadIdx.x / 128 * k.subs * 64;
    uint32_t last;
    do {
        const uint32_t slot = d->l->more + d->slots.slot * QL_W8A8_OUTLIER_BYTES(k.subs, k.tokens);
        barrier_wait(d->l->slot_full + 8 * d->slots.slot, d->slots.parity);
        last = load_shared_4(d->l->last + 4 * d->slots.slot);
        if (last < 2) {
            const uint32_t weights = slot + k.tokens * QL_W8A8_OUTLIERS * 2 + rows * QL_W8A8_OUTLIERS * 2;
            warpgroup_fence();
#pragma unroll
            for (int i = 0; i < k.subs; i++)
                multiply_columns(sums + i * k.tokens / 2, columns_descriptor(weights + i * 64 * QL_W8A8_OUTLIERS * 2),
                                 columns_descriptor(slot), k.tokens, type);
            warpgroup_commit();
            WARPGROUP_WAIT(0);
            settle_bits(sums, k.subs * k.tokens / 2);
        }
        __syncwarp();
        if (lane_of() == 0) barrier_arrive(d->l->slot_empty + 8 * d->slots.slot);
        advance(&d->slots, SLOTS);
    } while (!(last & 1));
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

/* 64 rows, 32 tokens at a time: turned over in shared memory, so that 128 bytes go along a row of out. */
static __device__ __forceinline__ void store_narrow(const uint32_t *sums, const ql_w8a8_params *p, const float *bias,
                                                    uint32_t buffer, int row, int token, shape k) {
    enum { TOKENS = 32 };
    const int lane = lane_of(), thread = (int)threadIdx.x % 128, wg = (int)threadIdx.x / 128;
    const bool whole = p->n % 8 == 0 && (uintptr_t)p->out % 16 == 0;
    const int type = p->out_type, chunk = thread / WARP * 2 + lane / 8 % 2;
#pragma unroll
    for (int from = 0; from < k.tokens; from += TOKENS) {
        if (token + from >= p->m) break;
        named_barrier(OUTPUT_BARRIER + wg, 128);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t *s = sums + 4 * (from / 8 + j + i / 2) + 2 * (i % 2);
                m[i] = round16_pair(__uint_as_float(s[0]) + bias[i % 2], __uint_as_float(s[1]) + bias[i % 2], type);
            }
            const int at = 8 * (j + lane / 16) + lane % 8;
            store_matrices_transposed(buffer + at * 128 + (chunk ^ at % 8) * 16, m);
        }
        named_barrier(OUTPUT_BARRIER + wg, 128);
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            const int at = i * 16 + thread / 8, piece = thread % 8;
            const uint32_t from_at = buffer + at * 128 + (piece ^ at % 8) * 16;
            const int64_t m = token + from + at, col = row + piece * 8;
            if (m >= p->m || col >= p->n) continue;
            uint16_t *to = (uint16_t *)p->out + m * p->n + col;
            if (whole) {
                *(uint4 *)to = load_shared_16(from_at);
            } else {
                const int count = (int)min((int64_t)8, p->n - col);
#pragma unroll 1
                for (int c = 0; c < count; c++) to[c] = load_shared_2(from_at + 2 * c);
            }
        }
    }
}

static __device__ __forceinline__ void finish_tile(uint32_t *sums, reader *d, const row_terms *rows, int row, int token,
                                                   shape k) {
    const ql_w8a8_params *p = &d->q->product;
    const int wg = (int)threadIdx.x / 128, warp = (int)threadIdx.x / WARP % 4;
    if (k.grouped || d->outliers)
        scale_by_rows(sums, rows, k);
    else
        scale_by_tokens_and_rows(sums, d, rows, k);
#pragma unroll
    for (int i = 0; i < k.subs; i++) {
        const int first = row + (wg * k.subs + i) * 64;
        if (p->out_type == QL_VALUE_F32)
            store_wide(sums + i * k.tokens / 2, p, rows->bias + 2 * i, first + warp * 16 + lane_of() / 4, token, k);
        else
            store_narrow(sums + i * k.tokens / 2, p, rows->bias + 2 * i, d->l->outputs + wg * 4096, first, token, k);
    }
}

static __device__ __forceinline__ void multiply_all(const ql_w8a8_wgmma_params *q, const layout *l, int rank, shape k) {
    const int wg = (int)threadIdx.x / 128, warp = (int)threadIdx.x / WARP % 4, count = k.subs * k.tokens / 2;
    uint32_t sums[MOST_SUMS];
    reader d;
    d.q = q;
    d.l = l;
    d.stage.slot = d.scales.slot = d.slots.slot = 0;
    d.stage.parity = d.scales.parity = d.slots.parity = 0;
    d.rows_at = (uint32_t)(wg * k.subs * 64 * K);
    d.outliers = k.code == QL_W8A8_INT8 && q->product.outliers;
    d.ready = d.outliers ? l->ready : l->full;
    if (k.grouped && wg == 1) named_barrier_arrive(TURN_BARRIER, 256);
    segment s;
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q, k); index++) {
        int row, token;
        place_tile(q, s.tile, rank, &row, &token, k);
        const row_terms rows = load_row_terms(&q->product, row + wg * k.subs * 64 + warp * 16 + lane_of() / 4, k);
#pragma unroll
        for (int i = 0; i < count; i++) sums[i] = 0;
        if (k.grouped)
            sum_grouped(sums, &d, s.end - s.first, k);
        else
            sum_plain(sums, &d, s.end - s.first, k);
        if (d.outliers) {
            scale_by_tokens(sums, &d, k);
            add_slots(sums, &d, k);
        }
        if (s.first > 0) {
            leave_partials(sums, q, rank, k);
            continue;
        }
        add_partials(sums, q, s.end, rank, k.code == QL_W8A8_INT8 && !d.outliers, k);
        finish_tile(sums, &d, &rows, row, token, k);
    }
}

static __device__ __forceinline__ void product(const ql_w8a8_wgmma_params *q, shape k) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const layout l = layout_of(shared_address(shared), k);
    const int lane = (int)threadIdx.x - (QL_W8A8_THREADS - FEEDERS);
    const int rank = k.cluster > 1 ? (int)cluster_rank() : 0;
    if (lane >= 0) {
        WARPGROUP_GIVES_REGISTERS(56);
        if (lane < WARP) {
            if (lane == 0) {
                prefetch_map(q->w_map);
                prefetch_map(q->x_map);
            }
            init_barriers(&l, lane, k);
        }
        __syncthreads();
        if (k.cluster > 1) cluster_barrier();
        if (lane < WARP) start_next_kernel();
        if (lane == 0) copy_codes(q, &l, rank, k);
        if (lane >= WARP) {
            if (k.grouped)
                scale_stages(q, &l, rank, k);
            else if (lane >= 2 * WARP)
                help_segments(q, &l, rank, k);
            else if (k.code == QL_W8A8_INT8 && q->product.outliers)
                clear_stages(q, &l, k);
        }
        __syncwarp();
    } else {
        WARPGROUP_TAKES_REGISTERS(224);
        __syncthreads();
        if (k.cluster > 1) cluster_barrier();
        wait_for_previous_kernel();
        multiply_all(q, &l, rank, k);
    }
    /* No thread block's shared memory goes before the others' copies and arrivals have reached it. */
    if (k.cluster > 1) cluster_barrier();
}

#define KERNEL(name, source, code, grouped, subs, tokens, cluster)                                                     \
    extern "C" __global__ void __launch_bounds__(QL_W8A8_THREADS, 1)                                                   \
        name(const __grid_constant__ ql_w8a8_wgmma_params q) {                                                         \
        const shape k = {code, grouped, subs, tokens, cluster};                                                        \
        product(&q, k);                                                                                                \
    }
QL_W8A8_WGMMA_VARIANTS(KERNEL)

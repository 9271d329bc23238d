/* The warps of the 8-bit product on wgmma that feed those that multiply: one thread copies codes, three warps bring scales
 * and outliers. */
#ifndef QL_KERNELS_W8A8_FEED_CUH
#define QL_KERNELS_W8A8_FEED_CUH

#include "w8a8_outliers.cuh"

/* ---- the thread that copies codes: what a pair has in common each of the two copies half of, into both ---- */

enum {
    BOTH_BLOCKS = 3,
    EARLY_STAGES = 2 /* filled before x is there, which comes after what was asked for before it */
};

static __device__ __forceinline__ void copy_w(const ql_w8a8_wgmma_params *q, const layout *l, int slot, int block,
                                              int row, shape k) {
    const uint32_t full = l->full + 8 * slot;
    const bool once = q->token_tiles == 1;
    const uint32_t to = stage_at(l, slot, k);
    barrier_arrive_expect(full, QL_W8A8_STAGE_BYTES(k.rows, k.tokens));
    if (TOKEN_PARTS(k) == 1) {
        if (once)
            copy_box_once(to, q->w_map, block * K, row, full);
        else
            copy_box(to, q->w_map, block * K, row, full);
    } else {
        const int own = cluster_rank() * (k.rows / 2);
        if (once)
            copy_box_to_all_once(to + own * K, q->w_map, block * K, row + own, full, BOTH_BLOCKS);
        else
            copy_box_to_all(to + own * K, q->w_map, block * K, row + own, full, BOTH_BLOCKS);
    }
}

static __device__ __forceinline__ void copy_x(const ql_w8a8_wgmma_params *q, const layout *l, int slot, int block,
                                              int token, shape k) {
    const int own = ROW_PARTS(k) == 1 ? 0 : cluster_rank() * (k.tokens / 2);
    const uint32_t to = stage_at(l, slot, k) + (k.rows + own) * K, full = l->full + 8 * slot;
    if (ROW_PARTS(k) == 1)
        copy_box(to, q->x_map, block * K, token, full);
    else
        copy_box_to_all(to, q->x_map, block * K, token + own, full, BOTH_BLOCKS);
}

static __device__ __forceinline__ void await_marks(uint64_t *marks, uint64_t nonce) {
    bool all;
    do {
        uint64_t seen[QL_W8A8_WARPS];
#pragma unroll
        for (int i = 0; i < QL_W8A8_WARPS; i++) seen[i] = load_relaxed(marks + i);
        all = true;
#pragma unroll
        for (int i = 0; i < QL_W8A8_WARPS; i++) all &= seen[i] == nonce;
    } while (!all);
    fence_for_copies();
#pragma unroll
    for (int i = 0; i < QL_W8A8_WARPS; i++) marks[i] = 0; /* so that the launch may be repeated as it is, by a graph */
}

static __device__ __forceinline__ void copy_partials(const ql_w8a8_wgmma_params *q, const layout *l, ring *r, int count,
                                                     shape k) {
#pragma unroll 1
    for (int i = 1; i <= count; i++) {
        const int64_t place = place_of_partials(own_range(k) + i, k);
        const uint8_t *from = (const uint8_t *)q->partials + place * SLICES(k) * QL_W8A8_SLICE_BYTES;
        await_marks(q->flags + place * QL_W8A8_WARPS, q->nonce);
#pragma unroll 1
        for (int slice = 0; slice < SLICES(k); slice += SLICES_A_STAGE(k)) {
            const int bytes = min(SLICES_A_STAGE(k), SLICES(k) - slice) * QL_W8A8_SLICE_BYTES;
            barrier_wait(l->empty + 8 * r->slot, r->parity);
            barrier_arrive_expect(l->full + 8 * r->slot, bytes);
            copy_bulk(stage_at(l, r->slot, k), from + slice * QL_W8A8_SLICE_BYTES, bytes, l->full + 8 * r->slot);
            advance(r, q->stages);
        }
    }
}

/* The cluster's first segment, and where it lies: found before the barriers are there, as it takes some divisions. */
typedef struct start {
    segment s;
    int row, token;
    bool any;
} start;

static __device__ __forceinline__ start find_start(const ql_w8a8_wgmma_params *q, shape k) {
    start from;
    from.any = segment_at(&from.s, 0, q, k);
    place_tile(q, from.s.tile, &from.row, &from.token, k);
    return from;
}

static __device__ __forceinline__ void copy_codes(const ql_w8a8_wgmma_params *q, const layout *l, start at, shape k) {
    ring r = {0, 1};
    if (!at.any) return;
    /* Weights may be read before the kernel before is done. */
    const int early = min(at.s.end - at.s.first, min(q->stages, (int)EARLY_STAGES));
#pragma unroll 1
    for (int i = 0; i < early; i++) copy_w(q, l, i, at.s.first + i, at.row, k);
    const int next = at.s.first + early;
#pragma unroll 1
    for (int block = next; block < min(at.s.end, next + q->ahead); block++) prefetch_box(q->w_map, block * K, at.row);
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < early; i++) {
        copy_x(q, l, i, at.s.first + i, at.token, k);
        advance(&r, q->stages);
    }
    int partials = count_partials(q, &at.s, k), index = 1;
    at.s.first += early;
#pragma unroll 1
    while (true) {
#pragma unroll 1
        for (int block = at.s.first; block < at.s.end; block++) {
            barrier_wait(l->empty + 8 * r.slot, r.parity);
            copy_w(q, l, r.slot, block, at.row, k);
            copy_x(q, l, r.slot, block, at.token, k);
            advance(&r, q->stages);
        }
        copy_partials(q, l, &r, partials, k);
        if (!segment_at(&at.s, index++, q, k)) break;
        place_tile(q, at.s.tile, &at.row, &at.token, k);
        partials = count_partials(q, &at.s, k);
    }
}

/* ---- the warps beside it: scales ---- */

static __device__ __forceinline__ float x_scale(const ql_w8a8_params *p, int token, int group) {
    return token < p->m ? p->x_scales[token * p->x_token_stride + group * p->x_group_stride] : 0.0f;
}

/* For each stage the scales of its tokens, times that of each of the weight's blocks: each of three warps has every third
 * stage. */
static __device__ __forceinline__ void scale_stages(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    const ql_w8a8_params *p = &q->product;
    const int lane = (int)threadIdx.x % WARP, which = (int)threadIdx.x / WARP % 4 - 1, each = k.tokens / WARP;
    const int parts = k.rows / QL_W8A8_GROUP;
    const bool blocks = p->w_rows == QL_W8A8_GROUP;
    ring r = {0, 1};
    int turn = 0;
    segment s;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q, k); index++) {
        int row, token;
        place_tile(q, s.tile, &row, &token, k);
#pragma unroll 1
        for (int block = s.first; block < s.end; block++) {
            if (turn == which) {
                float x[4], w[2];
#pragma unroll
                for (int i = 0; i < each; i++) x[i] = x_scale(p, token + i * WARP + lane, block);
#pragma unroll
                for (int part = 0; part < parts; part++) {
                    const int first = row + part * QL_W8A8_GROUP;
                    const int64_t at = first / QL_W8A8_GROUP * p->w_row_stride + block * p->w_group_stride;
                    w[part] = blocks && first < p->n ? p->w_scales[at] : 1.0f;
                }
                const uint32_t to = l->more + r.slot * QL_W8A8_SCALE_BYTES(k.rows, k.tokens);
                barrier_wait(l->empty + 8 * r.slot, r.parity);
#pragma unroll
                for (int part = 0; part < parts; part++)
#pragma unroll
                    for (int i = 0; i < each; i++)
                        store_shared_4(to + part * k.tokens * 4 + scale_place(i * WARP + lane, k),
                                       __float_as_uint(x[i] * w[part]));
                __syncwarp();
                if (lane == 0) barrier_arrive(l->full + 8 * r.slot);
            }
            turn = turn == SCALERS - 1 ? 0 : turn + 1;
            advance(&r, q->stages);
        }
#pragma unroll 1
        for (int i = count_partials(q, &s, k) * STAGES_OF_PARTIALS(k); i > 0; i--) {
            if (turn == which) {
                barrier_wait(l->empty + 8 * r.slot, r.parity);
                if (lane == 0) barrier_arrive(l->full + 8 * r.slot);
            }
            turn = turn == SCALERS - 1 ? 0 : turn + 1;
            advance(&r, q->stages);
        }
    }
}

/* What the end of a tile takes: its tokens' scales, and outliers, whose mask's mark is set to 0 for the quantizer. Members of
 * a cluster end a warpgroup's rows each. */
static __device__ __forceinline__ void help_segments(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    const ql_w8a8_params *p = &q->product;
    const int thread = (int)threadIdx.x % (HELPERS * WARP), rank = k.meets ? (int)blockIdx.x % q->members : 0;
    const bool outliers = k.code == QL_W8A8_INT8 && p->outliers;
    ring r = {0, 1};
    uint32_t slots = ~0u;
    segment s;
    wait_for_previous_kernel();
    if (outliers && thread < WARP) list_columns(p, l);
    if (outliers && blockIdx.x == 0 && thread == 0) *(uint64_t *)(p->outliers + p->x_pitch / 32) = 0;
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q, k); index++) {
        if (k.meets ? rank >= 2 : s.first > 0) continue;
        int row, token;
        place_tile(q, s.tile, &row, &token, k);
        barrier_wait(l->scales_empty + 8 * r.slot, r.parity);
#pragma unroll 1
        for (int i = thread; i < k.tokens; i += HELPERS * WARP)
            store_shared_4(l->tile_scales + r.slot * k.tokens * 4 + scale_place(i, k),
                           __float_as_uint(x_scale(p, token + i, 0)));
        __syncwarp();
        if (thread % WARP == 0) barrier_arrive(l->scales_full + 8 * r.slot);
        advance(&r, 2);
        if (outliers) fill_slots(p, l, &slots, row, token, rank, &s, k);
    }
}

#endif

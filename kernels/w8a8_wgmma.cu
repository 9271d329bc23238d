/* The product of 8-bit activations with an 8-bit weight on sm_90a, for more than a few tokens: Y^T = W X^T, both operands
 * as bytes in shared memory, sums in fp32 or int32.
 *
 * A thread block has two warpgroups that multiply, each half of a tile, and one that feeds them: a thread copies codes into
 * a ring of stages of 128 columns, three warps fetch scales and outliers. w8a8_wgmma.h says how tiles are shared among
 * thread blocks, w8a8.h what is computed.
 *
 * Grouped kernels sum 128 columns at a time and add them, times their scales, in fp32. The others leave all sums to the
 * tensor cores, whose sums of e4m3 products have fewer bits than fp32, and scale outputs. From 128 tokens on grouped kernels
 * are turned: a lane then has two tokens' scales to read in place of 32, and shared memory, which products take three
 * quarters of, has no time for more. */
#include "variants.h"
#include "w8a8_feed.cuh"
#include "w8a8_outputs.cuh"

static __device__ __forceinline__ void release_stage(const reader *d, int slot, shape k) {
    const uint32_t empty = d->l->empty + 8 * slot;
    if (!k.pair) {
        if (lane_of() == 0) barrier_arrive(empty);
    } else {
        if (lane_of() < 2) barrier_arrive_at(empty, lane_of());
    }
}

/* 128 columns of 64 rows by `width`, which lie `from` bytes after the first, on top of sums or, without `add`, in their
 * place. */
static __device__ __forceinline__ void multiply_stage(uint32_t *sums, const reader *d, int add, int from, int width,
                                                      shape k) {
    const uint32_t stage = d->stage.slot * (QL_W8A8_STAGE_BYTES(k.rows, k.tokens) / 16);
    const uint32_t a = d->rows + stage, b = d->width + stage;
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < K / 32; step++)
        multiply_codes(sums, descriptor_at(a, step * 32), descriptor_at(b, from + step * 32), add || step > 0, width,
                       k.code);
    warpgroup_commit();
}

/* column: the lane's of those that this warpgroup wants of the stages. */
static __device__ __forceinline__ void sum_plain(uint32_t *sums, reader *d, const segment *s, int column, shape k) {
    int before = -1; /* the stage whose products may still run */
#pragma unroll 1
    for (int block = s->first; block < s->end; block++) {
        barrier_wait(d->l->full + 8 * d->stage.slot, d->stage.parity);
        multiply_stage(sums, d, 1, 0, WIDTH(k), k);
        if (k.code == QL_W8A8_INT8) take_columns(d->l, stage_at(d->l, d->stage.slot, k), block, column, k);
        WARPGROUP_WAIT(1);
        if (before >= 0) release_stage(d, before, k);
        before = d->stage.slot;
        advance(&d->stage, d->q->stages);
    }
    WARPGROUP_WAIT(0);
    settle_bits(sums, WIDTH(k) / 2);
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

/* Where tokens are rows: the lane's are g and g + 8. `part`: which of the weight's blocks. */
static __device__ __forceinline__ void load_token_pair(float scale[2], const reader *d, int part, shape k) {
    const uint32_t at = d->pair + d->stage.slot * QL_W8A8_SCALE_BYTES(k.rows, k.tokens) + part * k.tokens * 4;
    scale[0] = __uint_as_float(load_shared_4(at));
    scale[1] = __uint_as_float(load_shared_4(at + 32));
}

/* One token's sums after the other's, so that a scale need not be read from registers for each. */
static __device__ __forceinline__ void add_scaled_rows(uint32_t *sums, const uint32_t *part, const float scale[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int c = 2 * i; c < QL_W8A8_GROUP / 2; c += c % 2 ? 3 : 1)
            sums[c] = __float_as_uint(__fmaf_rn(__uint_as_float(part[c]), scale[i], __uint_as_float(sums[c])));
}

/* Sums of 128 columns, and the stage that they come from. Two take turns: products of the next 128 columns run while one is
 * added to the sums. */
typedef struct turn {
    uint32_t part[MOST_SUMS / 2];
    float scale[2];
    int slot;
} turn;

static __device__ __forceinline__ void begin_turn(turn *t, reader *d, shape k) {
    t->slot = d->stage.slot;
    barrier_wait(d->l->full + 8 * t->slot, d->stage.parity);
    if (k.turned) load_token_pair(t->scale, d, 0, k);
    multiply_stage(t->part, d, 0, 0, WIDTH(k), k);
    advance(&d->stage, d->q->stages);
}

static __device__ __forceinline__ void end_turn(uint32_t *sums, turn *t, const reader *d, shape k) {
    settle_bits(t->part, WIDTH(k) / 2);
    if (!k.turned) add_scaled(sums, t->part, d->l->more + t->slot * k.tokens * 4, k);
    __syncwarp();
    release_stage(d, t->slot, k);
    if (k.turned) add_scaled_rows(sums, t->part, t->scale);
    settle_bits(sums, WIDTH(k) / 2);
}

static __device__ __forceinline__ void sum_grouped(uint32_t *sums, reader *d, int blocks, shape k) {
    turn t[2];
    begin_turn(&t[0], d, k);
#pragma unroll 1
    for (; blocks > 2; blocks -= 2) {
        begin_turn(&t[1], d, k);
        WARPGROUP_WAIT(1);
        end_turn(sums, &t[0], d, k);
        begin_turn(&t[0], d, k);
        WARPGROUP_WAIT(1);
        end_turn(sums, &t[1], d, k);
    }
    if (blocks == 2) {
        begin_turn(&t[1], d, k);
        WARPGROUP_WAIT(1);
        end_turn(sums, &t[0], d, k);
        WARPGROUP_WAIT(0);
        end_turn(sums, &t[1], d, k);
    } else {
        WARPGROUP_WAIT(0);
        end_turn(sums, &t[0], d, k);
    }
}

/* Turned, with two blocks of the weight's rows: one after the other, in the same registers, as the sums of both leave none
 * for a second part; while one is added the other warpgroup's products run. What the next stage takes is fetched beside the
 * last products of one. */
static __device__ __forceinline__ void sum_tall(uint32_t *sums, reader *d, int blocks, shape k) {
    enum { WIDE = QL_W8A8_GROUP };
    uint32_t part[WIDE / 2];
    float scale[2][2], next[2][2];
    barrier_wait(d->l->full + 8 * d->stage.slot, d->stage.parity);
#pragma unroll
    for (int i = 0; i < 2; i++) load_token_pair(next[i], d, i, k);
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const int slot = d->stage.slot;
#pragma unroll
        for (int i = 0; i < 4; i++) scale[i / 2][i % 2] = next[i / 2][i % 2];
        multiply_stage(part, d, 0, 0, WIDE, k);
        WARPGROUP_WAIT(0);
        settle_bits(part, WIDE / 2);
        add_scaled_rows(sums, part, scale[0]);
        settle_bits(sums, WIDE / 2);
        multiply_stage(part, d, 0, WIDE * K, WIDE, k);
        advance(&d->stage, d->q->stages);
        if (blocks > 1) {
            barrier_wait(d->l->full + 8 * d->stage.slot, d->stage.parity);
#pragma unroll
            for (int i = 0; i < 2; i++) load_token_pair(next[i], d, i, k);
        }
        WARPGROUP_WAIT(0);
        settle_bits(part, WIDE / 2);
        __syncwarp();
        release_stage(d, slot, k);
        add_scaled_rows(sums + WIDE / 2, part, scale[1]);
        settle_bits(sums + WIDE / 2, WIDE / 2);
    }
}

/* ---- tiles that several thread blocks share ---- */

/* In an order that lets the compiler give a sum and the part that is added to it registers of different banks. */
static __device__ __forceinline__ uint4 quad_of(const uint32_t *sums) {
    return make_uint4(sums[1], sums[0], sums[3], sums[2]);
}

static __device__ __forceinline__ void add_four(uint32_t *sums, uint4 v, shape k) {
    const uint32_t four[4] = {v.y, v.x, v.w, v.z};
#pragma unroll
    for (int c = 0; c < 4; c++)
        sums[c] = k.code == QL_W8A8_INT8 ? sums[c] + four[c]
                                         : __float_as_uint(__uint_as_float(sums[c]) + __uint_as_float(four[c]));
}

/* Adds what a range left, as it comes through the ring. */
static __device__ __forceinline__ void add_partial(uint32_t *sums, reader *d, shape k) {
#pragma unroll
    for (int first = 0; first < SLICES(k); first += SLICES_A_STAGE(k)) {
        const uint32_t from = stage_at(d->l, d->stage.slot, k) + threadIdx.x * 16;
        barrier_wait(d->l->full + 8 * d->stage.slot, d->stage.parity);
#pragma unroll
        for (int i = 0; i < SLICES_A_STAGE(k) && first + i < SLICES(k); i++)
            add_four(sums + 4 * (first + i), load_shared_16(from + i * QL_W8A8_SLICE_BYTES), k);
        fence_shared();
        __syncwarp();
        release_stage(d, d->stage.slot, k);
        advance(&d->stage, d->q->stages);
    }
}

static __device__ __forceinline__ void add_partials(uint32_t *sums, reader *d, int partials, shape k) {
#pragma unroll 1
    for (; partials > 0; partials--) add_partial(sums, d, k);
}

static __device__ __forceinline__ void leave_partials(const uint32_t *sums, const ql_w8a8_wgmma_params *q, shape k) {
    const int64_t place = place_of_partials(own_range(k), k);
    uint4 *to = (uint4 *)((uint8_t *)q->partials + place * SLICES(k) * QL_W8A8_SLICE_BYTES) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < SLICES(k); i++) __stcg(to + i * 256, quad_of(sums + 4 * i));
    __syncwarp();
    if (lane_of() == 0) store_release(q->flags + place * QL_W8A8_WARPS + (int)threadIdx.x / WARP, q->nonce);
}

/* Members of a cluster have a part of the columns each. The sums of warpgroup w meet in member w, where they become
 * outputs: false in all others. */
static __device__ __forceinline__ bool meet(uint32_t *sums, const reader *d, shape k) {
    const int wg = (int)threadIdx.x / 128, thread = (int)threadIdx.x % 128, members = d->q->members;
    const int rank = cluster_rank();
    const uint32_t room = stage_at(d->l, d->q->stages, k) + thread * 16;
    if (rank != wg) {
        const int place = rank < wg ? rank : rank - 1;
        const uint32_t to = address_at(room + place * QL_W8A8_MEETING_BYTES(k.tokens), wg);
#pragma unroll
        for (int i = 0; i < SLICES(k); i++) store_remote_16(to + i * 2048, quad_of(sums + 4 * i));
        __syncwarp();
        if (lane_of() == 0) barrier_arrive_remote(address_at(d->l->met, wg));
        return false;
    }
    barrier_wait_remote(d->l->met, 0);
#pragma unroll 1
    for (int place = 0; place < members - 1; place++)
#pragma unroll
        for (int i = 0; i < SLICES(k); i++)
            add_four(sums + 4 * i, load_shared_16(room + place * QL_W8A8_MEETING_BYTES(k.tokens) + i * 2048), k);
    return true;
}

/* Adds what outlier columns give beyond their codes. */
static __device__ __forceinline__ void add_slots(uint32_t *sums, reader *d, shape k) {
    const int wg = (int)threadIdx.x / 128, all = (int)load_shared_4(d->l->list + 4 * LISTED);
    fence_shared(); /* columns that were taken from stages */
    named_barrier(OUTPUT_BARRIER + wg, 128);
#pragma unroll 1
    for (int index = 0; index * SLOT_COLUMNS < all; index++) {
        const int place = index % SLOTS;
        const uint32_t slot = slot_at(d->l, place, k);
        barrier_wait(d->l->slot_full + 8 * place, d->slots >> place & 1);
        d->slots ^= 1u << place;
        const uint32_t weights = slot + (k.tokens + wg * 64) * QL_W8A8_OUTLIERS * 2;
        warpgroup_fence();
        multiply_columns(sums, columns_descriptor(weights), columns_descriptor(slot), k.tokens);
        warpgroup_commit();
        WARPGROUP_WAIT(0);
        settle_bits(sums, k.tokens / 2);
        __syncwarp();
        if (lane_of() == 0) barrier_arrive(d->l->slot_empty + 8 * place);
    }
}

/* ---- all of a thread block ---- */

/* Whether this thread block makes outputs of a warpgroup's sums. */
static __device__ __forceinline__ bool ends_here(const segment *s, int wg, const ql_w8a8_wgmma_params *q, shape k) {
    return k.meets ? (int)blockIdx.x % q->members == wg : s->first == 0;
}

static __device__ __forceinline__ void multiply_all(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    const int wg = (int)threadIdx.x / 128;
    uint32_t sums[MOST_SUMS];
    reader d;
    d.q = q;
    d.l = l;
    d.stage.slot = d.scales.slot = 0;
    d.stage.parity = d.scales.parity = 0;
    d.slots = 0;
    d.rows = rows_descriptor(l->stages + (uint32_t)((k.turned ? k.rows : 0) + wg * 64) * K);
    d.width = rows_descriptor(l->stages + (k.turned ? 0 : k.rows * K));
    d.pair = l->more + ((int)threadIdx.x / WARP * 16 + lane_of() / 4) * 4;
    /* Shuffled, so that the compiler neither computes them anew for each stage, before its products can start, nor takes a
     * warp's lanes to differ in descriptors: those are made by uniform instructions then, a few a stage. That ends where
     * lanes may part in the loop over segments: nothing in it branches by lane to the loop's next turn. */
    d.rows = __shfl_sync(ALL_LANES, d.rows, 0);
    d.width = __shfl_sync(ALL_LANES, d.width, 0);
    if (k.turned) d.pair = __shfl_sync(ALL_LANES, d.pair, lane_of());
    d.turn = 0;
    const bool outliers = k.code == QL_W8A8_INT8 && q->product.outliers;
    segment s;
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q, k); index++) {
        int row, token;
        place_tile(q, s.tile, &row, &token, k);
        row_terms rows;
        if (!k.turned) rows = load_row_terms(&q->product, row + (int)threadIdx.x / WARP * 16 + lane_of() / 4, k);
        /* After the rows' terms were asked for, which are as long on their way. */
        if (index == 0) d.column = outliers ? listed_column(l) : (int)NO_COLUMN;
#pragma unroll
        for (int i = 0; i < SUMS(k); i++) sums[i] = 0;
        if (k.grouped && k.rows > QL_W8A8_GROUP)
            sum_tall(sums, &d, s.end - s.first, k);
        else if (k.grouped)
            sum_grouped(sums, &d, s.end - s.first, k);
        else
            sum_plain(sums, &d, &s, ends_here(&s, wg, q, k) ? d.column : (int)NO_COLUMN, k);
        if (k.meets) {
            if (!meet(sums, &d, k)) return;
        } else if (s.first > 0) {
            leave_partials(sums, q, k);
        } else {
            add_partials(sums, &d, count_partials(q, &s, k), k);
        }
        if (s.first == 0 || k.meets) {
            if (!k.grouped) scale_by_tokens(sums, &d, k);
            if (outliers) add_slots(sums, &d, k);
            if (k.turned)
                finish_turned(sums, &d, row, token, k);
            else
                finish_tile(sums, &d, &rows, row, token, k);
        }
    }
}

static __device__ __forceinline__ void product(const ql_w8a8_wgmma_params *q, shape k) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const layout l = layout_of(shared_address(shared), k);
    const int feeder = __shfl_sync(ALL_LANES, (int)threadIdx.x / WARP, 0) - QL_W8A8_WARPS;
    start from;
    if (feeder == 0) from = find_start(q, k);
    if (feeder == 1 && is_elected()) init_barriers(q, &l, k);
    if (feeder == 2 && is_elected()) {
        prefetch_map(q->w_map);
        prefetch_map(q->x_map);
    }
    if (k.code == QL_W8A8_INT8 && feeder < 0) clear_slots(&l, k);
    __syncthreads();
    if (k.meets || k.pair) meet_cluster();
    /* Nothing stands before the registers' change in a branch: it would have to fit in fewer. */
    if (feeder >= 0) {
        if (k.rows > QL_W8A8_GROUP) WARPGROUP_GIVES_REGISTERS(40);
        if (k.rows == QL_W8A8_GROUP && k.tokens > 64 && k.grouped) WARPGROUP_GIVES_REGISTERS(56);
        if (k.tokens > 64 && !k.grouped) WARPGROUP_GIVES_REGISTERS(72);
        if (feeder == 0) {
            start_next_kernel();
            if (is_elected()) copy_codes(q, &l, from, k);
        } else {
            if (k.grouped)
                scale_stages(q, &l, k);
            else
                help_segments(q, &l, k);
        }
        __syncwarp();
    } else {
        if (k.rows > QL_W8A8_GROUP) WARPGROUP_TAKES_REGISTERS(232);
        if (k.rows == QL_W8A8_GROUP && k.tokens > 64 && k.grouped) WARPGROUP_TAKES_REGISTERS(224);
        if (k.tokens > 64 && !k.grouped) WARPGROUP_TAKES_REGISTERS(216);
        wait_for_previous_kernel();
        multiply_all(q, &l, k);
    }
    /* No thread block's shared memory goes before the other's copies and arrivals have reached it. */
    if (k.pair) meet_cluster();
}

/* Where they do, thread blocks use half of the registers, so that those of the kernel before and after find room beside
 * them. */
#define HAS_ROOM(code, grouped, tokens) ((code) == QL_W8A8_E4M3 && !(grouped) && (tokens) <= 64)

#define KERNEL(name, source, code, grouped, rows, tokens, pair, meets, turned)                                         \
    extern "C" __global__ void __launch_bounds__(QL_W8A8_THREADS, 1 + HAS_ROOM(code, grouped, tokens))                 \
        name(const __grid_constant__ ql_w8a8_wgmma_params q) {                                                         \
        const shape k = {code, grouped, rows, tokens, pair, meets, turned};                                            \
        product(&q, k);                                                                                                \
    }
QL_W8A8_WGMMA_VARIANTS(KERNEL)

/* The frame of the 8-bit product on wgmma (w8a8_wgmma.cu): which tiles a cluster has, where things lie in shared memory,
 * and the warps that feed those that multiply. A shape is constant in a kernel. */
#ifndef QL_KERNELS_W8A8_FRAME_CUH
#define QL_KERNELS_W8A8_FRAME_CUH

#include "value.cuh"
#include "w8a8_wgmma.h"
#include "wgmma8.cuh"

enum { WARP = 32, FEEDERS = 128, K = QL_W8A8_K, SCALERS = 3, HELPERS = 2, SLOTS = QL_W8A8_OUTLIER_SLOTS };

typedef struct shape {
    int code, grouped, tokens, pair, meets, turned;
} shape;

/* Products of 64 rows that a warpgroup has, and how wide they are. */
#define SUBS(k) ((k).turned ? (k).tokens / 128 : 1)
#define WIDTH(k) ((k).turned ? QL_W8A8_ROWS : (k).tokens)

/* A place in a ring of slots, and how often it came round. */
typedef struct ring {
    int slot;
    uint32_t parity;
} ring;

static __device__ __forceinline__ void advance(ring *r, int slots) {
    if (++r->slot == slots) {
        r->slot = 0;
        r->parity ^= 1;
    }
}

/* ---- tiles ---- */

/* Blocks first to end of a tile. */
typedef struct segment {
    int tile, first, end;
} segment;

/* The range of a cluster. A tile's first columns are in an earlier range than the rest, so in a later cluster: what it
 * waits for was started before it, however many there is room for at once. */
static __device__ __forceinline__ int own_range(shape k) {
    return ((int)gridDim.x - 1 - (int)blockIdx.x) / (k.pair + 1);
}

static __device__ __forceinline__ int range_start(const ql_w8a8_wgmma_params *q, int range) {
    return range * q->range + min(range, q->longer_ranges);
}

/* The cluster's segment number `index`: those of its range, then whole tiles. False where there is none. */
static __device__ __forceinline__ bool segment_at(segment *s, int index, const ql_w8a8_wgmma_params *q, shape k) {
    if (k.meets) {
        const int rank = (int)blockIdx.x % q->members;
        s->tile = (int)blockIdx.x / q->members;
        s->first = q->k_blocks * rank / q->members;
        s->end = q->k_blocks * (rank + 1) / q->members;
        return index == 0;
    }
    const int own = own_range(k), start = range_start(q, own), end = range_start(q, own + 1);
    int tile = start / q->k_blocks + index;
    const int from = tile * q->k_blocks;
    s->first = max(start - from, 0);
    s->end = min(q->k_blocks, end - from);
    if (from >= end) {
        const int last = end > start ? (end - 1) / q->k_blocks - start / q->k_blocks + 1 : 0;
        tile = q->split_tiles + own + (index - last) * ((int)gridDim.x / (k.pair + 1));
        s->first = 0;
        s->end = q->k_blocks;
    }
    s->tile = tile;
    return tile < q->row_tiles * q->token_tiles;
}

/* How many ranges after this one have columns of the segment's tile, if it has the first ones: they leave their sums. */
static __device__ __forceinline__ int count_partials(const ql_w8a8_wgmma_params *q, const segment *s, shape k) {
    int count = 0, end = s->end, range = own_range(k);
    if (k.meets || s->first > 0) return 0;
    for (; end < q->k_blocks; count++) {
        range++;
        end += range_start(q, range + 1) - range_start(q, range);
    }
    return count;
}

/* The first row of this thread block's part of a tile, and the tile's first token. Tiles go along a group of token tiles
 * first, so that those in flight at once share weights and x. */
static __device__ __forceinline__ void place_tile(const ql_w8a8_wgmma_params *q, int tile, int *row, int *token,
                                                  shape k) {
    const int rank = k.pair ? (int)cluster_rank() : 0;
    const int group = tile / (QL_W8A8_TOKEN_GROUP * q->row_tiles), first = group * QL_W8A8_TOKEN_GROUP;
    const int width = min(QL_W8A8_TOKEN_GROUP, q->token_tiles - first);
    tile -= first * q->row_tiles;
    *row = (tile / width * (k.pair + 1) + rank) * QL_W8A8_ROWS;
    *token = (first + tile % width) * k.tokens;
}

/* ---- shared memory: addresses; barriers are 8 bytes each ---- */

typedef struct layout {
    uint32_t full, ready, empty;        /* of stages; ready: full, and outlier columns of x are cleared */
    uint32_t scales_full, scales_empty; /* of a tile's scales, two */
    uint32_t slot_full, slot_empty;     /* of outlier slots, two */
    uint32_t last;                      /* of outlier slots, a word each: bit 0: the last of its pass; bit 1: empty */
    uint32_t met;                       /* the sums of a cluster's other members are there */
    uint32_t outputs, tile_scales, more, stages;
} layout;

static __device__ __forceinline__ layout layout_of(uint32_t base, shape k) {
    layout l;
    l.full = base;
    l.empty = base + 128;
    l.scales_full = base + 256;
    l.scales_empty = base + 272;
    l.slot_full = base + 288;
    l.slot_empty = base + 304;
    l.last = base + 320;
    l.ready = base + 384;
    l.met = base + 512;
    l.outputs = base + QL_W8A8_BARRIER_BYTES;
    l.tile_scales = l.outputs + QL_W8A8_WARPS * QL_W8A8_WARP_BYTES;
    l.more = l.tile_scales + 2 * k.tokens * 4;
    l.stages = base + QL_W8A8_HEAD_BYTES(k.code, k.grouped, k.tokens);
    return l;
}

static __device__ __forceinline__ void init_barriers(const ql_w8a8_wgmma_params *q, const layout *l, int lane,
                                                     shape k) {
    if (k.meets && lane == 0) barrier_init(l->met, (q->members - 1) * QL_W8A8_WARPS / 2);
    if (lane < QL_W8A8_MOST_STAGES) {
        barrier_init(l->full + 8 * lane, k.grouped ? 2 : 1);
        barrier_init(l->ready + 8 * lane, 1);
        barrier_init(l->empty + 8 * lane, QL_W8A8_WARPS * (k.pair + 1));
    }
    if (lane < 2) {
        barrier_init(l->scales_full + 8 * lane, HELPERS);
        barrier_init(l->scales_empty + 8 * lane, QL_W8A8_WARPS);
        barrier_init(l->slot_full + 8 * lane, HELPERS + 1);
        barrier_init(l->slot_empty + 8 * lane, QL_W8A8_WARPS);
    }
    barrier_init_done();
}

static __device__ __forceinline__ uint32_t stage_at(const layout *l, int slot, shape k) {
    return l->stages + slot * QL_W8A8_STAGE_BYTES(k.tokens);
}

/* Where a token's scale lies, so that a lane of a product has those of four of its tokens in 16 bytes: tokens 8 j + 2 t
 * and the one after it for two j. Turned, a lane has rows instead. */
static __device__ __forceinline__ uint32_t scale_place(int token, shape k) {
    if (k.turned) return (uint32_t)token * 4;
    return (uint32_t)(token / 16 * 64 + token % 8 / 2 * 16 + token / 8 % 2 * 8 + token % 2 * 4);
}

/* ---- the thread that copies codes ---- */

static __device__ __forceinline__ void copy_w(const ql_w8a8_wgmma_params *q, const layout *l, int slot, int block,
                                              int row, shape k) {
    const uint32_t full = l->full + 8 * slot;
    barrier_arrive_expect(full, QL_W8A8_STAGE_BYTES(k.tokens));
    if (q->token_tiles == 1)
        copy_box_once(stage_at(l, slot, k), q->w_map, block * K, row, full);
    else
        copy_box(stage_at(l, slot, k), q->w_map, block * K, row, full);
}

/* Each thread block of a cluster copies its share of the tokens into all of them. */
static __device__ __forceinline__ void copy_x(const ql_w8a8_wgmma_params *q, const layout *l, int slot, int block,
                                              int token, shape k) {
    const int rank = k.pair ? (int)cluster_rank() : 0;
    const int share = k.tokens / (k.pair + 1);
    const uint32_t to = stage_at(l, slot, k) + QL_W8A8_ROWS * K + rank * share * K;
    if (!k.pair)
        copy_box(to, q->x_map, block * K, token, l->full + 8 * slot);
    else
        copy_box_to_all(to, q->x_map, block * K, token + rank * share, l->full + 8 * slot, 3);
}

/* Sums that others left go through the ring as well, some slices a stage. */
#define SLICES(k) ((k).tokens / 8)
#define SLICES_A_STAGE(k) (QL_W8A8_STAGE_BYTES((k).tokens) / QL_W8A8_SLICE_BYTES)
#define STAGES_OF_PARTIALS(k) ((SLICES(k) + SLICES_A_STAGE(k) - 1) / SLICES_A_STAGE(k))

static __device__ __forceinline__ int64_t place_of_partials(int range, shape k) {
    return (int64_t)range * (k.pair + 1) + (k.pair ? (int)cluster_rank() : 0);
}

static __device__ __forceinline__ void await_marks(uint64_t *marks, uint64_t nonce) {
    bool all;
    do {
        uint64_t seen[QL_W8A8_WARPS];
#pragma unroll
        for (int i = 0; i < QL_W8A8_WARPS; i++)
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(seen[i]) : "l"(marks + i) : "memory");
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

static __device__ __forceinline__ void copy_codes(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    ring r = {0, 1};
    segment s;
    int row, token;
    if (!segment_at(&s, 0, q, k)) return;
    place_tile(q, s.tile, &row, &token, k);
    /* Weights may be read before the kernel before is done. */
    const int early = min(s.end - s.first, q->stages);
    for (int i = 0; i < early; i++) copy_w(q, l, i, s.first + i, row, k);
    wait_for_previous_kernel();
    for (int i = 0; i < early; i++) {
        copy_x(q, l, i, s.first + i, token, k);
        advance(&r, q->stages);
    }
    int partials = count_partials(q, &s, k), index = 1;
    s.first += early;
#pragma unroll 1
    do {
        place_tile(q, s.tile, &row, &token, k);
#pragma unroll 1
        for (int block = s.first; block < s.end; block++) {
            barrier_wait(l->empty + 8 * r.slot, r.parity);
            copy_w(q, l, r.slot, block, row, k);
            copy_x(q, l, r.slot, block, token, k);
            advance(&r, q->stages);
        }
        copy_partials(q, l, &r, partials, k);
        if (!segment_at(&s, index++, q, k)) break;
        partials = count_partials(q, &s, k);
    } while (true);
}

/* ---- the warps beside it ---- */

static __device__ __forceinline__ float x_scale(const ql_w8a8_params *p, int token, int group) {
    return token < p->m ? p->x_scales[token * p->x_token_stride + group * p->x_group_stride] : 0.0f;
}

/* For each stage the scales of its tokens, times those of the weight's blocks: each of three warps has every third stage. */
static __device__ __forceinline__ void scale_stages(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    const ql_w8a8_params *p = &q->product;
    const int lane = (int)threadIdx.x % WARP, which = (int)threadIdx.x / WARP % 4 - 1, each = k.tokens / WARP;
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
                float x[8], w = 1.0f;
#pragma unroll
                for (int i = 0; i < each; i++) x[i] = x_scale(p, token + i * WARP + lane, block);
                if (blocks && row < p->n)
                    w = p->w_scales[row / QL_W8A8_GROUP * p->w_row_stride + block * p->w_group_stride];
                const uint32_t to = l->more + r.slot * k.tokens * 4;
                barrier_wait(l->empty + 8 * r.slot, r.parity);
#pragma unroll
                for (int i = 0; i < each; i++)
                    store_shared_4(to + scale_place(i * WARP + lane, k), __float_as_uint(x[i] * w));
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

/* ---- outliers ----
 *
 * The marked columns of a segment are put into slots of 16, in their order, as 16-bit matrices of x and of the weight. Where
 * a segment has more than OWN_SLOTS of them, the rest cannot be made while its stages pass: they would wait for slots that
 * are left only after them. */
enum { OWN_SLOTS = SLOTS };

static __device__ __forceinline__ int count_bits(uint4 v) {
    return __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
}

static __device__ __forceinline__ int slots_of(int columns) {
    return max((columns + QL_W8A8_OUTLIERS - 1) / QL_W8A8_OUTLIERS, 1);
}

/* The place of an element of a slot: 8 x 8 matrices of 128 bytes, the two of eight rows side by side. */
static __device__ __forceinline__ uint32_t slot_place(int row, int col) {
    return (uint32_t)(row / 8 * 256 + col / 8 * 128 + row % 8 * 16 + col % 8 * 2);
}

static __device__ __forceinline__ void store_shared_2(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"((uint16_t)v) : "memory");
}

static __device__ __forceinline__ uint32_t slot_at(const layout *l, int slot, shape k) {
    return l->more + slot * QL_W8A8_OUTLIER_BYTES(k.tokens);
}

/* A column of a stage: cleared in x; the weight's into column j of a slot, if there is one. */
static __device__ __forceinline__ void take_column(uint32_t stage, int col, uint32_t slot, int j, int type, shape k) {
    const int lane = (int)threadIdx.x % WARP;
    /* Pieces of 16 bytes are swizzled by their row. */
    const uint32_t place = stage + lane * K + ((col / 16 ^ lane % 8) * 16 + col % 16);
#pragma unroll
    for (int i = 0; i < k.tokens / WARP; i++)
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(place + (QL_W8A8_ROWS + i * WARP) * K), "r"(0) : "memory");
    if (!slot) return;
#pragma unroll
    for (int i = 0; i < QL_W8A8_ROWS / WARP; i++) {
        int code;
        asm volatile("ld.shared.s8 %0, [%1];" : "=r"(code) : "r"(place + i * WARP * K));
        store_shared_2(slot + slot_place(k.tokens + lane + i * WARP, j), round16((float)code, type));
    }
}

/* One warp makes stages ready: outlier columns of x are cleared before they are multiplied, those of the weight kept. */
static __device__ __forceinline__ void clear_stages(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    const uint4 *marks = (const uint4 *)q->product.outliers;
    const int lane = (int)threadIdx.x % WARP, type = q->product.x_type;
    ring r = {0, 0}, slots = {0, 1};
    segment s;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q, k); index++) {
        uint4 own = make_uint4(0, 0, 0, 0); /* lane i: the marks of the i-th of 32 blocks */
        uint32_t marked = 0, slot = 0;
        int found = 0, columns = 0;
        for (int block = s.first + lane; block < s.end; block += WARP) columns += count_bits(marks[block]);
        columns = __reduce_add_sync(~0u, columns);
#pragma unroll 1
        for (int block = s.first; block < s.end; block++) {
            const int at = (block - s.first) % WARP;
            if (at == 0) {
                own = block + lane < s.end ? marks[block + lane] : make_uint4(0, 0, 0, 0);
                marked = __ballot_sync(~0u, count_bits(own) != 0);
            }
            barrier_wait(l->full + 8 * r.slot, r.parity);
            if (marked >> at & 1) {
#pragma unroll 1
                for (int w = 0; w < 4; w++) {
                    uint32_t bits = __shfl_sync(~0u, w == 0 ? own.x : w == 1 ? own.y : w == 2 ? own.z : own.w, at);
#pragma unroll 1
                    for (; bits; bits &= bits - 1) {
                        const int j = found % QL_W8A8_OUTLIERS;
                        if (j == 0) slot = 0;
                        if (j == 0 && found < OWN_SLOTS * QL_W8A8_OUTLIERS) {
                            barrier_wait(l->slot_empty + 8 * slots.slot, slots.parity);
                            slot = slot_at(l, slots.slot, k);
                            for (int i = lane; i < QL_W8A8_ROWS * 2; i += WARP)
                                store_shared_16(slot + k.tokens * 32 + i * 16, make_uint4(0, 0, 0, 0));
                            __syncwarp();
                        }
                        take_column(stage_at(l, r.slot, k), w * 32 + __ffs((int)bits) - 1, slot, j, type, k);
                        found++;
                        if (slot && (j == QL_W8A8_OUTLIERS - 1 || found == columns)) {
                            fence_for_products();
                            __syncwarp();
                            if (lane == 0) barrier_arrive(l->slot_full + 8 * slots.slot);
                            advance(&slots, SLOTS);
                        }
                    }
                }
                fence_for_products();
                __syncwarp();
            }
            if (lane == 0) barrier_arrive(l->ready + 8 * r.slot);
            advance(&r, q->stages);
        }
        /* Before what others left is waited for: it comes after the slots, and may want all stages. */
        for (int i = columns ? OWN_SLOTS : 0; i < slots_of(columns); i++) {
            barrier_wait(l->slot_empty + 8 * slots.slot, slots.parity);
            if (lane == 0) barrier_arrive(l->slot_full + 8 * slots.slot);
            advance(&slots, SLOTS);
        }
#pragma unroll 1
        for (int i = count_partials(q, &s, k) * STAGES_OF_PARTIALS(k); i > 0; i--) {
            barrier_wait(l->full + 8 * r.slot, r.parity);
            if (lane == 0) barrier_arrive(l->ready + 8 * r.slot);
            advance(&r, q->stages);
        }
    }
}

/* A walk along the marks of outlier columns up to `end`: lane i has 128 of each 4096. */
typedef struct walk {
    uint4 bits;
    int64_t next, end; /* next: the column that the words to be loaded next begin at */
} walk;

static __device__ __forceinline__ void load_marks(walk *m, const ql_w8a8_params *p) {
    const int64_t col = m->next + (int)threadIdx.x % WARP * 128;
    m->bits = make_uint4(0, 0, 0, 0);
    if (col < m->end) m->bits = *(const uint4 *)(p->outliers + col / 32);
    m->next += 128 * WARP;
}

/* Lane i gets the i-th of the next columns that are marked; how many. *more: whether there are others after them. */
static __device__ __forceinline__ int next_columns(int *column, bool *more, walk *m, const ql_w8a8_params *p) {
    const int lane = (int)threadIdx.x % WARP;
    int count = 0;
    *column = 0;
    for (;;) {
        const uint32_t any = __ballot_sync(~0u, (m->bits.x | m->bits.y | m->bits.z | m->bits.w) != 0);
        *more = any != 0;
        if (any == 0) {
            if (m->next >= m->end) return count;
            load_marks(m, p);
            continue;
        }
        if (count == QL_W8A8_OUTLIERS) return count;
        const int leader = __ffs((int)any) - 1;
        int found = 0;
        if (lane == leader) {
            const int word = m->bits.x ? 0 : m->bits.y ? 1 : m->bits.z ? 2 : 3;
            const uint32_t bits = word == 0 ? m->bits.x : word == 1 ? m->bits.y : word == 2 ? m->bits.z : m->bits.w;
            found = word * 32 + __ffs((int)bits) - 1;
            if (word == 0) m->bits.x &= bits - 1;
            if (word == 1) m->bits.y &= bits - 1;
            if (word == 2) m->bits.z &= bits - 1;
            if (word == 3) m->bits.w &= bits - 1;
        }
        found = (int)(m->next - 128 * WARP) + leader * 128 + __shfl_sync(~0u, found, leader);
        if (lane == count) *column = found;
        count++;
    }
}

/* The tokens' values, and the rows' if `rows` goes beyond them, in `count` of 16 columns, the rest zeros: the original x and
 * the weight's codes. A warp does half of it. */
static __device__ __forceinline__ void fill_slot(uint32_t slot, const ql_w8a8_params *p, int column, int count, int row,
                                                 int token, int rows, shape k) {
    enum { BATCH = 8 };
    const int lane = (int)threadIdx.x % WARP, half = rows / 2, first = (int)threadIdx.x / WARP % 2 * half;
    const uint32_t reciprocal = 0xffffffffu / (uint32_t)count + 1;
    for (int i = lane; i < half * 2; i += WARP) store_shared_16(slot + first * 32 + i * 16, make_uint4(0, 0, 0, 0));
    __syncwarp();
#pragma unroll 1
    for (int base = 0; base < half * count; base += WARP * BATCH) {
        uint32_t value[BATCH], place[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int index = base + i * WARP + lane;
            const int at = count == 1 ? index : (int)__umulhi((uint32_t)index, reciprocal);
            const int j = index - at * count, own = first + at;
            const int64_t col = __shfl_sync(~0u, column, j);
            place[i] = index < half * count ? slot + slot_place(own, j) : 0;
            value[i] = 0;
            if (place[i] == 0) continue;
            if (own < k.tokens) {
                const int64_t m = token + own;
                if (m < p->m) value[i] = ((const uint16_t *)p->x)[m * p->x_stride + col];
            } else {
                const int64_t n = row + own - k.tokens;
                if (n < p->n) value[i] = 1u << 16 | p->codes[n * p->row_stride + col];
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (place[i])
                store_shared_2(place[i], value[i] >> 16 ? round16((float)(int8_t)value[i], p->x_type) : value[i]);
    }
}

/* The slots of a segment: x in those that clear_stages makes as well, both operands in the rest. */
static __device__ __forceinline__ void fill_slots(const ql_w8a8_params *p, const layout *l, ring *r, int row, int token,
                                                  const segment *s, shape k) {
    const int lane = (int)threadIdx.x % WARP;
    walk m;
    m.next = (int64_t)s->first * K;
    m.end = (int64_t)s->end * K;
    load_marks(&m, p);
    bool more;
    int slot = 0;
    do {
        int column;
        const int count = next_columns(&column, &more, &m, p);
        const int rows = slot < OWN_SLOTS ? k.tokens : k.tokens + QL_W8A8_ROWS;
        barrier_wait(l->slot_empty + 8 * r->slot, r->parity);
        if (count) fill_slot(slot_at(l, r->slot, k), p, column, count, row, token, rows, k);
        if (threadIdx.x % FEEDERS == 2 * WARP)
            store_shared_4(l->last + 4 * r->slot, (more ? 0u : 1u) + (count ? 0u : 2u));
        fence_for_products();
        __syncwarp();
        if (lane == 0) barrier_arrive(l->slot_full + 8 * r->slot);
        advance(r, SLOTS);
        slot++;
    } while (more);
}

/* What the end of a segment takes: its tokens' scales, and outliers. Two warps. */
static __device__ __forceinline__ void help_segments(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
    const ql_w8a8_params *p = &q->product;
    const int thread = (int)threadIdx.x % (HELPERS * WARP);
    const bool outliers = k.code == QL_W8A8_INT8 && p->outliers;
    ring r = {0, 1}, slots = {0, 1};
    segment s;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q, k); index++) {
        if (s.first > 0 && !outliers && !k.meets) continue;
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
        if (outliers) fill_slots(p, l, &slots, row, token, &s, k);
    }
}

#endif

/* The frame of the 8-bit product on wgmma (w8a8_wgmma.cu): which tiles a cluster has, and where things lie in shared memory.
 * A shape is constant in a kernel. */
#ifndef QL_KERNELS_W8A8_FRAME_CUH
#define QL_KERNELS_W8A8_FRAME_CUH

#include "cluster.cuh"
#include "value.cuh"
#include "w8a8_wgmma.h"
#include "warpgroup.cuh"

enum { WARP = 32, K = QL_W8A8_K, SCALERS = 3, HELPERS = 3, SLOTS = QL_W8A8_OUTLIER_SLOTS };

typedef struct shape {
    int code, grouped, rows, tokens, pair, meets, turned;
} shape;

/* How wide a warpgroup's products of 64 rows are. */
#define WIDTH(k) ((k).turned ? (k).rows : (k).tokens)

/* A thread's sums of a tile. */
#define SUMS(k) ((k).rows * (k).tokens / 256)

/* Thread blocks along each side of a cluster's tile. */
#define ROW_PARTS(k) QL_W8A8_ROW_PARTS((k).rows, (k).tokens, (k).pair)
#define TOKEN_PARTS(k) QL_W8A8_TOKEN_PARTS((k).rows, (k).tokens, (k).pair)

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
    const int group = tile / (QL_W8A8_TOKEN_GROUP * q->row_tiles), first = group * QL_W8A8_TOKEN_GROUP;
    const int width = min(QL_W8A8_TOKEN_GROUP, q->token_tiles - first);
    tile -= first * q->row_tiles;
    const int rank = k.pair ? cluster_rank() : 0;
    *row = (tile / width * ROW_PARTS(k) + rank % ROW_PARTS(k)) * k.rows;
    *token = ((first + tile % width) * TOKEN_PARTS(k) + rank % TOKEN_PARTS(k)) * k.tokens;
}

/* ---- shared memory: addresses; barriers are 8 bytes each ---- */

typedef struct layout {
    uint32_t full, empty;               /* of stages */
    uint32_t scales_full, scales_empty; /* of a tile's scales, two */
    uint32_t slot_full, slot_empty;     /* of outlier slots, two */
    uint32_t list_full, list;           /* the columns of the first outlier slots, and how many there are, words */
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
    l.list_full = base + 336;
    l.list = base + 384;
    l.met = base + 512;
    l.outputs = base + QL_W8A8_BARRIER_BYTES;
    l.tile_scales = l.outputs + QL_W8A8_OUTPUT_BYTES(k.grouped, k.tokens);
    l.more = l.tile_scales + 2 * k.tokens * 4;
    l.stages = base + QL_W8A8_HEAD_BYTES(k.code, k.grouped, k.rows, k.tokens);
    return l;
}

/* By one thread: of a thread of 32 each the compiler makes a loop over the lanes. */
static __device__ __forceinline__ void init_barriers(const ql_w8a8_wgmma_params *q, const layout *l, shape k) {
#pragma unroll 1
    for (int i = 0; i < q->stages; i++) {
        barrier_init(l->full + 8 * i, k.grouped ? 2 : 1);
        barrier_init(l->empty + 8 * i, QL_W8A8_WARPS * (k.pair + 1));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        barrier_init(l->scales_full + 8 * i, HELPERS);
        barrier_init(l->scales_empty + 8 * i, QL_W8A8_WARPS);
        if (k.code == QL_W8A8_INT8) barrier_init(l->slot_full + 8 * i, HELPERS);
        if (k.code == QL_W8A8_INT8) barrier_init(l->slot_empty + 8 * i, QL_W8A8_WARPS / (k.meets ? 2 : 1));
    }
    if (k.code == QL_W8A8_INT8) barrier_init(l->list_full, 1);
    if (k.meets) barrier_init(l->met, (q->members - 1) * QL_W8A8_WARPS / 2);
    barrier_init_done();
}

static __device__ __forceinline__ uint32_t stage_at(const layout *l, int slot, shape k) {
    return l->stages + slot * QL_W8A8_STAGE_BYTES(k.rows, k.tokens);
}

/* Where a token's scale lies, so that a lane of a product has those of four of its tokens in 16 bytes: tokens 8 j + 2 t
 * and the one after it for two j. Turned, a lane has rows instead. */
static __device__ __forceinline__ uint32_t scale_place(int token, shape k) {
    if (k.turned) return (uint32_t)token * 4;
    return (uint32_t)(token / 16 * 64 + token % 8 / 2 * 16 + token / 8 % 2 * 8 + token % 2 * 4);
}

/* Sums that others left go through the ring as well, some slices a stage. */
#define SLICES(k) (SUMS(k) / 4)
#define SLICES_A_STAGE(k) (QL_W8A8_STAGE_BYTES((k).rows, (k).tokens) / QL_W8A8_SLICE_BYTES)
#define STAGES_OF_PARTIALS(k) ((SLICES(k) + SLICES_A_STAGE(k) - 1) / SLICES_A_STAGE(k))

/* Where a thread block's sums lie among those that are left. */
static __device__ __forceinline__ int64_t place_of_partials(int range, shape k) {
    return (int64_t)range * (k.pair + 1) + (k.pair ? cluster_rank() : 0);
}

#endif

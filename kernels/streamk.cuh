/* The frame of the stream-K product on wgmma (wgmma.cu): which tiles a thread block has, where things lie in its shared
 * memory, and the warps that feed those that multiply. */
#ifndef QL_KERNELS_STREAMK_CUH
#define QL_KERNELS_STREAMK_CUH

#include "code_exact.cuh"
#include "hopper.cuh"
#include "streamk.h"

enum { WARP = 32, FEEDERS = 128, K = QL_STREAMK_K, BOX_K = QL_STREAMK_BOX_K, MOST_SUMS = 128, SCALE_WARPS = 3 };

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

/* Blocks first to end of a tile. */
typedef struct segment {
    int tile, first, end;
} segment;

/* The range of a thread block. A tile's first columns are in an earlier range than the rest, so in a later block: what it
 * waits for was started before it, however many blocks there is room for at once. */
static __device__ __forceinline__ int own_range(void) {
    /* Volatile, so that what follows from it is computed again for each tile: registers are scarcer than instructions. */
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return (int)gridDim.x - 1 - block;
}

static __device__ __forceinline__ int range_start(const ql_streamk_params *q, int range) {
    return range * q->range + min(range, q->longer_ranges);
}

/* The thread block's segment number `index`: those of its range, then whole tiles. False where there is none. */
static __device__ __forceinline__ bool segment_at(segment *s, int index, const ql_streamk_params *q) {
    const int own = own_range(), start = range_start(q, own), end = range_start(q, own + 1);
    int tile = start / q->k_blocks + index;
    const int from = tile * q->k_blocks;
    s->first = max(start - from, 0);
    s->end = min(q->k_blocks, end - from);
    if (from >= end) {
        const int last = end > start ? (end - 1) / q->k_blocks - start / q->k_blocks + 1 : 0;
        tile = q->split_tiles + own + (index - last) * (int)gridDim.x;
        s->first = 0;
        s->end = q->k_blocks;
    }
    s->tile = tile;
    return tile < q->row_tiles * q->token_tiles;
}

/* Tiles go along a group of token tiles first, so that those in flight at once share weights and x. */
static __device__ __forceinline__ void place_tile(const ql_streamk_params *q, int tile, int *row_tile,
                                                  int *token_tile) {
    if (q->token_tiles == 1) {
        *row_tile = tile;
        *token_tile = 0;
        return;
    }
    int group = tile / (QL_STREAMK_TOKEN_GROUP * q->row_tiles), first = group * QL_STREAMK_TOKEN_GROUP;
    int width = min(QL_STREAMK_TOKEN_GROUP, q->token_tiles - first);
    tile -= first * q->row_tiles;
    *row_tile = tile / width;
    *token_tile = first + tile % width;
}

/* Addresses in shared memory; barriers are 8 bytes each. */
typedef struct layout {
    uint32_t full, empty, pair_full, pair_empty, pairs, outputs, codes, low, high;
    int stages, low_stages, stage_bytes, strip_bytes, rows;
} layout;

static __device__ __forceinline__ layout layout_of(const ql_streamk_params *q, uint32_t base, int code, int rows,
                                                   int tokens) {
    layout l;
    l.stages = q->stages;
    l.low_stages = q->low_stages;
    l.full = base;
    l.empty = base + 256;
    l.pair_full = base + 512;
    l.pair_empty = base + 512 + 8 * QL_STREAMK_PAIRS;
    l.pairs = base + QL_STREAMK_BARRIER_BYTES;
    l.outputs = l.pairs + QL_STREAMK_PAIRS * QL_STREAMK_PAIR_BYTES(rows);
    l.codes = l.outputs + QL_STREAMK_WARPS * QL_STREAMK_WARP_BYTES;
    l.low = base + QL_STREAMK_HEAD_BYTES(code, rows, tokens);
    l.stage_bytes = QL_STREAMK_STAGE_BYTES(tokens);
    l.high = QL_STREAMK_TABLE_AT + QL_STREAMK_TABLE_BYTES;
    l.strip_bytes = QL_STREAMK_STRIP_BYTES(code);
    l.rows = rows;
    return l;
}

static __device__ __forceinline__ uint32_t stage_at(const layout *l, int stage, int code) {
    if (code == QL_CODE_TABLE4 && stage >= l->low_stages) return l->high + (stage - l->low_stages) * l->stage_bytes;
    return l->low + stage * l->stage_bytes;
}

/* ---- the thread that copies x ---- */

static __device__ __forceinline__ void copy_x(const ql_streamk_params *q, const layout *l, int code, int tokens) {
    ring r = {0, 1};
    segment s;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q); index++) {
        int row_tile, token_tile;
        place_tile(q, s.tile, &row_tile, &token_tile);
#pragma unroll 1
        for (int col = s.first * K; col < s.end * K; col += QL_STREAMK_X_K(tokens)) {
            const uint32_t to = stage_at(l, r.slot, code), full = l->full + 8 * r.slot;
            barrier_wait(l->empty + 8 * r.slot, r.parity);
            barrier_arrive_expect(full, l->stage_bytes);
#pragma unroll
            for (int box = 0; box < QL_STREAMK_X_K(tokens) / BOX_K; box++)
                copy_box(to + box * BOX_K * tokens * 2, q->x_map, col + box * BOX_K, token_tile * tokens, full);
            advance(&r, l->stages);
        }
    }
}

/* ---- the warps that expand scales: each takes every third pair of groups, a lane one entry of a strip ----
 *
 * Code that is run once is as dear as memory that is read once: it comes from there, eight instructions at a time. So
 * this is short rather than unrolled. */

static __device__ __forceinline__ int group_of(const ql_packed_params *p, int col) {
    return p->groups == 1 ? 0 : col / (int)p->group_size;
}

/* A scale as the sum of two 16-bit numbers, the greater one in the low half. */
static __device__ __forceinline__ uint32_t split_scale(float scale, int type) {
    const uint32_t high = round16(scale, type);
    const float value =
        type == QL_VALUE_F16 ? __half2float(__ushort_as_half((uint16_t)high)) : __uint_as_float(high << 16);
    return high | (uint32_t)round16(scale - value, type) << 16;
}

/* As it lies in memory: the bits of a scale or of a second-level absmax, and a byte of zeros or of the first level. */
typedef struct raw_entry {
    uint32_t scale, byte;
} raw_entry;

static __device__ __forceinline__ raw_entry load_entry(const ql_streamk_params *q, int code, int64_t place, int row,
                                                       int group) {
    const ql_packed_params *p = &q->product;
    raw_entry raw = {0, 0};
    if (code == QL_CODE_TABLE4 && p->nested_table) {
        const int64_t block = (int64_t)min(row, (int)p->n - 1) * p->groups + min(group, (int)p->groups - 1);
        raw.byte = __ldg((const uint8_t *)p->scales + place);
        raw.scale = __ldg((const uint32_t *)p->nested_absmax + (block >> q->nested_shift));
        return raw;
    }
    raw.scale = p->scales_type == QL_VALUE_F32 ? __ldg((const uint32_t *)p->scales + place)
                                               : __ldg((const uint16_t *)p->scales + place);
    if (code != QL_CODE_TABLE4 && p->zeros) raw.byte = __ldg(p->zeros + (code == QL_CODE_INT8 ? place : place >> 1));
    return raw;
}

static __device__ __forceinline__ float entry_scale(raw_entry raw, int code, const ql_packed_params *p) {
    float scale = __uint_as_float(p->scales_type == QL_VALUE_BF16 ? raw.scale << 16 : raw.scale);
    if (p->scales_type == QL_VALUE_F16) scale = __half2float(__ushort_as_half((uint16_t)raw.scale));
    if (code == QL_CODE_TABLE4 && p->nested_table)
        scale = __fadd_rn(__fmul_rn(__ldg(p->nested_table + raw.byte), scale), p->nested_offset);
    return scale;
}

static __device__ __forceinline__ uint32_t entry_zero(raw_entry raw, const ql_packed_params *p, int code, int odd) {
    if (!p->zeros) return 1u << (QL_CODE_BITS(code) - 1);
    return code == QL_CODE_INT8 ? raw.byte : raw.byte >> 4 * odd & 15u;
}

/* What multiplying warps read: for each group of the pair, strip and g, the scales and zero words of rows g and g + 8. Of
 * a row that is one group, the first group of the pair has it. */
static __device__ __forceinline__ void expand_scales(const ql_streamk_params *q, const layout *l, int code, int type,
                                                     int scaling) {
    enum { BATCH = 4 };
    const int lane = (int)threadIdx.x % WARP, strips = l->rows / 16, which = (int)threadIdx.x / WARP % 4 - 1;
    const ql_packed_params *p = &q->product;
    const bool one_group = p->groups == 1;
    const int last_strip = ((int)p->n + 15) / 16 - 1, pairs = one_group ? 1 : ((int)p->groups + 1) / 2;
    /* Lane 4 g + i has row g + 8 (i % 2) of group i / 2. */
    const int g = lane / 4, half = lane % 2, odd = lane / 2 % 2;
    ring r = {0, 1};
    int turn = 0;
    segment s;
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q); index++) {
        int row_tile, token_tile;
        place_tile(q, s.tile, &row_tile, &token_tile);
        const int last = group_of(p, min(s.end * K, (int)p->k) - 1) / 2;
#pragma unroll 1
        for (int pair = group_of(p, s.first * K) / 2; pair <= last; pair++) {
            if (turn == which) {
                uint32_t to =
                    l->pairs + r.slot * QL_STREAMK_PAIR_BYTES(l->rows) + odd * strips * 128 + g * 16 + half * 4;
#pragma unroll 1
                for (int strip = 0; strip < strips; strip += BATCH) {
                    raw_entry raw[BATCH];
#pragma unroll
                    for (int i = 0; i < BATCH; i++) {
                        const int at = min(row_tile * strips + strip + i, last_strip);
                        const int64_t place =
                            one_group ? at * 16 + g + 8 * half : ((int64_t)at * pairs + pair) * 32 + lane;
                        raw[i] = load_entry(q, code, place, at * 16 + g + 8 * half, pair * 2 + odd);
                    }
                    if (strip == 0) barrier_wait(l->pair_empty + 8 * r.slot, r.parity);
#pragma unroll
                    for (int i = 0; i < BATCH; i++) {
                        const float scale = entry_scale(raw[i], code, p);
                        uint32_t bits = __float_as_uint(scale);
                        if (code != QL_CODE_TABLE4 && scaling == QL_SCALES_WEIGHTS) bits = split_scale(scale, type);
                        store_shared_4(to, bits);
                        if (code != QL_CODE_TABLE4)
                            store_shared_4(
                                to + 8, zero_word(entry_zero(raw[i], p, code, one_group ? g % 2 : half), code, type));
                        to += 128;
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(l->pair_full + 8 * r.slot);
            }
            turn = turn == SCALE_WARPS - 1 ? 0 : turn + 1;
            advance(&r, QL_STREAMK_PAIRS);
        }
    }
}

#endif

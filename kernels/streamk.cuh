/* The frame of the stream-K product on wgmma (wgmma.cu): which tiles a thread block has, where things lie in its shared
 * memory, and the warps that fill its stages.
 *
 * Code that is run once is as dear as memory that is read once, as it comes from there: so there are no divisions and
 * few unrolled loops before the first copies, and what one thread copies it copies under elect.sync, without which the
 * compiler writes a loop over the lanes around each instruction. */
#ifndef QL_KERNELS_STREAMK_CUH
#define QL_KERNELS_STREAMK_CUH

#include "cluster.cuh"
#include "streamk.h"
#include "warpgroup.cuh"

enum { WARP = 32, BOX_K = QL_STREAMK_BOX_K, WARPS = QL_STREAMK_WARPS, MOST_SUMS = 128, MOST_GROUPS = 4 };

/* Constants of a kernel. groups: those of a stage, in pairs; 1: one, of some stages; 0: one is all of K. wide: scales are
 * not of x's type. */
typedef struct shape {
    int code, type, rows, tokens, stage_k, groups;
    bool wide;
} shape;

#define PAIRED(k) QL_STREAMK_PAIRED((k).tokens)
#define SETS(k) QL_STREAMK_SETS((k).code, (k).tokens)
#define HAS_PLANES(k) QL_STREAMK_HAS_PLANES((k).code, (k).tokens)
#define HAS_PARTS(k) QL_STREAMK_HAS_PARTS((k).code, (k).tokens)
#define HAS_HALVES(k) QL_STREAMK_HAS_HALVES((k).code, (k).stage_k)

/* ---- tiles ---- */

/* Blocks first to end of a tile; left: blocks of the range that come after. */
typedef struct walk {
    int tile, first, end, left;
} walk;

/* Thread blocks, or pairs of them that go through the same tiles. */
static __device__ __forceinline__ int walkers(shape k) { return (int)gridDim.x / (PAIRED(k) + 1); }

/* The range of a thread block or a pair. A tile's first columns are in an earlier range than the rest, so in a later block:
 * what it waits for was started before it, however many blocks there is room for at once. */
static __device__ __forceinline__ int own_range(shape k) { return walkers(k) - 1 - (int)blockIdx.x / (PAIRED(k) + 1); }

static __device__ __forceinline__ int range_blocks(const ql_streamk_params *q, int range) {
    return q->range + (range < q->longer_ranges);
}

/* a / b by b's inverse: a is less than 2^31. */
static __device__ __forceinline__ int divide(int a, int b, uint32_t inverse) {
    const int quotient = (int)__umulhi((uint32_t)a, inverse);
    return (quotient + 1) * b <= a ? quotient + 1 : quotient;
}

/* The next part of the range, then whole tiles. False where there is none. */
static __device__ __forceinline__ bool next_tile(walk *w, const ql_streamk_params *q, shape k) {
    w->first = 0;
    if (w->left > 0) {
        w->tile++;
        w->end = min(q->k_blocks, w->left);
        w->left -= w->end;
        return true;
    }
    w->tile = w->tile < q->split_tiles ? q->split_tiles + own_range(k) : w->tile + walkers(k);
    w->end = q->k_blocks;
    return w->tile < q->row_tiles * q->token_tiles;
}

/* There is one for each thread block. */
static __device__ __forceinline__ walk first_tile(const ql_streamk_params *q, shape k) {
    const int own = own_range(k), start = own * q->range + min(own, q->longer_ranges);
    walk w = {-1, 0, 0, range_blocks(q, own)};
    if (w.left == 0) {
        next_tile(&w, q, k);
        return w;
    }
    w.tile = divide(start, q->k_blocks, q->k_blocks_inverse);
    w.first = start - w.tile * q->k_blocks;
    w.end = min(q->k_blocks, w.first + w.left);
    w.left -= w.end - w.first;
    return w;
}

/* Tiles go along a group of token tiles first, so that those in flight at once share weights and x. */
static __device__ __forceinline__ void place_tile(const ql_streamk_params *q, int tile, int *row_tile, int *token_tile,
                                                  shape k) {
    *row_tile = tile;
    *token_tile = 0;
    if (q->token_tiles > 1) {
        const int most = QL_STREAMK_TOKEN_GROUP / k.tokens;
        int first = 0;
#pragma unroll 1
        for (; tile >= most * q->row_tiles; first += most) tile -= most * q->row_tiles;
        const int width = min(most, q->token_tiles - first);
        *row_tile = width == most ? tile / most : divide(tile, width, q->width_inverse);
        *token_tile = first + tile - *row_tile * width;
    }
    if (PAIRED(k)) *row_tile = *row_tile * 2 + cluster_rank();
}

/* The first token that a tile multiplies. The last tile's are as many as the others', some of which another tile has as well
 * and stores: copies of what lies beyond the end of x take longer than those of what is there. */
static __device__ __forceinline__ int first_token(const ql_streamk_params *q, int token_tile, shape k) {
    return min(token_tile * k.tokens, max((int)q->product.m - k.tokens, 0));
}

/* The first group of a block. */
static __device__ __forceinline__ int group_of(const ql_streamk_params *q, int block, int groups) {
    return groups > 1 ? groups * block : divide(block, q->group_blocks, q->group_blocks_inverse);
}

/* Goes on by a block where a group is some of them; left: blocks of the group, that one included. Whether the first group of
 * a pair begins then. */
static __device__ __forceinline__ bool next_group(int *group, int *left, const ql_streamk_params *q) {
    const bool is_over = --*left == 0;
    if (is_over) *left = q->group_blocks;
    *group += is_over;
    return is_over && !(*group & 1);
}

/* ---- shared memory: addresses; barriers are 8 bytes each ---- */

enum { EMPTY = 256, SPARE = 1016 }; /* from a stage's full barrier to its empty one; a barrier that nobody waits for */

static __device__ __forceinline__ int stage_bytes(shape k) {
    return QL_STREAMK_STAGE_BYTES(k.code, k.rows, k.tokens, k.stage_k, k.groups);
}

/* Where a block's codes are in codes_map. */
static __device__ __forceinline__ int codes_column(int block, shape k) {
    const int tiles = HAS_HALVES(k) ? block / 2 : block;
    return tiles * (QL_STREAMK_STRIP_BYTES(k.code, k.stage_k) / QL_STREAMK_CODES_UNIT(k.code, k.stage_k));
}

/* Scales of a strip and a pair of groups are 16 << shift bytes. */
static __device__ __forceinline__ int scale_shift_of(const ql_streamk_params *q, shape k) {
    const ql_packed_params *p = &q->product;
    if (k.code == QL_CODE_TABLE4) return p->nested_table ? 1 : 3;
    return p->scales_type == QL_VALUE_F32 ? 3 : 2;
}

static __device__ __forceinline__ uint32_t stages_at(uint32_t base, shape k) {
    return base + QL_STREAMK_HEAD_BYTES(k.code, k.tokens, k.groups);
}

static __device__ __forceinline__ bool is_nested(const ql_streamk_params *q, shape k) {
    return k.code == QL_CODE_TABLE4 && q->product.nested_table;
}

/* Full: the codes' bytes, those of x, and 32 lanes' copies of entries, two warps' absmax or four warps' planes. */
static __device__ __forceinline__ void init_barriers(const ql_streamk_params *q, uint32_t base, shape k) {
    const int entries = HAS_PLANES(k) ? 4 : !k.groups ? 0 : is_nested(q, k) ? 2 : WARP;
#pragma unroll 1
    for (int i = 0; i < q->stages; i++) {
        barrier_init(base + 8 * i, 2 + entries);
        barrier_init(base + 8 * i + EMPTY, WARPS * (PAIRED(k) + 1));
    }
    barrier_init(base + SPARE, WARPS * (PAIRED(k) + 1));
    barrier_init_done();
}

/* A warp is done with a stage, x of which comes from both thread blocks of a pair. */
static __device__ __forceinline__ void release_stage(uint32_t empty, shape k) {
    const int lane = (int)threadIdx.x % WARP;
    if (!PAIRED(k)) {
        if (lane == 0) barrier_arrive(empty);
    } else {
        if (lane < 2) barrier_arrive_at(empty, lane);
    }
}

/* ---- the first things to wait for ---- */

enum { EARLY_BLOCKS = 2 };

/* A strip's sectors of a section from its pair of groups on, four lanes a strip. pair_bytes: of a strip and a pair. */
static __device__ __forceinline__ void prefetch_section(const void *section, int pair_bytes, int first_strip,
                                                        int strips, int last_strip, int pair, int pairs) {
    const int lane = (int)threadIdx.x % WARP, at = min(pair * pair_bytes + lane % 4 * 32, (pairs - 1) * pair_bytes);
    if (!section) return;
#pragma unroll
    for (int strip = 0; strip < strips; strip += 8)
        prefetch_sector((const uint8_t *)section +
                        (int64_t)min(first_strip + strip + lane / 4, last_strip) * pairs * pair_bytes + at);
}

/* Asks for what the first stages take of the weight, while barriers are made and the copies' instructions are on their
 * way. Of few stages: a whole ring would stand in its own way. */
static __device__ __forceinline__ void prefetch_first(const ql_streamk_params *q, walk w, shape k) {
    const ql_packed_params *p = &q->product;
    int row_tile, token_tile;
    place_tile(q, w.tile, &row_tile, &token_tile, k);
    if (is_elected()) {
#pragma unroll 1
        for (int block = w.first; block < min(w.end, w.first + EARLY_BLOCKS); block++)
            prefetch_box(q->codes_map, codes_column(block, k), row_tile * (k.rows / 16));
    }
    if (k.groups == 0) return;
    const int strips = k.rows / 16, last_strip = ((int)p->n + 15) / 16 - 1, pairs = ((int)p->groups + 1) / 2;
    const int pair = group_of(q, w.first, k.groups) / 2;
    prefetch_section(p->scales, 16 << scale_shift_of(q, k), row_tile * strips, strips, last_strip, pair, pairs);
    if (k.code != QL_CODE_TABLE4)
        prefetch_section(p->zeros, 16 << (k.code == QL_CODE_INT8), row_tile * strips, strips, last_strip, pair, pairs);
}

/* ---- what other ranges have left of a tile ---- */

/* How many ranges have a part of the tile after this one, which has its first blocks; else 0. */
static __device__ __forceinline__ int ranges_after(const ql_streamk_params *q, const walk *w, shape k) {
    int ranges = 0;
    if (w->first > 0) return 0;
#pragma unroll 1
    for (int end = w->end; end < q->k_blocks; ranges++) end += range_blocks(q, own_range(k) + 1 + ranges);
    return ranges;
}

/* Thread blocks of a pair leave their sums beside each other. */
static __device__ __forceinline__ int64_t place_of_partials(int range, shape k) {
    return PAIRED(k) ? (int64_t)range * 2 + cluster_rank() : range;
}

/* Parts that come by the ring after a tile's own stages: as far ahead of those that multiply as these, so that nobody waits
 * for them. Each is as long as a stage's x, and lies there. */
#define PART_BYTES(k) ((k).tokens * (k).stage_k * 2)
#define PARTS(k) ((k).rows * (k).tokens * 4 / PART_BYTES(k))

/* One thread asks for parts, of a range that has raised its flag, which it takes away again. What else brings something to
 * a stage arrives alone. */
static __device__ __forceinline__ void bring_parts(const ql_streamk_params *q, uint32_t base, ring *r, const walk *w,
                                                   bool asks, shape k) {
    if (!HAS_PARTS(k)) return;
    const int ranges = ranges_after(q, w, k);
#pragma unroll 1
    for (int i = 0; i < ranges; i++) {
        const int64_t place = place_of_partials(own_range(k) + 1 + i, k);
        const uint8_t *from = (const uint8_t *)(q->partials + place * (k.rows * k.tokens));
        if (asks) {
            uint64_t *flag = q->flags + place * WARPS;
            while (load_acquire(flag) != q->nonce) {
            }
            *flag = 0;
            fence_for_copies();
        }
#pragma unroll 1
        for (int part = 0; part < PARTS(k); part++) {
            const uint32_t full = base + 8 * r->slot, to = stages_at(base, k) + r->slot * stage_bytes(k);
            barrier_wait(full + EMPTY, r->parity);
            if (asks) {
                barrier_arrive_expect(full, PART_BYTES(k));
                copy_bulk(to, from + part * PART_BYTES(k), PART_BYTES(k), full);
            } else {
                barrier_arrive(full);
            }
            advance(r, q->stages);
        }
    }
}

/* ---- the threads that copy codes and x, one each or one for both ---- */

static __device__ __forceinline__ void ask_for_codes(const ql_streamk_params *q, uint32_t base, int slot, int row_tile,
                                                     int block, shape k) {
    const uint32_t full = base + 8 * slot, stage = stages_at(base, k) + slot * stage_bytes(k);
    barrier_arrive_expect(full, k.rows / 16 * QL_STREAMK_STRIP_BYTES(k.code, k.stage_k));
    copy_box(stage + QL_STREAMK_CODES_AT(k.tokens, k.stage_k), q->codes_map, codes_column(block, k),
             row_tile * (k.rows / 16), full);
}

/* Each thread block of a pair copies half of the tokens into both. */
static __device__ __forceinline__ void ask_for_x(const ql_streamk_params *q, uint32_t base, int slot, int token_tile,
                                                 int block, shape k) {
    const uint32_t full = base + 8 * slot, stage = stages_at(base, k) + slot * stage_bytes(k);
    const int token = first_token(q, token_tile, k);
    barrier_arrive_expect(full, q->x_bytes);
    if (PAIRED(k)) {
        const int share = k.tokens / 2, rank = cluster_rank();
        copy_box_to_all(stage + rank * share * BOX_K * 2, q->x_map, block * BOX_K, token + rank * share, full, 3);
        return;
    }
#pragma unroll
    for (int box = 0; box < k.stage_k / BOX_K; box++)
        copy_box(stage + box * BOX_K * k.tokens * 2, q->x_map, block * k.stage_k + box * BOX_K, token, full);
}

/* The first stages, ahead of those threads: codes by the one that made the barriers, x before any branch, as the instructions
 * of what runs later are not there yet. With more tokens nothing is gained. */
#define HAS_EARLY_STAGES(k) ((k).tokens <= 32)

static __device__ __forceinline__ int early_stages(const ql_streamk_params *q, walk w, shape k) {
    return HAS_EARLY_STAGES(k) ? min(min(EARLY_BLOCKS, w.end - w.first), q->stages - 1) : 0;
}

static __device__ __forceinline__ void ask_early(const ql_streamk_params *q, uint32_t base, walk w, bool x, shape k) {
    const int count = early_stages(q, w, k);
    int row_tile, token_tile;
    place_tile(q, w.tile, &row_tile, &token_tile, k);
    if (x) wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        if (x)
            ask_for_x(q, base, i, token_tile, w.first + i, k);
        else
            ask_for_codes(q, base, i, row_tile, w.first + i, k);
    }
}

static __device__ __forceinline__ void copy_stages(const ql_streamk_params *q, uint32_t base, walk w, bool x, shape k) {
    int skipped = early_stages(q, w, k);
    ring r = {skipped, 1};
    if (x) wait_for_previous_kernel();
    do {
        int row_tile, token_tile;
        place_tile(q, w.tile, &row_tile, &token_tile, k);
#pragma unroll 1
        for (int block = w.first + skipped; block < w.end; block++) {
            barrier_wait(base + 8 * r.slot + EMPTY, r.parity);
            if (x)
                ask_for_x(q, base, r.slot, token_tile, block, k);
            else
                ask_for_codes(q, base, r.slot, row_tile, block, k);
            advance(&r, q->stages);
        }
        bring_parts(q, base, &r, &w, x, k);
        skipped = 0;
    } while (next_tile(&w, q, k));
}

/* ---- the warp that copies entries: of each strip those of the stage's pairs of groups, as they lie in memory ----
 *
 * Of a pair first the scales, or absmax, at most 128 bytes a strip; 128 bytes a strip after their start the zeros, 16 or 32.
 * Nested absmax is not copied, but made (absmax.cuh). */

/* Pieces of 16 bytes, 1 << shift of each strip and pair, shared out among the lanes: at most MOST_PIECES a lane. */
enum { MOST_PIECES = 4 };

typedef struct pieces {
    const uint8_t *from[MOST_PIECES]; /* of the first pair; NULL: none */
    int shift;
} pieces;

static __device__ __forceinline__ pieces share_out(const void *section, int shift, int first_strip, int strips,
                                                   int last_strip, int pairs) {
    pieces result;
    result.shift = shift;
#pragma unroll
    for (int i = 0; i < MOST_PIECES; i++) {
        const int piece = (int)threadIdx.x % WARP + i * WARP, strip = min(first_strip + (piece >> shift), last_strip);
        const int64_t at = ((int64_t)strip * pairs << shift) + (piece & ((1 << shift) - 1));
        result.from[i] = section && piece < strips << shift ? (const uint8_t *)section + at * 16 : NULL;
    }
    return result;
}

static __device__ __forceinline__ void copy_pieces(uint32_t to, const pieces *p, int pair, int most) {
    const int64_t at = (int64_t)pair << (p->shift + 4);
#pragma unroll
    for (int i = 0; i < most; i++)
        if (p->from[i]) cp_async_16(to + ((int)threadIdx.x % WARP + i * WARP) * 16, p->from[i] + at, 16);
}

static __device__ __forceinline__ void copy_entries(const ql_streamk_params *q, uint32_t base, walk w, shape k) {
    const ql_packed_params *p = &q->product;
    const int strips = k.rows / 16, last_strip = ((int)p->n + 15) / 16 - 1, pairs = ((int)p->groups + 1) / 2;
    ring r = {0, 1};
    do {
        int row_tile, token_tile;
        place_tile(q, w.tile, &row_tile, &token_tile, k);
        int group = group_of(q, w.first, k.groups), left = (group + 1) * q->group_blocks - w.first;
        const pieces scales = share_out(p->scales, scale_shift_of(q, k), row_tile * strips, strips, last_strip, pairs);
        const pieces zeros = share_out(k.code == QL_CODE_TABLE4 ? NULL : p->zeros, k.code == QL_CODE_INT8,
                                       row_tile * strips, strips, last_strip, pairs);
#pragma unroll 1
        for (int block = w.first; block < w.end; block++) {
            const uint32_t full = base + 8 * r.slot;
            const uint32_t to = stages_at(base, k) + r.slot * stage_bytes(k) +
                                QL_STREAMK_ENTRIES_AT(k.code, k.rows, k.tokens, k.stage_k);
            barrier_wait(full + EMPTY, r.parity);
#pragma unroll
            for (int i = 0; i < QL_STREAMK_PAIRS(k.groups); i++) {
                const int pair = min(group / 2 + i, pairs - 1);
                const uint32_t at = to + i * QL_STREAMK_PAIR_BYTES(k.code, k.rows);
                /* 128 bytes a strip at most, 64 with scales of x's type. */
                copy_pieces(at, &scales, pair, k.wide || k.code == QL_CODE_TABLE4 ? strips / 4 : strips / 8);
                if (k.code != QL_CODE_TABLE4) copy_pieces(at + strips * 128, &zeros, pair, 1);
            }
            barrier_arrive_copies(full);
            if (k.groups > 1) {
                group += k.groups;
            } else if (--left == 0) {
                group++;
                left = q->group_blocks;
            }
            advance(&r, q->stages);
        }
        bring_parts(q, base, &r, &w, false, k);
    } while (next_tile(&w, q, k));
}

#endif

/* The product with a packed weight on sm_90a, for more than a few tokens: Y^T = W X^T with the weight as A of wgmma from
 * registers, x as B from shared memory, fp32 sums.
 *
 * A thread block has two warpgroups that multiply, each warp with the codes of its strips on their way to shared memory
 * some stages ahead, and one that feeds them: a thread copies x into a ring of stages, three warps expand scales and zeros
 * of pairs of groups into a ring of their own. streamk.h says how tiles are shared among thread blocks.
 *
 * A warp decodes 64 columns of its 16 rows while the product of the columns before them runs. Scales are applied to
 *   sums:    codes are exact, a group's sums are scaled when it ends;
 *   weights: W is rounded once to 16 bit: for tiles whose registers have no room for a group's sums;
 *   outputs: at the end, where a row is one group. */
#include "streamk.cuh"
#include "value.cuh"
#include "variants.h"

/* ---- the warps that multiply ---- */

/* Where a warp stands among groups. */
typedef struct groups_state {
    int group, left; /* left: granules of the group that are still to come */
    int granules;    /* of a group */
    ring r;
    uint32_t entry; /* this lane's place in a pair of slot 0, group 0 */
} groups_state;

static __device__ __forceinline__ void read_entries(const groups_state *gs, const layout *l, int sub_tiles,
                                                    uint4 *entries) {
    const uint32_t at =
        gs->entry + gs->r.slot * QL_STREAMK_PAIR_BYTES(l->rows) + (gs->group & 1) * (l->rows / 16 * 128);
#pragma unroll
    for (int i = 0; i < sub_tiles; i++) entries[i] = load_shared_16(at + i * 512);
}

static __device__ __forceinline__ void leave_pair(groups_state *gs, const layout *l) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) barrier_arrive(l->pair_empty + 8 * gs->r.slot);
    advance(&gs->r, QL_STREAMK_PAIRS);
}

static __device__ __forceinline__ void next_group(groups_state *gs, const layout *l, const ql_packed_params *p) {
    if (gs->group & 1) {
        leave_pair(gs, l);
        barrier_wait(l->pair_full + 8 * gs->r.slot, gs->r.parity);
    }
    gs->group++;
    gs->left = gs->group + 1 < (int)p->groups ? gs->granules : 1 << 30;
}

static __device__ __forceinline__ void first_group(groups_state *gs, const layout *l, const ql_packed_params *p,
                                                   int granule, int block) {
    barrier_wait(l->pair_full + 8 * gs->r.slot, gs->r.parity);
    gs->group = group_of(p, block * K);
    gs->left = 1 << 30;
    if (gs->group + 1 < (int)p->groups) gs->left = ((gs->group + 1) * (int)p->group_size - block * K) / granule;
}

/* A warp's codes on their way to shared memory, ahead of the stage that it multiplies: each lane copies what it reads
 * itself, so that nobody else has to be waited for. */
typedef struct code_stream {
    const uint8_t *from; /* this lane's codes of the next stage, in the first sub-tile */
    int64_t sub_tile;    /* bytes from there to the second's */
    int segment;         /* the next one's number */
    int blocks, tiles;   /* that are left of the segment, of the strip */
    int slot;            /* that is decoded next, and filled once that is done */
    uint32_t to;         /* this lane's place in slot 0 */
} code_stream;

/* The strip of a warp's first sub-tile within the tile; the second's is four further on. */
static __device__ __forceinline__ int strip_of(int rows) {
    const int warp = (int)threadIdx.x / WARP;
    return warp / 4 * 4 * (rows / 128) + warp % 4;
}

static __device__ __forceinline__ void fetch_segment(code_stream *c, const ql_streamk_params *q, int rows, int code) {
    const ql_packed_params *p = &q->product;
    const int strip_tiles = (int)((p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code));
    segment s;
    c->blocks = -1; /* where there are no more: it is not asked again */
    if (!segment_at(&s, c->segment++, q)) return;
    int row_tile, token_tile;
    place_tile(q, s.tile, &row_tile, &token_tile);
    const int last = (int)((p->n + 15) / 16) - 1, first = row_tile * (rows / 16) + strip_of(rows);
    const int skipped = s.first * (K / QL_TILE_K(code)), lane = (int)threadIdx.x % WARP;
    c->blocks = s.end - s.first;
    c->tiles = strip_tiles - skipped;
    c->from = p->codes + ((int64_t)min(first, last) * strip_tiles + skipped) * QL_TILE_BYTES(code) + lane * 16;
    c->sub_tile = (int64_t)(min(first + 4, last) - min(first, last)) * strip_tiles * QL_TILE_BYTES(code);
}

/* Starts copying the next stage's codes; a group of copies also where there is none left. */
static __device__ __forceinline__ void fetch(code_stream *c, const ql_streamk_params *q, const layout *l, int code,
                                             int rows, int tokens) {
    const int lane = (int)threadIdx.x % WARP, sub_tiles = rows / 128, tiles = K / QL_TILE_K(code);
    if (c->blocks == 0) fetch_segment(c, q, rows, code);
    if (c->blocks > 0) {
        const uint32_t to = c->to + c->slot * sub_tiles * l->strip_bytes;
#pragma unroll
        for (int i = 0; i < sub_tiles; i++)
#pragma unroll
            for (int t = 0; t < tiles; t++) {
                const uint8_t *from = c->from + i * c->sub_tile + t * QL_TILE_BYTES(code);
                const uint32_t at = to + i * l->strip_bytes + t * QL_TILE_BYTES(code);
                const int bytes = t == 0 || t < c->tiles ? 16 : 0;
                cp_async_16(at, from, bytes);
                if (code == QL_CODE_INT3) cp_async_8(at + 512 - lane * 8, from + 512 - lane * 8);
            }
        c->from += l->strip_bytes;
        c->tiles -= tiles;
        c->blocks--;
    }
    cp_async_commit();
    if (++c->slot == QL_STREAMK_CODE_STAGES(code, rows, tokens)) c->slot = 0;
}

/* A lane's codes of a stage: words, and the high bits of 3 bit. */
typedef struct stage_codes {
    uint32_t words[16], high[2];
} stage_codes;

static __device__ __forceinline__ void load_codes(stage_codes *c, uint32_t strip, int code) {
#pragma unroll
    for (int tile = 0; tile < K / QL_TILE_K(code); tile++) {
        const uint32_t at = strip + tile * QL_TILE_BYTES(code);
        uint4 v = load_shared_16(at);
        c->words[4 * tile] = v.x;
        c->words[4 * tile + 1] = v.y;
        c->words[4 * tile + 2] = v.z;
        c->words[4 * tile + 3] = v.w;
        if (code == QL_CODE_INT3) {
            uint2 h = load_shared_8(at + 512 - threadIdx.x % WARP * 8);
            c->high[0] = h.x;
            c->high[1] = h.y;
        }
    }
}

/* W rounded once: v * (high + low). */
static __device__ __forceinline__ void scale_weights(uint32_t *a, uint4 entry, bool split, int type) {
    uint32_t high[2] = {__byte_perm(entry.x, 0, 0x1010), __byte_perm(entry.y, 0, 0x1010)};
    if (split) {
        uint32_t low[2] = {__byte_perm(entry.x, 0, 0x3232), __byte_perm(entry.y, 0, 0x3232)};
#pragma unroll
        for (int i = 0; i < 16; i++)
            a[i] = type == QL_VALUE_F16 ? fma_half2(a[i], high[i & 1], mul_half2(a[i], low[i & 1]))
                                        : fma_bf162(a[i], high[i & 1], mul_bf162(a[i], low[i & 1]));
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++)
            a[i] = type == QL_VALUE_F16 ? mul_half2(a[i], high[i & 1]) : mul_bf162(a[i], high[i & 1]);
    }
}

static __device__ __forceinline__ void add_partials(float *sums, const ql_streamk_params *q, int end, int rows,
                                                    int tokens) {
    const int warp = (int)threadIdx.x / WARP;
    int range = own_range();
    while (end < q->k_blocks) {
        range++;
        end += range_start(q, range + 1) - range_start(q, range);
        uint64_t *flag = q->flags + (int64_t)range * QL_STREAMK_WARPS + warp;
        if (threadIdx.x % WARP == 0) {
            while (load_acquire(flag) != q->nonce) {
            }
            *flag = 0; /* so that the launch may be repeated as it is, by a graph */
        }
        __syncwarp();
        const float4 *from = (const float4 *)q->partials + (int64_t)range * (rows * tokens / 4) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < rows * tokens / 1024; i++) {
            float4 v = __ldcg(from + i * 256);
            sums[4 * i] += v.x;
            sums[4 * i + 1] += v.y;
            sums[4 * i + 2] += v.z;
            sums[4 * i + 3] += v.w;
        }
    }
}

static __device__ __forceinline__ void leave_partials(const float *sums, const ql_streamk_params *q, int rows,
                                                      int tokens) {
    float4 *to = (float4 *)q->partials + (int64_t)own_range() * (rows * tokens / 4) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < rows * tokens / 1024; i++)
        __stcg(to + i * 256, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    __syncwarp();
    if (threadIdx.x % WARP == 0)
        store_release(q->flags + (int64_t)own_range() * QL_STREAMK_WARPS + threadIdx.x / WARP, q->nonce);
}

/* 16 rows of W, all tokens of the tile: turned over in shared memory, so that 16 bytes go along a row of out. */
static __device__ __forceinline__ void store_strip(const float *sums, const ql_packed_params *p, uint32_t buffer,
                                                   int64_t row, int token, int tokens, float2 scale, int type) {
    const int lane = (int)threadIdx.x % WARP, g = lane / 4;
    const int chunk = tokens < 32 ? tokens : 32;
    float2 bias = {0.0f, 0.0f};
    if (p->bias && row + g < p->n) bias.x = load_value(p->bias, p->bias_type, (row + g) * p->bias_stride);
    if (p->bias && row + g + 8 < p->n) bias.y = load_value(p->bias, p->bias_type, (row + g + 8) * p->bias_stride);
    const bool whole = p->n % 8 == 0 && (uintptr_t)p->out % 16 == 0;
#pragma unroll
    for (int from = 0; from < tokens; from += chunk) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < chunk / 8; j += 2) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *s = sums + 4 * (from / 8 + j + i / 2) + 2 * (i % 2);
                const float by = i % 2 ? scale.y : scale.x, and_bias = i % 2 ? bias.y : bias.x;
                m[i] = round16_pair(s[0] * by + and_bias, s[1] * by + and_bias, type);
            }
            const int at = 8 * (j + lane / 16) + lane % 8, half = lane / 8 % 2 ^ (at >> 2 & 1);
            store_matrices_transposed(buffer + at * 32 + half * 16, m);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < chunk / 16; i++) {
            const int at = i * 16 + lane / 2, half = lane % 2;
            const uint32_t from_at = buffer + at * 32 + (half ^ (at >> 2 & 1)) * 16;
            const int64_t out_row = token + from + at, col = row + half * 8;
            if (out_row >= p->m || col >= p->n) continue;
            uint16_t *to = (uint16_t *)p->out + out_row * p->n + col;
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

/* A tile's sums so far, and what scales them. */
static __device__ __forceinline__ void add_scaled(float *sums, const float *part, float2 scale, int count) {
#pragma unroll
    for (int c = 0; c < count; c++) sums[c] += part[c] * (c & 2 ? scale.y : scale.x);
}

static __device__ __forceinline__ float2 scale_of(uint4 entry) {
    return make_float2(__uint_as_float(entry.x), __uint_as_float(entry.y));
}

/* A multiplying warp's place in its tile, in the rings and in the groups. */
typedef struct reader {
    const layout *l;
    const ql_packed_params *p;
    const ql_streamk_params *q;
    groups_state gs;
    ring r;
    code_stream c;
    uint32_t table;       /* this lane's column of the pair table */
    uint32_t stage;       /* address of x */
    stage_codes codes[2]; /* of each sub-tile */
    uint4 entries[2];     /* scales and zero words of this lane's rows in the group, for each sub-tile */
} reader;

static __device__ __forceinline__ void await_x(reader *d, int code) {
    barrier_wait(d->l->full + 8 * d->r.slot, d->r.parity);
    d->stage = stage_at(d->l, d->r.slot, code);
}

/* The next stage's codes into registers: on their way while what was decoded before is multiplied. */
static __device__ __forceinline__ void load_next_codes(reader *d, int code, int rows, int tokens) {
    const int sub_tiles = rows / 128;
    cp_async_wait(QL_STREAMK_CODE_STAGES(code, rows, tokens) - 1);
#pragma unroll
    for (int i = 0; i < sub_tiles; i++)
        load_codes(&d->codes[i], d->c.to + (d->c.slot * sub_tiles + i) * d->l->strip_bytes, code);
}

/* Their place is free once they are in registers. */
static __device__ __forceinline__ void leave_codes(reader *d, int code, int rows, int tokens) {
    fetch(&d->c, d->q, d->l, code, rows, tokens);
}

static __device__ __forceinline__ void release_stage(const reader *d, int slot) {
    if (threadIdx.x % WARP == 0) barrier_arrive(d->l->empty + 8 * slot);
}

/* To the group of the columns that come next. True where it is another than before. */
static __device__ __forceinline__ bool to_group(reader *d, int sub_tiles) {
    const bool fresh = d->gs.left == 0;
    if (fresh) {
        next_group(&d->gs, d->l, d->p);
        read_entries(&d->gs, d->l, sub_tiles, d->entries);
    }
    d->gs.left--;
    return fresh;
}

/* a[4 * steps]: the codes of `steps` steps from `step` of the stage, less their zeros, or with WEIGHTS as weights. */
static __device__ __forceinline__ void decode(uint32_t *a, const reader *d, int sub_tile, int step, int steps, int code,
                                              int type, int scaling) {
    const int tile_steps = QL_TILE_K(code) / 16;
    const uint4 entry = d->entries[sub_tile];
    const uint32_t zero[2] = {entry.z, entry.w};
    const stage_codes *c = &d->codes[sub_tile];
#pragma unroll
    for (int at = step; at < step + steps; at++)
        if (code == QL_CODE_TABLE4 && scaling == QL_SCALES_WEIGHTS)
            scaled_table_step(a + 4 * (at - step), c->words[at], scale_of(entry), d->table, type);
        else
            exact_step(a + 4 * (at - step), c->words + at / tile_steps * 4, c->high, at % tile_steps, zero, d->table,
                       d->p->zeros != NULL, code, type);
    if (code != QL_CODE_TABLE4 && scaling == QL_SCALES_WEIGHTS)
        scale_weights(a, entry, d->p->scales_type != type, type);
}

/* d += or, where `add` is 0, = the product of those steps with x. */
static __device__ __forceinline__ void multiply_steps(float *sums, const uint32_t *a, uint32_t stage, int step,
                                                      int steps, int add, int tokens, int type) {
    const uint32_t x = rows_descriptor(stage);
    warpgroup_fence();
#pragma unroll
    for (int at = step; at < step + steps; at++)
        multiply_warpgroup(sums, a + 4 * (at - step), descriptor_at(x, at / 4 * (BOX_K * tokens * 2) + at % 4 * 32),
                           at > step || add, tokens, type);
    warpgroup_commit();
}

/* Up to 64 tokens, groups of a multiple of 64: each half of a stage has its own sums, scaled and added while the products
 * of the other half run. */
static __device__ __forceinline__ void sum_halves(float *sums, float part[2][MOST_SUMS / 2], reader *d, int blocks,
                                                  int code, int type, int tokens) {
    const int count = tokens / 2;
    uint32_t a[2][16];
    float2 scale[2];
    load_next_codes(d, code, 128, tokens);
    decode(a[0], d, 0, 0, 4, code, type, QL_SCALES_SUMS);
    d->gs.left--;
    scale[0] = scale_of(d->entries[0]);
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        await_x(d, code);
        multiply_steps(part[0], a[0], d->stage, 0, 4, 0, tokens, type);
        to_group(d, 1);
        scale[1] = scale_of(d->entries[0]);
        decode(a[1], d, 0, 4, 4, code, type, QL_SCALES_SUMS);
        keep(a[1], 16);
        multiply_steps(part[1], a[1], d->stage, 4, 4, 0, tokens, type);
        leave_codes(d, code, 128, tokens);
        if (blocks > 1) load_next_codes(d, code, 128, tokens);
        WARPGROUP_WAIT(1);
        settle(part[0], count);
        add_scaled(sums, part[0], scale[0], count);
        if (blocks > 1) {
            to_group(d, 1);
            scale[0] = scale_of(d->entries[0]);
            decode(a[0], d, 0, 0, 4, code, type, QL_SCALES_SUMS);
            keep(a[0], 16);
        }
        WARPGROUP_WAIT(0);
        settle(part[1], count);
        release_stage(d, d->r.slot);
        advance(&d->r, d->l->stages);
        add_scaled(sums, part[1], scale[1], count);
    }
}

/* Any number of tokens, groups of a multiple of `steps` steps: one part of the sums, scaled and added where a group ends. */
static __device__ __forceinline__ void sum_groups(float *sums, float *part, reader *d, int blocks, int code, int type,
                                                  int tokens, int steps) {
    const int count = tokens / 2;
    uint32_t a[2][16], left = (uint32_t)(blocks * (K / 16 / steps));
    float2 scale = scale_of(d->entries[0]);
    bool fresh = true;
    load_next_codes(d, code, 128, tokens);
    decode(a[0], d, 0, 0, steps, code, type, QL_SCALES_SUMS);
    d->gs.left--;
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        await_x(d, code);
#pragma unroll
        for (int step = 0; step < K / 16; step += steps) {
            const int turn = step / steps % 2, next = (step + steps) % (K / 16);
            multiply_steps(part, a[turn], d->stage, step, steps, !fresh, tokens, type);
            if (next == 0) leave_codes(d, code, 128, tokens);
            fresh = true;
            /* A branch of its own: else the compiler decodes after it has waited. */
            keep(&left, 1);
            if (--left) {
                if (next == 0) load_next_codes(d, code, 128, tokens);
                fresh = to_group(d, 1);
                decode(a[turn ^ 1], d, 0, next, steps, code, type, QL_SCALES_SUMS);
                keep(a[turn ^ 1], 4 * steps);
            }
            WARPGROUP_WAIT(0);
            settle(part, count);
            if (next == 0) release_stage(d, d->r.slot);
            if (fresh) {
                add_scaled(sums, part, scale, count);
                scale = scale_of(d->entries[0]);
            }
        }
        advance(&d->r, d->l->stages);
    }
}

/* Scales are applied to weights or outputs: nothing but products touches the sums, which overlap freely. */
static __device__ __forceinline__ void sum_all(float *sums, reader *d, int blocks, int code, int type, int rows,
                                               int tokens, int scaling) {
    const int count = tokens / 2, sub_tiles = rows / 128, x_steps = QL_STREAMK_X_K(tokens) / 16;
    uint32_t a[2][16];
    int before = -1; /* the stage whose products may still run */
    load_next_codes(d, code, rows, tokens);
#pragma unroll 1
    for (; blocks > 0; blocks--) {
#pragma unroll
        for (int step = 0; step < K / 16; step += 4) {
            if (scaling == QL_SCALES_WEIGHTS) to_group(d, sub_tiles);
#pragma unroll
            for (int i = 0; i < sub_tiles; i++) {
                uint32_t *to = a[(step / 4 * sub_tiles + i) & 1];
                decode(to, d, i, step, 4, code, type, scaling);
                keep(to, 16);
                if (step % x_steps == 0 && i == 0) await_x(d, code);
                multiply_steps(sums + i * count, to, d->stage, step % x_steps, 4, 1, tokens, type);
                if (step == 4 && i == sub_tiles - 1) {
                    leave_codes(d, code, rows, tokens);
                    if (blocks > 1) load_next_codes(d, code, rows, tokens);
                }
                WARPGROUP_WAIT(1);
                if (step % x_steps == 0 && i == 0 && before >= 0) release_stage(d, before);
            }
            if ((step + 4) % x_steps == 0) {
                before = d->r.slot;
                advance(&d->r, d->l->stages);
            }
        }
    }
    WARPGROUP_WAIT(0);
    settle(sums, sub_tiles * count);
    release_stage(d, before);
}

/* Starts on the first stages' codes, which may be read before the kernel before is done. */
static __device__ __forceinline__ code_stream start_codes(const ql_streamk_params *q, const layout *l, int code,
                                                          int rows, int tokens) {
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    code_stream c;
    c.segment = c.slot = c.blocks = 0;
    c.to = l->codes + lane * 16 + warp * QL_STREAMK_CODE_STAGES(code, rows, tokens) * (rows / 128) * l->strip_bytes;
#pragma unroll 1
    for (int i = 0; i < QL_STREAMK_CODE_STAGES(code, rows, tokens); i++) fetch(&c, q, l, code, rows, tokens);
    return c;
}

static __device__ __forceinline__ void multiply_all(const ql_streamk_params *q, const layout *l, code_stream c,
                                                    uint32_t table, int code, int type, int rows, int tokens,
                                                    int scaling, int steps) {
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    const int sub_tiles = rows / 128, count = tokens / 2;
    const int strip = strip_of(rows);
    /* What others left is there when a range is longer than a tile, so the sums start with it; not where products overlap
     * across stages, for there the compiler wants sums that start at zero. */
    const bool early = scaling == QL_SCALES_SUMS && q->split_tiles >= (int)gridDim.x;
    float sums[MOST_SUMS], part[2][MOST_SUMS / 2];
    reader d;
    d.l = l;
    d.q = q;
    d.p = &q->product;
    d.c = c;
    wait_for_previous_kernel();
    d.gs.r.slot = d.r.slot = 0;
    d.gs.r.parity = d.r.parity = 0;
    d.gs.entry = l->pairs + strip * 128 + lane / 4 * 16;
    d.gs.granules = (int)d.p->group_size / (16 * steps);
    d.table = table;
    if (scaling == QL_SCALES_SUMS)
#pragma unroll
        for (int i = 0; i < count; i++) part[0][i] = part[1][i] = 0.0f;
    segment s;
#pragma unroll 1
    for (int index = 0; segment_at(&s, index, q); index++) {
        first_group(&d.gs, l, d.p, 16 * steps, s.first);
        read_entries(&d.gs, l, sub_tiles, d.entries);
#pragma unroll
        for (int i = 0; i < sub_tiles * count; i++) sums[i] = 0.0f;
        if (early && s.first == 0) add_partials(sums, q, s.end, rows, tokens);
        const int blocks = s.end - s.first;
        if (scaling != QL_SCALES_SUMS)
            sum_all(sums, &d, blocks, code, type, rows, tokens, scaling);
        else if (tokens <= 64 && steps == 4)
            sum_halves(sums, part, &d, blocks, code, type, tokens);
        else
            sum_groups(sums, part[0], &d, blocks, code, type, tokens, steps);
        leave_pair(&d.gs, l);
        if (s.first > 0) {
            leave_partials(sums, q, rows, tokens);
            continue;
        }
        if (!early) add_partials(sums, q, s.end, rows, tokens);
        int row_tile, token_tile;
        place_tile(q, s.tile, &row_tile, &token_tile);
#pragma unroll
        for (int i = 0; i < sub_tiles; i++) {
            const float2 one = {1.0f, 1.0f};
            store_strip(sums + i * count, d.p, l->outputs + warp * QL_STREAMK_WARP_BYTES,
                        (int64_t)row_tile * rows + (strip + 4 * i) * 16, token_tile * tokens, tokens,
                        scaling == QL_SCALES_OUTPUTS ? scale_of(d.entries[i]) : one, type);
        }
    }
}

/* Pairs of a table's values by a byte of two codes, a column for each lane; in fp32 one for two lanes, which do not read
 * at once. Returns this lane's. */
static __device__ __forceinline__ uint32_t fill_pairs(const float *table, int type, int scaling) {
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    for (int i = warp; i < 256; i += QL_STREAMK_WARPS) {
        const float first = __ldg(table + (i & 15)), second = __ldg(table + (i >> 4));
        uint32_t value = round16_pair(first, second, type);
        if (scaling == QL_SCALES_WEIGHTS) value = __float_as_uint(lane % 2 ? second : first);
        store_shared_4(QL_STREAMK_TABLE_AT + i * 256 + lane * 4, value);
    }
    return QL_STREAMK_TABLE_AT + (scaling == QL_SCALES_WEIGHTS ? lane % 16 * 8 : lane * 4);
}

static __device__ __forceinline__ void product(const ql_streamk_params *q, int code, int type, int rows, int tokens,
                                               int scaling, int steps) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const layout l = layout_of(q, shared_address(shared), code, rows, tokens);
    const int lane = (int)threadIdx.x - (QL_STREAMK_THREADS - FEEDERS);
    if (lane >= 0) {
        WARPGROUP_GIVES_REGISTERS(56);
        if (lane < WARP) {
            if (lane == 0) prefetch_map(q->x_map);
            barrier_init(l.full + 8 * lane, 1);
            barrier_init(l.empty + 8 * lane, QL_STREAMK_WARPS);
            if (lane < QL_STREAMK_PAIRS) {
                barrier_init(l.pair_full + 8 * lane, 1);
                barrier_init(l.pair_empty + 8 * lane, QL_STREAMK_WARPS);
            }
            barrier_init_done();
        }
        __syncthreads();
        /* By a warp that has asked for nothing yet: it is held until what it has asked for is there. */
        if (lane < WARP) start_next_kernel();
        if (lane == 0) copy_x(q, &l, code, tokens);
        if (lane >= WARP) expand_scales(q, &l, code, type, scaling);
    } else {
        /* A branch that takes its registers before anything else: what it has before must fit in fewer. */
        WARPGROUP_TAKES_REGISTERS(224);
        uint32_t table = 0;
        /* First, so that x and scales are asked for before the many codes, which the block would wait for here. */
        __syncthreads();
        code_stream codes = start_codes(q, &l, code, rows, tokens);
        if (code == QL_CODE_TABLE4) {
            table = fill_pairs(q->product.table, type, scaling);
            named_barrier(1, QL_STREAMK_WARPS * WARP);
        }
        multiply_all(q, &l, codes, table, code, type, rows, tokens, scaling, steps);
    }
}

#define KERNEL(name, source, code, type, rows, tokens, scaling, steps)                                                 \
    extern "C" __global__ void __launch_bounds__(QL_STREAMK_THREADS, 1)                                                \
        name(const __grid_constant__ ql_streamk_params q) {                                                            \
        product(&q, code, type, rows, tokens, scaling, steps);                                                         \
    }
QL_WGMMA_VARIANTS(KERNEL)

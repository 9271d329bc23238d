/* Up to 16 tokens with integers, in the stream-K product. Products of so few take no longer than their latency, one after the
 * other, and a group's sums are eight numbers a thread: so codes are left exact and scales go to those sums, in fp32, which
 * saves the instructions that scale weights. Two sets of eight warps take turns at stages, so that a scheduler has four warps
 * of which one may wait for its products while another decodes; each has its own sums of a tile, which are added at its end. */
#ifndef QL_KERNELS_SIXTEEN_TOKENS_CUH
#define QL_KERNELS_SIXTEEN_TOKENS_CUH

#include "exchange.cuh"
#include "stage_weight.cuh"

/* BATCH_STEPS: a stage is two batches, which have fragments of their own: one is decoded while the other is multiplied. */
enum { SUMS_FREE_BARRIER = 5, SUMS_THERE_BARRIER = 6, BATCH_STEPS = 4 };

/* Groups whose sums are taken for themselves, one where sums go on from stage to stage. */
#define GROUP_SUMS(k) ((k).groups ? (k).groups : 1)

/* Whether a tile of codes is a whole stage: read at once, not a batch at a time. */
#define HAS_WHOLE_TILES(k) (QL_TILE_K((k).code) == (k).stage_k)

static __device__ __forceinline__ void read_batch(stage_words *d, const reader *r, uint32_t at, int batch, shape k) {
    const int tiles = HAS_WHOLE_TILES(k) ? 1 : k.stage_k / QL_TILE_K(k.code) / 2;
    if (!HAS_WHOLE_TILES(k) || batch == 0) read_codes(d, r, at, batch * tiles, tiles, k);
}

/* entries: of the stage's groups. */
static __device__ __forceinline__ void decode_batch(uint32_t *a, const stage_words *d, const entry *entries,
                                                    const reader *r, int batch, shape k) {
    if (HAS_WHOLE_TILES(k))
        decode(a, d, entries, r->has_seconds, batch * BATCH_STEPS, BATCH_STEPS, k);
    else
        decode(a, d, entries + batch * k.groups / 2, r->has_seconds, 0, BATCH_STEPS, k);
}

static __device__ __forceinline__ void multiply_batch(float (*part)[8], const uint32_t *a, uint64_t x, int batch,
                                                      shape k) {
    const int steps = k.stage_k / 16 / GROUP_SUMS(k);
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < BATCH_STEPS; i++) {
        const int at = batch * BATCH_STEPS + i;
        multiply_warpgroup(part[at / steps], a + 4 * i, x + (at / 4 * (BOX_K * k.tokens * 2) + at % 4 * 32) / 16,
                           k.groups == 0 || at % steps, k.tokens, k.type);
    }
    warpgroup_commit();
}

/* The set's blocks of a tile. What the next stage takes is not asked for ahead: other warps run meanwhile. */
static __device__ __forceinline__ void sum_own_blocks(float *sums, reader *reads, place *c, const ql_streamk_params *q,
                                                      int blocks, shape k) {
    uint32_t a[2][4 * BATCH_STEPS];
    float part[MOST_GROUPS][8];
    stage_words d;
    entry entries[MOST_GROUPS];
    if (k.groups == 0) entries[0] = reads->row;
#pragma unroll
    for (int i = 0; i < 8 * GROUP_SUMS(k); i++) part[i / 8][i % 8] = 0.0f;
#pragma unroll 1
    for (; blocks > 0; blocks -= SETS(k)) {
        const uint64_t x = descriptor_of(c, k);
        const uint32_t empty = c->base + 8 * c->slot + EMPTY;
        await_stage(c);
        read_batch(&d, reads, c->at, 0, k);
        read_entries(&d, reads, c->at, k);
#pragma unroll
        for (int i = 0; i < k.groups; i++) entries[i] = make_entry(reads, &d.entries[i], k);
        decode_batch(a[0], &d, entries, reads, 0, k);
        read_batch(&d, reads, c->at, 1, k);
        multiply_batch(part, a[0], x, 0, k);
        decode_batch(a[1], &d, entries, reads, 1, k);
        multiply_batch(part, a[1], x, 1, k);
        step_on(c, reads, q, k);
        WARPGROUP_WAIT(0);
        release_stage(empty, k);
#pragma unroll
        for (int i = 0; i < k.groups; i++) add_scaled(sums, part[i], &entries[i], 8);
        if (k.groups == 0) settle(part[0], 8);
    }
    if (k.groups > 0) return;
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = part[0][i];
}

/* The first set takes over what the second has of a tile. Whether it is the first. sums_at: room for the second's, which is
 * free as soon as the first has come to the tile. */
static __device__ __forceinline__ bool take_over_sums(float *sums, uint32_t sums_at, int set) {
    const uint32_t own = sums_at + thread_anew() % MULTIPLIERS * 16;
    if (set == 1) {
        named_barrier(SUMS_FREE_BARRIER, 2 * MULTIPLIERS);
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            store_shared_16(own + i / 4 * (MULTIPLIERS * 16),
                            make_uint4(__float_as_uint(sums[i]), __float_as_uint(sums[i + 1]),
                                       __float_as_uint(sums[i + 2]), __float_as_uint(sums[i + 3])));
        named_arrive(SUMS_THERE_BARRIER, 2 * MULTIPLIERS);
        return false;
    }
    named_barrier(SUMS_THERE_BARRIER, 2 * MULTIPLIERS);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const uint4 v = load_shared_16(own + i / 4 * (MULTIPLIERS * 16));
        sums[i] += __uint_as_float(v.x);
        sums[i + 1] += __uint_as_float(v.y);
        sums[i + 2] += __uint_as_float(v.z);
        sums[i + 3] += __uint_as_float(v.w);
    }
    return true;
}

#endif

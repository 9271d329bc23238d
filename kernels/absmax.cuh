/* Nested absmax of the stream-K product: two of the warps that feed make absmax of it, so that stages have what they have
 * without nesting and no warp that multiplies waits for a look-up.
 *
 * A lane makes four of each pair of groups: rows g and g + 8 of a strip in both, which is how bytes and absmax lie. Bytes are
 * copied some pairs ahead into a ring of the lane's own, as they come behind the stages that were asked for; the second
 * level's are loaded where they may change. */
#ifndef QL_KERNELS_ABSMAX_CUH
#define QL_KERNELS_ABSMAX_CUH

#include "exchange.cuh"

enum {
    NESTED_WARP = 2, /* of those that feed, and the next one, which raises flags as well */
    NESTED_LANES = 2 * WARP,
    NESTED_SLOT = NESTED_LANES * 4,
    NESTED_RING = QL_STREAMK_NESTED_SLOTS * NESTED_SLOT
};

/* A lane's way along its rows' pairs of groups. */
typedef struct nested_source {
    const uint32_t *from; /* of the pair that is copied next */
    int left;             /* pairs that are not copied yet */
    uint32_t ring;        /* the lane's first slot */
    uint32_t at;          /* bytes from there to the slot at hand: after a copy the next pair's, after a read free */
    int group, run; /* the first group of the pair that is read next; groups of one second-level block come in runs */
    int entries[2]; /* numbers of the first entries of rows g and g + 8 */
    float second_level[4];
} nested_source;

static __device__ __forceinline__ void copy_nested(nested_source *s) {
    if (s->left > 0) cp_async_4(s->ring + s->at, s->from, 4);
    cp_async_commit();
    s->from += 8;
    s->left--;
    s->at = (s->at + NESTED_SLOT) % NESTED_RING;
}

static __device__ __forceinline__ void load_second_level(nested_source *s, const ql_streamk_params *q) {
    const ql_packed_params *p = &q->product;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int entry = s->entries[i % 2] + min(s->group + i / 2, (int)p->groups - 1);
        s->second_level[i] = __ldg(p->nested_absmax + (entry >> q->nested_shift));
    }
}

/* Of the next pair. table: address. */
static __device__ __forceinline__ void next_absmax(float absmax[4], nested_source *s, uint32_t table,
                                                   const ql_streamk_params *q) {
    if ((s->group & (s->run - 1)) == 0) load_second_level(s, q);
    cp_async_wait(QL_STREAMK_NESTED_SLOTS - 1);
    const uint32_t bytes = load_shared_4(s->ring + s->at);
#pragma unroll
    for (int i = 0; i < 4; i++) absmax[i] = __uint_as_float(load_shared_4(table + (bytes >> 8 * i & 255u) * 4));
#pragma unroll
    for (int i = 0; i < 4; i++)
        absmax[i] = __fadd_rn(__fmul_rn(absmax[i], s->second_level[i]), q->product.nested_offset);
    s->group += 2;
    copy_nested(s);
}

/* first_strip: of the tile. */
static __device__ __forceinline__ nested_source first_nested(const ql_streamk_params *q, uint32_t ring, int first_strip,
                                                             int pair) {
    const ql_packed_params *p = &q->product;
    const int lane = (int)threadIdx.x % NESTED_LANES, groups = (int)p->groups, pairs = (groups + 1) / 2;
    const int strip = min(first_strip + lane / 8, ((int)p->n + 15) / 16 - 1), row = strip * 16 + lane % 8;
    const int common = groups | 1 << q->nested_shift;
    nested_source s;
    s.from = (const uint32_t *)p->scales + ((int64_t)strip * pairs + pair) * 8 + lane % 8;
    s.left = pairs - pair;
    s.ring = ring + lane * 4;
    s.at = 0;
    s.group = 2 * pair;
    s.run = common & -common; /* a power of two */
    s.entries[0] = min(row, (int)p->n - 1) * groups;
    s.entries[1] = min(row + 8, (int)p->n - 1) * groups;
#pragma unroll 1
    for (int i = 0; i < QL_STREAMK_NESTED_SLOTS; i++) copy_nested(&s);
    load_second_level(&s, q);
    return s;
}

static __device__ __forceinline__ void make_entries(const ql_streamk_params *q, uint32_t base, walk w, int warp,
                                                    shape k) {
    const int lane = (int)threadIdx.x % NESTED_LANES;
    const uint32_t table = base + QL_STREAMK_TABLE_AT(k.code, k.tokens, k.groups) + QL_STREAMK_TABLE_BYTES,
                   nested_ring = table + 1024;
    const uint32_t to = stages_at(base, k) + QL_STREAMK_ENTRIES_AT(k.code, k.rows, k.tokens, k.stage_k) + lane * 16;
    const bool raises = warp > NESTED_WARP;
    ring r = {0, 1};
    int flags_in = -1;
    bool has_table = false;
    if (raises) start_next_kernel();
#pragma unroll
    for (int i = lane; i < 256; i += NESTED_LANES) cp_async_4(table + i * 4, q->product.nested_table + i, 4);
    cp_async_commit();
    do {
        int row_tile, token_tile;
        place_tile(q, w.tile, &row_tile, &token_tile, k);
        int group = group_of(q, w.first, k.groups), left = (group + 1) * q->group_blocks - w.first;
        nested_source s = first_nested(q, nested_ring, row_tile * (k.rows / 16), group / 2);
        float absmax[QL_STREAMK_PAIRS(MOST_GROUPS)][4];
        bool is_next = true;
        if (!has_table) {
            cp_async_wait(QL_STREAMK_NESTED_SLOTS - 1);
            named_barrier(NESTED_BARRIER, NESTED_LANES);
            has_table = true;
        }
#pragma unroll 1
        for (int block = w.first; block < w.end; block++) {
            const uint32_t full = base + 8 * r.slot, entries = to + r.slot * stage_bytes(k);
#pragma unroll
            for (int i = 0; i < QL_STREAMK_PAIRS(k.groups); i++)
                if (is_next) next_absmax(absmax[i], &s, table, q);
            count_down_flags(&flags_in, q, k);
            barrier_wait(full + EMPTY, r.parity);
#pragma unroll
            for (int i = 0; i < QL_STREAMK_PAIRS(k.groups); i++)
                store_shared_16(entries + i * QL_STREAMK_PAIR_BYTES(k.code, k.rows),
                                make_uint4(__float_as_uint(absmax[i][0]), __float_as_uint(absmax[i][1]),
                                           __float_as_uint(absmax[i][2]), __float_as_uint(absmax[i][3])));
            __syncwarp();
            if (lane % WARP == 0) barrier_arrive(full);
            advance(&r, q->stages);
            if (k.groups == 1) is_next = next_group(&group, &left, q);
        }
        cp_async_wait(0);
        if (flags_in >= 0) raise_flags(q, k);
        flags_in = raises && w.first > 0 ? q->stages - 1 : -1;
    } while (next_tile(&w, q, k));
    if (flags_in >= 0) raise_flags(q, k);
}

#endif

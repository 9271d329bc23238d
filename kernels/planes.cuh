/* A table's values times absmax, rounded once to 16 bit: all sixteen of a row and a group, made by the warps that feed
 * the stream-K product, and picked by codes in those that multiply.
 *
 * Low bytes and high bytes lie apart, a plane of 16 bytes each, as permutations of bytes pick them: four registers a
 * plane, whose halves a code's highest bit chooses from. Shared memory, which products of 256 tokens leave no room in
 * for a look-up of each pair, is read once a row and stage so. */
#ifndef QL_KERNELS_PLANES_CUH
#define QL_KERNELS_PLANES_CUH

#include "exchange.cuh"
#include "value.cuh"

/* ---- the four warps that make them, and feed the rest ----
 *
 * All four, as each shares its scheduler with two warps that multiply, and products of a warpgroup start when the last of
 * its warps is ready. A lane has a row. What it needs of memory it copies into a ring of its own, some pairs of groups
 * ahead, as that comes behind the stages that were asked for: 16 bytes of absmax, or 4 of nested absmax, of rows g and
 * g + 8 of its strip in the first group and in the second. What those 4 stand for is in shared memory; absmax of the second
 * level is loaded a pair ahead where it may change. */

/* Of a row in both groups of a pair: absmax, or what it is made of. */
typedef struct absmax_parts {
    float scale[2], by[2];
} absmax_parts;

/* A lane's way along its row's pairs of groups. */
typedef struct absmax_source {
    const uint8_t *from; /* of the pair that is copied next */
    int left;            /* pairs that are not copied yet */
    uint32_t ring;       /* the lane's first slot */
    uint32_t at;         /* bytes from there to the slot at hand: after a copy the next pair's, after a read free */
    int group, run; /* the first group of the pair that is read next; groups of one second-level block come in runs */
    int entry;      /* number of the row's first entry */
} absmax_source;

enum { PLANE = 16, FLAGS_WARP = 1, RING_SLOT = 128 * 16, RING_BYTES = QL_STREAMK_ABSMAX_SLOTS * RING_SLOT };

static __device__ __forceinline__ void copy_absmax(absmax_source *s, bool nested) {
    if (s->left > 0 && nested) cp_async_4(s->ring + s->at, s->from, 4);
    if (s->left > 0 && !nested) cp_async_16(s->ring + s->at, s->from, 16);
    cp_async_commit();
    s->from += nested ? 32 : 128;
    s->left--;
    s->at = (s->at + RING_SLOT) % RING_BYTES;
}

/* Absmax of the second level, of the pair that is read next. */
static __device__ __forceinline__ void load_row_level(absmax_parts *to, const absmax_source *s,
                                                      const ql_streamk_params *q) {
    const ql_packed_params *p = &q->product;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int entry = s->entry + min(s->group + i, (int)p->groups - 1);
        to->scale[i] = __ldg(p->nested_absmax + (entry >> q->nested_shift));
    }
}

/* h: 0 for row g, 1 for row g + 8. table: address. */
static __device__ __forceinline__ void read_absmax(absmax_parts *to, absmax_source *s, int h, uint32_t table,
                                                   const ql_streamk_params *q) {
    const ql_packed_params *p = &q->product;
    const uint32_t from = s->ring + s->at;
    if (p->nested_table && (s->group & (s->run - 1)) == 0) load_row_level(to, s, q);
    cp_async_wait(QL_STREAMK_ABSMAX_SLOTS - 1);
    if (p->nested_table) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            to->by[i] = __uint_as_float(load_shared_4(table + load_shared_1(from + h + 2 * i) * 4));
        s->group += 2;
    } else {
        to->scale[0] = __uint_as_float(load_shared_4(from + 4 * h));
        to->scale[1] = __uint_as_float(load_shared_4(from + 4 * h + 8));
    }
}

static __device__ __forceinline__ float absmax_of(const absmax_parts *parts, int i, const ql_packed_params *p) {
    return p->nested_table ? __fadd_rn(__fmul_rn(parts->by[i], parts->scale[i]), p->nested_offset) : parts->scale[i];
}

static __device__ __forceinline__ absmax_source first_absmax(const ql_streamk_params *q, uint32_t ring, int strip,
                                                             int row, int pair) {
    const ql_packed_params *p = &q->product;
    const int groups = (int)p->groups, pairs = (groups + 1) / 2, common = groups | 1 << q->nested_shift;
    const int64_t at = ((int64_t)strip * pairs + pair) * 8 + (int)threadIdx.x % 8;
    absmax_source s;
    s.from = (const uint8_t *)p->scales + at * (p->nested_table ? 4 : 16);
    s.left = pairs - pair;
    s.ring = ring;
    s.at = 0;
    s.group = 2 * pair;
    s.run = common & -common; /* a power of two */
    s.entry = row * groups;
    return s;
}

/* Both planes of a row in a group. low_plane: address; the high one is `planes` bytes further on. */
static __device__ __forceinline__ void store_planes(uint32_t low_plane, int planes, const float *table, float absmax,
                                                    int type) {
    uint32_t low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *t = table + 4 * i;
        const uint32_t first = round16_pair(__fmul_rn(t[0], absmax), __fmul_rn(t[1], absmax), type);
        const uint32_t second = round16_pair(__fmul_rn(t[2], absmax), __fmul_rn(t[3], absmax), type);
        low[i] = __byte_perm(first, second, 0x6420);
        high[i] = __byte_perm(first, second, 0x7531);
    }
    store_shared_16(low_plane, make_uint4(low[0], low[1], low[2], low[3]));
    store_shared_16(low_plane + planes, make_uint4(high[0], high[1], high[2], high[3]));
}

/* The first warp copies codes and x as well, another one raises flags. */
static __device__ __forceinline__ void feed_planes(const ql_streamk_params *q, uint32_t base, walk w, int warp,
                                                   shape k) {
    const ql_packed_params *p = &q->product;
    const int thread = (int)threadIdx.x % 128, h = thread / 8 % 2;
    const uint32_t to =
        stages_at(base, k) + QL_STREAMK_ENTRIES_AT(k.code, k.rows, k.tokens, k.stage_k) + thread * PLANE;
    const uint32_t nested_table = base + QL_STREAMK_TABLE_AT(k.code, k.tokens, k.groups);
    const bool nested = p->nested_table != NULL;
    ring r = {0, 1};
    float table[16];
    int flags_in = -1;
#pragma unroll
    for (int i = 0; i < 16; i++) table[i] = __ldg(p->table + i);
    if (nested) {
#pragma unroll
        for (int i = thread; i < 256; i += 128)
            store_shared_4(nested_table + i * 4, __float_as_uint(__ldg(p->nested_table + i)));
        named_barrier(NESTED_BARRIER, 128);
    }
    if (warp == FLAGS_WARP) start_next_kernel();
    if (warp == 0) wait_for_previous_kernel();
    do {
        int row_tile, token_tile;
        place_tile(q, w.tile, &row_tile, &token_tile, k);
        const int strip = min(row_tile * (k.rows / 16) + thread / 16, ((int)p->n + 15) / 16 - 1);
        int group = group_of(q, w.first, k.groups), left = (group + 1) * q->group_blocks - w.first;
        absmax_source s = first_absmax(q, nested_table + 1024 + thread * (nested ? 4 : 16), strip,
                                       min(strip * 16 + thread % 16, (int)p->n - 1), group / 2);
        bool is_next = true;
        float absmax[2];
        absmax_parts next;
#pragma unroll 1
        for (int i = 0; i < QL_STREAMK_ABSMAX_SLOTS; i++) copy_absmax(&s, nested);
        if (nested) load_row_level(&next, &s, q);
        read_absmax(&next, &s, h, nested_table, q);
#pragma unroll 1
        for (int block = w.first; block < w.end; block++) {
            const uint32_t full = base + 8 * r.slot;
            count_down_flags(&flags_in, q, k);
            barrier_wait(full + EMPTY, r.parity);
            if (warp == 0 && is_elected()) {
                ask_for_codes(q, base, r.slot, row_tile, block, k);
                ask_for_x(q, base, r.slot, token_tile, block, k);
            }
            if (is_next) {
                absmax[0] = absmax_of(&next, 0, p);
                absmax[1] = absmax_of(&next, 1, p);
                copy_absmax(&s, nested);
                read_absmax(&next, &s, h, nested_table, q);
            }
            const uint32_t low_plane = to + r.slot * stage_bytes(k);
            const bool is_second = k.groups == 1 && (group & 1);
            store_planes(low_plane, k.rows * PLANE, table, is_second ? absmax[1] : absmax[0], k.type);
            if (k.groups == 2) store_planes(low_plane + 2 * k.rows * PLANE, k.rows * PLANE, table, absmax[1], k.type);
            __syncwarp();
            if (thread % WARP == 0) barrier_arrive(full);
            advance(&r, q->stages);
            if (k.groups == 1) is_next = next_group(&group, &left, q);
        }
        cp_async_wait(0);
        if (flags_in >= 0) raise_flags(q, k);
        flags_in = warp == FLAGS_WARP && w.first > 0 ? q->stages - 1 : -1;
    } while (next_tile(&w, q, k));
    if (flags_in >= 0) raise_flags(q, k);
}

/* ---- in warps that multiply ---- */

/* Of a lane's rows g and g + 8. */
typedef struct planes {
    uint32_t low[2][4], high[2][4];
} planes;

static __device__ __forceinline__ void load_plane(uint32_t plane[4], uint32_t at) {
    const uint4 v = load_shared_16(at);
    plane[0] = v.x;
    plane[1] = v.y;
    plane[2] = v.z;
    plane[3] = v.w;
}

/* at: of row g. */
static __device__ __forceinline__ void read_planes(planes *to, uint32_t at, shape k) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        load_plane(to->low[h], at + h * 8 * PLANE);
        load_plane(to->high[h], at + (k.rows + h * 8) * PLANE);
    }
}

/* As __byte_perm, but that an index's highest bit asks for eight copies of the byte's. */
static __device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t indices) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(indices));
    return result;
}

/* Bytes by four indices of three bits, from the second half where `upper` has ones. */
static __device__ __forceinline__ uint32_t pick(const uint32_t plane[4], uint32_t indices, uint32_t upper) {
    const uint32_t first = permute(plane[0], plane[1], indices), second = permute(plane[2], plane[3], indices);
    return (first & ~upper) | (second & upper);
}

/* a[4] of one step of 16 columns by its word of codes. */
static __device__ __forceinline__ void pick_step(uint32_t a[4], uint32_t word, const planes *from) {
    const uint32_t indices = word & 0x77777777u, first_codes = word << 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint32_t four = permute(indices, 0, h ? 0x4431 : 0x4420);
        const uint32_t upper = permute(first_codes, word, h ? 0xfbd9 : 0xeac8);
        const uint32_t low = pick(from->low[h], four, upper), high = pick(from->high[h], four, upper);
        a[h] = permute(low, high, 0x5140);
        a[2 + h] = permute(low, high, 0x7362);
    }
}

#endif

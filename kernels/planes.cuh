/* A table's values times absmax, rounded once to 16 bit: all sixteen of a row and a group, made by two warps for each stage
 * of the stream-K product, and picked by codes in those that multiply.
 *
 * Low bytes and high bytes lie apart, a plane of 16 bytes each, as permutations of bytes pick them: four registers a
 * plane, whose halves a code's highest bit chooses from. Shared memory, which products of 256 tokens leave no room in
 * for a look-up of each pair, is read once a row and stage so. */
#ifndef QL_KERNELS_PLANES_CUH
#define QL_KERNELS_PLANES_CUH

#include "streamk.cuh"
#include "value.cuh"

/* ---- the two warps that make them ----
 *
 * A lane has rows g and g + 8 of a strip. What it needs of memory it copies into a ring of its own, some pairs of groups
 * ahead, as that comes behind the stages that were asked for: of both rows in the first group, then in the second one,
 * absmax, or those of the second level and the bytes of nested absmax. */

enum { PLANE = 16 };

static __device__ __forceinline__ void copy_absmax(uint32_t to, const ql_streamk_params *q, int strip, int pair) {
    const ql_packed_params *p = &q->product;
    const int g = (int)threadIdx.x % 8, groups = (int)p->groups, pairs = (groups + 1) / 2;
    const int64_t at = ((int64_t)strip * pairs + pair) * 8 + g;
    if (pair < pairs && !p->nested_table) cp_async_16(to, (const float4 *)p->scales + at, 16);
    if (pair < pairs && p->nested_table) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = min(strip * 16 + g + i % 2 * 8, (int)p->n - 1), group = min(2 * pair + i / 2, groups - 1);
            cp_async_4(to + 4 * i, p->nested_absmax + ((row * groups + group) >> q->nested_shift), 4);
        }
        cp_async_4(to + 16, (const uint32_t *)p->scales + at, 4);
    }
    cp_async_commit();
}

static __device__ __forceinline__ void read_absmax(float absmax[4], uint32_t from, const ql_packed_params *p) {
    const uint4 v = load_shared_16(from);
    absmax[0] = __uint_as_float(v.x);
    absmax[1] = __uint_as_float(v.y);
    absmax[2] = __uint_as_float(v.z);
    absmax[3] = __uint_as_float(v.w);
    if (!p->nested_table) return;
    const uint32_t bytes = load_shared_4(from + 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float nested = __ldg(p->nested_table + (bytes >> 8 * i & 255u));
        absmax[i] = __fadd_rn(__fmul_rn(nested, absmax[i]), p->nested_offset);
    }
}

/* Both planes of both rows. table, low_plane: addresses, the latter of row g; its high one is `planes` bytes further on. */
static __device__ __forceinline__ void store_planes(uint32_t low_plane, int planes, uint32_t table,
                                                    const float absmax[2], int type) {
    uint32_t low[2][4], high[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 t = load_shared_16(table + 16 * i);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t first = round16_pair(__fmul_rn(__uint_as_float(t.x), absmax[h]),
                                                __fmul_rn(__uint_as_float(t.y), absmax[h]), type);
            const uint32_t second = round16_pair(__fmul_rn(__uint_as_float(t.z), absmax[h]),
                                                 __fmul_rn(__uint_as_float(t.w), absmax[h]), type);
            low[h][i] = __byte_perm(first, second, 0x6420);
            high[h][i] = __byte_perm(first, second, 0x7531);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint32_t to = low_plane + h * 8 * PLANE;
        store_shared_16(to, make_uint4(low[h][0], low[h][1], low[h][2], low[h][3]));
        store_shared_16(to + planes, make_uint4(high[h][0], high[h][1], high[h][2], high[h][3]));
    }
}

static __device__ __forceinline__ void fill_planes(const ql_streamk_params *q, uint32_t base, walk w, shape k) {
    const ql_packed_params *p = &q->product;
    const int thread = (int)threadIdx.x % (2 * WARP), own = thread / 8;
    const uint32_t to = stages_at(base, k) + QL_STREAMK_ENTRIES_AT(k.code, k.rows, k.tokens, k.stage_k) +
                        (own * 16 + thread % 8) * PLANE;
    const uint32_t table = base + QL_STREAMK_TABLE_AT, ahead = table + 1024 + thread * 32;
    enum { SLOTS = QL_STREAMK_ABSMAX_SLOTS, SLOT = 2 * WARP * 32 };
    ring r = {0, 1};
    if (thread % WARP < 16)
        store_shared_4(table + 4 * (thread % WARP), __float_as_uint(__ldg(p->table + thread % WARP)));
    __syncwarp();
    do {
        int row_tile, token_tile, slot = 0;
        place_tile(q, w.tile, &row_tile, &token_tile, k);
        const int strip = min(row_tile * (k.rows / 16) + own, ((int)p->n + 15) / 16 - 1);
        int group = group_of(q, w.first, k.groups), left = (group + 1) * q->group_blocks - w.first;
        bool is_next = true;
        float absmax[4];
#pragma unroll 1
        for (int i = 0; i < SLOTS - 1; i++) copy_absmax(ahead + i * SLOT, q, strip, group / 2 + i);
#pragma unroll 1
        for (int block = w.first; block < w.end; block++) {
            const uint32_t full = base + 8 * r.slot;
            if (is_next) {
                copy_absmax(ahead + (slot + SLOTS - 1) % SLOTS * SLOT, q, strip, group / 2 + SLOTS - 1);
                cp_async_wait(SLOTS - 1);
                read_absmax(absmax, ahead + slot * SLOT, p);
                slot = (slot + 1) % SLOTS;
            }
            const float both[2] = {group & 1 ? absmax[2] : absmax[0], group & 1 ? absmax[3] : absmax[1]};
            barrier_wait(full + EMPTY, r.parity);
            store_planes(to + r.slot * stage_bytes(k), k.rows * PLANE, table, both, k.type);
            __syncwarp();
            if (thread % WARP == 0) barrier_arrive(full);
            advance(&r, q->stages);
            const bool is_over = --left == 0;
            if (is_over) left = q->group_blocks;
            group += is_over;
            is_next = is_over && !(group & 1);
        }
        cp_async_wait(0);
    } while (next_tile(&w, q, k));
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

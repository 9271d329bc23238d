/* Outliers of the 8-bit product on wgmma. The marked columns of a segment are put into slots of 16, in their order, as
 * 16-bit matrices of x and of the weight. Where a segment has more than OWN_SLOTS of them, the rest cannot be made while
 * its stages pass: they would wait for slots that are left only after them. */
#ifndef QL_KERNELS_W8A8_OUTLIERS_CUH
#define QL_KERNELS_W8A8_OUTLIERS_CUH

#include "w8a8_frame.cuh"

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

static __device__ __forceinline__ uint32_t slot_at(const layout *l, int slot, shape k) {
    return l->more + slot * QL_W8A8_OUTLIER_BYTES(k.rows, k.tokens);
}

/* A column of a stage: cleared in x; the weight's into column j of a slot, if there is one. */
static __device__ __forceinline__ void take_column(uint32_t stage, int col, uint32_t slot, int j, int type, shape k) {
    const int lane = (int)threadIdx.x % WARP;
    /* Pieces of 16 bytes are swizzled by their row. */
    const uint32_t place = stage + lane * K + ((col / 16 ^ lane % 8) * 16 + col % 16);
#pragma unroll
    for (int i = 0; i < k.tokens / WARP; i++) store_shared_1(place + (k.rows + i * WARP) * K, 0);
    if (!slot) return;
#pragma unroll
    for (int i = 0; i < k.rows / WARP; i++) {
        const int code = load_shared_int8(place + i * WARP * K);
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
        columns = __reduce_add_sync(ALL_LANES, columns);
#pragma unroll 1
        for (int block = s.first; block < s.end; block++) {
            const int at = (block - s.first) % WARP;
            if (at == 0) {
                own = block + lane < s.end ? marks[block + lane] : make_uint4(0, 0, 0, 0);
                marked = __ballot_sync(ALL_LANES, count_bits(own) != 0);
            }
            barrier_wait(l->full + 8 * r.slot, r.parity);
            if (marked >> at & 1) {
#pragma unroll 1
                for (int w = 0; w < 4; w++) {
                    const uint32_t here = w == 0 ? own.x : w == 1 ? own.y : w == 2 ? own.z : own.w;
                    uint32_t bits = __shfl_sync(ALL_LANES, here, at);
#pragma unroll 1
                    for (; bits; bits &= bits - 1) {
                        const int j = found % QL_W8A8_OUTLIERS;
                        if (j == 0) slot = 0;
                        if (j == 0 && found < OWN_SLOTS * QL_W8A8_OUTLIERS) {
                            barrier_wait(l->slot_empty + 8 * slots.slot, slots.parity);
                            slot = slot_at(l, slots.slot, k);
                            for (int i = lane; i < k.rows * 2; i += WARP)
                                store_shared_16(slot + k.tokens * 32 + i * 16, make_uint4(0, 0, 0, 0));
                            __syncwarp();
                        }
                        take_column(stage_at(l, r.slot, k), w * 32 + __ffs((int)bits) - 1, slot, j, type, k);
                        found++;
                        if (slot && (j == QL_W8A8_OUTLIERS - 1 || found == columns)) {
                            fence_shared();
                            __syncwarp();
                            if (lane == 0) barrier_arrive(l->slot_full + 8 * slots.slot);
                            advance(&slots, SLOTS);
                        }
                    }
                }
                fence_shared();
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
        const uint32_t any = __ballot_sync(ALL_LANES, (m->bits.x | m->bits.y | m->bits.z | m->bits.w) != 0);
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
        found = (int)(m->next - 128 * WARP) + leader * 128 + __shfl_sync(ALL_LANES, found, leader);
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
            const int64_t col = __shfl_sync(ALL_LANES, column, j);
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
        const int rows = slot < OWN_SLOTS ? k.tokens : k.tokens + k.rows;
        barrier_wait(l->slot_empty + 8 * r->slot, r->parity);
        if (count) fill_slot(slot_at(l, r->slot, k), p, column, count, row, token, rows, k);
        if (threadIdx.x % FEEDERS == 2 * WARP)
            store_shared_4(l->last + 4 * r->slot, (more ? 0u : 1u) + (count ? 0u : 2u));
        fence_shared();
        __syncwarp();
        if (lane == 0) barrier_arrive(l->slot_full + 8 * r->slot);
        advance(r, SLOTS);
        slot++;
    } while (more);
}

#endif

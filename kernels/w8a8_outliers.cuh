/* Outliers of the 8-bit product on wgmma. Codes are multiplied as if there were none; of the marked columns slots have what x
 * is beyond its codes, in the order of columns, as matrices of bf16: in two pieces, which hold 16-bit values exactly and what
 * a code is off by to 2^-17 of it, beside the weight's codes twice.
 *
 * The first slots' columns of the weight are taken from the stages by the warps that multiply them: memory would give them
 * only after all stages that were asked for before. What is in other thread blocks' stages, and the columns of more slots,
 * is read again. */
#ifndef QL_KERNELS_W8A8_OUTLIERS_CUH
#define QL_KERNELS_W8A8_OUTLIERS_CUH

#include "w8a8_activation.cuh"
#include "w8a8_frame.cuh"

enum { SLOT_COLUMNS = QL_W8A8_OUTLIERS / 2, LISTED = SLOTS * SLOT_COLUMNS, NO_COLUMN = 0x7fffffff };

static __device__ __forceinline__ uint32_t slot_at(const layout *l, int slot, shape k) {
    return l->more + slot * QL_W8A8_OUTLIER_BYTES(k.rows, k.tokens);
}

/* The place of an element of a slot: 8 x 8 matrices of 128 bytes, the two of eight rows side by side. */
static __device__ __forceinline__ uint32_t slot_place(int row, int col) {
    return (uint32_t)(row / 8 * 256 + col / 8 * 128 + row % 8 * 16 + col % 8 * 2);
}

static __device__ __forceinline__ void store_code(uint32_t slot, int row, int j, int code) {
    store_shared_2(slot + slot_place(row, j), round16((float)code, QL_VALUE_BF16));
}

/* ---- the warps that multiply ---- */

/* Columns that nobody fills are 0. */
static __device__ __forceinline__ void clear_slots(const layout *l, shape k) {
    const int row = (int)threadIdx.x / 2, second = (int)threadIdx.x % 2;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++)
        store_shared_16(slot_at(l, slot, k) + slot_place(k.tokens + row, second * SLOT_COLUMNS),
                        make_uint4(0, 0, 0, 0));
}

/* Lane i's is the i-th listed one. */
static __device__ __forceinline__ int listed_column(const layout *l) {
    const int lane = (int)threadIdx.x % WARP;
    barrier_wait(l->list_full, 0);
    return lane < LISTED ? (int)load_shared_4(l->list + 4 * lane) : (int)NO_COLUMN;
}

/* The codes of a warpgroup's rows in the listed columns of a stage. column: the lane's listed one. */
static __device__ __forceinline__ void take_columns(const layout *l, uint32_t stage, int block, int column, shape k) {
    const int row = (int)threadIdx.x / 128 * 64 + (int)threadIdx.x % 64, second = (int)threadIdx.x % 128 / 64;
    uint32_t here = __ballot_sync(ALL_LANES, column / K == block);
    if (!here) return;
#pragma unroll 1
    for (; here; here &= here - 1) {
        const int i = __ffs((int)here) - 1, col = __shfl_sync(ALL_LANES, column, i) % K;
        /* Pieces of 16 bytes are swizzled by their row. */
        const int code = load_shared_int8(stage + row * K + ((col / 16 ^ row % 8) * 16 + col % 16));
        store_code(slot_at(l, i / SLOT_COLUMNS, k), k.tokens + row, i % SLOT_COLUMNS + second * SLOT_COLUMNS, code);
    }
    __syncwarp(); /* before lane 0 gives the stage back */
}

/* ---- the warps beside them ---- */

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
        if (count == SLOT_COLUMNS) return count;
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

static __device__ __forceinline__ int count_bits(uint4 v) {
    return __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
}

/* The first columns, for the warps that multiply, and how many there are: by one warp. */
static __device__ __forceinline__ void list_columns(const ql_w8a8_params *p, const layout *l) {
    enum { AHEAD = 4, WIDE = 128 * WARP };
    const int lane = (int)threadIdx.x % WARP;
    int before = 0;
#pragma unroll 1
    for (int64_t first = 0; first < p->x_pitch; first += AHEAD * WIDE) {
        uint4 marks[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t col = first + i * WIDE + lane * 128;
            marks[i] = make_uint4(0, 0, 0, 0);
            if (col < p->x_pitch) marks[i] = *(const uint4 *)(p->outliers + col / 32);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int own = count_bits(marks[i]);
            int ordinal = own;
            for (int step = 1; step < WARP; step *= 2) {
                const int other = __shfl_up_sync(ALL_LANES, ordinal, step);
                if (lane >= step) ordinal += other;
            }
            const int all = __shfl_sync(ALL_LANES, ordinal, WARP - 1);
            ordinal += before - own;
            before += all;
            if (!all) continue;
            const uint32_t word[4] = {marks[i].x, marks[i].y, marks[i].z, marks[i].w};
#pragma unroll
            for (int w = 0; w < 4; w++)
                for (uint32_t bits = word[w]; bits; bits &= bits - 1, ordinal++)
                    if (ordinal < LISTED)
                        store_shared_4(l->list + 4 * ordinal, (uint32_t)(first + i * WIDE + lane * 128 + w * 32) +
                                                                  (uint32_t)__ffs((int)bits) - 1);
        }
    }
    if (lane < LISTED && lane >= before) store_shared_4(l->list + 4 * lane, (uint32_t)NO_COLUMN);
    if (lane == 0) store_shared_4(l->list + 4 * LISTED, (uint32_t)before);
    __syncwarp();
    if (lane == 0) barrier_arrive(l->list_full);
}

/* The columns of a slot, the same in all lanes. */
typedef struct slot_columns {
    int col[SLOT_COLUMNS], count;
} slot_columns;

/* A token's row of a slot. */
static __device__ __forceinline__ void fill_token(uint32_t slot, int row, const ql_w8a8_params *p,
                                                  const slot_columns *columns, int64_t token) {
    const uint16_t *x = (const uint16_t *)p->x + token * p->x_stride;
    const int8_t *codes = (const int8_t *)p->x_codes + token * p->x_pitch;
    const bool inside = token < p->m;
    const float unit = inside ? p->x_scales[token * p->x_token_stride] * (1.0f / 127.0f) : 0.0f;
    float rest[SLOT_COLUMNS];
#pragma unroll
    for (int j = 0; j < SLOT_COLUMNS; j++)
        rest[j] = inside && j < columns->count
                      ? __fmaf_rn(-(float)codes[columns->col[j]], unit, load_value(x, p->x_type, columns->col[j]))
                      : 0.0f;
#pragma unroll
    for (int piece = 0; piece < 2; piece++) {
        uint32_t pair[SLOT_COLUMNS / 2];
#pragma unroll
        for (int j = 0; j < SLOT_COLUMNS / 2; j++) pair[j] = next_pieces(rest + 2 * j, QL_VALUE_BF16);
        store_shared_16(slot + slot_place(row, piece * SLOT_COLUMNS), make_uint4(pair[0], pair[1], pair[2], pair[3]));
    }
}

/* A row of the weight in those of a slot's columns that bits of `which` tell; beyond the last, 0. */
static __device__ __forceinline__ void fill_codes(uint32_t slot, int row, const ql_w8a8_params *p,
                                                  const slot_columns *columns, int64_t n, uint32_t which) {
    const int8_t *codes = (const int8_t *)p->codes + n * p->row_stride;
    int code[SLOT_COLUMNS];
#pragma unroll
    for (int j = 0; j < SLOT_COLUMNS; j++)
        code[j] = which >> j & 1 && n < p->n && j < columns->count ? codes[columns->col[j]] : 0;
#pragma unroll
    for (int j = 0; j < SLOT_COLUMNS; j++)
        if (which >> j & 1) {
            store_code(slot, row, j, code[j]);
            store_code(slot, row, j + SLOT_COLUMNS, code[j]);
        }
}

/* Those of a slot's columns that are in nobody's stages here. */
static __device__ __forceinline__ uint32_t columns_beyond(const slot_columns *columns, const segment *s) {
    uint32_t which = 0;
#pragma unroll
    for (int j = 0; j < SLOT_COLUMNS; j++)
        if (j < columns->count && (columns->col[j] < s->first * K || columns->col[j] >= s->end * K)) which |= 1u << j;
    return which;
}

/* The next slot's columns, the first from the list, others by a walk, which is started when it is wanted. */
static __device__ __forceinline__ slot_columns columns_of(int slot, int all, walk *m, const ql_w8a8_params *p,
                                                          const layout *l) {
    slot_columns columns;
    int column = NO_COLUMN;
    columns.count = min(all - slot * SLOT_COLUMNS, (int)SLOT_COLUMNS);
    if (slot < SLOTS) {
        column = (int)load_shared_4(l->list + 4 * (slot * SLOT_COLUMNS + (int)threadIdx.x % SLOT_COLUMNS));
    } else {
        bool more;
        if (slot == SLOTS) {
            m->next = 0;
            m->end = p->x_pitch;
            load_marks(m, p);
            for (int i = 0; i < SLOTS; i++) next_columns(&column, &more, m, p);
        }
        next_columns(&column, &more, m, p);
    }
#pragma unroll
    for (int j = 0; j < SLOT_COLUMNS; j++) columns.col[j] = __shfl_sync(ALL_LANES, column, j);
    return columns;
}

/* The slots of a tile, or of the rows that member `rank` of a cluster ends. parity: of each slot's turns. */
static __device__ __forceinline__ void fill_slots(const ql_w8a8_params *p, const layout *l, uint32_t *parity, int row,
                                                  int token, int rank, const segment *s, shape k) {
    enum { THREADS = HELPERS * WARP };
    const int thread = (int)threadIdx.x % THREADS, lane = thread % WARP;
    const int first = k.meets ? rank * (k.rows / 2) : 0, rows = k.meets ? k.rows / 2 : k.rows;
    barrier_wait(l->list_full, 0);
    const int all = (int)load_shared_4(l->list + 4 * LISTED);
    walk m;
#pragma unroll 1
    for (int index = 0; index * SLOT_COLUMNS < all; index++) {
        const int place = index % SLOTS;
        const uint32_t slot = slot_at(l, place, k);
        const slot_columns columns = columns_of(index, all, &m, p, l);
        const uint32_t which = index < SLOTS ? columns_beyond(&columns, s) : (1u << SLOT_COLUMNS) - 1;
        barrier_wait(l->slot_empty + 8 * place, *parity >> place & 1);
#pragma unroll 1
        for (int i = thread; i < k.tokens; i += THREADS) fill_token(slot, i, p, &columns, token + i);
#pragma unroll 1
        for (int i = which ? thread : rows; i < rows; i += THREADS)
            fill_codes(slot, k.tokens + first + i, p, &columns, row + first + i, which);
        fence_shared();
        __syncwarp();
        if (lane == 0) barrier_arrive(l->slot_full + 8 * place);
        *parity ^= 1u << place;
    }
}

#endif

/* The product with a packed weight on sm_90a, for more than a few tokens: Y^T = W X^T with the weight as A of wgmma
 * from registers, x as B from shared memory, fp32 sums over all of K.
 *
 * A thread block has two warpgroups that multiply and four warps that feed them (streamk.cuh): a stage of their ring is
 * some columns of x, the codes of the tile's strips, and their scales and zeros as they lie in memory. A warp decodes
 * some steps of its 16 rows (twice 16 in tiles of 256 rows) while the product of the steps before them runs. Scales are
 * applied to weights, which are rounded once to 16 bit: so nothing but products touches the sums; to outputs, where a
 * group is all of K: codes stay exact; to the sums of 64 columns, with codes of a table: a table of its products would
 * be dear to read, or rounded twice. Blocks that share a tile add their sums as exchange.cuh says. */
#include "exchange.cuh"
#include "stage_weight.cuh"
#include "variants.h"

enum { TABLE_BARRIER = 1, STEPS = 4 /* of 16 columns that are decoded at once */ };

/* 16 rows of W, all tokens of the tile: turned over in shared memory, so that 16 bytes go along a row of out. */
static __device__ __forceinline__ void store_strip(const float *sums, const ql_packed_params *p, uint32_t buffer,
                                                   int row, int token, float2 scale, shape k) {
    const int lane = (int)threadIdx.x % WARP, g = lane / 4;
    float2 bias = {0.0f, 0.0f};
    if (p->bias) {
        bias.x = load_value(p->bias, p->bias_type, min((int64_t)(row + g), p->n - 1) * p->bias_stride);
        bias.y = load_value(p->bias, p->bias_type, min((int64_t)(row + g + 8), p->n - 1) * p->bias_stride);
    }
    /* A token has 32 bytes of the buffer; halves change places every four tokens, for the banks' sake. */
    const int to_token = lane / 16 * 8 + lane % 8, from_token = lane / 2;
    const uint32_t to = buffer + to_token * 32 + (lane / 8 % 2 ^ (to_token >> 2 & 1)) * 16;
    const uint32_t from = buffer + from_token * 32 + (lane % 2 ^ (from_token >> 2 & 1)) * 16;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < k.tokens / 8; j += 2) {
        uint32_t m[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *s = sums + 4 * (j + i / 2) + 2 * (i % 2);
            const float by = i % 2 ? scale.y : scale.x, and_bias = i % 2 ? bias.y : bias.x;
            m[i] = round16_pair(s[0] * by + and_bias, s[1] * by + and_bias, k.type);
        }
        store_matrices_transposed(to + j * 8 * 32, m);
    }
    __syncwarp();
    const bool whole = HAS_WHOLE_PIECES(p);
    const int col = row + lane % 2 * 8, columns = min(8, (int)p->n - col);
    const int tokens = columns > 0 ? min(k.tokens, (int)p->m - token) : 0;
    uint16_t *out = (uint16_t *)p->out + (int64_t)(token + from_token) * p->n + col;
    /* Rolled up: it is run once, and would have to be fetched. */
#pragma unroll 1
    for (int i = 0; i < k.tokens; i += 16, out += 16 * p->n) {
        if (from_token + i >= tokens) continue;
        if (whole) {
            store_global_16(out, load_shared_16(from + i * 32));
        } else {
#pragma unroll 1
            for (int c = 0; c < columns; c++) out[c] = load_shared_2(from + i * 32 + 2 * c);
        }
    }
}

/* The products of STEPS steps from step `from` with x, one group of them; sums are 0 before where `add` is 0. */
static __device__ __forceinline__ void multiply_steps(float *sums, const uint32_t *a, uint64_t x, int from, int add,
                                                      shape k) {
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int at = from + i;
        multiply_warpgroup(sums, a + 4 * i, x + (at / 4 * (BOX_K * k.tokens * 2) + at % 4 * 32) / 16, add || i,
                           k.tokens, k.type);
    }
    warpgroup_commit();
}

/* A warp's place among stages and groups, across tiles. */
typedef struct place {
    uint32_t base, parity;
    int slot;
    int at;   /* bytes from the first stage */
    int left; /* blocks of the group */
} place;

static __device__ __forceinline__ void await_stage(const place *c) { barrier_wait(c->base + 8 * c->slot, c->parity); }

/* From one stage to the next. */
static __device__ __forceinline__ void step_on(place *c, reader *reads, const ql_streamk_params *q, shape k) {
    c->at += stage_bytes(k);
    if (++c->slot == q->stages) {
        c->slot = 0;
        c->parity ^= 1;
        c->at = 0;
    }
    if (k.groups == 1 && --c->left == 0) {
        c->left = q->group_blocks;
        flip_group(reads, k);
    }
}

static __device__ __forceinline__ void find_group(place *c, reader *reads, const ql_streamk_params *q, int first,
                                                  shape k) {
    if (k.groups != 1) return;
    const int group = group_of(q, first, 1);
    c->left = (group + 1) * q->group_blocks - first;
    if (group & 1) flip_group(reads, k);
}

static __device__ __forceinline__ uint64_t descriptor_of(const place *c, shape k) {
    return descriptor_at(rows_descriptor(stages_at(c->base, k)), 0) + ((uint32_t)c->at >> 4);
}

/* The blocks of a tile. What a product takes is decoded while the one before runs; the next stage's words are asked for
 * before the last product of a stage, whose issue hides their way. */
static __device__ __forceinline__ void sum_blocks(float *sums, reader *reads, place *c, const ql_streamk_params *q,
                                                  int blocks, shape k) {
    const int sub_tiles = k.rows / 128, count = k.tokens / 2, batches = k.stage_k / 16 / STEPS * sub_tiles;
    const bool is_first_lane = threadIdx.x % WARP == 0;
    uint32_t a[2][4 * STEPS], before = c->base + SPARE;
    stage_words d;
    await_stage(c);
    read_stage(&d, reads, c->at, k);
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const uint64_t x = descriptor_of(c, k);
        const uint32_t empty = c->base + 8 * c->slot + EMPTY;
        entry e[2][2];
        bool ready = false;
#pragma unroll
        for (int i = 0; i < sub_tiles; i++) {
            if (k.groups == 0) e[i][0] = reads->rows[i];
#pragma unroll
            for (int group = 0; group < k.groups; group++) e[i][group] = make_entry(reads, &d.entries[i][group], k);
        }
        step_on(c, reads, q, k);
#pragma unroll
        for (int batch = 0; batch < batches; batch++) {
            const int i = batch % sub_tiles, from = batch / sub_tiles * STEPS;
            uint32_t *to = a[batch & 1];
            decode(to, &d, &e[i][k.groups == 2 ? from * 32 / k.stage_k : 0], reads->has_seconds, i, from, STEPS, k);
            if (batch == batches - 1 && blocks > 1) {
                if (!ready) await_stage(c);
                read_stage(&d, reads, c->at, k);
            }
            multiply_steps(sums + i * count, to, x, from, 1, k);
            WARPGROUP_WAIT(1);
            if (batch == 0) {
                if (is_first_lane) barrier_arrive(before);
                ready = barrier_test(c->base + 8 * c->slot, c->parity);
            }
        }
        before = empty;
    }
    WARPGROUP_WAIT(0);
    settle(sums, sub_tiles * count);
    if (is_first_lane) barrier_arrive(before);
}

static __device__ __forceinline__ void add_scaled(float *sums, float *part, const entry *e, int count) {
    settle(part, count);
#pragma unroll
    for (int i = 0; i < count; i++) sums[i] += part[i] * __uint_as_float(e->scale[i / 2 % 2]);
}

/* The same with scales applied to the sums of each half of a stage, which are taken for themselves: up to 64 tokens
 * while the products of the other half run; with more there are registers for one half's alone. No product runs from
 * one turn of the loop to the next: the compiler would have all of them wait. */
static __device__ __forceinline__ void sum_halves(float *sums, reader *reads, place *c, const ql_streamk_params *q,
                                                  int blocks, shape k) {
    const int count = k.tokens / 2, second = k.tokens <= 64;
    uint32_t a[2][4 * STEPS];
    float part[2][MOST_SUMS / 2];
    stage_words d;
    entry e[2];
    await_stage(c);
    read_stage(&d, reads, c->at, k);
    decode(a[0], &d, e, false, 0, 0, STEPS, k);
#pragma unroll
    for (int i = 0; i < count; i++) part[0][i] = part[second][i] = 0.0f;
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const uint64_t x = descriptor_of(c, k);
        const uint32_t empty = c->base + 8 * c->slot + EMPTY;
        multiply_steps(part[0], a[0], x, 0, 0, k);
        e[0] = make_entry(reads, &d.entries[0][0], k);
        e[1] = k.groups == 2 ? make_entry(reads, &d.entries[0][1], k) : e[0];
        decode(a[1], &d, e, false, 0, STEPS, STEPS, k);
        if (!second) {
            WARPGROUP_WAIT(0);
            add_scaled(sums, part[0], &e[0], count);
        }
        multiply_steps(part[second], a[1], x, STEPS, 0, k);
        step_on(c, reads, q, k);
        if (blocks > 1) {
            await_stage(c);
            read_stage(&d, reads, c->at, k);
        }
        if (second) {
            WARPGROUP_WAIT(1);
            add_scaled(sums, part[0], &e[0], count);
        }
        if (blocks > 1) decode(a[0], &d, e, false, 0, 0, STEPS, k);
        WARPGROUP_WAIT(0);
        if (threadIdx.x % WARP == 0) barrier_arrive(empty);
        add_scaled(sums, part[second], &e[1], count);
    }
}

/* Of rows that are one group: zeros before the sums, scales after them. */
static __device__ __forceinline__ void read_rows(float2 scales[2], reader *r, const ql_packed_params *p, int first_row,
                                                 shape k) {
    const int g = (int)threadIdx.x % WARP / 4;
#pragma unroll
    for (int i = 0; i < k.rows / 128; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = min(first_row + i * 64 + h * 8 + g, (int)p->n - 1);
            const float scale = load_value(p->scales, p->scales_type, row);
            uint32_t zeros = 0;
            if (p->zeros) zeros = k.code == QL_CODE_INT8 ? p->zeros[row] : p->zeros[row / 2] >> row % 2 * 4;
            r->rows[i].zero[h] = zero_word(stored_zero(zeros, 0, p->zeros != NULL, k.code), k.code, k.type);
            if (h == 0) scales[i].x = scale;
            if (h == 1) scales[i].y = scale;
        }
}

static __device__ __forceinline__ void multiply_all(const ql_streamk_params *q, uint32_t base, walk w, shape k) {
    const ql_packed_params *p = &q->product;
    const int warp = (int)threadIdx.x / WARP, strip = strip_of(k.rows), sub_tiles = k.rows / 128;
    const reader first_group = make_reader(q, base, k);
    float sums[MOST_SUMS];
    place c = {base, 0, 0, 0, 1};
    do {
        int row_tile, token_tile;
        place_tile(q, w.tile, &row_tile, &token_tile);
        const int row = row_tile * k.rows + strip * 16;
        reader reads = first_group;
        float2 scales[2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
        if (k.groups == 0) read_rows(scales, &reads, p, row, k);
#pragma unroll
        for (int i = 0; i < sub_tiles * k.tokens / 2; i++) sums[i] = 0.0f;
        find_group(&c, &reads, q, w.first, k);
        if (k.code == QL_CODE_TABLE4)
            sum_halves(sums, &reads, &c, q, w.end - w.first, k);
        else
            sum_blocks(sums, &reads, &c, q, w.end - w.first, k);
        if (w.first > 0) {
            leave_partials(sums, q, k);
            continue;
        }
        add_partials(sums, q, w.end, k);
#pragma unroll
        for (int i = 0; i < sub_tiles; i++)
            store_strip(sums + i * k.tokens / 2, p,
                        base + QL_STREAMK_BARRIER_BYTES + warp * QL_STREAMK_OUTPUT_BYTES(k.tokens), row + i * 64,
                        token_tile * k.tokens, scales[i], k);
    } while (next_tile(&w, q));
}

/* The four warps behind those that multiply. */
static __device__ __forceinline__ void feed(const ql_streamk_params *q, uint32_t base, walk w, int warp, shape k) {
    if (warp == 0 && is_elected()) copy_codes(q, base, w, k);
    if (warp == 1 && is_elected()) copy_x(q, base, w, k);
    if (warp == 2 && k.groups) copy_entries(q, base, w, k);
    if (warp == 3) {
        start_next_kernel();
        if (w.first > 0) {
            wait_for_previous_kernel();
            raise_flags(q);
        }
    }
}

static __device__ __forceinline__ void product(const ql_streamk_params *q, shape k) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int warp = __shfl_sync(ALL_LANES, (int)threadIdx.x / WARP, 0);
    if (warp == WARPS && is_elected()) init_barriers(base, q->stages, k);
    if (warp == WARPS + 1) {
        prefetch_map(q->x_map);
        prefetch_map(q->codes_map);
    }
    __syncthreads();
    /* Nothing stands before the registers' change in a branch: it would have to fit in fewer. */
    if (warp >= WARPS) {
        WARPGROUP_GIVES_REGISTERS(56);
        feed(q, base, first_tile(q), warp - WARPS, k);
    } else {
        WARPGROUP_TAKES_REGISTERS(224);
        if (k.code == QL_CODE_TABLE4) {
            fill_tables(&q->product, base + QL_STREAMK_TABLE_AT(k.tokens), k.type);
            named_barrier(TABLE_BARRIER, MULTIPLIERS);
        }
        wait_for_previous_kernel();
        multiply_all(q, base, first_tile(q), k);
    }
}

#define KERNEL(name, source, code, type, wide, rows, tokens, stage_k, groups)                                          \
    extern "C" __global__ void __launch_bounds__(QL_STREAMK_THREADS, 1)                                                \
        name(const __grid_constant__ ql_streamk_params q) {                                                            \
        const shape k = {code, type, rows, tokens, stage_k, groups, wide};                                             \
        product(&q, k);                                                                                                \
    }
QL_WGMMA_VARIANTS(KERNEL)

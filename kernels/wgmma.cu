/* The product with a packed weight on sm_90a, for more than a few tokens: Y^T = W X^T with the weight as A of wgmma
 * from registers, x as B from shared memory, fp32 sums over all of K.
 *
 * A thread block has two warpgroups that multiply, with few tokens four (sixteen_tokens.cuh), and four warps that feed them
 * (streamk.cuh): a stage of their ring is some columns of x, the codes of the tile's strips, and their scales and zeros as
 * they lie in memory. A warp decodes some steps of its 16 rows while the product of the steps before them runs. Scales are
 * applied to weights, which are rounded once to 16 bit: so nothing but products touches the sums; to outputs, where a
 * group is all of K: codes stay exact; to the sums of 64 columns, or of a group of 32, with codes of a table: a table of
 * its products would be dear to read, or rounded twice. With 256 tokens there are no registers for such sums, and half the
 * weights to decode: there a table's products with absmax are made for each row and group (planes.cuh). Blocks that share
 * a tile add their sums as exchange.cuh says. */
#include "absmax.cuh"
#include "sixteen_tokens.cuh"
#include "variants.h"

enum { START_BARRIER = 0, TABLE_BARRIER = 1, OUTPUT_BARRIER = 3 /* and the next */, MOST_STEPS = 4, MOST_PART = 64 };

/* The first of the warps that feed. */
#define FEEDERS(k) (SETS(k) * WARPS)
#define THREADS(k) QL_STREAMK_THREADS((k).code, (k).tokens)

/* ---- outputs ----
 *
 * The four warps of a warpgroup turn 64 rows of W over in shared memory, some tokens at a time, so that whole lines of out
 * are written: 32 bytes of 16 lines an instruction, as a warp has by itself, take four times as long. */

#define OUTPUT_TOKENS(k) QL_STREAMK_OUTPUT_TOKENS((k).code, (k).tokens, (k).groups)
#define OUTPUT_BYTES(k) QL_STREAMK_OUTPUT_BYTES((k).code, (k).tokens, (k).groups)
#define HAS_BOXES(k) QL_STREAMK_HAS_BOXES((k).tokens)

/* Asks for a row's scale, one group for all of the row, and waits for nothing: the word that it is in. */
static __device__ __forceinline__ uint32_t load_scale_word(const ql_packed_params *p, int row) {
    const int64_t at = (int64_t)row << (p->scales_type == QL_VALUE_F32 ? 2 : 1);
    return __ldg((const uint32_t *)((const uint8_t *)p->scales + (at & ~(int64_t)3)));
}

static __device__ __forceinline__ float scale_of_word(uint32_t word, int row, int type) {
    if (type == QL_VALUE_F32) return __uint_as_float(word);
    return value_of16(row & 1 ? word >> 16 : word & 0xffffu, type);
}

/* Of all tokens, what a row has for all of K: its scale, its bias. own: the first of the lane's rows. */
static __device__ __forceinline__ void apply_terms(float *sums, const ql_packed_params *p, int own,
                                                   const uint32_t scale_words[2], shape k) {
    float scale[2] = {1.0f, 1.0f}, bias[2] = {0.0f, 0.0f};
    if (k.groups && !p->bias) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int at = min(own + 8 * h, (int)p->n - 1);
        if (k.groups == 0) scale[h] = scale_of_word(scale_words[h], at, p->scales_type);
        if (p->bias) bias[h] = load_value(p->bias, p->bias_type, at * p->bias_stride);
    }
#pragma unroll
    for (int i = 0; i < k.tokens / 2; i++) sums[i] = sums[i] * scale[i / 2 % 2] + bias[i / 2 % 2];
}

/* A warp's 16 rows, a buffer's tokens, as a quarter of each of the buffer's lines of 128 bytes; their pieces of 16 bytes are
 * swizzled by the token. */
static __device__ __forceinline__ void turn_over(const float *sums, uint32_t buffer, int thread, shape k) {
    const int lane = thread % WARP, warp = thread / WARP % 4;
    const int token = lane / 16 * 8 + lane % 8, piece = (2 * warp + lane / 8 % 2) ^ lane % 8;
#pragma unroll
    for (int j = 0; j < OUTPUT_TOKENS(k) / 8; j += 2) {
        uint32_t m[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *s = sums + 4 * (j + i / 2) + 2 * (i % 2);
            m[i] = round16_pair(s[0], s[1], k.type);
        }
        store_matrices_transposed(buffer + (token + 8 * j) * 128 + piece * 16, m);
    }
}

enum { MOST_RAGGED_LINES = 4 };
#define RAGGED_LINES(k) (HAS_BOXES(k) ? MOST_RAGGED_LINES : 2)

/* As store_buffer, where rows of out begin anywhere: a warp has every fourth line, consecutive lanes consecutive columns, so
 * that all but the ends of a line are whole sectors. Some lines at once, as each comes from shared memory first; no more than
 * the many copies of this are worth. */
static __device__ __forceinline__ void store_ragged(const ql_packed_params *p, uint32_t buffer, int row, int token,
                                                    int skipped, int thread, shape k) {
    const int lane = thread % WARP;
    const int columns = (int)p->n - row, tokens = min(OUTPUT_TOKENS(k), (int)p->m - token);
    int first = thread / WARP % 4;
    uint16_t *out = (uint16_t *)p->out + (int64_t)(token + first) * p->n + row + lane;
#pragma unroll 1
    for (; first < tokens; first += 4 * RAGGED_LINES(k), out += 4 * RAGGED_LINES(k) * p->n) {
        uint16_t values[2 * MOST_RAGGED_LINES];
#pragma unroll
        for (int i = 0; i < 2 * RAGGED_LINES(k); i++) {
            const int line = first + i / 2 * 4, column = lane + i % 2 * WARP;
            values[i] = load_shared_2(buffer + line * 128 + (column / 8 ^ line % 8) * 16 + column % 8 * 2);
        }
#pragma unroll
        for (int i = 0; i < 2 * RAGGED_LINES(k); i++) {
            const int line = first + i / 2 * 4, column = lane + i % 2 * WARP;
            if (column < columns && line < tokens && line >= skipped) out[i / 2 * 4 * p->n + i % 2 * WARP] = values[i];
        }
    }
}

/* A warpgroup's buffer of 64 rows from `row` on and 32 tokens from `token` on, but the first `skipped`: eight lanes a line. */
static __device__ __forceinline__ void store_buffer(const ql_packed_params *p, uint32_t buffer, int row, int token,
                                                    int skipped, int thread, shape k) {
    const int line = thread % 128 / 8, piece = thread % 8, col = row + piece * 8;
    const int tokens = col < p->n ? min(OUTPUT_TOKENS(k), (int)p->m - token) : 0;
    const uint32_t from = buffer + line * 128 + (piece ^ line % 8) * 16;
    uint16_t *out = (uint16_t *)p->out + (int64_t)(token + line) * p->n + col;
    if (!HAS_WHOLE_PIECES(p)) {
        store_ragged(p, buffer, row, token, skipped, thread, k);
        return;
    }
#pragma unroll 2
    for (int i = 0; i < OUTPUT_TOKENS(k); i += 16)
        if (line + i < tokens && line + i >= skipped) store_global_16(out + i * p->n, load_shared_16(from + i * 128));
}

/* A warpgroup's 64 rows from `row` on, all tokens from `token` on but the first `skipped`, which another tile stores. Its two
 * buffers take turns, across tiles as well, so that one barrier a turn says both that a buffer is full and that the other is
 * free. What is made of the thread's number is made here: the loops before would else make parts of it again and again. */
static __device__ __forceinline__ void store_rows(float *sums, int *turn, const ql_packed_params *p, uint32_t buffers,
                                                  int row, int token, int skipped, const uint32_t scale_words[2],
                                                  shape k) {
    const int thread = thread_anew(), warpgroup = thread / 128;
    apply_terms(sums, p, row + thread / WARP % 4 * 16 + thread % WARP / 4, scale_words, k);
#pragma unroll
    for (int from = 0; from < k.tokens; from += OUTPUT_TOKENS(k)) {
        if (token + from >= p->m) break;
        if (from + OUTPUT_TOKENS(k) <= skipped) continue;
        const uint32_t buffer = buffers + (2 * warpgroup + *turn) * OUTPUT_BYTES(k);
        *turn ^= 1;
        turn_over(sums + from / 2, buffer, thread, k);
        named_barrier(OUTPUT_BARRIER + warpgroup, 128);
        store_buffer(p, buffer, row, token + from, skipped - from, thread, k);
    }
}

/* The same by copies out of shared memory, which go on while the next tile is multiplied. Each fence that they take is dear, so
 * that a buffer is all tokens, or half of them where the stages leave no room for more. */
static __device__ __forceinline__ void store_boxes(float *sums, const ql_streamk_params *q, uint32_t buffers, int row,
                                                   int token, int skipped, const uint32_t scale_words[2], shape k) {
    const ql_packed_params *p = &q->product;
    const int thread = thread_anew(), warpgroup = thread / 128;
    const uint32_t buffer = buffers + warpgroup * OUTPUT_BYTES(k);
    apply_terms(sums, p, row + thread / WARP % 4 * 16 + thread % WARP / 4, scale_words, k);
#pragma unroll
    for (int from = 0; from < k.tokens; from += OUTPUT_TOKENS(k)) {
        if (from > 0) {
            AWAIT_STORES(0);
            named_barrier(OUTPUT_BARRIER + warpgroup, 128);
        }
        turn_over(sums + from / 2, buffer, thread, k);
        fence_shared();
        named_barrier(OUTPUT_BARRIER + warpgroup, 128);
        if (HAS_WHOLE_PIECES(p) && skipped <= from) {
            if (thread % 128 == 0) store_box(q->out_map, buffer, row, token + from);
            commit_stores();
        } else {
            store_buffer(p, buffer, row, token + from, skipped - from, thread, k);
        }
    }
}

/* Steps of 16 columns that are decoded at once. A stage is two batches of them at least, which take turns: the products of
 * 256 tokens take twice as long, so half as many steps are enough. A table's batch is in one group, whose sums or planes it
 * has. */
#define HAS_SUMS_OF_GROUPS(k) ((k).code == QL_CODE_TABLE4 && !HAS_PLANES(k))
#define STEPS(k) ((k).stage_k * (k).rows < 128 * 128 || (HAS_SUMS_OF_GROUPS(k) && (k).groups == 4) ? 2 : MOST_STEPS)

/* The products of STEPS steps from step `from` with `tokens` tokens of x, one group of them; sums are 0 before where `add`
 * is 0. */
static __device__ __forceinline__ void multiply_steps(float *sums, const uint32_t *a, uint64_t x, int from, int tokens,
                                                      int add, shape k) {
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < STEPS(k); i++) {
        const int at = from + i;
        multiply_warpgroup(sums, a + 4 * i, x + (at / 4 * (BOX_K * k.tokens * 2) + at % 4 * 32) / 16, add || i, tokens,
                           k.type);
    }
    warpgroup_commit();
}

/* The next stage's words are asked for behind a stage's last product, which loads before it hold up; or before it, where they are
 * many, or much is to be made of them. */
#define READS_LATE(k) (!HAS_PLANES(k) && !((k).code == QL_CODE_INT8 && (k).groups))

/* The blocks of a tile. What a product takes is decoded while the one before runs. Words that are asked for without a branch are
 * after the last stage its own again. */
static __device__ __forceinline__ uint32_t sum_blocks(float *sums, reader *reads, place *c, const ql_streamk_params *q,
                                                      int blocks, shape k) {
    const int batches = k.stage_k / 16 / STEPS(k);
    uint32_t a[2][4 * MOST_STEPS], before = c->base + SPARE;
    int add = !HAS_BOXES(k);
    stage_words d;
    await_stage(c);
    read_stage(&d, reads, c->at, k);
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const uint64_t x = descriptor_of(c, k);
        const uint32_t empty = c->base + 8 * c->slot + EMPTY, planes_at = reads->scales + (uint32_t)c->at;
        entry e[MOST_GROUPS];
        bool ready = false;
        if (k.groups == 0) e[0] = reads->row;
#pragma unroll
        for (int group = 0; group < k.groups; group++)
            if (!HAS_PLANES(k)) e[group] = make_entry(reads, &d.entries[group], k);
        const int at = c->at;
        step_on(c, reads, q, k);
#pragma unroll
        for (int batch = 0; batch < batches; batch++) {
            const int from = batch * STEPS(k), next_group = group_of_step(from + STEPS(k), k);
            uint32_t *to = a[batch & 1];
            decode(to, &d, e, reads->has_seconds, from, STEPS(k), k);
            if (batch == batches - 1 && !READS_LATE(k)) {
                if (blocks > 1 && !ready) await_stage(c);
                read_stage(&d, reads, blocks > 1 ? c->at : at, k);
            }
            if (HAS_PLANES(k) && batch < batches - 1 && next_group > group_of_step(from, k))
                read_planes(&d.products, planes_at + next_group * 2 * k.rows * PLANE, k);
            multiply_steps(sums, to, x, from, k.tokens, add || batch, k);
            if (batch == batches - 1 && READS_LATE(k) && blocks > 1) {
                if (!ready) await_stage(c);
                read_stage(&d, reads, c->at, k);
            }
            WARPGROUP_WAIT(1);
            if (batch == 0) {
                release_stage(before, k);
                ready = barrier_test(c->base + 8 * c->slot, c->parity);
            }
        }
        before = empty;
        add = 1;
    }
    return before;
}

/* Its end: the products that still run, and the stage that they read. */
static __device__ __forceinline__ void finish_blocks(float *sums, uint32_t last_empty, shape k) {
    WARPGROUP_WAIT(0);
    settle(sums, k.tokens / 2);
    release_stage(last_empty, k);
}

/* The same with scales applied to the sums of each batch of a stage, which are taken for themselves while the next products
 * run: those of the batch that follows or, as 128 tokens leave no registers for two, of the other 64 of its tokens. No
 * product runs from one turn of the loop to the next: the compiler would have all of them wait. */
static __device__ __forceinline__ void sum_batches(float *sums, reader *reads, place *c, const ql_streamk_params *q,
                                                   int blocks, shape k) {
    const int tokens = k.tokens < MOST_PART ? k.tokens : MOST_PART, halves = k.tokens / tokens, count = tokens / 2;
    const int last = k.stage_k / 16 / STEPS(k) - 1, products = (last + 1) * halves;
    uint32_t a[2][4 * MOST_STEPS];
    float part[2][MOST_PART / 2];
    stage_words d;
    entry e[MOST_GROUPS];
    await_stage(c);
    read_stage(&d, reads, c->at, k);
    decode(a[0], &d, e, false, 0, STEPS(k), k);
#pragma unroll
    for (int i = 0; i < count; i++) part[0][i] = part[1][i] = 0.0f;
#pragma unroll 1
    for (; blocks > 0; blocks--) {
        const uint64_t x = descriptor_of(c, k);
        const uint32_t empty = c->base + 8 * c->slot + EMPTY;
#pragma unroll
        for (int i = 0; i < products; i++) {
            const int batch = i / halves, half = i % halves, next = batch + 1, before = (i - 1) / halves;
            multiply_steps(part[i & 1], a[batch & 1], x + half * (tokens * BOX_K * 2 / 16), batch * STEPS(k), tokens, 0,
                           k);
            if (i == 0) absmax_entries(e, &d, reads, (uint32_t)c->at, k);
            if (half == 1 && batch < last) decode(a[next & 1], &d, e, false, next * STEPS(k), STEPS(k), k);
            if (i == products - 1) {
                step_on(c, reads, q, k);
                if (blocks > 1) {
                    await_stage(c);
                    read_stage(&d, reads, c->at, k);
                }
            }
            if (i > 0) {
                WARPGROUP_WAIT(1);
                add_scaled(sums + (i - 1) % halves * count, part[(i - 1) & 1], &e[group_of_step(before * STEPS(k), k)],
                           count);
            }
            if (halves == 1 && batch < last) decode(a[next & 1], &d, e, false, next * STEPS(k), STEPS(k), k);
        }
        if (blocks > 1) decode(a[0], &d, e, false, 0, STEPS(k), k);
        WARPGROUP_WAIT(0);
        release_stage(empty, k);
        add_scaled(sums + (halves - 1) * count, part[(products - 1) & 1], &e[group_of_step(last * STEPS(k), k)], count);
    }
}

/* What other ranges have of the tile, in the order of K. */
static __device__ __forceinline__ void add_parts(float *sums, place *c, const ql_streamk_params *q, int ranges,
                                                 shape k) {
    const int count = PART_BYTES(k) / 4 / MULTIPLIERS;
#pragma unroll 1
    for (; ranges > 0; ranges--)
#pragma unroll
        for (int part = 0; part < PARTS(k); part++) {
            const uint32_t from = stages_at(c->base, k) + (uint32_t)c->at + threadIdx.x * 16;
            await_stage(c);
#pragma unroll
            for (int i = 0; i < count; i += 4) {
                const uint4 v = load_shared_16(from + i / 4 * (MULTIPLIERS * 16));
                float *s = sums + part * count + i;
                s[0] += __uint_as_float(v.x);
                s[1] += __uint_as_float(v.y);
                s[2] += __uint_as_float(v.z);
                s[3] += __uint_as_float(v.w);
            }
            fence_shared();
            __syncwarp();
            release_stage(c->base + 8 * c->slot + EMPTY, k);
            next_slot(c, q, k);
        }
}

/* Of rows that are one group: zeros before the sums; scales after them, so that nothing waits for these here. */
static __device__ __forceinline__ void read_rows(uint32_t scale_words[2], reader *r, const ql_packed_params *p,
                                                 int first_row, shape k) {
    const int g = (int)threadIdx.x % WARP / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = min(first_row + h * 8 + g, (int)p->n - 1);
        scale_words[h] = load_scale_word(p, row);
        uint32_t zeros = no_zeros(k.code);
        if (p->zeros) zeros = k.code == QL_CODE_INT8 ? p->zeros[row] : p->zeros[row / 2] >> row % 2 * 4;
        r->row.zero[h] = zero_word(stored_zero(zeros, 0, k.code), k.code, k.type);
    }
}

static __device__ __forceinline__ void multiply_all(const ql_streamk_params *q, uint32_t base, walk w, shape k) {
    const ql_packed_params *p = &q->product;
    const int strip = strip_of(k);
    const int set = SETS(k) == 2 ? __shfl_sync(ALL_LANES, (int)threadIdx.x / MULTIPLIERS, 0) : 0;
    const reader first_group = make_reader(q, base, k);
    float sums[MOST_SUMS];
    /* The first products of a tile with 256 tokens leave out what was before: zeros for each would take 300 cycles. */
    if (HAS_BOXES(k)) {
#pragma unroll
        for (int i = 0; i < MOST_SUMS; i++) sums[i] = 0.0f;
    }
    place c = first_place(base, set, k);
    int turn = 0, first_set = 0;
    int row_tile, token_tile;
    bool goes_on;
    place_tile(q, w.tile, &row_tile, &token_tile, k);
    do {
        const int row = row_tile * k.rows + strip * 16, token = first_token(q, token_tile, k);
        const int skipped = token_tile * k.tokens - token;
        reader reads = first_group;
        uint32_t scale_words[2], last_empty = 0;
        if (k.groups == 0) read_rows(scale_words, &reads, p, row, k);
        if (!HAS_BOXES(k)) {
#pragma unroll
            for (int i = 0; i < k.tokens / 2; i++) sums[i] = 0.0f;
        }
        const int others = set ^ first_set; /* blocks before the set's own */
        find_group(&c, &reads, q, w.first + others, k);
        if (SETS(k) == 2) {
            if (set == 0) named_arrive(SUMS_FREE_BARRIER, 2 * MULTIPLIERS);
            sum_own_blocks(sums, &reads, &c, q, w.end - w.first - others, k);
            first_set ^= (w.end - w.first) & 1;
        } else if (HAS_SUMS_OF_GROUPS(k)) {
            sum_batches(sums, &reads, &c, q, w.end - w.first, k);
        } else {
            last_empty = sum_blocks(sums, &reads, &c, q, w.end - w.first, k);
        }
        /* While the last products run. */
        walk next = w;
        goes_on = next_tile(&next, q, k);
        place_tile(q, next.tile, &row_tile, &token_tile, k);
        if (HAS_BOXES(k)) {
            AWAIT_STORES(0);
            named_barrier(OUTPUT_BARRIER + (int)threadIdx.x / 128, 128);
        }
        if (SETS(k) == 2 && !take_over_sums(sums, base + QL_STREAMK_TABLE_AT(k.code, k.tokens, k.groups), set)) {
            w = next;
            continue;
        }
        const int ranges = HAS_PARTS(k) ? ranges_after(q, &w, k) : await_partials(q, &w, k);
        if (!HAS_SUMS_OF_GROUPS(k) && SETS(k) == 1) finish_blocks(sums, last_empty, k);
        if (w.first > 0) {
            leave_partials(sums, q, k);
        } else {
            if (HAS_PARTS(k))
                add_parts(sums, &c, q, ranges, k);
            else if (ranges > 0)
                add_partials(sums, q, ranges, k);
            const int first = row - strip % 4 * 16;
            const uint32_t buffers = base + QL_STREAMK_BARRIER_BYTES;
            if (HAS_BOXES(k))
                store_boxes(sums, q, buffers, first, token, skipped, scale_words, k);
            else
                store_rows(sums, &turn, p, buffers, first, token, skipped, scale_words, k);
        }
        w = next;
    } while (goes_on);
    if (HAS_BOXES(k)) AWAIT_STORES(0);
}

/* The four warps behind those that multiply. */
static __device__ __forceinline__ void feed(const ql_streamk_params *q, uint32_t base, walk w, int warp, shape k) {
    if (HAS_PLANES(k)) {
        feed_planes(q, base, w, warp, k);
        return;
    }
    if (warp == 0 && is_elected()) copy_stages(q, base, w, false, k);
    if (warp == 1 && is_elected()) copy_stages(q, base, w, true, k);
    if (k.groups && is_nested(q, k)) {
        if (warp >= NESTED_WARP) make_entries(q, base, w, warp, k);
        return;
    }
    if (warp == 2 && k.groups) copy_entries(q, base, w, k);
    if (warp == 3) {
        start_next_kernel();
        if (w.first > 0) raise_flags(q, k);
    }
}

/* No thread block's shared memory goes before the other's copies and arrivals have reached it. Warps that multiply come here
 * whole: a __syncwarp() after them would cost their loop its uniform registers, 22 instructions a stage. */
static __device__ __forceinline__ void leave_pair(shape k) {
    if (PAIRED(k)) meet_cluster();
}

static __device__ __forceinline__ void product(const ql_streamk_params *q, shape k) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int warp = __shfl_sync(ALL_LANES, (int)threadIdx.x / WARP, 0);
    if (warp == FEEDERS(k) && is_elected()) init_barriers(q, base, k);
    if (warp == FEEDERS(k) + 1) {
        prefetch_map(q->x_map);
        prefetch_map(q->codes_map);
    }
    /* That warp has no part in this, and nobody waits for its requests. What a pair has to see of the barriers their own
     * fence has said: an arrival that says it again takes 900 cycles. */
    __syncwarp();
    if (PAIRED(k)) {
        arrive_cluster_started();
        if (warp == FEEDERS(k) + 3) prefetch_first(q, first_tile(q, k), k);
        __syncwarp();
        wait_cluster();
    } else if (HAS_EARLY_STAGES(k) && warp == FEEDERS(k)) {
        named_arrive(START_BARRIER, THREADS(k));
        if (is_elected()) ask_early(q, base, first_tile(q, k), false, k);
    } else if (warp == FEEDERS(k) + 3) {
        named_arrive(START_BARRIER, THREADS(k));
        prefetch_first(q, first_tile(q, k), k);
    } else {
        named_barrier(START_BARRIER, THREADS(k));
    }
    __syncwarp();
    /* Nothing stands before the registers' change in a branch: it would have to fit in fewer. */
    if (warp >= FEEDERS(k)) {
        WARPGROUP_GIVES_REGISTERS(56);
        if (HAS_EARLY_STAGES(k)) {
            if (warp == FEEDERS(k) + 1 && is_elected()) ask_early(q, base, first_tile(q, k), true, k);
            __syncwarp();
        }
        feed(q, base, first_tile(q, k), warp - FEEDERS(k), k);
        __syncwarp();
        leave_pair(k);
    } else {
        if (SETS(k) == 2)
            WARPGROUP_TAKES_REGISTERS(104);
        else
            WARPGROUP_TAKES_REGISTERS(224);
        if (HAS_SUMS_OF_GROUPS(k)) {
            fill_tables(&q->product, base + QL_STREAMK_TABLE_AT(k.code, k.tokens, k.groups), k.type);
            named_barrier(TABLE_BARRIER, MULTIPLIERS);
        }
        wait_for_previous_kernel();
        multiply_all(q, base, first_tile(q, k), k);
        leave_pair(k);
    }
}

#define KERNEL(name, source, code, type, wide, rows, tokens, stage_k, groups)                                          \
    extern "C" __global__ void __launch_bounds__(QL_STREAMK_THREADS(code, tokens), 1)                                  \
        name(const __grid_constant__ ql_streamk_params q) {                                                            \
        const shape k = {code, type, rows, tokens, stage_k, groups, wide};                                             \
        product(&q, k);                                                                                                \
    }
QL_WGMMA_VARIANTS(KERNEL)

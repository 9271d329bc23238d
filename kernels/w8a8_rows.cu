/* Quantizes the activations of an 8-bit layer, as w8a8_quantize.cu does, where a thread block can hold a row: 16-bit values at
 * multiples of 16 bytes, each read once, and of a row all at once. A block has each row_blocks-th row; with outliers there is
 * one block more, the first, which clears the mask before others set bits in it. */
#include "ptx.cuh"
#include "variants.h"
#include "w8a8_activation.cuh"

enum { WARP = 32, HELD = QL_W8A8_ROW_RUNS, FEW_ROWS = 64, LONG_ROW = 8192 };

/* What a thread holds of its row: runs that are blockDim.x apart, zeros from k on. */
typedef struct row {
    uint4 run[HELD];
} row;

static __device__ __forceinline__ int run_of(int i) { return i * (int)blockDim.x + (int)threadIdx.x; }

static __device__ __forceinline__ int column_of(int i) { return run_of(i) * QL_RUN; }

static __device__ __forceinline__ const uint4 *runs_of(const ql_w8a8_quantize_params *p, int64_t index) {
    return (const uint4 *)((const uint16_t *)p->x + index * p->x_stride);
}

/* Zeros where there is no such row. */
static __device__ __forceinline__ row load_row(const ql_w8a8_quantize_params *p, int64_t index) {
    const uint4 *from = runs_of(p, index);
    const int runs = index < p->m ? (int)p->k / QL_RUN : 0;
    row r;
#pragma unroll
    for (int i = 0; i < HELD; i++) r.run[i] = run_of(i) < runs ? __ldg(from + run_of(i)) : make_uint4(0, 0, 0, 0);
    return r;
}

/* The maximum over the block. Two buffers take turns, so that one barrier is enough. */
static __device__ __forceinline__ uint32_t row_max(uint32_t value, int turn) {
    __shared__ uint32_t most[2][WARP];
    const int lane = (int)threadIdx.x % WARP;
    value = __reduce_max_sync(ALL_LANES, value);
    if (lane == 0) most[turn][threadIdx.x / WARP] = value;
    __syncthreads();
    return __reduce_max_sync(ALL_LANES, lane < (int)blockDim.x / WARP ? most[turn][lane] : 0);
}

/* A scale's reciprocal, rounded down, and what it lacks, which is not negative so that -0 stays: a value of 11 bits times both
 * is on the side of every bound between codes that the quotient to nearest is on, or on it. Of all scales within 12 units in
 * the last place of such a value over a bound one is otherwise, the last before a power of two. */
typedef struct inverse {
    float first, rest;
} inverse;

static __device__ __forceinline__ inverse inverse_of(const ql_encoder *e) {
    float first = e->factor, lack = __fmaf_rn(-first, e->scale, 1.0f);
    if (lack < 0.0f) {
        first = __uint_as_float(__float_as_uint(first) - 1);
        lack = __fmaf_rn(-first, e->scale, 1.0f);
    }
    return (inverse){first, __fmul_rn(lack, first)};
}

static __device__ __forceinline__ bool is_rare(const ql_encoder *e) {
    return e->exact || (~__float_as_uint(e->scale) & 0x7fffffu) == 0;
}

static __device__ __forceinline__ uint2 encode_e4m3(uint4 bits, int type, inverse by) {
    float x[QL_RUN];
    unpack_run(x, bits, type);
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) x[i] = __fmaf_rn(x[i], by.first, __fmul_rn(x[i], by.rest));
    return e4m3_of_values(x);
}

static __device__ __forceinline__ void store_run(const ql_w8a8_quantize_params *p, int64_t index, int i, uint2 codes) {
    uint2 *to = (uint2 *)(p->codes + index * p->pitch);
    if (column_of(i) < (int)p->pitch) to[run_of(i)] = codes;
}

/* The thread's runs, read once more so that what is rare takes little room. */
static __device__ __forceinline__ void quantize_rare(const ql_w8a8_quantize_params *p, int64_t index,
                                                     const ql_encoder *e, int type) {
#pragma unroll 1
    for (int i = 0; column_of(i) < (int)p->pitch; i++) {
        float x[QL_RUN];
        unpack_run(x, column_of(i) < (int)p->k ? runs_of(p, index)[run_of(i)] : make_uint4(0, 0, 0, 0), type);
        store_run(p, index, i, e4m3_run(x, e));
    }
}

static __device__ __forceinline__ void quantize_token(const ql_w8a8_quantize_params *p, int64_t index, const row *r,
                                                      int turn, int type) {
    uint32_t pair = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) pair = __vmaxu2(pair, pair_magnitude(r->run[i]));
    const uint32_t most = widened(row_max(larger_of(pair), turn), type);
    const float scale = token_scale(most, p->upper_bound, p->least_scale);
    const ql_encoder e = e4m3_encoder(scale, most, false);
    const inverse by = inverse_of(&e);
    if (threadIdx.x == 0) p->scales[index] = scale;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (i * (int)blockDim.x * QL_RUN >= (int)p->pitch) break;
        store_run(p, index, i, encode_e4m3(r->run[i], type, by));
    }
    if (is_rare(&e)) quantize_rare(p, index, &e, type);
}

/* A group of 128 columns is 16 lanes' run. */
static __device__ __forceinline__ void quantize_groups(const ql_w8a8_quantize_params *p, int64_t index, const row *r,
                                                       int type) {
    enum { LANES = QL_W8A8_GROUP / QL_RUN };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (i * (int)blockDim.x * QL_RUN >= (int)p->pitch) break;
        const uint32_t most = widened(lanes_max(larger_of(pair_magnitude(r->run[i])), LANES), type);
        float scale;
        store_run(p, index, i, group_codes(&scale, r->run[i], most, type));
        if (threadIdx.x % LANES == 0 && column_of(i) < (int)p->pitch)
            p->scales[column_of(i) / QL_W8A8_GROUP * p->group_stride + index] = scale;
    }
}

/* ---- LLM.int8() ---- */

static __device__ __forceinline__ uint64_t *mark_of_mask(const ql_w8a8_quantize_params *p) {
    return (uint64_t *)(p->outliers + p->pitch / 32);
}

static __device__ __forceinline__ void clear_mask(const ql_w8a8_quantize_params *p) {
    for (int i = (int)threadIdx.x; i < p->pitch / 32; i += (int)blockDim.x) p->outliers[i] = 0;
    __syncthreads();
    if (threadIdx.x == 0) store_release(mark_of_mask(p), p->nonce);
}

static __device__ __forceinline__ void await_clear_mask(const ql_w8a8_quantize_params *p) {
    while (load_acquire(mark_of_mask(p)) != p->nonce) {
    }
}

/* Sets the bits of eight columns; of many rows most find them set by another. */
static __device__ __forceinline__ void mark_columns(const ql_w8a8_quantize_params *p, int col, uint32_t marked) {
    uint32_t *word = p->outliers + col / 32;
    marked <<= col % 32;
    if (p->m <= FEW_ROWS || marked & ~*(volatile uint32_t *)word) atomicOr(word, marked);
}

/* Bit i: value i of the run is an outlier. *most: of the run's others. */
static __device__ __forceinline__ uint32_t split_run(uint32_t *most, uint4 bits, uint32_t limit, int type) {
    float x[QL_RUN];
    unpack_run(x, bits, type);
    const uint32_t marked = outliers_of(x, limit);
    *most = inlier_magnitude(*most, x, marked);
    return marked;
}

/* marked: of a run 8 bits each. */
static __device__ __forceinline__ void mark_runs(const ql_w8a8_quantize_params *p, uint32_t marked) {
#pragma unroll 1
    for (int i = 0; i < HELD; i++)
        if (marked >> i * QL_RUN & 0xff) mark_columns(p, column_of(i), marked >> i * QL_RUN & 0xff);
}

/* Where rows are so long that the mask is clear before they are there, which one thread sees then, for all by the barrier. */
static __device__ __forceinline__ bool is_clear_first(const ql_w8a8_quantize_params *p) { return p->pitch > LONG_ROW; }

static __device__ __forceinline__ void quantize_int8(const ql_w8a8_quantize_params *p, int64_t index, const row *r,
                                                     int turn, int type) {
    const uint32_t limit = outlier_limit(p->threshold);
    uint32_t most = 0, marked = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t own = widened(larger_of(pair_magnitude(r->run[i])), type);
        if (own < limit)
            most = max(most, own);
        else
            marked |= split_run(&most, r->run[i], limit, type) << i * QL_RUN;
    }
    most = row_max(most, turn);
    if (is_clear_first(p)) mark_runs(p, marked);
    const ql_encoder e = int8_encoder(most);
    if (threadIdx.x == 0) p->scales[index] = __uint_as_float(most);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float x[QL_RUN];
        unpack_run(x, r->run[i], type);
        store_run(p, index, i, int8_run(x, &e, marked >> i * QL_RUN & 0xff));
    }
    if (!marked || is_clear_first(p)) return;
    await_clear_mask(p);
    mark_runs(p, marked);
}

static __device__ __forceinline__ void quantize_rows(const ql_w8a8_quantize_params *p, int mode, int code, int type) {
    int64_t index = (int64_t)blockIdx.x - (p->outliers != NULL);
    if (index < 0) {
        clear_mask(p);
        return;
    }
    /* Groups wait for nothing but their own values: warps go ahead of each other. */
    if (mode == QL_W8A8_GROUPS) {
#pragma unroll 1
        for (; index < p->m; index += p->row_blocks) {
            const row r = load_row(p, index);
            quantize_groups(p, index, &r, type);
        }
        return;
    }
    row r = load_row(p, index);
    if (code == QL_W8A8_INT8 && p->outliers && is_clear_first(p) && threadIdx.x == 0) await_clear_mask(p);
#pragma unroll 1
    for (int turn = 0; index < p->m; turn ^= 1) {
        const row next = load_row(p, index + p->row_blocks);
        if (code == QL_W8A8_INT8)
            quantize_int8(p, index, &r, turn, type);
        else
            quantize_token(p, index, &r, turn, type);
        r = next;
        index += p->row_blocks;
    }
}

#define KERNEL(name, source, mode, code, type)                                                                         \
    extern "C" __global__ void __launch_bounds__(QL_W8A8_ROW_THREADS, 1)                                               \
        name(const __grid_constant__ ql_w8a8_quantize_params p) {                                                      \
        start_next_kernel();                                                                                           \
        wait_for_previous_kernel();                                                                                    \
        quantize_rows(&p, mode, code, type);                                                                           \
    }
QL_W8A8_ROWS_VARIANTS(KERNEL)

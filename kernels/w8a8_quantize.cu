/* Quantizes the activations of an 8-bit layer, in one launch: codes, scales and the mask of outlier columns, as w8a8.h has
 * them. The product's kernel may start while this one runs.
 *
 * A block holds a row in registers from the absmax to the codes where it is not too long; else it reads it twice. */
#include "ptx.cuh"
#include "w8a8_activation.cuh"

enum { HELD = 2 }; /* runs of a thread */

static __device__ __forceinline__ const void *row_at(const ql_w8a8_quantize_params *p, int64_t row) {
    return (const char *)p->x + row * p->x_stride * (p->x_type == QL_VALUE_F32 ? 4 : 2);
}

/* The run at `col` of a row, zeros from k on. */
static __device__ __forceinline__ void load_row_run(float *run, const ql_w8a8_quantize_params *p, const void *row,
                                                    int64_t col) {
    load_run(run, row, p->x_type, p->vector, col, p->k);
}

static __device__ __forceinline__ uint32_t run_most(uint32_t most, const float *run, uint32_t limit) {
    return limit == 0xffffffffu ? run_magnitude(most, run) : inlier_magnitude(most, run, outliers_of(run, limit));
}

static __device__ __forceinline__ void store_codes(const ql_w8a8_quantize_params *p, int64_t row, int64_t col,
                                                   const float *run, const ql_encoder *e, uint32_t limit) {
    if (col >= p->pitch) return;
    const uint2 codes = p->code == QL_W8A8_INT8 ? int8_run(run, e, outliers_of(run, limit)) : e4m3_run(run, e);
    if (!p->values) {
        *(uint2 *)(p->codes + row * p->pitch + col) = codes;
        return;
    }
#pragma unroll
    for (int i = 0; i < QL_RUN; i++)
        if (col + i < p->k)
            p->values[row * p->k + col + i] =
                __fmul_rn(value_from_e4m3((uint8_t)((i < 4 ? codes.x : codes.y) >> i % 4 * 8)), e->scale);
}

/* Rows of which each has its scale. */
static __device__ __forceinline__ void quantize_tokens(const ql_w8a8_quantize_params *p) {
    const uint32_t limit = outlier_limit(p->threshold);
    const int64_t step = (int64_t)blockDim.x * QL_RUN, first = (int64_t)threadIdx.x * QL_RUN;
    const bool held = p->pitch <= HELD * step;
    for (int64_t row = blockIdx.x; row < p->m; row += p->row_blocks) {
        const void *from = row_at(p, row);
        float runs[HELD][QL_RUN];
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < HELD; i++) load_row_run(runs[i], p, from, first + i * step);
#pragma unroll
        for (int i = 0; i < HELD; i++) most = run_most(most, runs[i], limit);
        for (int64_t col = first + HELD * step; col < p->k; col += step) {
            float run[QL_RUN];
            load_row_run(run, p, from, col);
            most = run_most(most, run, limit);
        }
        most = block_max(most);
        const bool int8 = p->code == QL_W8A8_INT8;
        const float scale = int8 ? __uint_as_float(most) : token_scale(most, p->upper_bound, p->least_scale);
        const ql_encoder e = int8 ? int8_encoder(most) : e4m3_encoder(scale, most, false);
        if (threadIdx.x == 0) p->scales[row] = scale;
#pragma unroll
        for (int i = 0; i < HELD; i++) store_codes(p, row, first + i * step, runs[i], &e, limit);
        for (int64_t col = first + HELD * step; !held && col < p->pitch; col += step) {
            float run[QL_RUN];
            load_row_run(run, p, from, col);
            store_codes(p, row, col, run, &e, limit);
        }
    }
}

/* The largest magnitude of x, which the blocks find together. */
static __device__ __forceinline__ uint32_t tensor_magnitude(const ql_w8a8_quantize_params *p) {
    const int64_t step = (int64_t)blockDim.x * QL_RUN;
    const int blocks = p->row_blocks, block = (int)blockIdx.x;
    uint32_t most = 0;
    for (int64_t row = block; row < p->m; row += blocks)
        for (int64_t col = (int64_t)threadIdx.x * QL_RUN; col < p->k; col += step) {
            float run[QL_RUN];
            load_row_run(run, p, row_at(p, row), col);
            most = run_magnitude(most, run);
        }
    most = block_max(most);
    for (int other = (int)threadIdx.x; other < blocks; other += (int)blockDim.x) {
        p->absmax[other * blocks + block] = most;
        store_release(&p->marks[other * blocks + block], p->nonce);
    }
    for (int other = (int)threadIdx.x; other < blocks; other += (int)blockDim.x) {
        uint64_t *mark = &p->marks[block * blocks + other];
        while (load_acquire(mark) != p->nonce) {
        }
        most = max(most, *(volatile uint32_t *)&p->absmax[block * blocks + other]);
        *mark = 0;
    }
    return block_max(most);
}

/* All rows by one scale. */
static __device__ __forceinline__ void quantize_tensor(const ql_w8a8_quantize_params *p) {
    const float scale = p->mode == QL_W8A8_STATIC ? p->input_scale : e4m3_scale(__uint_as_float(tensor_magnitude(p)));
    const ql_encoder e = e4m3_encoder(scale, 0, true);
    if (blockIdx.x == 0 && threadIdx.x == 0) p->scales[0] = scale;
    for (int64_t row = blockIdx.x; row < p->m; row += p->row_blocks)
        for (int64_t col = (int64_t)threadIdx.x * QL_RUN; col < p->pitch; col += (int64_t)blockDim.x * QL_RUN) {
            float run[QL_RUN];
            load_row_run(run, p, row_at(p, row), col);
            store_codes(p, row, col, run, &e, 0xffffffffu);
        }
}

/* 128 columns of a row for each 16 lanes. */
static __device__ __forceinline__ void quantize_groups(const ql_w8a8_quantize_params *p) {
    enum { LANES = QL_W8A8_GROUP / QL_RUN };
    const int64_t across = p->pitch / QL_W8A8_GROUP, groups = p->m * across;
    const int64_t each = blockDim.x / LANES, step = p->row_blocks * each;
    /* The warp stays together to the last shuffle. */
    for (int64_t base = blockIdx.x * each; base < groups; base += step) {
        const int64_t unit = base + threadIdx.x / LANES, row = divide(unit, across), group = unit - row * across;
        const int64_t col = group * QL_W8A8_GROUP + threadIdx.x % LANES * QL_RUN;
        float run[QL_RUN] = {0};
        if (unit < groups) load_row_run(run, p, row_at(p, row), col);
        const uint32_t most = lanes_max(run_magnitude(0, run), LANES);
        const float scale = e4m3_scale(__uint_as_float(most));
        const ql_encoder e = e4m3_encoder(scale, most, false);
        if (unit >= groups) continue;
        store_codes(p, row, col, run, &e, 0xffffffffu);
        if (threadIdx.x % LANES == 0) p->scales[group * p->group_stride + row] = scale;
    }
}

/* The mask of the block's columns, over all rows. */
static __device__ __forceinline__ void mark_outliers(const ql_w8a8_quantize_params *p) {
    enum { LANES = QL_W8A8_OUTLIER_COLUMNS / QL_RUN };
    __shared__ uint8_t found[QL_W8A8_ROW_THREADS / 32][LANES];
    const uint32_t limit = outlier_limit(p->threshold);
    const int64_t block = (int64_t)blockIdx.x - p->row_blocks;
    const int64_t col = block * QL_W8A8_OUTLIER_COLUMNS + threadIdx.x % LANES * QL_RUN;
    uint32_t marked = 0;
#pragma unroll 4
    for (int64_t row = threadIdx.x / LANES; row < p->m; row += blockDim.x / LANES) {
        float run[QL_RUN];
        load_row_run(run, p, row_at(p, row), col);
        marked |= outliers_of(run, limit);
    }
    for (int lanes = LANES; lanes < 32; lanes *= 2) marked |= __shfl_xor_sync(ALL_LANES, marked, lanes);
    if (threadIdx.x % 32 < LANES) found[threadIdx.x / 32][threadIdx.x % 32] = (uint8_t)marked;
    __syncthreads();
    if (threadIdx.x >= LANES) return;
    for (int warp = 0; warp < (int)blockDim.x / 32; warp++) marked |= found[warp][threadIdx.x];
    ((uint8_t *)p->outliers)[block * LANES + threadIdx.x] = (uint8_t)marked;
}

extern "C" __global__ void __launch_bounds__(QL_W8A8_ROW_THREADS)
    ql_w8a8_quantize(const __grid_constant__ ql_w8a8_quantize_params p) {
    start_next_kernel();
    wait_for_previous_kernel();
    if ((int)blockIdx.x >= p.row_blocks)
        mark_outliers(&p);
    else if (p.mode == QL_W8A8_TOKEN)
        quantize_tokens(&p);
    else if (p.mode == QL_W8A8_GROUPS)
        quantize_groups(&p);
    else
        quantize_tensor(&p);
}

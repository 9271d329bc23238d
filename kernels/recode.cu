/* Codes from one form to another, nothing rounded: GPTQ's streams, AWQ's words, and AWQ's other storages. */
#include "quantize.h"
#include "stream.cuh"
#include "value.cuh"

enum { THREADS = QL_QUANTIZE_THREADS };

/* One item a thread, and on by the grid's size. */
#define FOR_EACH(i, count)                                                                                             \
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < (count); i += (int64_t)gridDim.x * THREADS)

/* A chunk of 32 codes of a column; neighbouring threads have neighbouring columns. */
extern "C" __global__ void __launch_bounds__(THREADS, 4) ql_recode(const __grid_constant__ ql_recode_params p) {
    int low_bits = p.bits == 3 ? 2 : p.bits; /* of the planar layout's first plane */
    int64_t chunks = p.count / CHUNK + (p.count % CHUNK != 0);
    FOR_EACH(i, chunks * p.cols) {
        int64_t chunk = i / p.cols, col = i % p.cols, first = chunk * CHUNK;
        const int32_t *words = (const int32_t *)p.from + chunk * p.bits * p.row_stride + col * p.col_stride;
        if (p.mode == QL_RECODE_UNPACK) {
            for (int j = 0; j < CHUNK && first + j < p.count; j++)
                ((uint8_t *)p.out)[(first + j) * p.cols + col] = (uint8_t)load_code(words, p.row_stride, p.bits, j);
            continue;
        }
        uint32_t four[CHUNK / 4] = {0};
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            uint32_t code = 0;
            if (p.mode == QL_RECODE_UNPLANAR) {
                code = load_code(words, p.row_stride, low_bits, j);
                if (p.bits > low_bits)
                    code |= load_code(words + low_bits * p.row_stride, p.row_stride, p.bits - low_bits, j) << low_bits;
            } else if (first + j < p.count) {
                code = ((const uint8_t *)p.from)[(first + j) * p.row_stride + col * p.col_stride];
            }
            four[j / 4] |= code << 8 * (j % 4);
        }
        store_chunk((int32_t *)p.out + chunk * p.bits * p.cols + col, p.cols, four, p.bits,
                    chunk_words(p.count - first, p.bits));
    }
}

/* ---- AWQ ---- */

static __device__ __forceinline__ uint32_t gemv_code(const ql_gather_params *p, int64_t row, int64_t col) {
    uint32_t word = ((const uint32_t *)p->from)[row * p->row_stride + col / 8 * p->col_stride];
    return word >> 4 * (col % 8) & 15;
}

static __device__ __forceinline__ uint32_t gemv_fast_code(const ql_gather_params *p, int64_t row, int64_t col) {
    int64_t position = col / 64 * 64 + row % 4 * 16 + col % 64 / 32 * 8 + col % 8 / 2 * 2 + col % 2;
    uint32_t word = ((const uint16_t *)p->from)[row / 4 * p->row_stride + position * p->col_stride];
    return word >> 4 * (col % 32 / 8) & 15;
}

static __device__ __forceinline__ uint32_t marlin_code(const ql_gather_params *p, int64_t row, int64_t col) {
    int64_t at = row / 64 * 128 + row % 8 * 16 + col % 8 / 2 * 4 + row % 64 / 16;
    int64_t nibble = col % 2 * 4 + row % 16 / 8 * 2 + col % 16 / 8;
    return ((const uint32_t *)p->from)[col / 16 * p->row_stride + at * p->col_stride] >> 4 * nibble & 15;
}

/* The code of row `row` (an output channel) and column `col` in the storage. */
static __device__ __forceinline__ uint32_t storage_code(const ql_gather_params *p, int64_t row, int64_t col) {
    switch (p->storage) {
    case QL_AWQ_PLAIN: return ((const uint8_t *)p->from)[col * p->row_stride + row * p->col_stride];
    case QL_AWQ_GEMV: return gemv_code(p, row, col);
    case QL_AWQ_GEMV_FAST: return gemv_fast_code(p, row, col);
    case QL_AWQ_MARLIN: return marlin_code(p, row, col);
    default: return 8;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_awq_gather(const __grid_constant__ ql_gather_params p) {
    int64_t words = p.rows / 8 + (p.rows % 8 != 0);
    FOR_EACH(i, p.cols * words) {
        int64_t col = i / words, first = i % words * 8;
        uint32_t word = 0;
        for (int j = 0; j < 8 && first + j < p.rows; j++) word |= storage_code(&p, first + j, col) << awq_shift(j);
        p.out[i] = (int32_t)word;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_awq_spread(const __grid_constant__ ql_spread_params p) {
    FOR_EACH(i, p.rows * p.cols) {
        int64_t row = i / p.cols, col = i % p.cols;
        uint32_t word = (uint32_t)p.from[row * p.row_stride + col / 8 * p.col_stride];
        p.out[i] = (uint8_t)(word >> awq_shift((int)(col % 8)) & 15);
    }
}

/* Marlin's column of scale `column`, inside each 64 where there are several groups, inside each 32 where there is one. */
static __device__ __forceinline__ int64_t marlin_column(int64_t column, int64_t groups) {
    if (groups > 1) return column / 64 * 64 + column % 8 * 8 + column % 64 / 8;
    return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_permute(const __grid_constant__ ql_permute_params p) {
    FOR_EACH(i, p.rows * p.cols) {
        int64_t row = i / p.cols, col = i % p.cols;
        int64_t at = row * p.row_stride + (p.marlin ? marlin_column(col, p.rows) : col) * p.col_stride;
        if (p.size == 2)
            ((uint16_t *)p.out)[i] = ((const uint16_t *)p.from)[at];
        else
            ((uint32_t *)p.out)[i] = ((const uint32_t *)p.from)[at];
    }
}

/* ---- a check that the host reads ---- */

extern "C" __global__ void __launch_bounds__(THREADS) ql_find_above(const __grid_constant__ ql_above_params p) {
    __shared__ unsigned long long least;
    if (threadIdx.x == 0) least = ~0ull;
    __syncthreads();
    FOR_EACH(i, p.rows * p.cols) {
        if (p.codes[i / p.cols * p.row_stride + i % p.cols * p.col_stride] <= p.largest) continue;
        atomicMin(&least, (unsigned long long)i);
        break;
    }
    __syncthreads();
    if (threadIdx.x == 0) p.first[blockIdx.x] = (int64_t)least;
}

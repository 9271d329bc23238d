/* Strided tensors laid out as rows; what the quantizers ask of a matrix first: row maxima and outlier columns. */
#include "params.h"
#include "source.cuh"

enum { THREADS = QL_LINEAR_THREADS };

/* outliers[col] = 1 where any row has |x| >= threshold there: a block has QL_OUTLIER_COLUMNS columns, which its warps share
 * by rows. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_find_outliers(const __grid_constant__ ql_activation_params p) {
    __shared__ bool found_by[THREADS / QL_OUTLIER_COLUMNS][QL_OUTLIER_COLUMNS];
    int lane = (int)threadIdx.x % QL_OUTLIER_COLUMNS, part = (int)threadIdx.x / QL_OUTLIER_COLUMNS;
    int64_t col = (int64_t)blockIdx.x * QL_OUTLIER_COLUMNS + lane;
    bool found = false;
    if (col < p.k)
#pragma unroll 8
        for (int64_t m = part; m < p.m; m += THREADS / QL_OUTLIER_COLUMNS)
            found |= fabsf(load_value(p.x, p.x_type, m * p.x_stride + col)) >= p.threshold;
    found_by[part][lane] = found;
    __syncthreads();
    if (part > 0 || col >= p.k) return;
    for (int i = 1; i < THREADS / QL_OUTLIER_COLUMNS; i++) found |= found_by[i][lane];
    p.outliers[col] = found;
}

/* row_absmax[m] = max |x[m][col]|, over |x| < threshold where one is given; one block a row. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_row_absmax(const __grid_constant__ ql_activation_params p) {
    int64_t size = p.x_type == QL_VALUE_F32 ? 4 : 2;
    bool vector = ((uintptr_t)p.x | (uintptr_t)(p.x_stride * size)) % 16 == 0;
    for (int64_t m = blockIdx.x; m < p.m; m += gridDim.x) {
        const void *row = (const char *)p.x + m * p.x_stride * size;
        uint32_t most = 0;
        for (int64_t col = (int)threadIdx.x * QL_RUN; col < p.k; col += THREADS * QL_RUN) {
            float run[QL_RUN];
            load_run(run, row, p.x_type, vector, col, p.k);
#pragma unroll
            for (int i = 0; i < QL_RUN; i++) {
                bool outlier = p.threshold > 0.0f && fabsf(run[i]) >= p.threshold;
                most = outlier ? most : max(most, magnitude_bits(run[i]));
            }
        }
        most = block_max(most);
        if (threadIdx.x == 0) p.row_absmax[m] = __uint_as_float(most);
    }
}

/* out = from without gaps, a thread an element. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_copy(const __grid_constant__ ql_copy_params p) {
    int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < p.count; i += step) {
        int64_t rest = i, offset = 0;
        for (int d = p.ndim - 1; d >= 0; d--) {
            offset += rest % p.shape[d] * p.stride[d];
            rest /= p.shape[d];
        }
        if (p.type == QL_VALUE_F32)
            ((uint32_t *)p.out)[i] = ((const uint32_t *)p.from)[offset];
        else if (p.type == QL_VALUE_F64)
            ((float *)p.out)[i] = __double2float_rn(((const double *)p.from)[offset]);
        else
            ((uint16_t *)p.out)[i] = ((const uint16_t *)p.from)[offset];
    }
}

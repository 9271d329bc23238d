/* What is done to activations before a product: strided ones laid out as rows; for the 8-bit layers row maxima, outlier
 * columns and FP8 rounding. */
#include "params.h"
#include "value.cuh"

enum { THREADS = QL_LINEAR_THREADS };

/* The bits of |value|: they order as magnitudes do, with every NaN above infinity, so that a maximum keeps NaN. */
static __device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

/* The maximum over the block, for every thread. */
static __device__ uint32_t block_max(uint32_t value) {
    __shared__ uint32_t most[THREADS / 32];
    value = __reduce_max_sync(0xffffffffu, value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < THREADS / 32; i++) value = max(value, most[i]);
    return value;
}

/* outliers[col] = 1 where any row has |x| >= threshold there; one thread a column. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_find_outliers(const __grid_constant__ ql_activation_params p) {
    int64_t col = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (col >= p.k) return;
    bool found = false;
    for (int64_t m = 0; m < p.m; m++) found |= fabsf(load_value(p.x, p.x_type, m * p.x_stride + col)) >= p.threshold;
    p.outliers[col] = found;
}

/* row_absmax[m] = max |x[m][col]|, over |x| < threshold where one is given; one block a row. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_row_absmax(const __grid_constant__ ql_activation_params p) {
    for (int64_t m = blockIdx.x; m < p.m; m += gridDim.x) {
        uint32_t most = 0;
        for (int64_t col = threadIdx.x; col < p.k; col += THREADS) {
            float value = load_value(p.x, p.x_type, m * p.x_stride + col);
            bool outlier = p.threshold > 0.0f && fabsf(value) >= p.threshold;
            most = outlier ? most : max(most, magnitude_bits(value));
        }
        most = block_max(most);
        if (threadIdx.x == 0) p.row_absmax[m] = __uint_as_float(most);
    }
}

/* absmax / 448, 1 for zero; NaN stays. */
static __device__ __forceinline__ float plain_scale(float absmax) {
    return absmax == 0.0f ? 1.0f : __fdiv_rn(absmax, 448.0f);
}

/* out[m][col] = e4m3(x / s) * s in fp32, with s as the layer's mode says; one block a row. */
extern "C" __global__ void __launch_bounds__(THREADS)
    ql_fp8_activation(const __grid_constant__ ql_activation_params p) {
    float scale = 1.0f;
    bool reciprocal = p.mode == QL_ACTIVATION_STATIC || p.mode == QL_ACTIVATION_TENSOR;
    if (p.mode == QL_ACTIVATION_STATIC) scale = p.input_scale;
    if (p.mode == QL_ACTIVATION_TENSOR) {
        uint32_t most = 0;
        for (int64_t m = threadIdx.x; m < p.m; m += THREADS) most = max(most, magnitude_bits(p.row_absmax[m]));
        scale = plain_scale(__uint_as_float(block_max(most)));
    }
    for (int64_t m = blockIdx.x; m < p.m; m += gridDim.x) {
        if (p.mode == QL_ACTIVATION_TOKEN) {
            float absmax = p.row_absmax[m];
            float bounded = absmax > p.upper_bound ? p.upper_bound : absmax;
            scale = __fdiv_rn(bounded, 448.0f);
            if (scale < p.least_scale) scale = p.least_scale;
        }
        for (int64_t base = 0; base < p.k; base += QL_ACTIVATION_GROUP) {
            int64_t col = base + threadIdx.x;
            bool inside = threadIdx.x < QL_ACTIVATION_GROUP && col < p.k;
            float value = inside ? load_value(p.x, p.x_type, m * p.x_stride + col) : 0.0f;
            if (p.mode == QL_ACTIVATION_GROUP128)
                scale = plain_scale(__uint_as_float(block_max(magnitude_bits(value))));
            float scaled = reciprocal ? __fmul_rn(value, __fdiv_rn(1.0f, scale)) : __fdiv_rn(value, scale);
            if (inside) p.out[m * p.k + col] = __fmul_rn(value_from_e4m3(e4m3_from_value(scaled)), scale);
        }
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

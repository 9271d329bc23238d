/* The base kernels: products with a weight as the checkpoint holds it, in fp32 on the plain cores, for every format, any
 * shape and any GPU. They define what is right; kernels for one architecture are there to be faster.
 *
 * A block makes 64 outputs of 4 * tokens tokens. It walks the inner dimension 32 at a time: the weight is decoded into
 * shared memory once, the activations beside it, and each thread sums `tokens` tokens of one output in registers, in the
 * order of the inner dimension, so that the same call gives the same bits. */
#include "int8_output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "variants.h"
#include "weight.cuh"

enum {
    OUTPUTS = QL_LINEAR_OUTPUTS,
    DEPTH = 32,
    THREADS = QL_LINEAR_THREADS,
    LANES = THREADS / OUTPUTS,
    MOST_TOKENS = QL_LINEAR_MANY / LANES
};

/* The tile of W that meets outputs [first, first + OUTPUTS) and inner indices [depth, depth + DEPTH). For a product W is
 * read as [out_features, in_features], for the gradient to the input as its transpose. Neighbouring threads take what is
 * close in memory: outputs where the checkpoint packs along N, the inner dimension where it is row-major. */
static __device__ __forceinline__ void load_weight(float tile[DEPTH][OUTPUTS + 1], const ql_linear_params *p,
                                                   bool transposed, int64_t first, int64_t depth, int64_t outputs,
                                                   int64_t inner) {
    bool output_fast = packs_along_n(p) != transposed;
    for (int i = (int)threadIdx.x; i < OUTPUTS * DEPTH; i += THREADS) {
        int o = output_fast ? i % OUTPUTS : i / DEPTH;
        int d = output_fast ? i / OUTPUTS : i % DEPTH;
        int64_t row = transposed ? depth + d : first + o, col = transposed ? first + o : depth + d;
        tile[d][o] = first + o < outputs && depth + d < inner ? weight_at(p, row, col) : 0.0f;
    }
}

/* out[m][o] = sum_d x[m][d] * W[o][d] (+ bias[o]). transposed and tokens are constants of each kernel. */
static __device__ __forceinline__ void product(const ql_linear_params *p, bool transposed, int tokens) {
    __shared__ float w[DEPTH][OUTPUTS + 1];
    __shared__ float x[DEPTH][LANES * MOST_TOKENS];
    int64_t outputs = transposed ? p->k : p->n, inner = transposed ? p->n : p->k;
    int64_t first = (int64_t)blockIdx.x * OUTPUTS, token = (int64_t)blockIdx.y * (LANES * tokens);
    int o = (int)threadIdx.x % OUTPUTS, lane = (int)threadIdx.x / OUTPUTS;
    float sum[MOST_TOKENS] = {0};
    wait_for_previous_kernel();
    for (int64_t depth = 0; depth < inner; depth += DEPTH) {
        load_weight(w, p, transposed, first, depth, outputs, inner);
        for (int i = (int)threadIdx.x; i < DEPTH * LANES * tokens; i += THREADS) {
            int64_t m = token + i / DEPTH, d = depth + i % DEPTH;
            bool inside = m < p->m && d < inner;
            x[i % DEPTH][i / DEPTH] = inside ? load_value(p->x, p->x_type, m * p->x_stride + d) : 0.0f;
        }
        __syncthreads();
        int count = (int)min(inner - depth, (int64_t)DEPTH);
        for (int d = 0; d < count; d++)
#pragma unroll
            for (int t = 0; t < tokens; t++) sum[t] += x[d][lane * tokens + t] * w[d][o];
        __syncthreads();
    }
    if (first + o >= outputs) return;
    float bias = transposed ? 0.0f : BIAS_AT(p, first + o);
#pragma unroll
    for (int t = 0; t < tokens; t++) {
        int64_t m = token + lane * tokens + t;
        if (m < p->m) store_value(p->out, p->out_type, m * outputs + first + o, sum[t] + bias);
    }
}

#define KERNEL(name, source, transposed, tokens)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ ql_linear_params params) {      \
        product(&params, transposed, tokens);                                                                          \
    }
QL_LINEAR_VARIANTS(KERNEL)

/* out[row][col] = W, a thread an element. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_dequantize(const __grid_constant__ ql_linear_params p) {
    int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < p.n * p.k; i += step) {
        const int64_t row = divide(i, p.k);
        store_value(p.out, p.out_type, i, weight_at(&p, row, i - row * p.k));
    }
}

/* LLM.int8(), whose activations are codes already. int8 products are summed in 64 bits, outliers in fp32 from the original
 * values. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_linear_int8(const __grid_constant__ ql_linear_params params) {
    enum { TOKENS = 4 };
    const ql_linear_params *p = &params;
    __shared__ int8_t w[DEPTH][OUTPUTS + 4];
    __shared__ int8_t codes[DEPTH][LANES * TOKENS];
    __shared__ float outliers[DEPTH][LANES * TOKENS];
    int64_t first = (int64_t)blockIdx.x * OUTPUTS, token = (int64_t)blockIdx.y * (LANES * TOKENS);
    int o = (int)threadIdx.x % OUTPUTS, lane = (int)threadIdx.x / OUTPUTS;
    int64_t sum[TOKENS] = {0};
    float outlier_sum[TOKENS] = {0};
    wait_for_previous_kernel();
    for (int64_t depth = 0; depth < p->k; depth += DEPTH) {
        /* A word of the mask has the columns of a tile. */
        uint32_t marked = p->outliers ? p->outliers[depth / DEPTH] : 0;
        for (int i = (int)threadIdx.x; i < OUTPUTS * DEPTH; i += THREADS) {
            int64_t row = first + i / DEPTH, col = depth + i % DEPTH;
            bool inside = row < p->n && col < p->k;
            w[i % DEPTH][i / DEPTH] = inside ? ((const int8_t *)p->codes)[row * p->k + col] : (int8_t)0;
        }
        for (int i = (int)threadIdx.x; i < DEPTH * LANES * TOKENS; i += THREADS) {
            int64_t m = token + i / DEPTH, d = depth + i % DEPTH;
            bool inside = m < p->m && d < p->k, outlier = marked >> i % DEPTH & 1;
            codes[i % DEPTH][i / DEPTH] =
                inside && !outlier ? ((const int8_t *)p->x_codes)[m * p->x_pitch + d] : (int8_t)0;
            outliers[i % DEPTH][i / DEPTH] =
                inside && outlier ? load_value(p->x, p->x_type, m * p->x_stride + d) : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < DEPTH; d++) {
            int code = w[d][o];
            for (int t = 0; t < TOKENS; t++) sum[t] += code * (int)codes[d][lane * TOKENS + t];
            if (marked >> d & 1)
                for (int t = 0; t < TOKENS; t++) outlier_sum[t] += outliers[d][lane * TOKENS + t] * (float)code;
        }
        __syncthreads();
    }
    if (first + o >= p->n) return;
    float scale = ((const float *)p->scales)[first + o] * (1.0f / 127.0f);
    float bias = BIAS_AT(p, first + o);
    for (int t = 0; t < TOKENS; t++) {
        int64_t m = token + lane * TOKENS + t;
        if (m >= p->m) continue;
        float value = int8_by_token((float)sum[t], p->row_absmax[m]) + outlier_sum[t];
        store_value(p->out, p->out_type, m * p->n + first + o, int8_by_row(value, scale, bias));
    }
}

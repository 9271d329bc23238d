/* Quantizers of bitsandbytes, whose blocks run over the flat array: NF4 and FP4, the 8-bit maps, and the mean that double
 * quantization takes off. The formulas are those of formats/fourbit.h and dynamic_map.h, to the bit.
 *
 * A block of values is read by as many lanes as have eight of them each, at most a warp, and read again for its codes. */
#include "quantize.h"
#include "source.cuh"

enum { THREADS = QL_QUANTIZE_THREADS };

/* A table that the threads read at different places: shared memory takes them all at once. */
static __device__ __forceinline__ void share_table(float *shared, const float *table, int count) {
    for (int i = (int)threadIdx.x; i < count; i += THREADS) shared[i] = table[i];
    __syncthreads();
}

/* The number of thresholds that x, in [-1, 1], is above. */
static __device__ __forceinline__ int thresholds_below(const ql_cell *cells, float x) {
    /* Adding 1.5 * 2^23 rounds to a whole number, which the low bits then are. */
    int place = (int)__float_as_uint(__fmaf_rn(x, 32.0f, 0x1.8p23f)) - 0x4b400000 + 32;
    ql_cell cell = cells[place];
    return cell.below + (x > cell.threshold);
}

/* NaN is above no threshold, as -1. */
static __device__ __forceinline__ int nf4_code(const ql_cell *cells, float x) {
    return thresholds_below(cells, fminf(fmaxf(x, -1.0f), 1.0f));
}

/* The patterns of ascending magnitudes are 0, 1, 6, 7, 4, 5, 2, 3. */
static __device__ __forceinline__ int fp4_code(const ql_cell *cells, float x) {
    float magnitude = x == x ? fminf(fabsf(x), 1.0f) : 0.0f;
    return (0x32547610 >> 4 * thresholds_below(cells, magnitude) & 15) | (x < 0.0f ? 8 : 0);
}

/* The bisection of dynamic_map.h. */
static __device__ __forceinline__ int map_code(const float *map, float x) {
    int pivot = 127, lower = 0, upper = 255;
#pragma unroll
    for (int step = 64; step > 0; step /= 2) {
        bool above = x > map[pivot];
        lower = above ? pivot : lower;
        upper = above ? upper : pivot;
        pivot += above ? step : -step;
    }
    if (x > map[pivot]) return x > __fmul_rn(__fadd_rn(map[upper], map[pivot]), 0.5f) ? upper : pivot;
    return x < __fmul_rn(__fadd_rn(map[lower], map[pivot]), 0.5f) ? lower : pivot;
}

/* The share that one lane has of a block of values: its first run, and where the block ends. */
typedef struct flat_share {
    int64_t begin, end;
    int lanes;
} flat_share;

static __device__ __forceinline__ flat_share share_of(const ql_flat_params *p, int64_t block, int lanes) {
    int64_t begin = block << p->shift, size = (int64_t)1 << p->shift;
    flat_share share = {begin + (int)threadIdx.x % lanes * QL_RUN, min(p->count, begin + size), lanes};
    return share;
}

static __device__ __forceinline__ float share_absmax(const ql_flat_params *p, const flat_share *share) {
    uint32_t most = 0;
    for (int64_t i = share->begin; i < share->end; i += share->lanes * QL_RUN) {
        float run[QL_RUN];
        load_run(run, p->in, p->type, p->vector, i, share->end);
        most = run_magnitude(most, run);
    }
    return __uint_as_float(lanes_max(most, share->lanes));
}

static __device__ __forceinline__ uint32_t four_bytes(const int *code) {
    return code[0] | code[1] << 8 | code[2] << 16 | (uint32_t)code[3] << 24;
}

/* Bytes of `code` at to, as many as there are before `end`. */
static __device__ __forceinline__ void store_bytes(uint8_t *to, int count, const uint8_t *end, const int *code) {
    if (to + count <= end) {
#pragma unroll
        for (int i = 0; i < count; i += 4) ((uint32_t *)to)[i / 4] = four_bytes(code + i);
    } else {
#pragma unroll
        for (int i = 0; i < count; i++)
            if (to + i < end) to[i] = (uint8_t)code[i];
    }
}

/* What a kernel encodes by, one of the two. */
typedef struct flat_code {
    const ql_cell *cells;
    const float *map;
} flat_code;

/* The codes of a run at value i. */
static __device__ __forceinline__ void encode_run(const ql_flat_params *p, flat_code by, int64_t i, const float *run,
                                                  float inverse) {
    uint8_t *out = (uint8_t *)p->out;
    int code[QL_RUN];
#pragma unroll
    for (int j = 0; j < QL_RUN; j++) {
        float x = __fmul_rn(run[j], inverse);
        code[j] = by.map ? map_code(by.map, x) : p->code == QL_FLAT_NF4 ? nf4_code(by.cells, x) : fp4_code(by.cells, x);
    }
    if (by.map) {
        store_bytes(out + i, QL_RUN, out + p->count, code);
        return;
    }
#pragma unroll
    for (int j = 0; j < QL_RUN / 2; j++) code[j] = code[2 * j] << 4 | code[2 * j + 1];
    store_bytes(out + i / 2, QL_RUN / 2, out + p->count / 2 + p->count % 2, code);
}

/* Lanes beyond the last block read and write nothing, but stay for the shuffles. */
static __device__ __forceinline__ void quantize(const ql_flat_params *p, flat_code by) {
    int lanes = lanes_of((int64_t)1 << p->shift), turn = THREADS / lanes, mine = (int)threadIdx.x / lanes;
    int64_t blocks = ((p->count - 1) >> p->shift) + 1;
    bool once = (int64_t)1 << p->shift <= lanes * QL_RUN; /* a lane has one run, which it keeps */
    for (int64_t first = (int64_t)blockIdx.x * turn; first < blocks; first += (int64_t)gridDim.x * turn) {
        flat_share share = share_of(p, first + mine, lanes);
        float run[QL_RUN], absmax;
        if (once) {
            load_run(run, p->in, p->type, p->vector, share.begin, share.end);
            absmax = __uint_as_float(lanes_max(run_magnitude(0, run), lanes));
            if (share.begin < share.end) encode_run(p, by, share.begin, run, __fdiv_rn(1.0f, absmax));
        } else {
            absmax = share_absmax(p, &share);
            float inverse = __fdiv_rn(1.0f, absmax);
            for (int64_t i = share.begin; i < share.end; i += lanes * QL_RUN) {
                load_run(run, p->in, p->type, p->vector, i, share.end);
                encode_run(p, by, i, run, inverse);
            }
        }
        if (first + mine < blocks && (int)threadIdx.x % lanes == 0) p->absmax[first + mine] = absmax;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_fourbit_quantize(const __grid_constant__ ql_flat_params p) {
    __shared__ ql_cell cells[QL_CELLS];
    for (int i = (int)threadIdx.x; i < QL_CELLS; i += THREADS) cells[i] = p.cells[i];
    __syncthreads();
    flat_code by = {cells, NULL};
    quantize(&p, by);
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_blockwise_quantize(const __grid_constant__ ql_flat_params p) {
    __shared__ float map[256];
    share_table(map, p.map, 256);
    flat_code by = {NULL, map};
    quantize(&p, by);
}

/* Eight values at element `i` of out, those at `end` and beyond left out. */
static __device__ __forceinline__ void store_run(void *out, int type, int64_t i, int64_t end, const float *run) {
    if (i + QL_RUN <= end && type != QL_VALUE_F32) {
        __align__(16) uint16_t halves[QL_RUN];
#pragma unroll
        for (int j = 0; j < QL_RUN; j++) store_value(halves, type, j, run[j]);
        *(uint4 *)((uint16_t *)out + i) = *(const uint4 *)halves;
    } else if (i + QL_RUN <= end) {
        float4 *to = (float4 *)((float *)out + i);
        to[0] = {run[0], run[1], run[2], run[3]};
        to[1] = {run[4], run[5], run[6], run[7]};
    } else {
#pragma unroll
        for (int j = 0; j < QL_RUN; j++)
            if (i + j < end) store_value(out, type, i + j, run[j]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_fourbit_dequantize(const __grid_constant__ ql_flat_params p) {
    __shared__ float code[16];
    share_table(code, p.device_table, 16);
    const uint8_t *packed = (const uint8_t *)p.in;
    int64_t bytes = p.count / 2 + p.count % 2;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * QL_RUN; i < p.count;
         i += (int64_t)gridDim.x * THREADS * QL_RUN) {
        float run[QL_RUN], absmax = p.absmax[i >> p.shift];
        uint32_t pairs = 0;
        if (p.vector && i / 2 + 4 <= bytes)
            pairs = *(const uint32_t *)(packed + i / 2);
        else
            for (int j = 0; j < 4; j++)
                if (i / 2 + j < bytes) pairs |= (uint32_t)packed[i / 2 + j] << 8 * j;
#pragma unroll
        for (int j = 0; j < QL_RUN; j++) run[j] = __fmul_rn(code[pairs >> (4 * j ^ 4) & 15], absmax);
        store_run(p.out, p.type, i, p.count, run);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    ql_blockwise_dequantize(const __grid_constant__ ql_flat_params p) {
    __shared__ float map[256];
    share_table(map, p.device_table, 256);
    const uint8_t *codes = (const uint8_t *)p.in;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * QL_RUN; i < p.count;
         i += (int64_t)gridDim.x * THREADS * QL_RUN) {
        float run[QL_RUN], absmax = p.absmax[i >> p.shift];
#pragma unroll
        for (int j = 0; j < QL_RUN; j++) run[j] = i + j < p.count ? __fmul_rn(map[codes[i + j]], absmax) : 0.0f;
        store_run(p.out, p.type, i, p.count, run);
    }
}

/* ---- the mean ---- */

/* The lanes' sums, folded in halves; for thread 0. */
static __device__ __forceinline__ double fold(double sum) {
    __shared__ double lane[QL_SUM_LANES];
    lane[threadIdx.x] = sum;
    for (int half = QL_SUM_LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) lane[threadIdx.x] = __dadd_rn(lane[threadIdx.x], lane[threadIdx.x + half]);
    }
    return lane[0];
}

extern "C" __global__ void __launch_bounds__(QL_SUM_LANES) ql_sum_chunks(const __grid_constant__ ql_mean_params p) {
    int64_t begin = (int64_t)blockIdx.x * QL_SUM_CHUNK, end = min(p.count, begin + QL_SUM_CHUNK);
    double sum = 0.0;
    for (int64_t i = begin + threadIdx.x; i < end; i += QL_SUM_LANES) sum = __dadd_rn(sum, (double)p.values[i]);
    sum = fold(sum);
    if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(QL_SUM_LANES) ql_mean(const __grid_constant__ ql_mean_params p) {
    int64_t chunks = p.count / QL_SUM_CHUNK + (p.count % QL_SUM_CHUNK != 0);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < chunks; i += QL_SUM_LANES) sum = __dadd_rn(sum, p.sums[i]);
    sum = fold(sum);
    if (threadIdx.x == 0) p.mean[0] = __double2float_rn(__ddiv_rn(sum, (double)p.count));
}

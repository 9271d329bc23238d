/* Quantizers with a scale a row: EETQ, LLM.int8() and FP8, and what EETQ's tiles and strided weights need. The formulas
 * are those of formats/eetq.h, int8.h and fp8.h, to the bit: nothing is fused, and divisions are IEEE's.
 *
 * A block has a row. Its threads hold it in registers from the absmax to the codes where it is not too long; else they read
 * it twice. */
#include "quantize.h"
#include "source.cuh"

/* ---- a row ---- */

enum { HELD = 4 }; /* runs of a thread */

/* Where the thread's run `i` begins. */
static __device__ __forceinline__ int64_t held_col(int i) { return ((int64_t)i * blockDim.x + threadIdx.x) * QL_RUN; }

/* Loads a row of a 16-bit type into held, zeros beyond its end; false where it does not fit. */
static __device__ __forceinline__ bool hold_row(uint4 *held, const ql_source *source, const void *from) {
    int64_t cols = source->cols;
    if (!source->vector || source->type == QL_VALUE_F32 || cols % QL_RUN || cols > (int64_t)HELD * blockDim.x * QL_RUN)
        return false;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        uint4 none = {0, 0, 0, 0};
        held[i] = held_col(i) < cols ? *(const uint4 *)((const uint16_t *)from + held_col(i)) : none;
    }
    return true;
}

/* The largest magnitude of what the thread holds, as magnitude_bits. */
static __device__ __forceinline__ uint32_t held_magnitude(const uint4 *held, int type) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        most = __vmaxu2(most, __vmaxu2(held[i].x & 0x7fff7fffu, held[i].y & 0x7fff7fffu));
        most = __vmaxu2(most, __vmaxu2(held[i].z & 0x7fff7fffu, held[i].w & 0x7fff7fffu));
    }
    return widened(max(most & 0xffffu, most >> 16), type);
}

/* That of the thread's part of a row that it reads. */
static __device__ __forceinline__ uint32_t row_magnitude(const ql_source *source, const void *from) {
    uint32_t most = 0;
    for (int64_t col = held_col(0); col < source->cols; col += (int64_t)blockDim.x * QL_RUN) {
        float run[QL_RUN];
        load_run(run, from, source->type, source->vector, col, source->cols);
        most = run_magnitude(most, run);
    }
    return most;
}

/* ---- EETQ ---- */

static __device__ __forceinline__ float eetq_scale(uint32_t most) {
    return most < INFINITY_BITS ? __fmul_rn(__uint_as_float(most), 1.0f / 128.0f) : __uint_as_float(0x7fc00000u);
}

/* Half away from zero, clamped; NaN (of 0 / 0) becomes 127. */
static __device__ __forceinline__ int eetq_code(float weight, float scale, float inverse) {
    int whole;
    if (round_quotient(&whole, weight, inverse)) return min(max(whole, -128), 127);
    float quotient = __fdiv_rn(weight, scale);
    quotient = quotient < 127.0f ? quotient : 127.0f;
    quotient = quotient > -128.0f ? quotient : -128.0f;
    whole = (int)quotient;
    float fraction = __fsub_rn(quotient, (float)whole);
    return whole + (fraction >= 0.5f) - (fraction <= -0.5f);
}

/* Four codes as bytes, the first lowest. */
static __device__ __forceinline__ uint32_t four_bytes(const int *code) {
    return (code[0] & 0xff) | (code[1] & 0xff) << 8 | (code[2] & 0xff) << 16 | (uint32_t)code[3] << 24;
}

/* Stores the codes of a run at `col` of a channel whose bytes begin at `to`; none from `cols` on, but the whole warp is
 * here. A thread's run is inputs 0 to 7 or 8 to 15 of 16, and neighbours exchange halves: the order in memory is 0, 8, 1, 9,
 * ... */
static __device__ __forceinline__ void store_eetq(uint8_t *to, int64_t col, int64_t cols, const float *run, float scale,
                                                  float inverse) {
    int code[QL_RUN];
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) code[i] = eetq_code(run[i], scale, inverse);
    uint32_t low = four_bytes(code) ^ 0x80808080u, high = four_bytes(code + 4) ^ 0x80808080u;
    bool odd = threadIdx.x & 1;
    uint32_t other = __shfl_xor_sync(ALL_LANES, odd ? low : high, 1);
    uint32_t first = odd ? other : low, second = odd ? high : other;
    uint2 bytes = {__byte_perm(first, second, 0x5140), __byte_perm(first, second, 0x7362)};
    if (col < cols) __stcs((uint2 *)(to + (col >> 6) * 128 + (col & 63)), bytes);
}

extern "C" __global__ void __launch_bounds__(QL_ROW_THREADS)
    ql_eetq_quantize(const __grid_constant__ ql_rows_params p) {
    int64_t cols = p.source.cols;
    for (int64_t row = blockIdx.x; row < p.source.rows; row += gridDim.x) {
        const void *from = row_of(&p.source, row);
        uint4 held[HELD];
        float run[QL_RUN];
        bool is_held = hold_row(held, &p.source, from);
        uint32_t most = is_held ? held_magnitude(held, p.source.type) : row_magnitude(&p.source, from);
        float scale = eetq_scale(block_max(most)), inverse = __fdiv_rn(1.0f, scale);
        uint8_t *to = (uint8_t *)p.codes + (row & ~(int64_t)1) * cols + (row & 1) * 64;
        if (threadIdx.x == 0) store_value(p.scales, p.scales_type, row, scale);
        if (is_held) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                unpack_run(run, held[i], p.source.type);
                store_eetq(to, held_col(i), cols, run, scale, inverse);
            }
            continue;
        }
        for (int64_t base = 0; base < cols; base += (int64_t)blockDim.x * QL_RUN) {
            load_run(run, from, p.source.type, p.source.vector, base + held_col(0), cols);
            store_eetq(to, base + held_col(0), cols, run, scale, inverse);
        }
    }
}

/* Codes [cols, rows] by the rows' absmax; tiles of 64 inputs by 64 channels. */
extern "C" __global__ void __launch_bounds__(QL_QUANTIZE_THREADS)
    ql_eetq_codes(const __grid_constant__ ql_rows_params p) {
    __shared__ int8_t tile[QL_EETQ_TILE_IN][QL_EETQ_TILE_OUT + 4];
    enum { LANES = QL_EETQ_TILE_IN / QL_RUN };
    int64_t rows = p.source.rows, cols = p.source.cols;
    int64_t first_row = (int64_t)blockIdx.y * QL_EETQ_TILE_OUT, first_col = (int64_t)blockIdx.x * QL_EETQ_TILE_IN;
    int64_t col = first_col + (int)threadIdx.x % LANES * QL_RUN;
    for (int r = (int)threadIdx.x / LANES; r < QL_EETQ_TILE_OUT; r += QL_QUANTIZE_THREADS / LANES) {
        if (first_row + r >= rows) break;
        float run[QL_RUN], scale = eetq_scale(magnitude_bits(p.row_absmax[first_row + r]));
        float inverse = __fdiv_rn(1.0f, scale);
        load_run(run, row_of(&p.source, first_row + r), p.source.type, p.source.vector, col, cols);
#pragma unroll
        for (int i = 0; i < QL_RUN; i++) tile[col - first_col + i][r] = (int8_t)eetq_code(run[i], scale, inverse);
        if (first_col == 0 && threadIdx.x % LANES == 0) store_value(p.scales, p.scales_type, first_row + r, scale);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < QL_EETQ_TILE_IN * QL_EETQ_TILE_OUT; i += QL_QUANTIZE_THREADS) {
        int k = i / QL_EETQ_TILE_OUT, n = i % QL_EETQ_TILE_OUT;
        if (first_col + k < cols && first_row + n < rows)
            ((int8_t *)p.codes)[(first_col + k) * rows + first_row + n] = tile[k][n];
    }
}

/* Byte `at` of the 128 that a pair of channels has in a tile: its input, and which channel of the pair. */
static __device__ __forceinline__ int input_of(int at) { return (at & 48) + (at >> 1 & 7) + 8 * (at & 1); }

enum { RETILE_BYTES = QL_EETQ_TILE_IN * QL_EETQ_TILE_OUT };

extern "C" __global__ void __launch_bounds__(QL_QUANTIZE_THREADS)
    ql_eetq_pack(const __grid_constant__ ql_retile_params p) {
    __shared__ uint8_t tile[QL_EETQ_TILE_IN][QL_EETQ_TILE_OUT + 4];
    int64_t first_in = (int64_t)blockIdx.x * QL_EETQ_TILE_IN, first_out = (int64_t)blockIdx.y * QL_EETQ_TILE_OUT;
    for (int i = (int)threadIdx.x; i < RETILE_BYTES; i += QL_QUANTIZE_THREADS) {
        int k = i / QL_EETQ_TILE_OUT, n = i % QL_EETQ_TILE_OUT;
        if (first_out + n < p.out_features)
            tile[k][n] = p.from[(first_in + k) * p.in_stride + (first_out + n) * p.out_stride] ^ 0x80u;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < RETILE_BYTES; i += QL_QUANTIZE_THREADS) {
        int pair = i / 128, at = i % 128, n = 2 * pair + at / 64;
        if (first_out + n < p.out_features)
            p.out[(first_out / 2 + pair) * 2 * p.in_features + first_in * 2 + at] = tile[input_of(at)][n];
    }
}

extern "C" __global__ void __launch_bounds__(QL_QUANTIZE_THREADS)
    ql_eetq_unpack(const __grid_constant__ ql_retile_params p) {
    __shared__ uint8_t tile[QL_EETQ_TILE_IN][QL_EETQ_TILE_OUT + 4];
    int64_t first_in = (int64_t)blockIdx.x * QL_EETQ_TILE_IN, first_out = (int64_t)blockIdx.y * QL_EETQ_TILE_OUT;
    for (int i = (int)threadIdx.x; i < RETILE_BYTES; i += QL_QUANTIZE_THREADS) {
        int pair = i / 128, at = i % 128, n = 2 * pair + at / 64;
        if (first_out + n < p.out_features)
            tile[input_of(at)][n] = p.from[(first_out / 2 + pair) * 2 * p.in_features + first_in * 2 + at] ^ 0x80u;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < RETILE_BYTES; i += QL_QUANTIZE_THREADS) {
        int k = i / QL_EETQ_TILE_OUT, n = i % QL_EETQ_TILE_OUT;
        if (first_out + n < p.out_features) p.out[(first_in + k) * p.out_features + first_out + n] = tile[k][n];
    }
}

/* ---- LLM.int8() ---- */

/* Eight bytes at codes[col], those at `end` and beyond left out. */
static __device__ __forceinline__ void store_bytes(uint8_t *codes, bool vector, int64_t col, int64_t end,
                                                   const int *code) {
    if (vector && col + QL_RUN <= end) {
        uint2 bytes = {four_bytes(code), four_bytes(code + 4)};
        __stcs((uint2 *)(codes + col), bytes);
        return;
    }
#pragma unroll
    for (int i = 0; i < QL_RUN; i++)
        if (col + i < end) codes[col + i] = (uint8_t)code[i];
}

/* What decides the codes of a row. */
typedef struct int8_row {
    uint32_t limit; /* magnitudes from here to infinity are outliers */
    float lift, factor;
    bool zero; /* every code is 0 */
} int8_row;

static __device__ __forceinline__ void store_int8(const ql_rows_params *p, uint8_t *codes, int64_t col,
                                                  const float *run, int8_row by) {
    int64_t cols = p->source.cols;
    int code[QL_RUN];
    /* Adding 1.5 * 2^23 leaves the sum's last place at 1: the addition itself rounds half to even. */
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) {
        float shifted = __fadd_rn(__fmul_rn(__fmul_rn(run[i], by.lift), by.factor), 0x1.8p23f);
        code[i] = by.zero ? 0 : (int)__float_as_uint(shifted) - 0x4b400000;
    }
    if (p->threshold > 0.0f)
#pragma unroll
        for (int i = 0; i < QL_RUN; i++)
            if (is_outlier(magnitude_bits(run[i]), by.limit) || (p->outliers && col + i < cols && p->outliers[col + i]))
                code[i] = 0;
    store_bytes(codes, cols % QL_RUN == 0, col, cols, code);
}

/* The thread's part of a row without its outliers. */
static __device__ __forceinline__ uint32_t inlier_magnitude(const ql_source *source, const void *from, uint32_t limit) {
    uint32_t most = 0;
    for (int64_t col = held_col(0); col < source->cols; col += (int64_t)blockDim.x * QL_RUN) {
        float run[QL_RUN];
        load_run(run, from, source->type, source->vector, col, source->cols);
#pragma unroll
        for (int i = 0; i < QL_RUN; i++) {
            uint32_t magnitude = magnitude_bits(run[i]);
            most = max(most, is_outlier(magnitude, limit) ? 0 : magnitude);
        }
    }
    return most;
}

extern "C" __global__ void __launch_bounds__(QL_ROW_THREADS)
    ql_int8_quantize(const __grid_constant__ ql_rows_params p) {
    int64_t cols = p.source.cols;
    uint32_t limit = __float_as_uint(p.threshold);
    for (int64_t row = blockIdx.x; row < p.source.rows; row += gridDim.x) {
        const void *from = row_of(&p.source, row);
        uint4 held[HELD];
        float run[QL_RUN];
        bool is_held = hold_row(held, &p.source, from);
        uint32_t most = p.threshold > 0.0f ? inlier_magnitude(&p.source, from, limit)
                        : is_held          ? held_magnitude(held, p.source.type)
                                           : row_magnitude(&p.source, from);
        most = block_max(most);
        float absmax = __uint_as_float(most), lift = absmax < 0x1p-100f ? 0x1p100f : 1.0f;
        int8_row by = {limit, lift, __fdiv_rn(127.0f, __fmul_rn(absmax, lift)), most == 0 || most >= INFINITY_BITS};
        uint8_t *codes = (uint8_t *)p.codes + row * cols;
        if (threadIdx.x == 0) ((float *)p.scales)[row] = absmax;
        if (is_held) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                unpack_run(run, held[i], p.source.type);
                if (held_col(i) < cols) store_int8(&p, codes, held_col(i), run, by);
            }
            continue;
        }
        for (int64_t col = held_col(0); col < cols; col += (int64_t)blockDim.x * QL_RUN) {
            load_run(run, from, p.source.type, p.source.vector, col, cols);
            store_int8(&p, codes, col, run, by);
        }
    }
}

extern "C" __global__ void __launch_bounds__(QL_ROW_THREADS)
    ql_list_columns(const __grid_constant__ ql_columns_params p) {
    __shared__ int counts[QL_ROW_THREADS / 32];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int64_t found = 0;
    for (int64_t base = 0; base < p.count; base += QL_ROW_THREADS) {
        int64_t col = base + threadIdx.x;
        bool set = col < p.count && p.flags[col];
        uint32_t votes = __ballot_sync(ALL_LANES, set);
        __syncthreads();
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        int before = __popc(votes & ((1u << lane) - 1)), all = 0;
        for (int i = 0; i < QL_ROW_THREADS / 32; i++) {
            if (i < warp) before += counts[i];
            all += counts[i];
        }
        if (set) p.columns[found + before] = col;
        found += all;
    }
}

/* ---- FP8 ---- */

/* Codes of a run by x * inverse or x / scale, as formats/fp8.h decides; a scale of 0 gives 0. */
static __device__ __forceinline__ void encode_e4m3(int *code, const float *run, float scale, bool reciprocal) {
    float inverse = __fdiv_rn(1.0f, scale);
    bool multiply = scale == 0.0f || (reciprocal && fabsf(inverse) < __uint_as_float(INFINITY_BITS));
    float factor = scale == 0.0f ? 0.0f : inverse;
#pragma unroll
    for (int i = 0; i < QL_RUN; i++)
        code[i] = e4m3_from_value(multiply ? __fmul_rn(run[i], factor) : __fdiv_rn(run[i], scale));
}

/* The scale of all rows. */
static __device__ __forceinline__ float fp8_scale_of_all(const ql_rows_params *p) {
    if (p->mode == QL_ROW_STATIC) return p->given_scale ? load_value(p->given_scale, p->given_type, 0) : p->given;
    uint32_t most = 0;
    for (int64_t row = threadIdx.x; row < p->source.rows; row += blockDim.x)
        most = max(most, magnitude_bits(p->row_absmax[row]));
    return e4m3_scale(__uint_as_float(block_max(most)));
}

/* The scale of a row of this absmax. */
static __device__ __forceinline__ float fp8_scale_of_row(const ql_rows_params *p, float absmax) {
    float bound = p->upper_bound ? load_value(p->upper_bound, p->bound_type, 0) : p->bound;
    float scale = __fdiv_rn(absmax > bound ? bound : absmax, 448.0f);
    return scale < p->least_scale ? p->least_scale : scale;
}

extern "C" __global__ void __launch_bounds__(QL_ROW_THREADS) ql_fp8_quantize(const __grid_constant__ ql_rows_params p) {
    int64_t cols = p.source.cols;
    bool by_token = p.mode == QL_ROW_TOKEN;
    float scale = by_token ? 1.0f : fp8_scale_of_all(&p);
    if (!by_token && blockIdx.x == 0 && threadIdx.x == 0) ((float *)p.scales)[0] = scale;
    for (int64_t row = blockIdx.x; row < p.source.rows; row += gridDim.x) {
        const void *from = row_of(&p.source, row);
        uint4 held[HELD];
        float run[QL_RUN];
        int code[QL_RUN];
        bool is_held = hold_row(held, &p.source, from);
        if (by_token) {
            uint32_t most = is_held ? held_magnitude(held, p.source.type) : row_magnitude(&p.source, from);
            scale = fp8_scale_of_row(&p, __uint_as_float(block_max(most)));
            if (threadIdx.x == 0) ((float *)p.scales)[row] = scale;
        }
        uint8_t *codes = (uint8_t *)p.codes + row * cols;
        if (is_held) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                unpack_run(run, held[i], p.source.type);
                encode_e4m3(code, run, scale, !by_token);
                if (held_col(i) < cols) store_bytes(codes, true, held_col(i), cols, code);
            }
            continue;
        }
        for (int64_t col = held_col(0); col < cols; col += (int64_t)blockDim.x * QL_RUN) {
            load_run(run, from, p.source.type, p.source.vector, col, cols);
            encode_e4m3(code, run, scale, !by_token);
            store_bytes(codes, cols % QL_RUN == 0, col, cols, code);
        }
    }
}

enum { BLOCK_LANES = QL_SCALED_BLOCK / QL_RUN };

/* A group of 128 columns for each 16 threads. */
extern "C" __global__ void __launch_bounds__(QL_QUANTIZE_THREADS)
    ql_fp8_groups(const __grid_constant__ ql_scaled_blocks_params p) {
    int64_t cols = p.source.cols, across = (cols + QL_SCALED_BLOCK - 1) / QL_SCALED_BLOCK;
    int64_t groups = p.source.rows * across, step = (int64_t)gridDim.x * (QL_QUANTIZE_THREADS / BLOCK_LANES);
    int64_t first = (int64_t)blockIdx.x * (QL_QUANTIZE_THREADS / BLOCK_LANES);
    /* The warp stays together to the last shuffle: lanes beyond the last group read nothing. */
    for (; first < groups; first += step) {
        int64_t group = first + (int)threadIdx.x / BLOCK_LANES, row = group / across;
        int64_t col = group % across * QL_SCALED_BLOCK + (int)threadIdx.x % BLOCK_LANES * QL_RUN;
        bool inside = group < groups;
        float run[QL_RUN] = {0};
        int code[QL_RUN];
        if (inside) load_run(run, row_of(&p.source, row), p.source.type, p.source.vector, col, cols);
        float scale = e4m3_scale(__uint_as_float(lanes_max(run_magnitude(0, run), BLOCK_LANES)));
        if (!inside) continue;
        encode_e4m3(code, run, scale, false);
        store_bytes(p.codes + row * cols, cols % QL_RUN == 0, col, cols, code);
        if (threadIdx.x % BLOCK_LANES == 0) p.scales[group] = scale;
    }
}

/* Blocks of 128 by 128, one a block of threads. */
extern "C" __global__ void __launch_bounds__(QL_TILE_THREADS)
    ql_fp8_blocks(const __grid_constant__ ql_scaled_blocks_params p) {
    int64_t rows = p.source.rows, cols = p.source.cols;
    int64_t first = (int64_t)blockIdx.y * QL_SCALED_BLOCK + (int)threadIdx.x / BLOCK_LANES;
    int64_t last = min(rows, ((int64_t)blockIdx.y + 1) * QL_SCALED_BLOCK);
    int64_t col = (int64_t)blockIdx.x * QL_SCALED_BLOCK + (int)threadIdx.x % BLOCK_LANES * QL_RUN;
    float run[QL_RUN];
    int code[QL_RUN];
    uint32_t most = 0;
    for (int64_t row = first; row < last; row += QL_TILE_THREADS / BLOCK_LANES) {
        load_run(run, row_of(&p.source, row), p.source.type, p.source.vector, col, cols);
        most = run_magnitude(most, run);
    }
    float scale = e4m3_scale(__uint_as_float(block_max(most)));
    for (int64_t row = first; row < last; row += QL_TILE_THREADS / BLOCK_LANES) {
        load_run(run, row_of(&p.source, row), p.source.type, p.source.vector, col, cols);
        encode_e4m3(code, run, scale, false);
        store_bytes(p.codes + row * cols, cols % QL_RUN == 0, col, cols, code);
    }
    if (threadIdx.x == 0) p.scales[(int64_t)blockIdx.y * gridDim.x + blockIdx.x] = scale;
}

/* ---- a weight that lies transposed ---- */

extern "C" __global__ void __launch_bounds__(QL_QUANTIZE_THREADS)
    ql_transpose(const __grid_constant__ ql_transpose_params p) {
    __shared__ uint32_t tile[QL_TRANSPOSE_TILE][QL_TRANSPOSE_TILE + 1];
    int64_t first_row = (int64_t)blockIdx.x * QL_TRANSPOSE_TILE, first_col = (int64_t)blockIdx.y * QL_TRANSPOSE_TILE;
    int fast = (int)threadIdx.x % QL_TRANSPOSE_TILE, slow = (int)threadIdx.x / QL_TRANSPOSE_TILE;
    for (int i = slow; i < QL_TRANSPOSE_TILE; i += QL_QUANTIZE_THREADS / QL_TRANSPOSE_TILE) {
        int64_t row = first_row + fast, col = first_col + i, at = row + col * p.col_stride;
        if (row < p.rows && col < p.cols)
            tile[i][fast] = p.size == 2 ? ((const uint16_t *)p.from)[at] : ((const uint32_t *)p.from)[at];
    }
    __syncthreads();
    for (int i = slow; i < QL_TRANSPOSE_TILE; i += QL_QUANTIZE_THREADS / QL_TRANSPOSE_TILE) {
        int64_t row = first_row + i, col = first_col + fast;
        if (row >= p.rows || col >= p.cols) continue;
        if (p.size == 2)
            ((uint16_t *)p.out)[row * p.cols + col] = (uint16_t)tile[fast][i];
        else
            ((uint32_t *)p.out)[row * p.cols + col] = tile[fast][i];
    }
}

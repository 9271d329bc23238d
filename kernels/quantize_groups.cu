/* Quantizers and packers with parameters by groups of columns: GPTQ and AWQ. The formulas are those of formats/gptq.h and
 * awq.h, to the bit, and so are the layouts. */
#include "quantize.h"
#include "source.cuh"
#include "stream.cuh"

enum { THREADS = QL_QUANTIZE_THREADS };

/* ---- parameters ---- */

/* The lesser, and the greater, of two; a NaN in either gives NaN. */
static __device__ __forceinline__ float lesser(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

static __device__ __forceinline__ float greater(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

static __device__ __forceinline__ float code_from_value(float rounded, float largest) {
    return !(rounded > 0.0f) ? 0.0f : rounded < largest ? rounded : largest;
}

/* As many lanes a group of columns as have a run of it each, at most a warp. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_find_group_params(const __grid_constant__ ql_group_params p) {
    int lanes = lanes_of(p.group_size);
    int64_t turn = THREADS / lanes, entries = p.source.rows * p.groups, cols = p.source.cols;
    for (int64_t first = blockIdx.x * turn; first < entries; first += gridDim.x * turn) {
        int64_t entry = first + (int)threadIdx.x / lanes;
        int64_t row = divide(entry, p.groups), begin = (entry - row * p.groups) * p.group_size;
        int64_t end = entry < entries ? min(cols, begin + p.group_size) : 0;
        const void *from = row_of(&p.source, row);
        /* GPTQ's range includes 0, AWQ's does not; a lane without columns has the first one. */
        float low = p.rule == QL_RULE_AWQ && begin < end ? load_value(from, p.source.type, begin) : 0.0f, high = low;
        for (int64_t col = begin + (int)threadIdx.x % lanes * QL_RUN; col < end; col += lanes * QL_RUN) {
            float run[QL_RUN];
            load_run(run, from, p.source.type, p.source.vector, col, end);
            /* What is missing of a run is zeros, which are in GPTQ's range anyway. */
            if (p.rule == QL_RULE_AWQ && col + QL_RUN > end)
                for (int i = 1; i < QL_RUN; i++) run[i] = col + i < end ? run[i] : run[0];
#pragma unroll
            for (int i = 0; i < QL_RUN; i++) {
                low = lesser(low, run[i]);
                high = greater(high, run[i]);
            }
        }
        for (int step = lanes / 2; step > 0; step /= 2) {
            low = lesser(low, __shfl_xor_sync(ALL_LANES, low, step));
            high = greater(high, __shfl_xor_sync(ALL_LANES, high, step));
        }
        if (entry >= entries || (int)threadIdx.x % lanes) continue;
        low = __fadd_rn(low, 0.0f); /* the least of 0 and -0 is -0 here, and 0 in the format's own order */
        float scale, zero;
        if (p.rule == QL_RULE_AWQ) {
            float range = __fsub_rn(high, low);
            scale = __fdiv_rn(range < 1e-5f ? 1e-5f : range, p.largest);
            zero = code_from_value(-rintf(__fdiv_rn(low, scale)), p.largest);
        } else {
            bool symmetric = p.rule == QL_RULE_GPTQ_SYMMETRIC;
            if (symmetric) {
                if (-low > high) high = -low;
                if (low < 0.0f) low = -high;
            }
            if (low == 0.0f && high == 0.0f) {
                low = -1.0f;
                high = 1.0f;
            }
            scale = __fdiv_rn(__fsub_rn(high, low), p.largest);
            zero = symmetric ? (p.largest + 1.0f) / 2.0f : rintf(__fdiv_rn(-low, scale));
        }
        p.scales[entry] = scale;
        p.zeros[entry] = zero;
    }
}

/* ---- codes ---- */

static __device__ __forceinline__ int64_t group_of(const ql_encode_params *p, int64_t col) {
    if (!p->index) return divide(col, p->group_size);
    int64_t at = col * p->index_stride;
    int64_t group = p->index_wide ? ((const int64_t *)p->index)[at] : ((const int32_t *)p->index)[at];
    return group < 0 ? group + p->groups : group;
}

static __device__ __forceinline__ float stored(float scale) { return __half2float(__float2half_rn(scale)); }

/* Codes of a run of one row: round_half_even((w + zero * scale) / fp16(scale)), clamped. */
static __device__ __forceinline__ void encode_run(uint8_t *code, const ql_encode_params *p, int64_t row, int64_t col,
                                                  int64_t end) {
    float run[QL_RUN], largest = (float)((1 << p->bits) - 1), scale_zero = 0.0f, scale = 1.0f, inverse = 1.0f;
    int64_t group = -1;
    load_run(run, row_of(&p->source, row), p->source.type, p->source.vector, col, end);
#pragma unroll
    for (int i = 0; i < QL_RUN; i++) {
        if (col + i >= end) {
            code[i] = 0;
            continue;
        }
        /* Runs begin at multiples of 8, so where groups do as well, a run has one. */
        if (i == 0 || p->index || p->group_size % QL_RUN) {
            int64_t here = group_of(p, col + i);
            if (here != group) {
                group = here;
                float given = load_strided(&p->scales, row, group);
                float zero = code_from_value(rintf(load_strided(&p->zeros, row, group)), largest);
                scale_zero = __fmul_rn(zero, given);
                scale = stored(given);
                inverse = __fdiv_rn(1.0f, scale);
            }
        }
        float shifted = __fadd_rn(run[i], scale_zero);
        int whole;
        code[i] = round_quotient(&whole, shifted, inverse)
                      ? (uint8_t)min(max(whole, 0), (int)largest)
                      : (uint8_t)code_from_value(rintf(__fdiv_rn(shifted, scale)), largest);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_group_encode(const __grid_constant__ ql_encode_params p) {
    enum { LANES = QL_ENCODE_COLS / QL_RUN };
    /* A pitch of 33 words keeps the rows' chunks in different banks. */
    __shared__ __align__(4) uint8_t tile[QL_ENCODE_ROWS][QL_ENCODE_COLS + 4];
    int64_t rows = p.source.rows, cols = p.source.cols;
    int64_t first_row = (int64_t)blockIdx.x * QL_ENCODE_ROWS, first_col = (int64_t)blockIdx.y * QL_ENCODE_COLS;
    int lane = (int)threadIdx.x % LANES;
    for (int r = (int)threadIdx.x / LANES; r < QL_ENCODE_ROWS; r += THREADS / LANES) {
        uint8_t code[QL_RUN] = {0};
        if (first_row + r < rows) encode_run(code, &p, first_row + r, first_col + lane * QL_RUN, cols);
        uint32_t *to = (uint32_t *)&tile[r][lane * QL_RUN];
        to[0] = code[0] | code[1] << 8 | code[2] << 16 | (uint32_t)code[3] << 24;
        to[1] = code[4] | code[5] << 8 | code[6] << 16 | (uint32_t)code[7] << 24;
    }
    __syncthreads();
    if (p.layout == QL_WORDS_GPTQ) {
        int r = (int)threadIdx.x % QL_ENCODE_ROWS, c = (int)threadIdx.x / QL_ENCODE_ROWS;
        int64_t chunk = first_col / CHUNK + c, left = cols - chunk * CHUNK;
        if (first_row + r >= rows || left <= 0) return;
        uint32_t four[CHUNK / 4];
#pragma unroll
        for (int i = 0; i < CHUNK / 4; i++) four[i] = *(const uint32_t *)&tile[r][c * CHUNK + 4 * i];
        store_chunk(p.words + chunk * p.bits * rows + first_row + r, rows, four, p.bits, chunk_words(left, p.bits));
        return;
    }
    enum { WORDS = QL_ENCODE_ROWS / 8 };
    int64_t words = rows / 8 + (rows % 8 != 0);
    for (int i = (int)threadIdx.x; i < WORDS * QL_ENCODE_COLS; i += THREADS) {
        int w = i % WORDS, c = i / WORDS;
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) word |= (uint32_t)tile[8 * w + j][c] << awq_shift(j);
        if (first_col + c < cols && first_row / 8 + w < words)
            p.words[(first_col + c) * words + first_row / 8 + w] = (int32_t)word;
    }
}

/* The zeros as they are stored, and the scales in fp16: a thread a group and 32 rows. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_group_store(const __grid_constant__ ql_encode_params p) {
    int64_t rows = p.source.rows, chunks = rows / CHUNK + (rows % CHUNK != 0);
    uint32_t mask = (1u << p.bits) - 1;
    int64_t words = p.layout == QL_WORDS_AWQ ? rows / 8 + (rows % 8 != 0)
                                             : rows / CHUNK * p.bits + chunk_words(rows % CHUNK, p.bits);
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < chunks * p.groups;
         i += (int64_t)gridDim.x * THREADS) {
        /* Neighbours have neighbouring groups: those lie side by side in what is read. */
        int64_t chunk = divide(i, p.groups), group = i - chunk * p.groups, first = chunk * CHUNK;
        uint32_t four[CHUNK / 4] = {0};
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            if (first + j >= rows) continue;
            float zero = code_from_value(rintf(load_strided(&p.zeros, first + j, group)), (float)mask);
            four[j / 4] |= (((uint32_t)zero - (uint32_t)p.zero_offset) & mask) << 8 * (j % 4);
            ((__half *)p.stored_scales)[group * rows + first + j] =
                __float2half_rn(load_strided(&p.scales, first + j, group));
        }
        if (p.layout == QL_WORDS_GPTQ) {
            store_chunk(p.zero_words + group * words + chunk * p.bits, 1, four, p.bits,
                        chunk_words(rows - first, p.bits));
            continue;
        }
#pragma unroll
        for (int w = 0; w < CHUNK / 8; w++) {
            uint32_t word = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) word |= (four[2 * w + j / 4] >> 8 * (j % 4) & 15) << awq_shift(j);
            if (chunk * 4 + w < words) p.zero_words[group * words + chunk * 4 + w] = (int32_t)word;
        }
    }
}

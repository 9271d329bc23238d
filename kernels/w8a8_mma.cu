/* Products of any number of tokens with 8-bit weights and 8-bit activations on mma.sync, for GPUs that have no wgmma:
 * 128 rows of the weight by 64 tokens a block, K in steps of 128 columns through a ring of stages in shared memory.
 *
 * e4m3 is multiplied as it is from compute capability 8.9 on, and becomes fp16, exactly, on GPUs before that. The sums
 * of a step are added in fp32, whether or not that was asked for. Outliers come in fp32 at the end, from x less what
 * their codes gave.
 *
 * Grid: ceil(n / QL_W8A8_MMA_ROWS) by ceil(m / QL_W8A8_MMA_TOKENS). */
#include "int8_output.cuh"
#include "variants.h"
#include "w8a8_activation.cuh"
#include "w8a8_mma.h"
#include "w8a8_pieces.cuh"

enum {
    ROWS = QL_W8A8_MMA_ROWS,
    TOKENS = QL_W8A8_MMA_TOKENS,
    STEP = QL_W8A8_GROUP,
    STAGES = QL_W8A8_MMA_STAGES,
    THREADS = QL_W8A8_MMA_THREADS,
    STAGE_BYTES = QL_W8A8_MMA_STAGE_BYTES,
    /* Of a warp, in tiles of 16 rows by 8 tokens: four warps share the rows, two the tokens. */
    ROW_TILES = ROWS / 4 / 16,
    TOKEN_TILES = TOKENS / 2 / 8,
    LISTED = 1024 /* columns of the mask that are looked through at a time */
};

extern __shared__ __align__(128) uint8_t shared[];

/* Columns [step * STEP, ...) of the block's rows and tokens; of rows that are not there, the last one's. */
static __device__ __forceinline__ void load_stage(const ql_w8a8_params *p, uint32_t to, int64_t row, int64_t token,
                                                  int64_t step) {
    for (int i = (int)threadIdx.x; i < (ROWS + TOKENS) * (STEP / 16); i += THREADS) {
        const int line = i / (STEP / 16), piece = i % (STEP / 16);
        const int64_t col = step * STEP + piece * 16;
        if (line < ROWS) {
            const int64_t at = min(row + line, p->n - 1) * p->row_stride + col;
            cp_async_16(to + piece_at(line, piece), p->codes + (col < p->k ? at : 0), col < p->k ? 16 : 0);
        } else {
            const int64_t at = min(token + line - ROWS, p->m - 1) * p->x_pitch + col;
            cp_async_16(to + piece_at(line, piece), p->x_codes + at, 16);
        }
    }
}

/* sum += 16 rows by 8 tokens over 32 columns: two words of each of two rows, as mma takes them, and of a token. */
static __device__ __forceinline__ void multiply_e4m3(float sum[4], const uint32_t w[4], const uint32_t x[2]) {
#if __CUDA_ARCH__ >= 890
    multiply_16832_e4m3(sum, w, x);
#else
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t a[4];
        operand_of_e4m3(a, w[2 * i], w[2 * i + 1]);
        const uint32_t b[2] = {half2_of_e4m3(x[i] & 0xffffu), half2_of_e4m3(x[i] >> 16)};
        multiply_16816(sum, a, b, QL_VALUE_F16);
    }
#endif
}

/* What a lane has of the block's outputs: entry i of a tile is row lane / 4 + i / 2 * 8, token lane % 4 * 2 + i % 2. */
typedef struct ql_outputs {
    float value[ROW_TILES][TOKEN_TILES][4];
} ql_outputs;

typedef struct ql_place {
    int row, token; /* in the block, of the lane's first entry */
} ql_place;

static __device__ __forceinline__ ql_place place_of_lane(void) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    return (ql_place){warp % 4 * (ROWS / 4) + lane / 4, warp / 4 * (TOKENS / 2) + lane % 4 * 2};
}

/* What a lane multiplies of half a stage, 64 columns: pieces of its rows and tokens. */
typedef struct ql_fragments {
    uint4 w[ROW_TILES][2], x[TOKEN_TILES];
} ql_fragments;

static __device__ __forceinline__ uint4 piece_of(uint32_t stage, int line, int half) {
    return *(const uint4 *)(shared + stage + piece_at(line, half * 4 + (int)threadIdx.x % 4));
}

static __device__ __forceinline__ void load_fragments(ql_fragments *f, uint32_t stage, int half) {
    const int row = (int)threadIdx.x / 32 % 4 * (ROWS / 4) + (int)threadIdx.x % 32 / 4;
    const int token = ROWS + (int)threadIdx.x / 128 * (TOKENS / 2) + (int)threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
        f->w[i][0] = piece_of(stage, row + i * 16, half);
        f->w[i][1] = piece_of(stage, row + i * 16 + 8, half);
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; j++) f->x[j] = piece_of(stage, token + j * 8, half);
}

/* out += the sums of a step, by the scales of its group, of which there may be one. */
static __device__ __forceinline__ void add_step(ql_outputs *out, const float sums[ROW_TILES][TOKEN_TILES][4],
                                                const ql_w8a8_params *p, bool groups, int64_t row, int64_t token,
                                                int64_t step) {
    float by_row[ROW_TILES][2], by_token[TOKEN_TILES][2];
#pragma unroll
    for (int i = 0; groups && i < ROW_TILES * 2; i++) {
        const int64_t at = min(row + i / 2 * 16 + i % 2 * 8, p->n - 1);
        by_row[i / 2][i % 2] = p->w_scales[divide(at, p->w_rows) * p->w_row_stride + step * p->w_group_stride];
    }
#pragma unroll
    for (int i = 0; groups && i < TOKEN_TILES * 2; i++) {
        const int64_t at = min(token + i / 2 * 8 + i % 2, p->m - 1);
        by_token[i / 2][i % 2] = p->x_scales[at * p->x_token_stride + step * p->x_group_stride];
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out->value[i][j][e] += groups ? sums[i][j][e] * (by_token[j][e % 2] * by_row[i][e / 2]) : sums[i][j][e];
}

/* What scales everything: x's, and the row's, or for int8 a 127th of its absmax. */
static __device__ __forceinline__ float row_scale_at(const ql_w8a8_params *p, int code, int64_t row) {
    const float scale = p->w_scales[divide(row, p->w_rows) * p->w_row_stride];
    return code == QL_W8A8_INT8 ? scale * (1.0f / 127.0f) : scale;
}

/* ---- outliers ---- */

/* The marked ones of LISTED columns from `first` on into list, ascending; how many. The whole block is here. */
static __device__ __forceinline__ int list_columns(int *list, int *count, const ql_w8a8_params *p, int64_t first) {
    const int lane = (int)threadIdx.x % 32;
    __syncthreads();
    if (threadIdx.x < 32) {
        const int64_t word = first / 32 + lane;
        uint32_t bits = word < p->x_pitch / 32 ? p->outliers[word] : 0;
        int before = __popc(bits);
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, before, step);
            if (lane >= step) before += other;
        }
        if (lane == 31) *count = before;
        before -= __popc(bits);
        for (; bits; bits &= bits - 1) list[before++] = (int)first + lane * 32 + __ffs((int)bits) - 1;
    }
    __syncthreads();
    return *count;
}

/* out = sum over the marked columns of (x - code * absmax / 127) * weight code. */
static __device__ __forceinline__ void multiply_outliers(ql_outputs *out, const ql_w8a8_params *p, int64_t row,
                                                         int64_t token) {
    enum { PIECE = 32 };
    int *list = (int *)shared, *count = list + LISTED;
    float *x = (float *)(count + 32), *w = x + PIECE * TOKENS;
    const ql_place place = place_of_lane();
    for (int64_t first = 0; first < p->k; first += LISTED) {
        const int listed = list_columns(list, count, p, first);
        for (int begin = 0; begin < listed; begin += PIECE) {
            const int columns = min(listed - begin, (int)PIECE);
            __syncthreads();
            for (int i = (int)threadIdx.x; i < columns * TOKENS; i += THREADS) {
                const int64_t at = min(token + i % TOKENS, p->m - 1), col = list[begin + i / TOKENS];
                const float code = (float)(int8_t)p->x_codes[at * p->x_pitch + col];
                x[i] = load_value(p->x, p->x_type, at * p->x_stride + col) - code * (p->x_scales[at] * (1.0f / 127.0f));
            }
            for (int i = (int)threadIdx.x; i < columns * ROWS; i += THREADS) {
                const int64_t at = min(row + i % ROWS, p->n - 1), col = list[begin + i / ROWS];
                w[i] = (float)(int8_t)p->codes[at * p->row_stride + col];
            }
            __syncthreads();
            for (int c = 0; c < columns; c++)
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            out->value[i][j][e] += x[c * TOKENS + place.token + j * 8 + e % 2] *
                                                   w[c * ROWS + place.row + i * 16 + e / 2 * 8];
        }
    }
}

/* ---- the kernel ---- */

/* row, token: of the lane's first entry. whole: the sums of int8, to which `out` has the outliers. */
static __device__ __forceinline__ void store_outputs(const ql_w8a8_params *p, const ql_outputs *out,
                                                     const int32_t whole[ROW_TILES][TOKEN_TILES][4], int code,
                                                     bool groups, int64_t row, int64_t token) {
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; i++) {
        const int64_t r = row + i / 2 * 16 + i % 2 * 8;
        if (r >= p->n) continue;
        const float by_row = groups ? 1.0f : row_scale_at(p, code, r);
        const float bias = BIAS_AT(p, r);
#pragma unroll
        for (int j = 0; j < TOKEN_TILES * 2; j++) {
            const int64_t t = token + j / 2 * 8 + j % 2;
            if (t >= p->m) continue;
            const int e = i % 2 * 2 + j % 2;
            float value = out->value[i / 2][j / 2][e];
            const float by_token = groups ? 1.0f : p->x_scales[t * p->x_token_stride];
            if (code == QL_W8A8_INT8)
                value = int8_by_row(int8_by_token((float)whole[i / 2][j / 2][e], by_token) + value, by_row, bias);
            else
                value = value * by_token * by_row + bias;
            store_value(p->out, p->out_type, t * p->n + r, value);
        }
    }
}

static __device__ __forceinline__ void product(const ql_w8a8_params *p, int code, bool groups) {
    const int64_t first_row = (int64_t)blockIdx.x * ROWS, first_token = (int64_t)blockIdx.y * TOKENS;
    const int64_t steps = (p->k + STEP - 1) / STEP;
    const ql_place place = place_of_lane();
    const int64_t row = first_row + place.row, token = first_token + place.token;
    ql_outputs out = {0};
    int32_t whole[ROW_TILES][TOKEN_TILES][4] = {0};
    start_next_kernel();
    wait_for_previous_kernel();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) load_stage(p, shared_address(shared + stage * STAGE_BYTES), first_row, first_token, stage);
        cp_async_commit();
    }
    for (int64_t step = 0; step < steps; step++) {
        cp_async_wait(STAGES - 2);
        __syncthreads();
        const int64_t next = step + STAGES - 1;
        if (next < steps)
            load_stage(p, shared_address(shared + next % STAGES * STAGE_BYTES), first_row, first_token, next);
        cp_async_commit();
        const uint32_t stage = (uint32_t)(step % STAGES * STAGE_BYTES);
        float sums[ROW_TILES][TOKEN_TILES][4] = {0};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            ql_fragments f;
            load_fragments(&f, stage, half);
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; j++)
#pragma unroll
                    for (int word = 0; word < 4; word += 2) { /* two are 32 columns */
                        const uint32_t a[4] = {word_of(f.w[i][0], word), word_of(f.w[i][1], word),
                                               word_of(f.w[i][0], word + 1), word_of(f.w[i][1], word + 1)};
                        const uint32_t b[2] = {word_of(f.x[j], word), word_of(f.x[j], word + 1)};
                        if (code == QL_W8A8_INT8)
                            multiply_16832_int8(whole[i][j], a, b);
                        else
                            multiply_e4m3(sums[i][j], a, b);
                    }
        }
        if (code == QL_W8A8_E4M3) add_step(&out, sums, p, groups, row, token, step);
    }
    cp_async_wait(0);
    if (code == QL_W8A8_INT8 && p->outliers) multiply_outliers(&out, p, first_row, first_token);
    store_outputs(p, &out, whole, code, groups, row, token);
}

#define KERNEL(name, source, code, groups)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ ql_w8a8_params params) {     \
        product(&params, code, groups);                                                                                \
    }
QL_W8A8_MMA_VARIANTS(KERNEL)

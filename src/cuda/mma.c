#include "mma.h"

#include "nonce.h"

#include <limits.h>

enum { MOST_SPLITS = 16, TILES = 3, UNWANTED = -1 };

/* Tokens of a block, by tile. */
static const int tile_tokens[TILES] = {16, 64, 128};

/* By code and tile: the kernels for fp16 x with fp16 scales, with other scales, and for bf16 x. */
#define INTEGERS(name, tokens)                                                                                         \
    {QL_KERNEL_ql_mma_##name##_f16_##tokens, QL_KERNEL_ql_mma_##name##_f16_wide_##tokens,                              \
     QL_KERNEL_ql_mma_##name##_bf16_##tokens}
#define TABLE(tokens)                                                                                                  \
    {QL_KERNEL_ql_mma_table4_f16_##tokens, QL_KERNEL_ql_mma_table4_f16_##tokens, QL_KERNEL_ql_mma_table4_bf16_##tokens}
#define NONE {UNWANTED, UNWANTED, UNWANTED}
static const int kernels[QL_CODE_COUNT][TILES][3] = {
    [QL_CODE_INT2] = {INTEGERS(int2, 16), INTEGERS(int2, 64), NONE},
    [QL_CODE_INT3] = {INTEGERS(int3, 16), INTEGERS(int3, 64), NONE},
    [QL_CODE_INT4] = {INTEGERS(int4, 16), INTEGERS(int4, 64), INTEGERS(int4, 128)},
    [QL_CODE_INT8] = {INTEGERS(int8, 16), INTEGERS(int8, 64), INTEGERS(int8, 128)},
    [QL_CODE_TABLE4] = {TABLE(16), TABLE(64), TABLE(128)},
    [QL_CODE_E4M3] = {NONE, NONE, NONE},
};
#undef INTEGERS
#undef TABLE
#undef NONE

/* Problems and choices name the kernel of fp16 scales also where they are others: scales are no part of a problem. */
static int kernel_of(int code, int tile, int x_type) { return kernels[code][tile][x_type == QL_VALUE_BF16 ? 2 : 0]; }

static int tile_of(const ql_packed_params *p, ql_cuda_choice choice) {
    for (int tile = 0; tile < TILES; tile++)
        if (kernel_of(p->code, tile, p->x_type) == (int)choice.kernel) return tile;
    return UNWANTED;
}

/* Stages of x and codes along K, of which a split has some. */
static int64_t stages(int64_t k, int code) { return ql_ceil_div(k, QL_MMA_STAGE_K(code)); }

/* Enough splits to keep every multiprocessor at work, each with some stages to fill its pipeline. */
static int preferred_splits(const ql_cuda_device *device, const ql_cuda_problem *problem, int tokens) {
    const int64_t tiles = ql_ceil_div(problem->n, QL_MMA_ROWS) * ql_ceil_div(problem->m, tokens);
    const int64_t room = (int64_t)device->properties.multiprocessors * (tokens == 16 ? 2 : 1);
    const int64_t most = stages(problem->k, problem->code) / 4;
    int64_t splits = room / tiles;
    splits = splits < most ? splits : most;
    splits = splits < MOST_SPLITS ? splits : MOST_SPLITS;
    return splits < 1 ? 1 : (int)splits;
}

static int preferred_tile(const ql_cuda_problem *problem) {
    int tile = problem->m <= 16 ? 0 : problem->m <= 64 ? 1 : 2;
    while (kernel_of(problem->code, tile, problem->x_type) == UNWANTED) tile--;
    return tile;
}

static bool known(const ql_cuda_device *device, const ql_cuda_problem *problem, int tile) {
    const int kernel = kernel_of(problem->code, tile, problem->x_type);
    return kernel != UNWANTED && device->kernels[kernel];
}

static int candidates(ql_cuda_choice *out, int room, const ql_cuda_device *device, const ql_cuda_problem *problem) {
    if (kernel_of(problem->code, 0, problem->x_type) == UNWANTED || problem->k / 16 > INT_MAX / 2) return 0;
    int count = 0;
    const int first = preferred_tile(problem);
    for (int i = 0; i < TILES; i++) {
        const int tile = i == 0 ? first : i - 1 + (i - 1 >= first);
        if (!known(device, problem, tile)) continue;
        const int splits = preferred_splits(device, problem, tile_tokens[tile]);
        const int tried[] = {splits, splits * 2, splits / 2, splits * 4};
        for (int j = 0; j < 4 && count < room; j++) {
            const int parameter = tried[j];
            if (parameter < 1 || parameter > MOST_SPLITS || parameter > stages(problem->k, problem->code)) continue;
            out[count++] = (ql_cuda_choice){.kernel = (ql_cuda_kernel)kernel_of(problem->code, tile, problem->x_type),
                                            .parameter = parameter};
        }
    }
    return count;
}

/* fp32 sums of every split but the last of each tile, then a flag for each of them; false where they do not fit int64. */
static bool add_scratch(ql_cuda_prepared *prepared, const ql_packed_params *p, int splits, int tokens) {
    int64_t parts, flags;
    return !__builtin_mul_overflow(ql_ceil_div(p->n, QL_MMA_ROWS), ql_ceil_div(p->m, tokens), &parts) &&
           !__builtin_mul_overflow(parts, splits - 1, &parts) &&
           !__builtin_mul_overflow(parts, (int64_t)QL_MMA_ROWS * tokens * 4, &prepared->flags_at) &&
           !__builtin_mul_overflow(parts, 8, &flags) &&
           !__builtin_add_overflow(prepared->flags_at, flags, &prepared->scratch_bytes);
}

static bool prepare(ql_cuda_prepared *prepared, const ql_cuda_device *device, const ql_packed_params *p,
                    ql_cuda_choice choice) {
    (void)device;
    const int tile = tile_of(p, choice);
    if (tile == UNWANTED || choice.parameter < 1 || choice.parameter > stages(p->k, p->code)) return false;
    const bool aligned = (uintptr_t)p->x % 16 == 0 && (p->x_stride % 8 == 0 || p->m == 1);
    if (!aligned || p->order || p->m < 1) return false;
    const int tokens = tile_tokens[tile];
    const bool wide = p->x_type == QL_VALUE_F16 && p->scales_type != QL_VALUE_F16;
    if (!add_scratch(prepared, p, choice.parameter, tokens)) return false;
    prepared->kernel = wide ? (ql_cuda_kernel)kernels[p->code][tile][1] : choice.kernel;
    prepared->grid = (ql_cuda_grid){
        .x = ql_ceil_div(p->n, QL_MMA_ROWS) * ql_ceil_div(p->m, tokens) * choice.parameter,
        .y = 1,
        .threads = QL_MMA_THREADS,
        .shared_bytes = QL_MMA_STAGES(p->code, tokens) * QL_MMA_STAGE_BYTES(p->code, tokens) + QL_MMA_TABLE_BYTES,
        .overlaps = true};
    prepared->split = (ql_split_params){.product = *p, .splits = choice.parameter};
    return true;
}

static int launch(const ql_cuda_guard *guard, void *stream, ql_cuda_prepared *prepared, const void *x, void *scratch,
                  char message[QL_CUDA_MESSAGE]) {
    ql_split_params *params = &prepared->split;
    params->product.x = x;
    params->partial = scratch;
    params->flags = (uint64_t *)(void *)((char *)scratch + prepared->flags_at);
    params->nonce = ql_cuda_nonce();
    return ql_cuda_launch(guard, prepared->kernel, stream, &prepared->grid, params, message);
}

const ql_cuda_product_engine ql_cuda_mma = {
    .most_rows = INT64_MAX, .candidates = candidates, .prepare = prepare, .launch = launch};

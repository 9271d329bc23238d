#include "w8a8_wgmma.h"

#include "../../kernels/params.h"
#include "../../kernels/w8a8_wgmma.h"
#include "nonce.h"

#include <limits.h>
#include <stdio.h>

enum { MOST_K = 1 << 27 /* so that blocks of all split tiles are counted in 32 bits */ };

typedef struct variant {
    ql_cuda_kernel kernel;
    int code;
    bool grouped;
    int subs, tokens, cluster;
} variant;

#define VARIANT(name, source, code, grouped, subs, tokens, cluster)                                                    \
    {QL_KERNEL_##name, code, grouped, subs, tokens, cluster},
static const variant variants[] = {QL_W8A8_WGMMA_VARIANTS(VARIANT)};
#undef VARIANT
enum { VARIANTS = sizeof(variants) / sizeof(variants[0]) };

static bool is_grouped(const ql_w8a8_params *p) { return p->promoted || p->x_group_stride || p->w_group_stride; }

static int64_t rows_of(const variant *v) { return (int64_t)QL_W8A8_ROWS(v->subs) * v->cluster; }

/* Tiles of a product, and the clusters that share them. */
typedef struct cut {
    int64_t row_tiles, token_tiles, k_blocks;
    int64_t clusters;
} cut;

static cut cut_of(const variant *v, const ql_cuda_device *device, const ql_w8a8_params *p) {
    cut c = {.row_tiles = ql_ceil_div(p->n, rows_of(v)),
             .token_tiles = ql_ceil_div(p->m, v->tokens),
             .k_blocks = ql_ceil_div(p->k, QL_W8A8_K),
             .clusters = device->properties.multiprocessors / v->cluster};
    const int64_t blocks = c.row_tiles * c.token_tiles * c.k_blocks;
    if (blocks < c.clusters) c.clusters = blocks;
    return c;
}

/* Lower is better. */
static int64_t cost(const variant *v, const ql_cuda_device *device, const ql_w8a8_params *p) {
    (void)device;
    return ql_ceil_div(p->m, v->tokens) * (v->tokens + 64) * 8 - v->cluster - v->subs;
}

static const variant *choose(const ql_cuda_device *device, const ql_w8a8_params *p) {
    const variant *best = NULL;
    int64_t least = 0;
    for (int i = 0; i < VARIANTS; i++) {
        const variant *v = &variants[i];
        if (v->code != p->code || v->grouped != is_grouped(p) || !device->kernels[v->kernel]) continue;
        const int64_t own = cost(v, device, p);
        if (best && own >= least) continue;
        best = v;
        least = own;
    }
    return best;
}

static bool are_scales_known(const ql_w8a8_params *p) {
    if (p->w_rows == QL_W8A8_GROUP) return true;
    return p->w_group_stride == 0 && (p->w_rows == 1 || p->w_rows == p->n);
}

bool ql_cuda_w8a8_wgmma_takes(const ql_cuda_device *device, const ql_w8a8_params *p) {
    if (p->m < 1 || p->n < 1 || p->k < 1 || p->k > MOST_K || p->n > INT_MAX - 1024 || p->m > INT_MAX - 1024)
        return false;
    if (p->k % 16 || p->row_stride % 16 || (uintptr_t)p->codes % 16 || (uintptr_t)p->x_codes % 16 || p->x_pitch % 16)
        return false;
    if (p->outliers && (p->code != QL_W8A8_INT8 || p->x_type == QL_VALUE_F32)) return false;
    if (!are_scales_known(p)) return false;
    return choose(device, p) != NULL && ql_ceil_div(p->n, 128) * ql_ceil_div(p->m, 32) <= INT_MAX / 2;
}

/* Sums of a range's first, broken tile, then a flag for each of its warps. */
static int64_t partial_bytes(const variant *v, const cut *c) {
    return c->clusters * rows_of(v) * v->tokens * (int64_t)sizeof(float);
}

int64_t ql_cuda_w8a8_wgmma_scratch(const ql_cuda_device *device, const ql_w8a8_params *p) {
    const variant *v = choose(device, p);
    const cut c = cut_of(v, device, p);
    return partial_bytes(v, &c) + c.clusters * v->cluster * QL_W8A8_WARPS * (int64_t)sizeof(uint64_t);
}

/* A matrix of codes as boxes of 128 columns. */
static ql_cu_result map_codes(void *map, const ql_cuda_driver *driver, const uint8_t *codes, int64_t rows, int64_t k,
                              int64_t stride, int box_rows) {
    const uint64_t shape[2] = {(uint64_t)k, (uint64_t)rows}, bytes[1] = {(uint64_t)stride};
    const uint32_t box[2] = {QL_W8A8_K, (uint32_t)box_rows}, step[2] = {1, 1};
    return driver->tensor_map_encode_tiled(map, QL_CU_TENSOR_U8, 2, (void *)(uintptr_t)codes, shape, bytes, box, step,
                                           0, QL_CU_TENSOR_SWIZZLE_128B, QL_CU_TENSOR_L2_128B, 0);
}

int ql_cuda_w8a8_wgmma_launch(const ql_cuda_guard *guard, void *stream, const ql_w8a8_params *p, void *scratch,
                              char message[QL_CUDA_MESSAGE]) {
    const variant *v = choose(guard->device, p);
    const cut c = cut_of(v, guard->device, p);
    const int64_t tiles = c.row_tiles * c.token_tiles;
    /* What is left over whole waves is split together with one of them, so that no range is short. */
    const int64_t left = tiles % c.clusters;
    const int64_t split = left == 0 ? 0 : tiles < c.clusters ? tiles : left + c.clusters;
    const int head = QL_W8A8_HEAD_BYTES(v->code, v->grouped, v->subs, v->tokens);
    const int stage = QL_W8A8_STAGE_BYTES(v->subs, v->tokens);
    int stages = (guard->properties->shared_bytes - head) / stage;
    if (stages > QL_W8A8_MOST_STAGES) stages = QL_W8A8_MOST_STAGES;
    ql_w8a8_wgmma_params params = {
        .product = *p,
        .partials = scratch,
        .flags = (uint64_t *)(void *)((char *)scratch + partial_bytes(v, &c)),
        .nonce = ql_cuda_nonce(),
        .row_tiles = (int32_t)c.row_tiles,
        .token_tiles = (int32_t)c.token_tiles,
        .k_blocks = (int32_t)c.k_blocks,
        .split_tiles = (int32_t)split,
        .range = (int32_t)(split * c.k_blocks / c.clusters),
        .longer_ranges = (int32_t)(split * c.k_blocks % c.clusters),
        .stages = stages,
    };
    ql_cu_result result =
        map_codes(params.w_map, guard->driver, p->codes, p->n, p->k, p->row_stride, QL_W8A8_ROWS(v->subs));
    if (result == QL_CU_SUCCESS)
        result = map_codes(params.x_map, guard->driver, p->x_codes, p->m, p->k, p->x_pitch, v->tokens / v->cluster);
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE,
                 "%s: operands of %lld and %lld by %lld could not be described to the GPU: %s.",
                 ql_cuda_kernel_name(v->kernel), (long long)p->n, (long long)p->m, (long long)p->k,
                 ql_cuda_error(guard->driver, result));
        return -1;
    }
    const ql_cuda_grid grid = {.x = c.clusters * v->cluster,
                               .y = 1,
                               .threads = QL_W8A8_THREADS,
                               .shared_bytes = head + stages * stage,
                               .cluster = v->cluster,
                               .overlaps = true};
    return ql_cuda_launch(guard, v->kernel, stream, &grid, &params, message);
}

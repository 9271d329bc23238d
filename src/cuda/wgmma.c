#include "wgmma.h"

#include "../../kernels/streamk.h"
#include "nonce.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>

enum {
    PARTS_OF_TILE = 8, /* that ranges are made of where they are aligned */
    MOST_K = 1 << 26   /* so that bytes of a strip and blocks of all split tiles are counted in 32 bits */
};

typedef struct variant {
    ql_cuda_kernel kernel;
    int code, type;
    bool wide;
    int rows, tokens, stage_k, groups;
} variant;

#define VARIANT(name, source, code, type, wide, rows, tokens, stage_k, groups)                                         \
    {QL_KERNEL_##name, code, type, wide, rows, tokens, stage_k, groups},
static const variant variants[] = {QL_WGMMA_VARIANTS(VARIANT)};
#undef VARIANT
enum { VARIANTS = sizeof(variants) / sizeof(variants[0]) };

/* Kernels are numbered in the order of their lists, so that a variant is found without a search. */
static const variant *variant_of(ql_cuda_kernel kernel) {
    const int place = (int)kernel - (int)variants[0].kernel;
    return place >= 0 && place < VARIANTS && variants[place].kernel == kernel ? &variants[place] : NULL;
}

static int sets(const variant *v) { return QL_STREAMK_SETS(v->code, v->tokens); }

/* The variant for the type of the product's scales: a choice names one that is not wide. With two sets of warps it takes both
 * 16-bit types, and in place of one for fp32 there is that of 32 tokens. */
static const variant *variant_for(const variant *v, const ql_packed_params *p) {
    if (v->groups == 0 || v->code == QL_CODE_TABLE4 || p->scales_type == p->x_type) return v;
    if (sets(v) == 2 && p->scales_type != QL_VALUE_F32) return v;
    for (int i = 0; i < VARIANTS; i++) {
        const variant *other = &variants[i];
        if (other->wide && other->code == v->code && other->type == v->type && other->rows == v->rows &&
            other->tokens == (sets(v) == 2 ? 32 : v->tokens) && other->groups == v->groups)
            return other;
    }
    return NULL;
}

/* Whether groups lie in its stages as it expects. */
static bool fits_groups(const variant *v, bool one_group, int64_t group_size) {
    if (v->groups == 0 || one_group) return v->groups == 0 && one_group;
    return v->groups == 1 ? group_size % v->stage_k == 0 : group_size * v->groups == v->stage_k;
}

static int stage_bytes(const variant *v) {
    return QL_STREAMK_STAGE_BYTES(v->code, v->rows, v->tokens, v->stage_k, v->groups);
}

/* Thread blocks that go through the same tiles. */
static int together(const variant *v) { return QL_STREAMK_PAIRED(v->tokens) ? 2 : 1; }

/* As many stages as there is room for, the same number for each set of warps. */
static int stages_of(const variant *v, int room) {
    const int stages = (room - QL_STREAMK_HEAD_BYTES(v->code, v->tokens, v->groups)) / stage_bytes(v);
    return (stages < QL_STREAMK_MOST_STAGES ? stages : QL_STREAMK_MOST_STAGES) / sets(v) * sets(v);
}

/* What 128 columns take, in ns: tiles of 32, 64, 128 and 256 tokens; groups of 32 more, 16 tokens less, but where 8 bit in one
 * group is memory's pace alone. */
static double pace(const variant *v) {
    static const double paces[][4] = {{345, 463, 768, 1520}, {402, 508, 800, 1520}, {360, 474, 757, 1520},
                                      {341, 460, 775, 1535}, {376, 509, 814, 1590}, {362, 503, 870, 1530}};
    const int kind = v->code == QL_CODE_INT2   ? 0
                     : v->code == QL_CODE_INT3 ? 1
                     : v->code == QL_CODE_INT4 ? 2
                     : v->code == QL_CODE_INT8 ? 3 + (v->groups != 0)
                                               : 5;
    const int tile = v->tokens <= 32 ? 0 : v->tokens == 64 ? 1 : v->tokens == 128 ? 2 : 3;
    const bool table = v->code == QL_CODE_TABLE4, two_planes = table && v->groups == 2 && v->tokens == 256;
    const double more = v->groups == 4 ? (table ? 1.2 : 1.14) : two_planes ? 1.07 : 1;
    return paces[kind][tile] * more * (v->tokens != 16 ? 1 : kind == 3 ? 1.06 : 0.89);
}

static int64_t tiles_of(const variant *v, const ql_cuda_problem *p) {
    return ql_ceil_div(p->n, v->rows * together(v)) * ql_ceil_div(p->m, v->tokens);
}

/* What a product takes, in ns: a model of an H200 that tells ways to run it from each other, without the time that all of
 * them take, fitted to some 1400 products. The weight comes at 4200 bytes a ns; a tile ends in outputs. Ranges that share
 * a tile leave each other sums, which is dear; dearer where they do not begin and end with tiles: then thread blocks are at
 * different places of K as well, and where the second-level cache does not hold what they share, they read it again. Tiles of
 * 256 tokens leave outputs to copies, so that each takes less, have twice the sums to exchange, and read half of x; what others
 * leave of them is mostly there when it is wanted, unless they are fewer than thread blocks. Ranges that begin and end at eighths
 * of tiles lose half as much by it, of a table as much, at halves nothing. */
static double cost(const variant *v, const ql_cuda_problem *p, int64_t blocks) {
    const int rows = v->rows * together(v);
    const int64_t tiles = tiles_of(v, p), walkers = blocks / together(v);
    const double bits = QL_CODE_BITS(p->code), size = v->rows * v->tokens / (128.0 * 128);
    const double share = (double)tiles / (double)walkers, k = (double)p->k;
    const bool boxes = QL_STREAMK_HAS_BOXES(v->tokens);
    double loop = share * k / 128 * pace(v), exchange = 0;
    if (tiles % walkers != 0) {
        const double meeting = !boxes                                     ? 1500
                               : tiles < walkers                          ? 4500
                               : QL_STREAMK_HAS_PARTS(v->code, v->tokens) ? 1800
                                                                          : 3000;
        const bool halves = tiles > walkers && 2 * tiles % walkers == 0;
        exchange = meeting * (halves ? 0.5 : 1) + 480 * size * fmax(1, 1 / share);
        if (!halves && (tiles > walkers || walkers % tiles != 0)) {
            const double uncached = fmin(1, k * fmin((double)p->m, QL_STREAMK_TOKEN_GROUP) / 6e6);
            const bool aligned = PARTS_OF_TILE * tiles % walkers == 0 && v->code != QL_CODE_TABLE4;
            exchange += (710 + 1265 * size) * (aligned ? 0.5 : 1);
            if (!boxes) loop *= 1 + uncached * (5.0 / rows + (p->m > v->tokens ? 1.2 * bits / v->tokens : 0));
        }
    }
    return fmax(loop, (double)p->n * k * bits / 8 / 4200) + ceil(share) * (boxes ? 330 : 1130 + 100 * size) + exchange;
}

static bool serves(const variant *v, const ql_cuda_device *device, const ql_cuda_problem *problem) {
    return problem->m > 0 && problem->n > 0 && !v->wide && v->code == problem->code && v->type == problem->x_type &&
           device->kernels[v->kernel] && fits_groups(v, problem->group_size == problem->k, problem->group_size) &&
           problem->k <= MOST_K && problem->n <= INT_MAX - 256 && problem->m <= INT_MAX - 256;
}

/* A way to run a product: a variant, and how many thread blocks at most. */
typedef struct way {
    double cost;
    ql_cuda_choice choice;
} way;

/* Inserts one into ways, which are sorted; how many there are then. */
static int add_way(way *ways, int count, const variant *v, const ql_cuda_problem *problem, int64_t blocks) {
    const way new = {cost(v, problem, blocks), {.kernel = v->kernel, .parameter = (int32_t)blocks}};
    int place = count;
    for (; place > 0 && ways[place - 1].cost > new.cost; place--) ways[place] = ways[place - 1];
    ways[place] = new;
    return count + 1;
}

/* Fewer thread blocks than there are multiprocessors, so that each has whole tiles, or each tile the same number of them. */
static int64_t even_blocks(const variant *v, const ql_cuda_problem *problem, int64_t most) {
    const int64_t tiles = tiles_of(v, problem), walkers = most / together(v);
    const int64_t even = tiles < walkers ? tiles * (walkers / tiles) : ql_ceil_div(tiles, ql_ceil_div(tiles, walkers));
    return even * together(v);
}

/* Fewer, so that each has as many eighths of tiles: those that are at one place of K then share what they read of x, and of
 * halves no thread block both leaves sums and adds others'. 0 where there is no such number, and for few tokens. */
static int64_t aligned_blocks(const variant *v, const ql_cuda_problem *problem, int64_t most) {
    const int64_t parts = PARTS_OF_TILE * tiles_of(v, problem), each = ql_ceil_div(parts, most / together(v));
    return v->tokens >= 64 && parts % each == 0 ? parts / each * together(v) : 0;
}

static int candidates(ql_cuda_choice *out, int room, const ql_cuda_device *device, const ql_cuda_problem *problem) {
    const int64_t all = device->properties.multiprocessors;
    way ways[3 * VARIANTS];
    int count = 0;
    for (int i = 0; i < VARIANTS; i++) {
        const variant *v = &variants[i];
        const int64_t most = all - all % together(v);
        if (!most || !serves(v, device, problem)) continue;
        const int64_t even = even_blocks(v, problem, most), aligned = aligned_blocks(v, problem, most);
        count = add_way(ways, count, v, problem, most);
        if (even != most) count = add_way(ways, count, v, problem, even);
        if (aligned && aligned != even && aligned != most) count = add_way(ways, count, v, problem, aligned);
    }
    if (count > room) count = room;
    for (int i = 0; i < count; i++) out[i] = ways[i].choice;
    return count;
}

/* The variant that runs the product so, or NULL. */
static const variant *taking(const ql_cuda_device *device, const ql_packed_params *p, ql_cuda_choice choice) {
    const variant *v = variant_of(choice.kernel);
    if (!v || v->wide || p->order || p->m < 1 || choice.parameter < together(v)) return NULL;
    if (v->code != p->code || v->type != p->x_type || !fits_groups(v, p->groups == 1, p->group_size)) return NULL;
    if (p->nested_table && (p->nested_blocksize & (p->nested_blocksize - 1))) return NULL;
    if (v->code == QL_CODE_TABLE4 && p->n > INT_MAX / p->groups - 256) return NULL; /* entries are counted in 32 bits */
    if (p->k > MOST_K || p->n > INT_MAX - 256 || p->m > INT_MAX - 256) return NULL;
    if (ql_ceil_div(p->n, v->rows) * ql_ceil_div(p->m, v->tokens) > INT_MAX / 2) return NULL;
    if ((uintptr_t)p->x % 16 || (p->x_stride % 8 && p->m != 1)) return NULL;
    v = variant_for(v, p);
    return v && device->kernels[v->kernel] ? v : NULL;
}

/* Of a box of x: a tile's tokens, but none that are not there in a tile that is all of them. */
static int x_rows(const variant *v, int64_t m) {
    return together(v) == 1 && m < v->tokens ? (int)m : v->tokens / together(v);
}

/* What streamk.cuh divides by. */
static uint32_t inverse(int32_t value) {
    return value == 1 ? UINT32_MAX : (uint32_t)(((uint64_t)1 << 32) / (uint64_t)value);
}

static bool prepare(ql_cuda_prepared *prepared, const ql_cuda_device *device, const ql_packed_params *p,
                    ql_cuda_choice choice) {
    const variant *v = taking(device, p, choice);
    if (!v) return false;
    ql_streamk_params *params = &prepared->streamk;
    *params = (ql_streamk_params){.product = *p};
    params->row_tiles = (int32_t)ql_ceil_div(p->n, v->rows * together(v));
    params->token_tiles = (int32_t)ql_ceil_div(p->m, v->tokens);
    params->k_blocks = (int32_t)ql_ceil_div(p->k, v->stage_k);
    params->k_blocks_inverse = inverse(params->k_blocks);
    params->group_blocks = v->groups == 1 ? (int32_t)(p->group_size / v->stage_k) : 1;
    params->group_blocks_inverse = inverse(params->group_blocks);
    const int32_t most_wide = QL_STREAMK_TOKEN_GROUP / v->tokens, last_wide = params->token_tiles % most_wide;
    params->width_inverse = inverse(last_wide ? last_wide : most_wide);
    const int64_t tiles = (int64_t)params->row_tiles * params->token_tiles, all = tiles * params->k_blocks;
    const int32_t most = choice.parameter / together(v), grid = all < most ? (int32_t)all : most;
    params->split_tiles = (int32_t)ql_split_tiles(tiles, grid);
    const int32_t units = params->split_tiles * params->k_blocks;
    params->range = units / grid;
    params->longer_ranges = units % grid;
    params->stages = stages_of(v, device->properties.shared_bytes);
    params->x_bytes = x_rows(v, p->m) * together(v) * v->stage_k * 2;
    while (p->nested_blocksize >> (params->nested_shift + 1)) params->nested_shift++;
    prepared->kernel = v->kernel;
    prepared->grid = (ql_cuda_grid){.x = (int64_t)grid * together(v),
                                    .y = 1,
                                    .threads = QL_STREAMK_THREADS(v->code, v->tokens),
                                    .shared_bytes = QL_STREAMK_HEAD_BYTES(v->code, v->tokens, v->groups) +
                                                    params->stages * stage_bytes(v),
                                    .cluster = together(v),
                                    .overlaps = true};
    /* Sums of a range's first, broken tile, then a flag for each of its warps. */
    prepared->flags_at = (int64_t)choice.parameter * v->rows * v->tokens * 4;
    prepared->scratch_bytes =
        prepared->flags_at + (int64_t)choice.parameter * QL_STREAMK_WARPS * (int64_t)sizeof(uint64_t);
    return true;
}

/* x as boxes of 64 columns by a tile's tokens, or all where they are fewer. */
static ql_cu_result map_x(void *map, const ql_cuda_driver *driver, const ql_packed_params *p, const variant *v) {
    const uint64_t shape[2] = {(uint64_t)p->k, (uint64_t)p->m};
    const int64_t stride = p->m == 1 ? (p->k + 7) / 8 * 8 : p->x_stride;
    const uint64_t bytes[1] = {(uint64_t)stride * 2};
    const uint32_t box[2] = {QL_STREAMK_BOX_K, (uint32_t)x_rows(v, p->m)}, step[2] = {1, 1};
    return driver->tensor_map_encode_tiled(map, p->x_type == QL_VALUE_F16 ? QL_CU_TENSOR_F16 : QL_CU_TENSOR_BF16, 2,
                                           (void *)(uintptr_t)p->x, shape, bytes, box, step, 0,
                                           QL_CU_TENSOR_SWIZZLE_128B, QL_CU_TENSOR_L2_128B, 0);
}

/* The codes, a row a strip, as boxes of a stage's columns by a tile's strips. */
static ql_cu_result map_codes(void *map, const ql_cuda_driver *driver, const ql_packed_params *p, const variant *v) {
    const int unit = QL_STREAMK_CODES_UNIT(v->code, v->stage_k);
    const uint64_t strip = (uint64_t)(ql_ceil_div(p->k, QL_TILE_K(v->code)) * QL_TILE_BYTES(v->code));
    const uint64_t shape[2] = {strip / (uint64_t)unit, (uint64_t)ql_ceil_div(p->n, QL_STRIP)}, bytes[1] = {strip};
    const uint32_t box[2] = {(uint32_t)(QL_STREAMK_STRIP_BYTES(v->code, v->stage_k) / unit),
                             (uint32_t)v->rows / QL_STRIP};
    const uint32_t step[2] = {1, 1};
    return driver->tensor_map_encode_tiled(map, unit == 8 ? QL_CU_TENSOR_INT64 : QL_CU_TENSOR_INT32, 2,
                                           (void *)(uintptr_t)p->codes, shape, bytes, box, step, 0, 0,
                                           QL_CU_TENSOR_L2_256B, 0);
}

/* out as boxes of what a warpgroup leaves to a copy, swizzled as x; where its rows are no whole pieces threads store them. */
static ql_cu_result map_out(void *map, const ql_cuda_driver *driver, const ql_packed_params *p, const variant *v) {
    if (!QL_STREAMK_HAS_BOXES(v->tokens) || p->n % 8 || (uintptr_t)p->out % 16) return QL_CU_SUCCESS;
    const uint64_t shape[2] = {(uint64_t)p->n, (uint64_t)p->m}, bytes[1] = {(uint64_t)p->n * 2};
    const uint32_t box[2] = {64, (uint32_t)QL_STREAMK_OUTPUT_TOKENS(v->code, v->tokens, v->groups)}, step[2] = {1, 1};
    return driver->tensor_map_encode_tiled(map, p->x_type == QL_VALUE_F16 ? QL_CU_TENSOR_F16 : QL_CU_TENSOR_BF16, 2,
                                           (void *)(uintptr_t)p->out, shape, bytes, box, step, 0,
                                           QL_CU_TENSOR_SWIZZLE_128B, QL_CU_TENSOR_L2_128B, 0);
}

static int launch(const ql_cuda_guard *guard, void *stream, ql_cuda_prepared *prepared, const void *x, void *scratch,
                  char message[QL_CUDA_MESSAGE]) {
    const variant *v = variant_of(prepared->kernel);
    ql_streamk_params *params = &prepared->streamk;
    const ql_packed_params *p = &params->product;
    params->product.x = x;
    params->partials = scratch;
    params->flags = (uint64_t *)(void *)((char *)scratch + prepared->flags_at);
    params->nonce = ql_cuda_nonce();
    ql_cu_result result = map_x(params->x_map, guard->driver, p, v);
    if (result == QL_CU_SUCCESS) result = map_codes(params->codes_map, guard->driver, p, v);
    if (result == QL_CU_SUCCESS) result = map_out(params->out_map, guard->driver, p, v);
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE, "%s: x of %lld by %lld could not be described to the GPU: %s.",
                 ql_cuda_kernel_name(v->kernel), (long long)p->m, (long long)p->k,
                 ql_cuda_error(guard->driver, result));
        return -1;
    }
    return ql_cuda_launch(guard, v->kernel, stream, &prepared->grid, params, message);
}

const ql_cuda_product_engine ql_cuda_wgmma = {
    .most_rows = INT64_MAX, .candidates = candidates, .prepare = prepare, .launch = launch};

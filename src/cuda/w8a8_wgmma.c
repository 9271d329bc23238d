#include "w8a8_wgmma.h"

#include "../../kernels/params.h"
#include "../../kernels/w8a8_wgmma.h"
#include "memo.h"
#include "nonce.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>

enum {
    MOST_K = 1 << 27, /* so that blocks of all split tiles are counted in 32 bits */
    MOST_MEMBERS = 4,
    LEAST_STAGES = 3,
    NEIGHBOUR_BYTES = 16 * 1024 /* of shared memory for what quantizes x, where both fit a multiprocessor */
};

typedef struct variant {
    ql_cuda_kernel kernel;
    int code;
    bool grouped;
    int rows, tokens;
    bool pair, meets;
} variant;

#define VARIANT(name, source, code, grouped, rows, tokens, pair, meets, turned)                                        \
    {QL_KERNEL_##name, code, grouped, rows, tokens, pair, meets},
static const variant variants[] = {QL_W8A8_WGMMA_VARIANTS(VARIANT)};
#undef VARIANT
enum { VARIANTS = sizeof(variants) / sizeof(variants[0]) };

static bool is_grouped(const ql_w8a8_params *p) { return p->promoted || p->x_group_stride || p->w_group_stride; }

/* A product as a variant runs it. */
typedef struct cut {
    const variant *variant;
    int64_t row_tiles, token_tiles, k_blocks;
    int64_t clusters; /* that share the tiles; as many as there are of them where a cluster's members meet */
    int members;      /* thread blocks of a cluster */
} cut;

/* A cluster's tile. */
static int64_t tile_rows(const variant *v) { return (int64_t)v->rows * QL_W8A8_ROW_PARTS(v->rows, v->tokens, v->pair); }
static int64_t tile_tokens(const variant *v) {
    return (int64_t)v->tokens * QL_W8A8_TOKEN_PARTS(v->rows, v->tokens, v->pair);
}

/* What a thread block copies of each operand: half of what a pair has in common. */
static int w_box_rows(const variant *v) { return v->rows / QL_W8A8_TOKEN_PARTS(v->rows, v->tokens, v->pair); }
static int x_box_rows(const variant *v) { return v->tokens / QL_W8A8_ROW_PARTS(v->rows, v->tokens, v->pair); }

static int64_t tiles_of(const cut *c) { return c->row_tiles * c->token_tiles; }

static int64_t split_tiles(const cut *c) { return c->variant->meets ? 0 : ql_split_tiles(tiles_of(c), c->clusters); }

static bool is_split(const cut *c) { return split_tiles(c) > 0; }

static int meeting_bytes(const cut *c) {
    return c->variant->meets ? (c->members - 1) * QL_W8A8_MEETING_BYTES(c->variant->tokens) : 0;
}

/* Shared memory before the stages. */
static int head_bytes(const variant *v) { return QL_W8A8_HEAD_BYTES(v->code, v->grouped, v->rows, v->tokens); }

/* As many stages as there is room for. */
static int stages_of(const cut *c, const ql_cuda_properties *gpu) {
    const variant *v = c->variant;
    const int room = gpu->shared_bytes - (v->tokens <= 64 ? NEIGHBOUR_BYTES : 0);
    const int stages = (room - head_bytes(v) - meeting_bytes(c)) / QL_W8A8_STAGE_BYTES(v->rows, v->tokens);
    return stages < QL_W8A8_MOST_STAGES ? stages : QL_W8A8_MOST_STAGES;
}

static cut cut_of(const variant *v, const ql_w8a8_params *p, int64_t clusters, int members) {
    return (cut){.variant = v,
                 .row_tiles = ql_ceil_div(p->n, tile_rows(v)),
                 .token_tiles = ql_ceil_div(p->m, tile_tokens(v)),
                 .k_blocks = ql_ceil_div(p->k, QL_W8A8_K),
                 .clusters = clusters,
                 .members = members};
}

/* What thread blocks that go along K together have in the second-level cache, where more of them than one read it. */
static double common_bytes(const cut *c, const ql_w8a8_params *p) {
    const double across = fmin((double)c->token_tiles, QL_W8A8_TOKEN_GROUP);
    const double tokens = fmin((double)p->m, across * (double)tile_tokens(c->variant));
    const double rows = (double)tile_rows(c->variant) * (double)c->clusters / across;
    return c->token_tiles > 1 ? (double)p->k * (tokens + rows) : 0;
}

/* What a model of an H200 at work takes, fitted to some 160 products with up to 128 tokens, which wait for memory, and to 100
 * with more: ns in which a thread block multiplies a token's 128 columns with 128 rows, bytes a ns of the second-level cache
 * for all of them, ns that it takes to give sums to another, and those of pairs whose ranges all begin at a tile or in its
 * middle, and of these e4m3's where tiles are full and no range is less than one. */
typedef struct pace {
    double plain, narrow, wide, tall; /* in groups: tiles of up to 64 tokens, of more, of two blocks' rows */
    double cached, exchange[2], halves[2], full_halves; /* exchange: plain, in groups */
} pace;

static const pace few_tokens = {3.9, 7.6, 6.6, 6.6, 7600, {13000, 13000}, {13000, 13000}, 13000},
                  many_tokens = {3.0, 3.6, 3.15, 3.05, 10000, {6000, 4500}, {2700, 2300}, 1500};
enum { FEW_TOKENS = 128 };

/* What it takes thread blocks to give each other sums. */
static double exchange_cost(const cut *c, const ql_w8a8_params *p, const pace *is) {
    const variant *v = c->variant;
    if (!v->pair || 2 * tiles_of(c) % c->clusters != 0) return is->exchange[v->grouped];
    const bool full = p->m % tile_tokens(v) == 0 && tiles_of(c) > c->clusters;
    return v->code == QL_W8A8_E4M3 && !v->grouped && full ? is->full_halves : is->halves[v->grouped];
}

/* What a cut takes, in ns: tells cuts from each other, without the time that all of them take. A thread block is given at most
 * 85 bytes a ns; a pair asks for what it has in common once; the weight comes at 4200. A tile ends in outputs. Sums that cross
 * thread blocks are dear, least between members; so are ranges of which each is elsewhere in K, where the cache does not hold
 * all of it. */
static double cost(const cut *c, const ql_w8a8_params *p) {
    const variant *v = c->variant;
    const double tokens = v->tokens, tiles = (double)tiles_of(c), thread_blocks = (double)(c->clusters * c->members);
    const double blocks = (double)c->k_blocks * (v->meets ? 1.0 / c->members : tiles / (double)c->clusters);
    const double asked = (double)w_box_rows(v) + (double)x_box_rows(v);
    const pace *is = p->m > FEW_TOKENS ? &many_tokens : &few_tokens;
    const double copy = QL_W8A8_K * fmax((v->rows + tokens) / 85, asked * thread_blocks / is->cached);
    const double grouped = v->rows > QL_W8A8_GROUP ? is->tall : tokens > 64 ? is->wide : is->narrow;
    const double outputs = tokens * v->rows / QL_W8A8_GROUP, multiply = outputs * (v->grouped ? grouped : is->plain);
    const double main_loop = fmax(blocks * fmax(multiply, copy), (double)p->n * (double)p->k / 4200);
    const double ends = ceil(tiles / (double)c->clusters) * (1600 + outputs * 4);
    double exchange = 0;
    if (v->meets) exchange += 1350 + c->members * tokens * 7.3;
    if (is_split(c)) {
        const double apart = fmax(0, common_bytes(c, p) - 30e6) / 130e6;
        exchange += exchange_cost(c, p, is) + outputs * 9 * ceil((double)c->clusters / tiles);
        exchange += (v->pair ? fmin(0.15, 0.35 * apart) : apart) * multiply * (double)(split_tiles(c) * c->k_blocks) /
                    (double)c->clusters;
    }
    return main_loop + ends + exchange;
}

typedef struct weighed {
    cut cut;
    double cost;
} weighed;

static void consider(weighed *best, const variant *v, const ql_cuda_device *device, const ql_w8a8_params *p,
                     int64_t clusters, int members) {
    cut c = cut_of(v, p, clusters, members);
    const int64_t tiles = tiles_of(&c);
    if (v->meets) {
        /* Clusters of more than two leave some multiprocessors idle, and what finds no room has to wait. */
        const int idle = members > 2 ? device->properties.multiprocessors / 8 : 0;
        if (members > c.k_blocks || tiles * members > device->properties.multiprocessors - idle) return;
        c.clusters = tiles;
    }
    if (c.clusters > tiles * c.k_blocks) c.clusters = tiles * c.k_blocks;
    if (stages_of(&c, &device->properties) < LEAST_STAGES || c.clusters < 1) return;
    const double own = cost(&c, p);
    if (best->cut.variant && own >= best->cost) return;
    best->cut = c;
    best->cost = own;
}

/* Without a variant where no kernel is there for it. */
static cut weigh_cuts(const ql_cuda_device *device, const ql_w8a8_params *p) {
    weighed best = {.cut = {.variant = NULL}};
    for (int i = 0; i < VARIANTS; i++) {
        const variant *v = &variants[i];
        if (v->code != p->code || v->grouped != is_grouped(p) || !device->kernels[v->kernel]) continue;
        if (v->meets) {
            for (int members = 2; members <= MOST_MEMBERS; members++) consider(&best, v, device, p, 0, members);
            continue;
        }
        /* All that there is room for, or fewer that have whole tiles, or, in pairs, halves of some. */
        const int members = v->pair ? 2 : 1;
        const int64_t most = device->properties.multiprocessors / members;
        const int64_t tiles = ql_ceil_div(p->n, tile_rows(v)) * ql_ceil_div(p->m, tile_tokens(v));
        if (most < 1) continue;
        consider(&best, v, device, p, most, members);
        consider(&best, v, device, p, ql_ceil_div(tiles, ql_ceil_div(tiles, most)), members);
        if (v->pair) consider(&best, v, device, p, ql_ceil_div(2 * tiles, ql_ceil_div(2 * tiles, most)), members);
    }
    return best.cut;
}

/* A choice's parameter: members + MEMBERS * clusters, of which a GPU has no more than multiprocessors. */
enum { MEMBERS = 8 };
_Static_assert((int)MOST_MEMBERS < (int)MEMBERS, "a parameter holds both");

/* Kernels are numbered in the order of their lists, so that a variant is found without a search. */
static cut cut_of_choice(const ql_w8a8_params *p, ql_cuda_choice choice) {
    const variant *v = &variants[choice.kernel - variants[0].kernel];
    return cut_of(v, p, choice.parameter / MEMBERS, choice.parameter % MEMBERS);
}

/* What weigh_cuts finds, remembered: weighing takes longer than all else that is done here for a call. */
static bool choose(ql_cuda_choice *choice, const ql_cuda_device *device, const ql_w8a8_params *p) {
    const int memo = QL_CUDA_MEMO_W8A8_WGMMA + is_grouped(p);
    const ql_cuda_problem problem = {.n = p->n, .k = p->k, .m = p->m, .code = p->code};
    bool found;
    if (ql_cuda_memo_find(&found, choice, memo, device->ordinal, &problem)) return found;
    const cut c = weigh_cuts(device, p);
    found = c.variant != NULL;
    *choice = (ql_cuda_choice){0};
    if (found)
        *choice = (ql_cuda_choice){.kernel = c.variant->kernel, .parameter = (int32_t)c.clusters * MEMBERS + c.members};
    ql_cuda_memo_keep(found, *choice, memo, device->ordinal, &problem);
    return found;
}

static bool are_scales_known(const ql_w8a8_params *p) {
    if (p->w_rows == QL_W8A8_GROUP) return true;
    return p->w_group_stride == 0 && (p->w_rows == 1 || p->w_rows == p->n);
}

bool ql_cuda_w8a8_wgmma_takes(ql_cuda_choice *choice, const ql_cuda_device *device, const ql_w8a8_params *p) {
    if (p->m < 1 || p->n < 1 || p->k < 1) return false;
    if (p->k > MOST_K || p->n > INT_MAX - 1024 || p->m > INT_MAX - 1024) return false;
    if (ql_ceil_div(p->n, QL_W8A8_GROUP) * ql_ceil_div(p->m, 32) > INT_MAX / 2) return false;
    if (p->k % 16 || p->row_stride % 16 || (uintptr_t)p->codes % 16) return false;
    if (p->x_pitch % 16 || (uintptr_t)p->x_codes % 16) return false;
    if (p->outliers && (p->code != QL_W8A8_INT8 || p->x_type == QL_VALUE_F32)) return false;
    return are_scales_known(p) && choose(choice, device, p);
}

/* Sums of a range's first, broken tile, then a flag for each of its warps. */
static int64_t partial_bytes(const cut *c) {
    return c->clusters * c->members * c->variant->rows * c->variant->tokens * (int64_t)sizeof(float);
}

int64_t ql_cuda_w8a8_wgmma_scratch(const ql_w8a8_params *p, ql_cuda_choice choice) {
    const cut c = cut_of_choice(p, choice);
    if (!is_split(&c)) return 0;
    return partial_bytes(&c) + c.clusters * c.members * QL_W8A8_WARPS * (int64_t)sizeof(uint64_t);
}

/* A matrix of codes as boxes of 128 columns. */
static ql_cu_result map_codes(void *map, const ql_cuda_driver *driver, const uint8_t *codes, int64_t rows, int64_t k,
                              int64_t stride, int box_rows) {
    const uint64_t shape[2] = {(uint64_t)k, (uint64_t)rows}, bytes[1] = {(uint64_t)stride};
    const uint32_t box[2] = {QL_W8A8_K, (uint32_t)box_rows}, step[2] = {1, 1};
    return driver->tensor_map_encode_tiled(map, QL_CU_TENSOR_U8, 2, (void *)(uintptr_t)codes, shape, bytes, box, step,
                                           0, QL_CU_TENSOR_SWIZZLE_128B, QL_CU_TENSOR_L2_128B, 0);
}

static ql_cu_result map_operands(ql_w8a8_wgmma_params *params, const ql_cuda_driver *driver, const variant *v) {
    const ql_w8a8_params *p = &params->product;
    const ql_cu_result result = map_codes(params->w_map, driver, p->codes, p->n, p->k, p->row_stride, w_box_rows(v));
    if (result != QL_CU_SUCCESS) return result;
    return map_codes(params->x_map, driver, p->x_codes, p->m, p->k, p->x_pitch, x_box_rows(v));
}

/* While x is quantized memory has nothing to do once the first stages are full. Where a thread block has few blocks more, they
 * are soon asked for anyway, and x comes before them. */
static int blocks_ahead(const cut *c) {
    enum { MANY_BLOCKS = 36, AHEAD = 8 };
    const int64_t own = c->variant->meets ? c->k_blocks / c->members : c->k_blocks * tiles_of(c) / c->clusters;
    return c->variant->tokens <= 64 && own >= MANY_BLOCKS ? AHEAD : 0;
}

int ql_cuda_w8a8_wgmma_launch(const ql_cuda_guard *guard, void *stream, const ql_w8a8_params *p, ql_cuda_choice choice,
                              void *scratch, char message[QL_CUDA_MESSAGE]) {
    const cut c = cut_of_choice(p, choice);
    const variant *v = c.variant;
    const int64_t split = split_tiles(&c);
    ql_w8a8_wgmma_params params = {
        .product = *p,
        .row_tiles = (int32_t)c.row_tiles,
        .token_tiles = (int32_t)c.token_tiles,
        .k_blocks = (int32_t)c.k_blocks,
        .split_tiles = (int32_t)split,
        .range = (int32_t)(split * c.k_blocks / c.clusters),
        .longer_ranges = (int32_t)(split * c.k_blocks % c.clusters),
        .stages = stages_of(&c, guard->properties),
        .ahead = blocks_ahead(&c),
        .members = c.members,
    };
    if (is_split(&c)) {
        params.partials = scratch;
        params.flags = (uint64_t *)(void *)((char *)scratch + partial_bytes(&c));
        params.nonce = ql_cuda_nonce();
    }
    const ql_cu_result result = map_operands(&params, guard->driver, v);
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE,
                 "%s: %lld and %lld rows of %lld codes could not be described to the GPU: %s.",
                 ql_cuda_kernel_name(v->kernel), (long long)p->n, (long long)p->m, (long long)p->k,
                 ql_cuda_error(guard->driver, result));
        return -1;
    }
    const ql_cuda_grid grid = {
        .x = c.clusters * c.members,
        .y = 1,
        .threads = QL_W8A8_THREADS,
        .shared_bytes = head_bytes(v) + params.stages * QL_W8A8_STAGE_BYTES(v->rows, v->tokens) + meeting_bytes(&c),
        .cluster = c.members,
        .overlaps = true,
        .inner = true,
    };
    return ql_cuda_launch(guard, v->kernel, stream, &grid, &params, message);
}

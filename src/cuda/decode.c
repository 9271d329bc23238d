#include "decode.h"

#include "../../kernels/decode.h"

#include <limits.h>

enum { MOST_ROWS = 16, MOST_CLUSTER_SHIFT = 3, MOST_GROUPS = 16, UNWANTED = -1 };

/* Elements of x of which each block does better to put columns in order itself than to wait for a kernel that does it once. On an
 * H200, us in a chain, itself / after that kernel: 4096x6144 with 2 and 4 rows 6.1 / 6.9, 6.7 / 7.8; 8192x10240 with 1, 2 and 4
 * rows 13.4 / 13.5, 14.2 / 13.7, 15.7 / 14.6; 8 bit 21.2 / 22.4, 22.0 / 22.4, 23.5 / 22.8. */
enum { MOST_ORDERED = 16384 };

/* A row of the table below by the most tokens of a kernel: 4, 8, 16 or 1. */
#define TOKEN_TILE(tokens) ((tokens) == 1 ? 3 : (tokens) / 8)

/* One more than the kernel, by code, type of x, token tile and grouping; 0 where there is none. */
#define ENTRY(name, source, code, type, tokens, groups)                                                                \
    [code][(type) == QL_VALUE_BF16][TOKEN_TILE(tokens)][groups] = QL_KERNEL_##name + 1,
static const int kernels[QL_CODE_COUNT][2][4][MOST_GROUPS + 1] = {QL_DECODE_VARIANTS(ENTRY)};
/* Those for 2 to 8 rows whose columns are in another order, by the same. */
static const int cells_kernels[QL_CODE_COUNT][2][4][MOST_GROUPS + 1] = {QL_DECODE_CELLS_VARIANTS(ENTRY)};
#undef ENTRY

/* log2 of a power of two, or -1. */
static int log2_of(int64_t value) {
    int shift = 0;
    if (value < 1 || value & (value - 1)) return -1;
    while (value >> shift > 1) shift++;
    return shift;
}

/* The columns of a group, all where there is one. */
static int64_t group_columns(const ql_packed_params *p) { return p->groups == 1 ? p->k : p->group_size; }

/* How groups lie in batches of a kernel of `tokens`: the groups of a batch, 0 for one group, or -1 for what none knows. */
static int groups_of_batch(int code, int tokens, int64_t k, int64_t group_size) {
    const int64_t batch = QL_DECODE_BATCH_K(code, tokens);
    if (group_size >= k) return 0;
    if (group_size >= batch) return group_size % batch == 0 && log2_of(group_size / batch) >= 0 ? 1 : -1;
    return batch % group_size == 0 && batch / group_size <= MOST_GROUPS ? (int)(batch / group_size) : -1;
}

/* What tells a code's kernels from each other: the most tokens, and the groups of a batch (groups_of_batch). */
typedef struct form {
    int tokens, groups;
} form;

/* Two groups side by side want four tokens at most, and two groups. One token of double quantization has kernels of its own where a
 * batch has many groups. */
static form form_of(int code, int64_t m, int64_t k, int64_t group_size, bool nested) {
    const int groups = groups_of_batch(code, 4, k, group_size);
    const int tokens = m == 1 && nested && groups >= 8 ? 1 : m > 8 ? 16 : m <= 4 && groups >= 2 ? 4 : 8;
    return (form){tokens, groups_of_batch(code, tokens, k, group_size)};
}

/* Whether pieces of 16 bytes of x can be copied. */
static bool is_aligned(const ql_packed_params *p) {
    return (uintptr_t)p->x % 16 == 0 && (p->x_stride % 8 == 0 || p->m == 1);
}

/* Columns that a block of so many threads puts into cells (cells.cuh). */
static int64_t most_cells(int threads) { return QL_CELLS_PIECES * 8 * (int64_t)threads; }

/* The most tokens of the kernel that does. That for 4 puts many columns of some rows in order slower than that for 8: 4 rows of
 * 8192x10240 take 14.5 us and 13.3 on an H200, of 4096x6144 5.7 and 6.2. */
static int cells_tokens(const ql_packed_params *p) {
    return p->m <= 4 && 2 * p->k <= most_cells(QL_DECODE_THREADS) ? 4 : 8;
}

/* The kernel that puts columns of x in order as cells, or UNWANTED. One row is stored as quickly column by column (order.cuh). */
static int cells_kernel_of(const ql_packed_params *p) {
    if (!p->order || p->m < 2 || p->m > 8 || p->k % 8 || p->k > most_cells(QL_DECODE_THREADS) || !is_aligned(p))
        return UNWANTED;
    const int groups = groups_of_batch(p->code, 8, p->k, group_columns(p));
    if (groups < 0) return UNWANTED;
    return cells_kernels[p->code][p->x_type == QL_VALUE_BF16][TOKEN_TILE(cells_tokens(p))][groups] - 1;
}

static form form_of_product(const ql_packed_params *p) {
    const int64_t rows = cells_kernel_of(p) == UNWANTED ? p->m : cells_tokens(p);
    return form_of(p->code, rows, p->k, group_columns(p), p->nested_table != NULL);
}

/* The kernel, or UNWANTED. Whether absmax is quantized is no part of a problem, nor of a choice. */
static int kernel_of(const ql_cuda_problem *problem, bool nested) {
    const form is = form_of(problem->code, problem->m, problem->k, problem->group_size, nested);
    if (is.groups < 0 || problem->m < 1 || problem->m > MOST_ROWS) return UNWANTED;
    return kernels[problem->code][problem->x_type == QL_VALUE_BF16][TOKEN_TILE(is.tokens)][is.groups] - 1;
}

static int take(int *at, int64_t bytes) {
    const int start = *at;
    /* More than any block has, whatever else it takes. */
    *at = bytes > 1 << 24 || *at > 1 << 24 ? INT_MAX / 2 : start + (int)((bytes + 15) / 16 * 16);
    return start;
}

/* Where columns in another order pass through (order.cuh): eight a thread, as often as it takes or as there is room for. It
 * begins with a line of memory, so that lines stay whole. at: the bytes of shared memory without it; returns those with it. */
static int lay_stage(ql_decode_params *p, const ql_cuda_properties *gpu, int at) {
    const int64_t columns = (int64_t)p->teams * p->team_warps * 32 * 8, bytes = columns * (4 + p->m * 2);
    int end = (p->partials_at + 127) / 128 * 128;
    const int64_t wanted = ql_ceil_div(p->k, columns), room = (gpu->shared_bytes - (int64_t)end) / bytes;
    const int64_t times = wanted < room ? wanted : room;
    if (times < 1) return at;
    p->stage_columns = (int32_t)(times * columns);
    p->stage_at = take(&end, times * bytes);
    return end > at ? end : at;
}

/* Cuts a product for `warps` warps a team and clusters of 2^cluster_shift blocks; the bytes of shared memory that a block
 * takes, more than it has where it cannot be. */
static int cut(ql_decode_params *p, const ql_packed_params *product, const ql_cuda_properties *gpu, int warps,
               int cluster_shift) {
    const int code = product->code, cluster = 1 << cluster_shift;
    const bool table = code == QL_CODE_TABLE4, nested = product->nested_table != NULL;
    const int64_t k = product->k, m = product->m, tiles = ql_ceil_div(k, QL_TILE_K(code));
    const form is = form_of_product(product);
    const int tokens = is.tokens, groups = is.groups, abreast = QL_DECODE_ABREAST(code, tokens);
    const int batch_k = QL_DECODE_BATCH_K(code, tokens), batch_tiles = QL_DECODE_BATCH_TILES(code, tokens);
    const bool zeros = QL_DECODE_ZEROS(code, tokens, groups), cells = cells_kernel_of(product) != UNWANTED;
    *p = (ql_decode_params){.codes = product->codes,
                            .scales = product->scales,
                            .zeros = product->zeros,
                            .x = product->x,
                            .team_warps = warps,
                            .cluster_shift = cluster_shift,
                            .m = (int32_t)m,
                            .k = (int32_t)k,
                            .x_stride = (int32_t)product->x_stride,
                            .product = *product};
    p->bands = (int32_t)ql_ceil_div(product->n, QL_STRIP * abreast);
    p->lone = abreast == 2 && ql_ceil_div(product->n, QL_STRIP) % 2 ? p->bands - 1 : -1;
    p->band_bytes = (uint32_t)(tiles * QL_TILE_BYTES(code) * abreast);
    p->batches = (int32_t)ql_ceil_div(k, batch_k);
    p->block_batches = (int32_t)ql_ceil_div(p->batches, cluster);
    p->last_tiles = (int32_t)(tiles - (int64_t)(p->batches - 1) * batch_tiles);
    p->pairs = (int32_t)ql_ceil_div(product->groups, 2);
    p->group_shift = groups == 1 ? log2_of(product->group_size / batch_k) : 0;
    p->nested_shift = nested ? log2_of(product->nested_blocksize) : 0;
    p->undivided = nested && groups > 0 && product->groups % groups == 0 && product->nested_blocksize % groups == 0;
    p->bare_zero = product->zeros         ? -1
                   : code == QL_CODE_INT8 ? 128
                   : code == QL_CODE_INT4 ? 0x88
                   : code == QL_CODE_INT3 ? 0x44
                                          : 0x22;
    p->scale_size = nested ? 1 : table || product->scales_type == QL_VALUE_F32 ? 4 : 2;

    p->teams = QL_DECODE_THREADS / 32 / warps;
    p->warp_team = (65536 + warps - 1) / warps;
    /* Clusters lie in one part of the GPU each: a part's last few multiprocessors take none of the larger ones. */
    const int64_t usable = cluster > 2 ? gpu->multiprocessors * 10 / 11 : gpu->multiprocessors;
    const int64_t room = usable / cluster > 0 ? usable / cluster : 1, wanted = ql_ceil_div(p->bands, p->teams);
    p->blocks = (int32_t)(room < wanted ? room : wanted);
    /* Where a few less do it in no more rounds: the small kernels between layers then have a place while this one runs. */
    const int64_t even = ql_ceil_div(wanted, ql_ceil_div(wanted, p->blocks));
    if (even >= p->blocks - p->blocks / 32) p->blocks = (int32_t)even;
    p->hop = p->blocks * p->teams;
    p->hop_bytes = (int64_t)p->band_bytes * p->hop;
    p->hop_entries = (int32_t)((int64_t)p->hop * abreast * p->pairs * 32);
    p->walk_bytes = warps * QL_DECODE_BATCH_BYTES(code, tokens);
    p->walk_entries = warps * (groups / 2) * 32;
    p->walk_x = warps * batch_k * (cells ? QL_DECODE_CELL : 2);
    p->walk_sums = warps * groups * tokens * 4;
    p->rounds = (int32_t)ql_ceil_div(p->bands, p->hop);
    p->token_part = (int32_t)((65536 + m - 1) / m);
    /* Where a warp walks few batches the second is better asked for when it is wanted. */
    p->ahead = p->rounds * ql_ceil_div(p->block_batches, warps) > 3;

    int at = 0;
    if (table) take(&at, QL_DECODE_PAIRS_BYTES);
    p->x_aligned = !product->order && is_aligned(product);
    p->x_pitch = p->block_batches * batch_k * 2;
    p->x_at = take(&at, cells   ? (int64_t)p->block_batches * batch_k * QL_DECODE_CELL
                        : zeros ? (m + 1) * p->x_pitch + 64
                                : m * p->x_pitch);
    p->sums_at = take(&at, table ? 0 : (int64_t)p->teams * (groups ? groups * p->block_batches : warps) * tokens * 4);
    p->exchange_at =
        take(&at, cluster > 1 ? ql_ceil_div(p->rounds, cluster) * p->teams * cluster * m * 64 * abreast : 0);
    /* As many rounds as there is room for; if not all, half of that in each of two buffers: one is filled while the other is
     * added up. Where that makes warps of more than 8 tokens meet two times more often, one buffer. */
    const int64_t round_bytes = (int64_t)p->teams * warps * m * 64 * abreast;
    const int64_t fit = at < gpu->shared_bytes ? (gpu->shared_bytes - at) / round_bytes : 0;
    const int64_t flushes = fit >= 1 ? ql_ceil_div(p->rounds, fit) : p->rounds;
    const bool two = fit >= 2 && fit < p->rounds && (m <= 8 || ql_ceil_div(p->rounds, fit / 2) <= flushes + 1);
    const int64_t rounds = two ? fit / 2 : ql_ceil_div(p->rounds, flushes);
    p->flush_rounds = (int32_t)rounds;
    p->partials_bytes = two ? (int32_t)(rounds * round_bytes) : 0;
    p->partials_at = take(&at, rounds * round_bytes * (two ? 2 : 1));
    return product->order && is_aligned(product) && QL_DECODE_ORDERED(code, tokens, groups) ? lay_stage(p, gpu, at)
                                                                                            : at;
}

static bool sizes_fit(const ql_packed_params *p) {
    const int64_t places = QL_GROUP_PLACES(p->n, p->groups);
    return p->n > 0 && p->k > 0 && p->n <= INT_MAX - 16 && p->k <= 1 << 26 && places <= INT_MAX &&
           p->x_stride <= INT_MAX / 32 && p->x_stride >= -(INT_MAX / 32);
}

/* A way to cut a product, and what it costs, in eighths of a batch: the batches that one warp walks, where the multiprocessors
 * share bands, an eighth more in a cluster larger than x needs; half of each batch of a band again for its sums of x in the
 * first one, a quarter of a batch to leave a band's sums, and three eighths each time that all warps meet because there is no
 * room for more of them. Tables have no sums of x, but with up to four tokens more to do for a band; bands of two strips have
 * twice as many sums of their own, of which more tokens leave more. Of equal ones the smaller cluster, of tables and up to four
 * tokens the one whose blocks have fewest batches, then the one whose blocks have most warps, then the one whose warps are idle
 * least, then the one with most of them in a team. */
typedef struct way {
    int64_t cost;
    int cluster_shift;
    int64_t batches; /* of a block, where they count */
    int present, idle, warps;
} way;

static bool is_better(const way *a, const way *b) {
    if (a->cost != b->cost) return a->cost < b->cost;
    if (a->cluster_shift != b->cluster_shift) return a->cluster_shift < b->cluster_shift;
    if (a->batches != b->batches) return a->batches < b->batches;
    if (a->present != b->present) return a->present > b->present;
    return a->idle != b->idle ? a->idle < b->idle : a->warps > b->warps;
}

enum { WIDTHS = 7, CLUSTERS = 2 };

/* Inserts into ways, which are sorted, those of a cluster size that fit; how many there are then. */
static int add_ways(way ways[WIDTHS * CLUSTERS], int count, const ql_cuda_device *device,
                    const ql_packed_params *product, int cluster_shift) {
    const int tokens = form_of_product(product).tokens;
    const int all = QL_DECODE_THREADS / 32, weight = count ? 9 : 8, cluster = 1 << cluster_shift;
    const int64_t whole = ql_ceil_div(product->k, QL_DECODE_BATCH_K(product->code, tokens)),
                  batches = ql_ceil_div(whole, cluster);
    /* Each block has a part of K. */
    if (batches * (cluster - 1) >= whole) return count;
    const int widths[WIDTHS] = {16, 14, 8, 7, 5, 4, batches < 4 ? (int)batches : 0};
    ql_decode_params p;
    for (int i = 0; i < WIDTHS; i++) {
        const int warps = widths[i];
        if (warps < 1 || warps > all || warps > batches ||
            cut(&p, product, &device->properties, warps, cluster_shift) > device->properties.shared_bytes)
            continue;
        const int64_t turns = ql_ceil_div(batches, warps), meetings = ql_ceil_div(p.rounds, p.flush_rounds) - 1;
        const bool twice = QL_DECODE_ABREAST(product->code, tokens) == 2;
        const bool few = product->code == QL_CODE_TABLE4 && tokens <= 4;
        const int64_t of_x = twice || few ? 0 : 4, meet = twice ? 6 : 3;
        const int64_t leave = twice ? 2 + 3 * product->m / 8 : few ? 3 : 2;
        const way new = {p.rounds * turns * weight + of_x * turns + leave * p.rounds + meet * meetings,
                         cluster_shift,
                         few ? p.rounds * p.teams * batches : 0,
                         p.teams * warps,
                         (int)(turns * warps - batches),
                         warps};
        int place = count++;
        for (; place > 0 && is_better(&new, &ways[place - 1]); place--) ways[place] = ways[place - 1];
        ways[place] = new;
    }
    return count;
}

static int candidates(ql_cuda_choice *out, int room, const ql_cuda_device *device, const ql_cuda_problem *problem) {
    const int kernel = kernel_of(problem, false);
    if (kernel == UNWANTED || !device->kernels[kernel]) return 0;
    ql_packed_params product = {.m = problem->m, .n = problem->n, .k = problem->k, .code = problem->code};
    product.group_size = problem->group_size;
    product.groups = ql_ceil_div(problem->k, problem->group_size);
    if (!sizes_fit(&product)) return 0;
    const int most = device->properties.major >= 9 ? MOST_CLUSTER_SHIFT : 0;
    way ways[WIDTHS * CLUSTERS];
    int count = 0, smallest = most;
    for (int shift = 0; shift <= most && shift <= smallest + 1; shift++) {
        const int before = count;
        count = add_ways(ways, count, device, &product, shift);
        if (!before && count) smallest = shift;
    }
    if (count > room) count = room;
    for (int i = 0; i < count; i++)
        out[i] =
            (ql_cuda_choice){.kernel = (ql_cuda_kernel)kernel, .parameter = ways[i].warps + 32 * ways[i].cluster_shift};
    return count;
}

/* Whether the kernels know scales like these. */
static bool scales_fit(const ql_packed_params *p) {
    const form is = form_of_product(p);
    if (p->code != QL_CODE_TABLE4) return !is.groups || p->scales_type != QL_VALUE_F32;
    if (!p->nested_table) return true;
    if (log2_of(p->nested_blocksize) < 0) return false;
    /* Lanes find the block of each group (nested.cuh), or of a batch's first and last one. */
    if (QL_DECODE_ABREAST(p->code, is.tokens) == 2) return true;
    return p->nested_blocksize >= is.groups &&
           (QL_DECODE_DIVIDED(is.tokens, is.groups) > 1 || p->groups % (is.groups ? is.groups : 1) == 0);
}

static bool prepare(ql_cuda_prepared *prepared, const ql_cuda_device *device, const ql_packed_params *p,
                    ql_cuda_choice choice) {
    const int warps = choice.parameter % 32, cluster_shift = choice.parameter / 32;
    if (warps < 1 || warps > QL_DECODE_THREADS / 32 || cluster_shift < 0 || cluster_shift > MOST_CLUSTER_SHIFT ||
        !sizes_fit(p))
        return false;
    const ql_cuda_problem problem = ql_cuda_problem_of(p);
    if (kernel_of(&problem, false) != (int)choice.kernel) return false;
    if (!scales_fit(p)) return false;
    ql_decode_params *params = &prepared->decode;
    const int bytes = cut(params, p, &device->properties, warps, cluster_shift);
    if (bytes > device->properties.shared_bytes) return false;
    const int threads = params->teams * warps * 32, cells_kernel = cells_kernel_of(p);
    if (cells_kernel != UNWANTED) {
        if (cluster_shift || p->k > most_cells(threads)) return false;
        prepared->kernel = (ql_cuda_kernel)cells_kernel;
    } else {
        /* Columns that are loaded one by one are for one row, and as they are. */
        if (!params->x_aligned && !params->stage_columns && (p->m > 1 || p->order)) return false;
        if (p->order && p->m * p->k > MOST_ORDERED) return false;
        prepared->kernel = (ql_cuda_kernel)kernel_of(&problem, p->nested_table != NULL);
    }
    if (!device->kernels[prepared->kernel]) return false;
    prepared->grid = (ql_cuda_grid){.x = (int64_t)params->blocks << cluster_shift,
                                    .y = 1,
                                    .threads = threads,
                                    .shared_bytes = bytes,
                                    .cluster = 1 << cluster_shift,
                                    .overlaps = true};
    prepared->scratch_bytes = 0;
    return true;
}

static int launch(const ql_cuda_guard *guard, void *stream, ql_cuda_prepared *prepared, const void *x, void *nothing,
                  char message[QL_CUDA_MESSAGE]) {
    (void)nothing;
    prepared->decode.x = prepared->decode.product.x = x;
    return ql_cuda_launch(guard, prepared->kernel, stream, &prepared->grid, &prepared->decode, message);
}

const ql_cuda_product_engine ql_cuda_decode = {
    .most_rows = MOST_ROWS, .candidates = candidates, .prepare = prepare, .launch = launch};

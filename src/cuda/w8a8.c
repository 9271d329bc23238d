#include "w8a8.h"

#include "../../kernels/params.h"
#include "../../kernels/w8a8_decode.h"
#include "../../kernels/w8a8_mma.h"
#include "memo.h"
#include "nonce.h"
#include "w8a8_wgmma.h"

#include <limits.h>

/* Rows that the decode kernels take. */
enum { MOST_ROWS = 16 };

enum {
    MOST_CLUSTER = 8,
    LEAST_SLOTS = 2,
    EARLY_SLOTS = 4,
    SOON_SLOTS = 3,
    KEPT_CHUNKS = 8,
    FEW_WARPS = 8,        /* of a team: fewer than these */
    NARROW_VALUES = 8192, /* of x, at most, where a block has half of its threads */
    ALIGNMENT = 256       /* of parts of scratch */
};

/* FP8's least scale of a token: formats/fp8.h. */
#define LEAST_SCALE (1.0f / (448.0f * 512.0f))

/* ---- what a weight is to the kernels ---- */

static ql_cuda_w8a8 int8_of(const ql_weight *weight) {
    return (ql_cuda_w8a8){.params = {.codes = (const uint8_t *)weight->int8.codes,
                                     .w_scales = weight->int8.absmax,
                                     .row_stride = weight->k,
                                     .w_row_stride = 1,
                                     .w_rows = 1,
                                     .code = QL_W8A8_INT8},
                          .fast = true,
                          .mode = QL_W8A8_TOKEN,
                          .threshold = weight->int8.threshold};
}

static ql_cuda_w8a8 fp8_of(const ql_weight *weight) {
    static const int modes[] = {
        [QL_FP8_STATIC] = QL_W8A8_STATIC,
        [QL_FP8_TENSOR] = QL_W8A8_TENSOR,
        [QL_FP8_TOKEN] = QL_W8A8_TOKEN,
        [QL_FP8_GROUP] = QL_W8A8_GROUPS,
    };
    const ql_fp8 *fp8 = &weight->fp8;
    const bool across = fp8->block_k < weight->k;
    const int64_t rows = fp8->block_n;
    return (ql_cuda_w8a8){.params = {.codes = fp8->weight,
                                     .w_scales = fp8->scale,
                                     .row_stride = fp8->row_stride,
                                     .w_row_stride = fp8->scale_stride,
                                     .w_group_stride = across,
                                     .w_rows = rows < weight->n || rows == QL_W8A8_GROUP ? rows : weight->n,
                                     .promoted = fp8->promoted,
                                     .code = QL_W8A8_E4M3},
                          /* A block of 256 columns would have one scale for two groups. */
                          .fast = fp8->col_stride == 1 && (!across || fp8->block_k == QL_W8A8_GROUP),
                          .mode = modes[fp8->activation],
                          .input_scale = fp8->input_scale,
                          .upper_bound = fp8->input_upper_bound};
}

ql_cuda_w8a8 ql_cuda_w8a8_of(const ql_weight *weight) {
    ql_cuda_w8a8 product = weight->format == QL_FORMAT_INT8 ? int8_of(weight) : fp8_of(weight);
    product.params.n = weight->n;
    product.params.k = weight->k;
    return product;
}

static bool by_groups(const ql_cuda_w8a8 *product) {
    return product->mode == QL_W8A8_GROUPS || product->params.w_group_stride;
}

static bool has_mask(const ql_cuda_w8a8 *product) {
    return product->params.code == QL_W8A8_INT8 && product->threshold > 0.0f;
}

static int64_t pitch_of(const ql_cuda_w8a8 *product) {
    return ql_ceil_div(product->params.k, QL_W8A8_PITCH) * QL_W8A8_PITCH;
}

/* A row of group scales, so that a tile of tokens has them at multiples of 16 bytes. */
static int64_t group_stride_of(const ql_cuda_w8a8 *product) {
    return product->mode == QL_W8A8_GROUPS ? ql_ceil_div(product->params.m, 4) * 4 : 0;
}

/* ---- the quantizer ---- */

static int64_t tensor_blocks(const ql_cuda_device *device, const ql_cuda_w8a8 *product) {
    int64_t most = device->properties.multiprocessors;
    if (most > QL_W8A8_TENSOR_BLOCKS) most = QL_W8A8_TENSOR_BLOCKS;
    return product->params.m < most ? product->params.m : most;
}

static ql_w8a8_quantize_params quantizer_of(const ql_cuda_w8a8 *product) {
    const ql_w8a8_params *p = &product->params;
    const int64_t size = p->x_type == QL_VALUE_F32 ? 4 : 2;
    return (ql_w8a8_quantize_params){
        .x = p->x,
        .m = p->m,
        .k = p->k,
        .pitch = pitch_of(product),
        .x_stride = p->x_stride,
        .group_stride = group_stride_of(product),
        .code = p->code,
        .mode = product->mode,
        .x_type = p->x_type,
        .vector = (uintptr_t)p->x % 16 == 0 && (p->m == 1 || p->x_stride * size % 16 == 0),
        .threshold = product->threshold,
        .input_scale = product->input_scale,
        .upper_bound = product->upper_bound,
        .least_scale = LEAST_SCALE,
    };
}

/* By mode, code and type of x. */
static ql_cuda_kernel rows_kernel(const ql_w8a8_quantize_params *p) {
    const bool half = p->x_type == QL_VALUE_F16;
    if (p->code == QL_W8A8_INT8) return half ? QL_KERNEL_ql_w8a8_rows_int8_f16 : QL_KERNEL_ql_w8a8_rows_int8_bf16;
    if (p->mode == QL_W8A8_GROUPS) return half ? QL_KERNEL_ql_w8a8_rows_groups_f16 : QL_KERNEL_ql_w8a8_rows_groups_bf16;
    return half ? QL_KERNEL_ql_w8a8_rows_tokens_f16 : QL_KERNEL_ql_w8a8_rows_tokens_bf16;
}

/* Whether a thread block can hold a row, whose scales are its own. Of the products only those on wgmma reset the mark that
 * it leaves with a mask. */
static bool has_short_rows(const ql_cuda_device *device, const ql_w8a8_quantize_params *p, ql_cuda_w8a8_engine engine) {
    return p->codes && p->vector && p->x_type != QL_VALUE_F32 && p->k % 8 == 0 &&
           p->pitch <= QL_W8A8_ROW_THREADS * QL_W8A8_ROW_RUNS * 8 &&
           (p->mode == QL_W8A8_TOKEN || p->mode == QL_W8A8_GROUPS) && (!p->outliers || engine == QL_CUDA_W8A8_WGMMA) &&
           device->kernels[rows_kernel(p)];
}

/* Threads that hold few runs are many, so that a row is done soon; with more rows than so many threads have room for, few
 * threads with many runs each do all of them sooner. */
static int launch_rows(const ql_cuda_guard *guard, void *stream, ql_w8a8_quantize_params *p,
                       char message[QL_CUDA_MESSAGE]) {
    enum { BUSY_THREADS = 1024 /* of a multiprocessor */ };
    const int64_t runs = ql_ceil_div(p->pitch, 8);
    const int64_t multiprocessors = guard->properties->multiprocessors, rows = ql_ceil_div(p->m, multiprocessors);
    int each = 0;
    int64_t threads;
    do {
        each++;
        threads = ql_ceil_div(runs, each * 32) * 32;
    } while (each < QL_W8A8_ROW_RUNS && threads * rows > BUSY_THREADS);
    const int64_t blocks = multiprocessors * (BUSY_THREADS / threads);
    p->row_blocks = (int32_t)(blocks < p->m ? blocks : p->m);
    const ql_cuda_grid grid = {
        .x = p->row_blocks + (p->outliers != NULL), .y = 1, .threads = (int)threads, .overlaps = true};
    return ql_cuda_launch(guard, rows_kernel(p), stream, &grid, p, message);
}

static int launch_quantizer(const ql_cuda_guard *guard, void *stream, ql_w8a8_quantize_params *p,
                            const ql_cuda_w8a8 *product, char message[QL_CUDA_MESSAGE]) {
    const int64_t runs = ql_ceil_div(p->pitch, 8 * 32) * 32;
    const int threads = runs > QL_W8A8_ROW_THREADS ? QL_W8A8_ROW_THREADS : (int)runs;
    int64_t blocks = p->m;
    if (p->mode == QL_W8A8_GROUPS) blocks = ql_ceil_div(p->m * (p->pitch / QL_W8A8_GROUP), threads / 16);
    if (p->mode == QL_W8A8_TENSOR) blocks = tensor_blocks(guard->device, product);
    p->row_blocks = (int32_t)(blocks < 1 << 20 ? blocks : 1 << 20);
    const int64_t columns = p->outliers ? p->pitch / QL_W8A8_OUTLIER_COLUMNS : 0;
    const ql_cuda_grid grid = {.x = p->row_blocks + columns, .y = 1, .threads = threads, .overlaps = true};
    return ql_cuda_launch(guard, QL_KERNEL_ql_w8a8_quantize, stream, &grid, p, message);
}

/* ---- decode ---- */

/* By code and groups: with the activations quantized by the blocks themselves, or before. */
static ql_cuda_kernel decode_kernel(const ql_cuda_w8a8 *product, bool own) {
    if (product->params.code == QL_W8A8_INT8)
        return own ? QL_KERNEL_ql_w8a8_decode_int8_8 : QL_KERNEL_ql_w8a8_decode_int8_16;
    if (by_groups(product)) return own ? QL_KERNEL_ql_w8a8_decode_groups_8 : QL_KERNEL_ql_w8a8_decode_groups_16;
    return own ? QL_KERNEL_ql_w8a8_decode_e4m3_8 : QL_KERNEL_ql_w8a8_decode_e4m3_16;
}

static int32_t take(int64_t *at, int64_t bytes) {
    const int64_t start = *at;
    *at = start + (bytes + 127) / 128 * 128;
    return (int32_t)start;
}

/* Whether blocks could quantize x themselves, if its rows are short enough for their threads to hold: 16-bit values, 8 at a
 * time, with scales of the kind that the product wants. */
static bool may_hold(const ql_cuda_w8a8 *product) {
    const ql_w8a8_params *w = &product->params;
    const bool vector = (uintptr_t)w->x % 16 == 0 &&
                        ((w->x_stride % 8 == 0 && w->x_stride >= 0 && w->x_stride <= INT32_MAX / 2) || w->m == 1);
    return w->x_type != QL_VALUE_F32 && vector && w->m <= QL_W8A8_OWN_TOKENS &&
           by_groups(product) == (product->mode == QL_W8A8_GROUPS);
}

/* Cuts a product for teams of `warps` warps and clusters of `cluster`; the bytes of shared memory that a block takes, or -1
 * where it does not have so many. */
static int64_t cut(ql_w8a8_decode_params *p, const ql_cuda_w8a8 *product, const ql_cuda_properties *gpu, bool own,
                   int warps, int cluster) {
    const int64_t m = product->params.m, tokens = own ? QL_W8A8_OWN_TOKENS : 16,
                  groups = ql_ceil_div(product->params.k, QL_W8A8_GROUP);
    const int64_t pieces = product->params.x_type == QL_VALUE_F32 ? 3 : 1;
    const int64_t room = gpu->multiprocessors / cluster;
    if (room < 1) return -1;
    p->cluster = cluster;
    p->warps = warps;
    p->warp_team = (65536 + warps - 1) / warps;
    p->cluster_shift = 0;
    while (1 << p->cluster_shift < cluster) p->cluster_shift++;
    /* Half as many warps do half as often what each does once, which counts where x does not. */
    const int most = QL_W8A8_DECODE_THREADS / 32 / (own && m * product->params.k <= NARROW_VALUES ? 2 : 1);
    p->teams = most / warps;
    if (p->teams > QL_W8A8_MOST_TEAMS) p->teams = QL_W8A8_MOST_TEAMS;
    if (p->teams < 1) return -1;
    p->strips = (int32_t)ql_ceil_div(product->params.n, QL_W8A8_STRIP);
    p->batches = (int32_t)ql_ceil_div(ql_ceil_div(groups, cluster), warps);
    p->span = p->batches * warps * QL_W8A8_GROUP;
    const int64_t wanted = ql_ceil_div(p->strips, p->teams), all = (int64_t)p->teams * warps;
    p->blocks = (int32_t)(room < wanted ? room : wanted);
    p->rounds = (int32_t)ql_ceil_div(p->strips, (int64_t)p->blocks * p->teams);
    p->outputs = p->rounds * p->teams * QL_W8A8_STRIP;
    p->row_pieces = (int32_t)(ql_ceil_div(p->span, (own ? 8 : 16) * 32) * 32);
    if (own && m * p->row_pieces > QL_W8A8_OWN_HELD * all * 32) return -1;
    p->per_row = (uint32_t)(((UINT64_C(1) << 32) + (uint64_t)p->row_pieces - 1) / (uint64_t)p->row_pieces);
    p->turn = (int32_t)(p->row_pieces / 32 / m * 32);
    int64_t at = 0;
    p->kept = has_mask(product) ? KEPT_CHUNKS : 0;
    p->x_pitch = own && product->params.code == QL_W8A8_E4M3 ? p->span * 2 + 16 : p->span + 64;
    take(&at, m * p->x_pitch);
    p->scales_at = take(&at, (by_groups(product) ? p->span / QL_W8A8_GROUP * tokens : tokens) * 4);
    p->mask_at = take(&at, product->params.code == QL_W8A8_INT8 ? p->span / 8 : 0);
    p->places_at = take(&at, has_mask(product) ? p->span / 64 : 0);
    p->chunks_at = take(&at, p->kept * 2);
    p->kept_at = take(&at, p->kept * pieces * m * 128);
    p->marked_at = take(&at, has_mask(product) ? 4 : 0);
    p->most_at = take(&at, own ? QL_W8A8_OWN_HELD * all * 4 : 0);
    p->encoders_at = take(&at, own ? m * 16 : 0);
    p->sums_at = take(&at, QL_W8A8_SUMS_BUFFERS(tokens) * all * m * QL_W8A8_SUMS_PITCH * 4);
    p->exchange_at = take(&at, cluster > 1 ? ql_ceil_div(p->rounds, cluster) * p->teams * cluster * m * 64 : 0);
    p->outputs_at = take(&at, (int64_t)p->outputs * 8);
    p->ring_scales_at = take(&at, by_groups(product) ? all * QL_W8A8_MOST_SLOTS * QL_W8A8_STRIP * 4 : 0);
    p->ring_at = take(&at, 0);
    const int64_t slots = (gpu->shared_bytes - at) / (all * QL_W8A8_SLOT);
    p->slots = (int32_t)(slots < QL_W8A8_MOST_SLOTS ? slots : QL_W8A8_MOST_SLOTS);
    /* Where no launch overlaps the one before there is nothing to wait for, and what comes first is x; one row of it does
     * not wait long for a slot, or two where a team has one strip alone. To ask for slots takes long while memory is busy, so
     * the rest waits until x has been looked at, where that is much, or is all that memory waits for. */
    const bool overlaps = ql_cuda_overlap_allowed(), alone = !overlaps && m == 1 && p->rounds == 1;
    const int32_t early = !own ? EARLY_SLOTS : (overlaps ? 1 : 0) + (m == 1 ? 1 : 0) + (alone ? 1 : 0);
    p->early = p->slots > early ? early : p->slots - 1;
    p->soon = !overlaps && (m > 1 || (alone && !by_groups(product))) ? SOON_SLOTS : p->slots;
    if (p->soon < p->early) p->soon = p->early;
    if (p->soon > p->slots) p->soon = p->slots;
    return p->slots < LEAST_SLOTS ? -1 : at + p->slots * all * QL_W8A8_SLOT;
}

/* The way whose warps walk fewest slots, where the multiprocessors share strips; of equal ones the one with most teams, as
 * these meet least often. Where blocks quantize x themselves a meeting takes 0.07 of a slot for each warp, and a few warps
 * are long at a strip if it is their only one. Warps of a team plus 32 times the cluster, or 0 where there is no way. */
static int weigh_ways(const ql_cuda_device *device, const ql_cuda_w8a8 *product, bool own) {
    static const int widths[] = {16, 15, 14, 13, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1};
    /* An exchange more, and of larger clusters fewer fit. */
    static const int weight[MOST_CLUSTER + 1] = {[1] = 8, [2] = 9, [4] = 12, [8] = 16};
    const int most = own || device->properties.major < 9 ? 1 : MOST_CLUSTER;
    const int64_t all = ql_ceil_div(product->params.k, QL_W8A8_GROUP);
    int64_t least = INT64_MAX;
    int best = 0;
    for (int cluster = 1; cluster <= most; cluster *= 2)
        for (int i = 0; i < (int)(sizeof widths / sizeof *widths); i++) {
            ql_w8a8_decode_params p;
            const int64_t groups = ql_ceil_div(all, cluster);
            /* Each block has a part of K. */
            if (widths[i] > groups || groups * (cluster - 1) >= all) continue;
            if (cut(&p, product, &device->properties, own, widths[i], cluster) < 0) continue;
            if (own && widths[i] < FEW_WARPS && all >= FEW_WARPS && p.rounds == 1) continue;
            const int64_t meeting = own ? widths[i] * 11 : 0;
            const int64_t steps = p.rounds * (p.batches * weight[cluster] * 20 + meeting) + (p.slots < 4 ? 80 : 0);
            const int64_t cost = steps * 64 + widths[i];
            if (cost >= least) continue;
            least = cost;
            best = widths[i] + 32 * cluster;
        }
    return best;
}

static bool plan_decode(ql_cuda_w8a8_plan *plan, const ql_cuda_device *device, const ql_cuda_w8a8 *product, bool own) {
    if (!device->kernels[decode_kernel(product, own)]) return false;
    const int memo = QL_CUDA_MEMO_W8A8_DECODE + own + 2 * by_groups(product) + 4 * has_mask(product);
    const ql_cuda_problem problem = {.n = product->params.n,
                                     .k = product->params.k,
                                     .m = product->params.m,
                                     .code = product->params.code,
                                     .x_type = product->params.x_type};
    ql_cuda_choice choice = {.kernel = decode_kernel(product, own)};
    bool found;
    if (!ql_cuda_memo_find(&found, &choice, memo, device->ordinal, &problem)) {
        choice.parameter = weigh_ways(device, product, own);
        found = choice.parameter > 0;
        ql_cuda_memo_keep(found, choice, memo, device->ordinal, &problem);
    }
    if (!found) return false;
    plan->engine = QL_CUDA_W8A8_DECODE;
    plan->choice = choice;
    plan->own = own;
    return true;
}

/* What is read 16 bytes at a time, with 32-bit indices. */
static bool suits_tensor_cores(const ql_cuda_w8a8 *product) {
    const ql_w8a8_params *p = &product->params;
    return product->fast && p->k % 16 == 0 && p->row_stride % 16 == 0 && p->row_stride >= p->k &&
           (uintptr_t)p->codes % 16 == 0 && p->n <= INT_MAX / 2 && p->k <= 1 << 26 && p->w_rows >= 1;
}

static int launch_decode(const ql_cuda_guard *guard, void *stream, const ql_cuda_w8a8_plan *plan,
                         const ql_cuda_w8a8 *product, const ql_w8a8_params *filled, char message[QL_CUDA_MESSAGE]) {
    ql_w8a8_decode_params p = {.product = *filled};
    const int warps = plan->choice.parameter % 32, cluster = plan->choice.parameter / 32;
    const int64_t bytes = cut(&p, product, guard->properties, plan->own, warps, cluster);
    /* Where each block quantizes x, the mask is in its shared memory; only whether there is one is asked for here. */
    if (plan->own) {
        p.quantize = quantizer_of(product);
        p.x_row_bytes = product->params.m > 1 ? (int32_t)(product->params.x_stride * 2) : 0;
        p.product.outliers = has_mask(product) ? (const uint32_t *)(const void *)filled->codes : NULL;
    }
    const ql_cuda_grid grid = {.x = (int64_t)p.blocks * p.cluster,
                               .y = 1,
                               .threads = p.teams * p.warps * 32,
                               .shared_bytes = (int)bytes,
                               .cluster = p.cluster,
                               .overlaps = true,
                               .inner = !plan->own};
    return ql_cuda_launch(guard, plan->choice.kernel, stream, &grid, &p, message);
}

/* ---- mma.sync ---- */

static ql_cuda_kernel mma_kernel(const ql_cuda_w8a8 *product) {
    if (product->params.code == QL_W8A8_INT8) return QL_KERNEL_ql_w8a8_mma_int8;
    return by_groups(product) ? QL_KERNEL_ql_w8a8_mma_groups : QL_KERNEL_ql_w8a8_mma_e4m3;
}

static bool plan_mma(ql_cuda_w8a8_plan *plan, const ql_cuda_device *device, const ql_cuda_w8a8 *product) {
    plan->choice.kernel = mma_kernel(product);
    if (!device->kernels[plan->choice.kernel]) return false;
    plan->engine = QL_CUDA_W8A8_MMA;
    return true;
}

/* A launch reaches at most so many blocks along m; more rows take several. */
enum { MOST_GRID_M = 65535 };

static int launch_mma(const ql_cuda_guard *guard, void *stream, ql_cuda_kernel kernel, ql_w8a8_params p,
                      char message[QL_CUDA_MESSAGE]) {
    const int64_t m = p.m, most = (int64_t)MOST_GRID_M * QL_W8A8_MMA_TOKENS;
    const int64_t out_bytes = p.n * (p.out_type == QL_VALUE_F32 ? 4 : 2), x_bytes = p.x_type == QL_VALUE_F32 ? 4 : 2;
    for (int64_t done = 0; done < m; done += most) {
        p.m = m - done < most ? m - done : most;
        const ql_cuda_grid grid = {.x = ql_ceil_div(p.n, QL_W8A8_MMA_ROWS),
                                   .y = ql_ceil_div(p.m, QL_W8A8_MMA_TOKENS),
                                   .threads = QL_W8A8_MMA_THREADS,
                                   .shared_bytes = QL_W8A8_MMA_SHARED,
                                   .overlaps = true,
                                   .inner = true};
        if (ql_cuda_launch(guard, kernel, stream, &grid, &p, message) < 0) return -1;
        p.out = (char *)p.out + most * out_bytes;
        p.x = (const char *)p.x + most * p.x_stride * x_bytes;
        p.x_codes += most * p.x_pitch;
        p.x_scales += most * p.x_token_stride;
    }
    return 0;
}

/* ---- choosing and launching ---- */

/* The parameters with the places of what the quantizer makes. */
static ql_w8a8_params filled_params(const ql_cuda_w8a8_plan *plan, const ql_cuda_w8a8 *product, void *scratch) {
    ql_w8a8_params p = product->params;
    if (plan->own) return p;
    char *at = scratch;
    p.x_codes = scratch;
    p.x_scales = (const float *)(const void *)(at + plan->scales_at);
    p.outliers = has_mask(product) ? (const uint32_t *)(const void *)(at + plan->outliers_at) : NULL;
    p.x_pitch = pitch_of(product);
    p.x_token_stride = product->mode == QL_W8A8_TOKEN || product->mode == QL_W8A8_GROUPS;
    p.x_group_stride = group_stride_of(product);
    /* As exact as sums of fewer columns, which decode has; so few rows take no longer. */
    p.promoted |= p.code == QL_W8A8_E4M3 && p.m <= QL_W8A8_OWN_TOKENS;
    return p;
}

/* Adds a part of scratch: its place, or -1 once anything did not fit. */
static int64_t add_part(int64_t *end, int64_t count, int64_t size) {
    int64_t bytes, start = *end;
    if (start < 0 || __builtin_mul_overflow(count, size, &bytes) ||
        __builtin_add_overflow(bytes, ALIGNMENT - 1, &bytes) ||
        __builtin_add_overflow(start, bytes / ALIGNMENT * ALIGNMENT, end)) {
        *end = -1;
        return 0;
    }
    return start;
}

/* What the quantizer leaves, and where its blocks meet. */
static int64_t quantizer_scratch(ql_cuda_w8a8_plan *plan, const ql_cuda_device *device, const ql_cuda_w8a8 *product) {
    const int64_t m = product->params.m, pitch = pitch_of(product), meeting = tensor_blocks(device, product);
    const bool as_values = plan->engine == QL_CUDA_W8A8_BASE && product->params.code == QL_W8A8_E4M3;
    const int64_t stride = group_stride_of(product);
    int64_t end = 0;
    add_part(&end, m, as_values ? product->params.k * 4 : pitch);
    plan->scales_at = add_part(&end, stride ? stride : m, stride ? pitch / QL_W8A8_GROUP * 4 : 4);
    plan->outliers_at = add_part(&end, has_mask(product) ? pitch / 32 + 2 : 0, 4); /* and its mark */
    plan->meeting_at = add_part(&end, product->mode == QL_W8A8_TENSOR ? meeting * meeting : 0, 12);
    return end;
}

static bool plan_wgmma(ql_cuda_w8a8_plan *plan, const ql_cuda_device *device, const ql_cuda_w8a8 *product) {
    /* Scratch is aligned to more than any engine asks for, so any such address stands for it. */
    const ql_w8a8_params stand_in = filled_params(plan, product, (void *)(uintptr_t)ALIGNMENT);
    if (!ql_cuda_w8a8_wgmma_takes(&plan->choice, device, &stand_in)) return false;
    plan->engine = QL_CUDA_W8A8_WGMMA;
    return true;
}

/* Whether one of the fast kernels takes the product: who is asked first is who runs such a number of rows soonest. wgmma does
 * 32 rows sooner than decode 4 that were quantized before; but what decode does in exact sums of fp32 because no block could
 * hold it, as x in fp32, stays so. */
static bool plan_fast(ql_cuda_w8a8_plan *plan, const ql_cuda_device *device, const ql_cuda_w8a8 *product) {
    if (!suits_tensor_cores(product)) return false;
    const bool few = product->params.m <= QL_W8A8_OWN_TOKENS, held = few && may_hold(product);
    return (held && plan_decode(plan, device, product, true)) ||
           (few && !held && plan_decode(plan, device, product, false)) || plan_wgmma(plan, device, product) ||
           (product->params.m <= MOST_ROWS && plan_decode(plan, device, product, false)) ||
           plan_mma(plan, device, product);
}

ql_cuda_w8a8_plan ql_cuda_w8a8_choose(const ql_cuda_device *device, const ql_cuda_w8a8 *product, bool base) {
    ql_cuda_w8a8_plan plan = {0};
    if (base || !plan_fast(&plan, device, product)) plan.engine = QL_CUDA_W8A8_BASE;
    if (plan.own) return plan;
    plan.scratch_bytes = plan.product_at = quantizer_scratch(&plan, device, product);
    if (plan.engine == QL_CUDA_W8A8_WGMMA && plan.product_at >= 0) {
        const int64_t bytes = ql_cuda_w8a8_wgmma_scratch(&product->params, plan.choice);
        if (__builtin_add_overflow(plan.product_at, bytes, &plan.scratch_bytes)) plan.scratch_bytes = -1;
    }
    return plan;
}

int ql_cuda_w8a8_run(ql_w8a8_params *filled, const ql_cuda_guard *guard, void *stream, const ql_cuda_w8a8_plan *plan,
                     const ql_cuda_w8a8 *product, void *scratch, char message[QL_CUDA_MESSAGE]) {
    *filled = filled_params(plan, product, scratch);
    if (!plan->own) {
        ql_w8a8_quantize_params p = quantizer_of(product);
        char *at = scratch;
        if (plan->engine == QL_CUDA_W8A8_BASE && p.code == QL_W8A8_E4M3)
            p.values = scratch;
        else
            p.codes = scratch;
        p.scales = (float *)(void *)(at + plan->scales_at);
        p.outliers = has_mask(product) ? (uint32_t *)(void *)(at + plan->outliers_at) : NULL;
        const int64_t meeting = tensor_blocks(guard->device, product);
        p.marks = (uint64_t *)(void *)(at + plan->meeting_at);
        p.absmax = (uint32_t *)(void *)(at + plan->meeting_at + meeting * meeting * 8);
        p.nonce = ql_cuda_nonce();
        const int launched = has_short_rows(guard->device, &p, plan->engine)
                                 ? launch_rows(guard, stream, &p, message)
                                 : launch_quantizer(guard, stream, &p, product, message);
        if (launched < 0) return -1;
    }
    switch (plan->engine) {
    case QL_CUDA_W8A8_DECODE: return launch_decode(guard, stream, plan, product, filled, message);
    case QL_CUDA_W8A8_WGMMA:
        return ql_cuda_w8a8_wgmma_launch(guard, stream, filled, plan->choice, (char *)scratch + plan->product_at,
                                         message);
    case QL_CUDA_W8A8_MMA: return launch_mma(guard, stream, plan->choice.kernel, *filled, message);
    default: return 0;
    }
}

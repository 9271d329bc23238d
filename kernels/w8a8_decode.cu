/* Products of 1 to 16 tokens with 8-bit weights and 8-bit activations. The weight is the checkpoint's own tensor, read once
 * at the speed of memory; 16 rows of it are the large operand of mma, tokens the small one (w8a8_pieces.cuh).
 *
 * Each warp has a ring of slots in shared memory, 16 rows by 128 columns, which it fills by cp.async in whole lines of the
 * cache and empties itself: no barrier is between. The ring is as deep as the memory allows, so that the weight is on its way
 * while the activations are quantized. Those lie in shared memory as codes. The kernels of up to 8 tokens quantize them
 * themselves, each block all of them (w8a8_own.cuh); for those of 16 another kernel has done it. The warps of a team split K
 * and meet once a strip, where their sums are added in shared memory, in order, so that the same call gives the same bits.
 *
 * e4m3 becomes fp16 exactly and is summed in fp32, int8 is summed in int32. Columns of outliers are multiplied in fp16 or
 * bf16 from the original activations, with the weight that is at hand already; fp32 is the sum of three bf16.
 *
 * Grid: blocks * cluster, blockDim.x = 32 * teams * warps. */
#include "cluster.cuh"
#include "int8_output.cuh"
#include "ptx.cuh"
#include "variants.h"
#include "w8a8_own.cuh"
#include "w8a8_pieces.cuh"

enum { STRIP = QL_W8A8_STRIP, SLOT = QL_W8A8_SLOT };

static __device__ __forceinline__ void meet_team(const ql_w8a8_decode_params *p, int team) {
    named_barrier(1 + team, p->warps * 32);
}

/* ---- the weight ---- */

/* What a warp loads next: a slot's columns of a strip. A lane takes 16 bytes of rows lane / 8, that and 4, 8, 12, and where
 * scales change by groups that of row lane % 16. */
typedef struct ql_ahead {
    const uint8_t *row[4]; /* at the lane's first column of the block */
    const float *scale;
    int strip, batch;
} ql_ahead;

/* Rows beyond the weight's are its last one: what comes of them is not stored. */
static __device__ __forceinline__ void point_at_rows(ql_ahead *ahead, const ql_w8a8_params *p, const uint8_t *columns,
                                                     bool groups) {
    const int lane = (int)threadIdx.x % 32, last = (int)p->n - 1;
#pragma unroll
    for (int i = 0; i < 4; i++)
        ahead->row[i] = columns + min(ahead->strip * STRIP + lane / 8 + i * 4, last) * p->row_stride;
    if (groups)
        ahead->scale = p->w_scales + min(ahead->strip * STRIP + lane % 16, last) / (int)p->w_rows * p->w_row_stride;
}

/* Columns beyond the end come as zeros. */
static __device__ __forceinline__ void load_slot(const ql_ahead *ahead, uint32_t slot, int col, int left) {
    const int lane = (int)threadIdx.x % 32;
    const bool inside = col < left;
#pragma unroll
    for (int i = 0; i < 4; i++)
        cp_async_16(slot + piece_at(lane / 8 + i * 4, lane % 8), ahead->row[i] + (inside ? col : 0), inside ? 16 : 0);
}

/* The scales of the slot's rows in a group; beyond the last one, where codes are 0, any will do. */
static __device__ __forceinline__ void load_slot_scales(const ql_ahead *ahead, const ql_w8a8_params *p, uint32_t to,
                                                        int group) {
    const int lane = (int)threadIdx.x % 32, last = (int)((p->k - 1) / COLUMNS);
    if (lane < STRIP) cp_async_4(to + lane * 4, ahead->scale + min(group, last) * p->w_group_stride, 4);
}

/* Scales and biases of the outputs of a block, of which memory would have to serve all slots in flight first if they were
 * asked for where they are needed. [round, team, 16] each, so that strips follow each other. */
static __device__ __forceinline__ float *outputs_of(const ql_w8a8_decode_params *p) {
    return (float *)(shared + p->outputs_at);
}

static __device__ __forceinline__ int output_row(const ql_w8a8_decode_params *p, int at) {
    return (((int)blockIdx.x >> p->cluster_shift) + at / STRIP * p->blocks) * STRIP + at % STRIP;
}

/* They come with the slot that is asked for next: before the loop, or while it waits for nothing but the first. A team's by
 * its own warps, as those alone have met before they read them. */
static __device__ __forceinline__ void load_row_scales(const ql_w8a8_decode_params *p, int team) {
    const ql_w8a8_params *w = &p->product;
    const int thread = (int)threadIdx.x - team * p->warps * 32;
#pragma unroll 1
    for (int at = (thread / STRIP * p->teams + team) * STRIP + thread % STRIP; at < p->outputs;
         at += p->teams * p->warps * 32) {
        const int row = min(output_row(p, at), (int)w->n - 1), place = w->w_rows == 1 ? row : row / (int)w->w_rows;
        cp_async_4(shared_address(outputs_of(p) + at), w->w_scales + place * w->w_row_stride, 4);
    }
}

enum { HELD_BIASES = 2 };
typedef struct ql_held_biases {
    float bias[HELD_BIASES];
} ql_held_biases;

static __device__ __forceinline__ float bias_at(const ql_w8a8_params *p, int64_t row) {
    return p->bias && row < p->n ? load_value(p->bias, p->bias_type, row * p->bias_stride) : 0.0f;
}

static __device__ __forceinline__ void hold_biases(ql_held_biases *held, const ql_w8a8_decode_params *p) {
    if (!p->product.bias) return;
#pragma unroll
    for (int i = 0; i < HELD_BIASES; i++) {
        const int at = i * (int)blockDim.x + (int)threadIdx.x;
        if (at < p->outputs) held->bias[i] = bias_at(&p->product, output_row(p, at));
    }
}

static __device__ __forceinline__ void store_biases(const ql_held_biases *held, const ql_w8a8_decode_params *p) {
    if (!p->product.bias) return;
    float *to = outputs_of(p) + p->outputs;
#pragma unroll
    for (int i = 0; i < HELD_BIASES; i++) {
        const int at = i * (int)blockDim.x + (int)threadIdx.x;
        if (at < p->outputs) to[at] = held->bias[i];
    }
#pragma unroll 1
    for (int at = HELD_BIASES * (int)blockDim.x + (int)threadIdx.x; at < p->outputs; at += (int)blockDim.x)
        to[at] = bias_at(&p->product, output_row(p, at));
}

/* ---- products ---- */

/* Sums of a warp's products that do not wait for each other: sum[chain * tiles + tile]. Half of them where they are added for
 * each slot and other warps have time for the rest. */
enum { CHAINED = 4 };
#define CHAINS(groups, tokens) ((groups) && (tokens) == QL_W8A8_OWN_TOKENS ? CHAINED / 2 : CHAINED)

/* sums += 16 rows by 8 tokens over 64 columns. */
static __device__ __forceinline__ void multiply_e4m3(float (*sum)[4], const uint4 w[2], const uint4 *x, int tiles) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        operand_of_e4m3(a, word_of(w[0], i), word_of(w[1], i));
#pragma unroll
        for (int tile = 0; tile < tiles; tile++) {
            uint32_t b[2];
            halves_of_e4m3(b, word_of(x[tile], i));
            multiply_16816(sum[i * tiles % CHAINED + tile], a, b, QL_VALUE_F16);
        }
    }
}

/* The same of 8 tokens, which are there as fp16. */
static __device__ __forceinline__ void multiply_halves(float (*sum)[4], const uint4 w[2], const uint4 x[2],
                                                       int chains) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        operand_of_e4m3(a, word_of(w[0], i), word_of(w[1], i));
        const uint32_t b[2] = {word_of(x[i / 2], i % 2 * 2), word_of(x[i / 2], i % 2 * 2 + 1)};
        multiply_16816(sum[i % chains], a, b, QL_VALUE_F16);
    }
}

static __device__ __forceinline__ void multiply_int8(int32_t (*sum)[4], const uint4 w[2], const uint4 *x, int tiles) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {word_of(w[0], i), word_of(w[1], i), word_of(w[0], i + 1), word_of(w[1], i + 1)};
#pragma unroll
        for (int tile = 0; tile < tiles; tile++) {
            const uint32_t b[2] = {word_of(x[tile], i), word_of(x[tile], i + 1)};
            multiply_16832_int8(sum[i / 2 * tiles + tile], a, b);
        }
    }
}

/* Leaves the sums of all chains in the first. */
static __device__ __forceinline__ void add_chains(float (*sum)[4], int tiles, int sums) {
#pragma unroll
    for (int at = sums / 2; at >= tiles; at /= 2)
#pragma unroll
        for (int i = 0; i < at; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] += sum[i + at][j];
}

/* ---- outliers ---- */

/* sums += W x over the marked columns of a chunk, which are kept in 16 bit as x has them. x: the kept row of token 0, at
 * the lane's columns of the chunk. steps: bits 4 i to 4 i + 3: whether columns of the i-th product are marked; few are. */
static __device__ __forceinline__ void multiply_kept(float (*sums)[4], const uint4 w[2], const uint8_t *x, int m,
                                                     uint32_t steps, int tiles, int type) {
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!(steps >> 4 * i & 15)) continue;
        uint32_t a[4];
        operand_of_int8(a, word_of(w[0], i), word_of(w[1], i), type);
#pragma unroll
        for (int tile = 0; tile < tiles; tile++) {
            const uint2 values = *(const uint2 *)(x + min(tile * 8 + lane / 4, m - 1) * 128 + 8 * i);
            const uint32_t b[2] = {values.x, values.y};
            multiply_16816(sums[tile], a, b, type);
        }
    }
}

/* The same for fp32, and for chunks that are not kept: slow. marked: 16 bits for the lane's own columns, which begin at col
 * of x, and at `own` of the chunk. */
static __device__ __forceinline__ void multiply_pieces(float sum[4], const ql_w8a8_decode_params *p, const uint4 w[2],
                                                       int place, int token, int64_t col, int own, uint32_t marked) {
    const ql_w8a8_params *product = &p->product;
    const int type = product->x_type == QL_VALUE_F16 ? QL_VALUE_F16 : QL_VALUE_BF16,
              pieces = pieces_of(product->x_type);
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        operand_of_int8(a, word_of(w[0], i), word_of(w[1], i), type);
        float value[4];
#pragma unroll
        for (int j = 0; place == NOT_KEPT && j < 4; j++)
            value[j] = outlier_at(product, token, col + 4 * i + j, marked >> (4 * i + j) & 1);
#pragma unroll 1
        for (int piece = 0; piece < pieces; piece++) {
            uint2 x;
            if (place == NOT_KEPT)
                x = make_uint2(next_pieces(value, type), next_pieces(value + 2, type));
            else
                x = *(const uint2 *)(kept_at(p, place, piece, token) + (own + 4 * i) * 2);
            const uint32_t b[2] = {x.x, x.y};
            if (type == QL_VALUE_F16)
                multiply_16816(sum, a, b, QL_VALUE_F16);
            else
                multiply_16816(sum, a, b, QL_VALUE_BF16);
        }
    }
}

/* The bits of the lane's columns of a chunk. */
static __device__ __forceinline__ uint32_t marked_of_lane(uint2 mask) {
    const int lane = (int)threadIdx.x % 32;
    return (lane % 4 < 2 ? mask.x : mask.y) >> lane % 2 * 16 & 0xffffu;
}

/* Which of the two. */
static __device__ __forceinline__ void multiply_outliers(float (*sums)[4], const ql_w8a8_decode_params *p,
                                                         const uint4 w[2], int place, int64_t col, uint2 mask,
                                                         int tiles) {
    const int lane = (int)threadIdx.x % 32, own = lane % 4 * 16, m = (int)p->product.m;
    const uint32_t steps = mask.x | mask.y | (mask.x | mask.y) >> 16;
    if (place != NOT_KEPT && p->product.x_type == QL_VALUE_F16) {
        multiply_kept(sums, w, kept_at(p, place, 0, 0) + own * 2, m, steps, tiles, QL_VALUE_F16);
    } else if (place != NOT_KEPT && p->product.x_type == QL_VALUE_BF16) {
        multiply_kept(sums, w, kept_at(p, place, 0, 0) + own * 2, m, steps, tiles, QL_VALUE_BF16);
    } else {
        const uint32_t marked = marked_of_lane(mask);
#pragma unroll
        for (int tile = 0; tile < tiles; tile++)
            multiply_pieces(sums[tile], p, w, place, min(tile * 8 + lane / 4, m - 1), col, own, marked);
    }
}

/* ---- a strip ---- */

/* What a warp has of a strip: sums over its columns, by chain and tile of 8 tokens. */
typedef struct ql_w8a8_sums {
    float sum[CHAINED][4];
    int32_t whole[CHAINED][4]; /* int8 */
    float outliers[2][4];      /* int8 */
} ql_w8a8_sums;

static __device__ __forceinline__ void store_sums(const ql_w8a8_decode_params *p, int at, const uint32_t *sum, int tile,
                                                  int lane) {
    uint32_t *to = (uint32_t *)(shared + p->sums_at) + at + tile * 8 * QL_W8A8_SUMS_PITCH + lane / 4;
    const int token = lane % 4 * 2, left = (int)p->product.m - tile * 8 - token;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i % 2 < left) to[(token + i % 2) * QL_W8A8_SUMS_PITCH + i / 2 * 8] = sum[i];
}

/* Where block `rank` keeps the part of `from` of an output of a round of its own. */
static __device__ __forceinline__ int exchange_at(const ql_w8a8_decode_params *p, int round, int team, int from) {
    return p->exchange_at + ((round / p->cluster * p->teams + team) * p->cluster + from) * (int)p->product.m * 64;
}

static __device__ __forceinline__ void store_output(const ql_w8a8_params *p, int code, int token, int64_t row,
                                                    float value, float row_scale, float bias) {
    value = code == QL_W8A8_INT8 ? int8_by_row(value, row_scale * (1.0f / 127.0f), bias) : value + bias;
    if (row < p->n) store_value(p->out, p->out_type, token * p->n + row, value);
}

/* The warp's sums of int8 become fp32 in the units of outliers, with these on top: one sum of a warp to add in place of two.
 * So where there are outliers the last bits of fp32 are not those of a sum of all codes. */
static __device__ __forceinline__ void add_outliers(ql_w8a8_sums *s, const ql_w8a8_decode_params *p, int tiles) {
    const int token = (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < tiles; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float by_token = int8_by_token((float)s->whole[tile][i], scales_of(p)[tile * 8 + token + i % 2]);
            s->whole[tile][i] = __float_as_int(by_token + s->outliers[tile][i]);
        }
}

static __device__ __forceinline__ float sum_of_warps(const uint32_t *from, int warps, int step) {
    float sum = 0.0f;
#pragma unroll 8
    for (int warp = 0; warp < warps; warp++) sum += __uint_as_float(from[warp * step]);
    return sum;
}

/* The sum of a token and row over the team's warps, scaled; of int8 without the row's scale. */
static __device__ __forceinline__ float output_of(const ql_w8a8_decode_params *p, int code, bool groups, int at,
                                                  int token, float row_scale, bool has_outliers) {
    const uint32_t *from = (const uint32_t *)(shared + p->sums_at) + at + token * QL_W8A8_SUMS_PITCH;
    const int step = (int)p->product.m * QL_W8A8_SUMS_PITCH;
    if (code == QL_W8A8_INT8) {
        if (has_outliers) return sum_of_warps(from, p->warps, step);
        int64_t whole = 0;
#pragma unroll 8
        for (int warp = 0; warp < p->warps; warp++) whole += (int32_t)from[warp * step];
        return int8_by_token((float)whole, scales_of(p)[token]);
    }
    const float sum = sum_of_warps(from, p->warps, step);
    return groups ? sum : sum * scales_of(p)[token] * row_scale;
}

/* Until the oldest of the ring's slots is there: all but the others. Compared one by one, as a jump by a table waits for
 * memory at each slot. */
static __device__ __forceinline__ void wait_for_slot(int slots) {
    if (slots == 8)
        cp_async_wait(7);
    else if (slots == 7)
        cp_async_wait(6);
    else if (slots == 6)
        cp_async_wait(5);
    else if (slots == 5)
        cp_async_wait(4);
    else if (slots == 4)
        cp_async_wait(3);
    else if (slots == 3)
        cp_async_wait(2);
    else if (slots == 2)
        cp_async_wait(1);
    else
        cp_async_wait(0);
}

/* ---- the kernel ---- */

/* Adds to s what a slot gives; col: of the slot, in the block. */
static __device__ __forceinline__ void multiply_slot(ql_w8a8_sums *s, const ql_w8a8_decode_params *p, int code,
                                                     bool groups, int tokens, const uint8_t *slot, const float *scales,
                                                     int col, int64_t first, bool has_outliers) {
    const int lane = (int)threadIdx.x % 32, tiles = tokens / 8, m = (int)p->product.m;
    float part[CHAINED][4] = {0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 w[2] = {*(const uint4 *)(slot + piece_at(lane / 4, half * 4 + lane % 4)),
                            *(const uint4 *)(slot + piece_at(lane / 4 + 8, half * 4 + lane % 4))};
        const int own_col = col + half * 64 + lane % 4 * 16;
        uint4 x[2];
        if (code == QL_W8A8_E4M3 && tokens == QL_W8A8_OWN_TOKENS) {
            const uint4 *from = (const uint4 *)(shared + min(lane / 4, m - 1) * p->x_pitch + own_col * 2);
            x[0] = from[0];
            x[1] = from[1];
            multiply_halves(groups ? part : s->sum, w, x, CHAINS(groups, tokens));
            continue;
        }
#pragma unroll
        for (int tile = 0; tile < tiles; tile++)
            x[tile] = *(const uint4 *)(shared + min(tile * 8 + lane / 4, m - 1) * p->x_pitch + own_col);
        if (code == QL_W8A8_E4M3) {
            multiply_e4m3(groups ? part : s->sum, w, x, tiles);
            continue;
        }
        const uint2 mask =
            has_outliers ? *(const uint2 *)(shared + p->mask_at + (col + half * 64) / 8) : make_uint2(0, 0);
        if (mask.x | mask.y) {
            const uint32_t marked = marked_of_lane(mask);
            const int place = shared[p->places_at + col / 64 + half];
            multiply_outliers(s->outliers, p, w, place, first + own_col, mask, tiles);
            /* Codes that the block made are 0 there. */
#pragma unroll
            for (int tile = 0; tokens != QL_W8A8_OWN_TOKENS && tile < tiles; tile++) {
                x[tile].x &= ~bytes_of_bits(marked);
                x[tile].y &= ~bytes_of_bits(marked >> 4);
                x[tile].z &= ~bytes_of_bits(marked >> 8);
                x[tile].w &= ~bytes_of_bits(marked >> 12);
            }
        }
        multiply_int8(s->whole, w, x, tiles);
    }
    if (!groups) return;
    const float low = scales[lane / 4], high = scales[lane / 4 + 8];
    add_chains(part, tiles, CHAINS(groups, tokens));
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
        const float2 by = *(const float2 *)(scales_of(p) + col / COLUMNS * tokens + tile * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) s->sum[tile][i] += part[tile][i] * ((i % 2 ? by.y : by.x) * (i / 2 ? high : low));
    }
}

/* Adds the sums of a cluster's blocks, in order, for the rounds that this block owns. */
static __device__ __forceinline__ void finish_cluster(const ql_w8a8_decode_params *p, int code, int team, int rank) {
    const int hop = p->blocks * p->teams, m = (int)p->product.m;
    int strip = ((int)blockIdx.x >> p->cluster_shift) + team * p->blocks + rank * hop;
    meet_cluster();
    for (int round = rank; strip < p->strips; round += p->cluster, strip += hop * p->cluster)
        for (int i = (int)threadIdx.x - team * p->warps * 32; i < m * 16; i += p->warps * 32) {
            const int64_t row = (int64_t)strip * STRIP + i % 16;
            float value = 0.0f;
            for (int from = 0; from < p->cluster; from++)
                value += *(const float *)(shared + exchange_at(p, round, team, from) + i * 4);
            const float *outputs = outputs_of(p) + (round * p->teams + team) * STRIP + i % 16;
            store_output(&p->product, code, i / 16, row, value, outputs[0],
                         p->product.bias ? outputs[p->outputs] : 0.0f);
        }
}

static __device__ __forceinline__ void product(const ql_w8a8_decode_params *p, int code, bool groups, int tokens) {
    const ql_w8a8_params *product = &p->product;
    const bool own = tokens == QL_W8A8_OWN_TOKENS;
    const int tiles = tokens / 8, m = (int)product->m;
    const int lane = (int)threadIdx.x % 32, warp_of_block = (int)threadIdx.x / 32;
    const int team = warp_of_block * p->warp_team >> 16, warp = warp_of_block - team * p->warps;
    const int step = p->warps * COLUMNS, cluster = (int)blockIdx.x >> p->cluster_shift;
    const int rank = !own && p->cluster > 1 ? cluster_rank() : 0, hop = p->blocks * p->teams;
    const int64_t first = (int64_t)rank * p->span;
    const int left = (int)min(product->k - first, (int64_t)p->span), load_col = warp * COLUMNS + lane % 8 * 16;
    const uint8_t *columns = product->codes + first;
    const int first_group = (int)(first / COLUMNS) + warp;
    uint8_t *ring = shared + p->ring_at + warp_of_block * p->slots * SLOT;
    float *ring_scales = (float *)(shared + p->ring_scales_at) + warp_of_block * p->slots * STRIP;

    ql_ahead ahead = {.strip = cluster + team * p->blocks, .batch = 0};
    int strip = ahead.strip;
    point_at_rows(&ahead, product, columns, groups);
/* The warp's next slot, if there is one, into place `at` of the ring. */
#define LOAD_AHEAD(at)                                                                                                 \
    do {                                                                                                               \
        if (ahead.strip < p->strips) {                                                                                 \
            load_slot(&ahead, shared_address(ring + (at) * SLOT), load_col + ahead.batch * step, left);                \
            if (groups)                                                                                                \
                load_slot_scales(&ahead, product, shared_address(ring_scales + (at) * STRIP),                          \
                                 first_group + ahead.batch * p->warps);                                                \
            if (++ahead.batch == p->batches) {                                                                         \
                ahead.batch = 0;                                                                                       \
                ahead.strip += hop;                                                                                    \
                point_at_rows(&ahead, product, columns, groups);                                                       \
            }                                                                                                          \
        }                                                                                                              \
        cp_async_commit();                                                                                             \
    } while (0)
    /* What is asked for first comes first: of the weight no more than keeps memory at work until the activations are
     * asked for. */
#define LOAD_SLOTS(from, to) _Pragma("unroll 1") for (int i = (from); i < (to); i++) LOAD_AHEAD(i)
    if (!own && !groups) load_row_scales(p, team);
    LOAD_SLOTS(0, p->early);
    start_next_kernel();
    wait_for_previous_kernel();
    ql_held_biases biases;
    bool has_outliers = code == QL_W8A8_INT8 && product->outliers;
    if (own) {
        ql_own_values held;
        hold_values(&held, p, code);
        hold_biases(&biases, p);
        if (!groups) load_row_scales(p, team);
        LOAD_SLOTS(p->early, p->soon);
        if (groups) {
            quantize_own_groups(&held, p, tokens);
            LOAD_SLOTS(p->soon, p->slots);
        } else {
            const bool found = scale_own_rows(&held, p, code);
            LOAD_SLOTS(p->soon, p->slots);
            __syncthreads();
            quantize_own_rows(&held, p, found, code);
            has_outliers &= found;
        }
    } else {
        ql_held held;
        hold_codes(&held, p, groups, tokens, first);
        hold_biases(&biases, p);
        /* Which outliers to ask for only the mask tells, so the rest of the ring waits for them. */
        if (!has_outliers) LOAD_SLOTS(p->early, p->slots);
        copy_activations(&held, p, groups, tokens, first);
        if (has_outliers) {
            __syncthreads();
            const int chunks = place_outliers(p);
            keep_outliers(p, chunks, first);
            LOAD_SLOTS(p->early, p->slots);
            has_outliers = chunks > 0;
        }
    }
    store_biases(&biases, p);
    if (own && !groups) wait_for_slot(p->slots - p->early); /* with which the scales come */
    __syncthreads();
    if (!own && p->cluster > 1) meet_cluster(); /* nobody writes into a block that has not started */

    int at_slot = 0;
    /* The warps take turns at adding. */
    int turn = 0;
    for (int round = 0; strip < p->strips; strip += hop, round++) {
        const int place = (int)threadIdx.x - (team * p->warps + turn) * 32;
        const int output = place < 0 ? place + p->warps * 32 : place;
        const int64_t row = (int64_t)strip * STRIP + output % 16;
        if (++turn == p->warps) turn = 0;
        ql_w8a8_sums s = {0};
        for (int batch = 0; batch < p->batches; batch++) {
            wait_for_slot(p->slots);
            __syncwarp();
            multiply_slot(&s, p, code, groups, tokens, ring + at_slot * SLOT, ring_scales + at_slot * STRIP,
                          warp * COLUMNS + batch * step, first, has_outliers);
            __syncwarp();
            LOAD_AHEAD(at_slot);
            if (++at_slot == p->slots) at_slot = 0;
        }
        /* With two buffers who adds the sums of one round is past it before anybody meets the round after the next. */
        const int size = m * QL_W8A8_SUMS_PITCH, all = p->teams * p->warps, buffers = QL_W8A8_SUMS_BUFFERS(tokens);
        const int at = (round % buffers * all + team * p->warps) * size;
        if (buffers == 1) meet_team(p, team + QL_W8A8_MOST_TEAMS);
        if (code == QL_W8A8_E4M3 && !groups) add_chains(s.sum, tiles, CHAINED);
#pragma unroll
        for (int i = 0; i < tiles * 4; i++) s.whole[i / 4][i % 4] += s.whole[tiles + i / 4][i % 4];
        if (code == QL_W8A8_INT8 && has_outliers) add_outliers(&s, p, tiles);
#pragma unroll
        for (int tile = 0; tile < tiles; tile++)
            store_sums(p, at + warp * size,
                       code == QL_W8A8_INT8 ? (const uint32_t *)s.whole[tile] : (const uint32_t *)s.sum[tile], tile,
                       lane);
        meet_team(p, team);
        const float *outputs = outputs_of(p) + (round * p->teams + team) * STRIP + output % 16;
        const float row_scale = groups ? 1.0f : outputs[0], bias = product->bias ? outputs[p->outputs] : 0.0f;
        for (int token = output / 16; token < m; token += p->warps * 2) {
            const float value = output_of(p, code, groups, at + output % 16, token, row_scale, has_outliers);
            if (own || p->cluster == 1) {
                store_output(product, code, token, row, value, row_scale, bias);
                continue;
            }
            const int to = exchange_at(p, round, team, rank) + (token * 16 + output % 16) * 4;
            store_remote(shared_address(shared + to), round % p->cluster, value);
        }
    }
#undef LOAD_AHEAD
#undef LOAD_SLOTS
    if (!own && p->cluster > 1) finish_cluster(p, code, team, rank);
}

#define KERNEL(name, source, code, groups, tokens)                                                                     \
    extern "C" __global__ void __launch_bounds__(QL_W8A8_DECODE_THREADS, 1)                                            \
        name(const __grid_constant__ ql_w8a8_decode_params params) {                                                   \
        product(&params, code, groups, tokens);                                                                        \
    }
QL_W8A8_DECODE_VARIANTS(KERNEL)

/* What the 8-bit product on wgmma takes beside kernels/w8a8.h, and how its shared memory is laid out: plain C for the host
 * and the device.
 *
 * A tile is the outputs of some rows of the weight and of some tokens. Two warpgroups multiply: with the weight's rows as
 * the rows of wgmma each has half of them and all tokens; turned, with tokens as its rows, half of the tokens and all rows
 * of the weight. Kernels of three kinds share tiles among thread blocks:
 *   alone: a tile is a thread block's;
 *   in pairs: a cluster's tile is twice as large, half for each of its two thread blocks, which copy the larger of their two
 *   operands for each other, as both have it: so the second-level cache is asked for less, by which a GPU at its limit of
 *   power is faster;
 *   meeting: the `members` thread blocks of a cluster divide the columns of one tile and add their sums over the cluster's
 *   shared memory, one tile a cluster: for products of few tiles.
 *
 * For the first two the product has row_tiles x token_tiles tiles of k_blocks blocks of 128 columns each. The first
 * split_tiles tiles are one line of blocks, cut into as many equal ranges as there are clusters; the tiles after them are
 * done whole, one a cluster and wave. A range that starts inside a tile leaves its sums in scratch for the cluster that has
 * the tile's first columns, which adds them in the order of K. */
#ifndef QL_KERNELS_W8A8_WGMMA_H
#define QL_KERNELS_W8A8_WGMMA_H

#include "streamk.h"
#include "w8a8.h"

enum {
    QL_W8A8_K = 128, /* columns of a stage, one byte each */
    QL_W8A8_THREADS = 384,
    QL_W8A8_WARPS = 8,       /* that multiply */
    QL_W8A8_TOKEN_GROUP = 8, /* tiles of tokens that are done beside each other */
    QL_W8A8_MOST_STAGES = 16,
    QL_W8A8_BARRIER_BYTES = 1024,
    QL_W8A8_WARP_BYTES = 1024,   /* of outputs: two buffers of 64 rows by 16 tokens a warpgroup */
    QL_W8A8_TURNED_BYTES = 2048, /* the same where scales have groups: 64 rows by 16 tokens a warp */
    QL_W8A8_SLICE_BYTES = 4096,  /* of sums left in scratch: 16 of each thread that multiplies */
    QL_W8A8_OUTLIERS = 16,       /* 16-bit columns of an outlier slot: two of each marked one */
    QL_W8A8_OUTLIER_SLOTS = 2
};

#define QL_W8A8_STAGE_BYTES(rows, tokens) (((rows) + (tokens)) * QL_W8A8_K)

/* Thread blocks of a pair lie along the side on which their own tiles have less. */
#define QL_W8A8_ROW_PARTS(rows, tokens, pair) ((pair) && (rows) < (tokens) ? 2 : 1)
#define QL_W8A8_TOKEN_PARTS(rows, tokens, pair) ((pair) && (rows) >= (tokens) ? 2 : 1)

/* Of an outlier slot: 16-bit columns of x and of the weight. */
#define QL_W8A8_OUTLIER_BYTES(rows, tokens) (((rows) + (tokens)) * QL_W8A8_OUTLIERS * 2)

/* What a thread block of a cluster leaves in another's shared memory, after the stages: the sums of a warpgroup. */
#define QL_W8A8_MEETING_BYTES(tokens) ((tokens) * 256)

#define QL_W8A8_OUTPUT_BYTES(grouped, tokens)                                                                          \
    (QL_W8A8_WARPS * ((grouped) && (tokens) > 64 ? QL_W8A8_TURNED_BYTES : QL_W8A8_WARP_BYTES))

/* Scales of a stage: the tokens', times that of each block of the weight. */
#define QL_W8A8_SCALE_BYTES(rows, tokens) ((rows) / QL_W8A8_GROUP * (tokens) * 4)

/* Before the stages: barriers, outputs, x's scales of two tiles, then scales of stages or outlier slots. A multiple of
 * 1024. */
#define QL_W8A8_HEAD_BYTES(code, grouped, rows, tokens)                                                                \
    ((QL_W8A8_BARRIER_BYTES + QL_W8A8_OUTPUT_BYTES(grouped, tokens) + 2 * (tokens) * 4 +                               \
      ((grouped)                ? QL_W8A8_MOST_STAGES * QL_W8A8_SCALE_BYTES(rows, tokens)                              \
       : (code) == QL_W8A8_INT8 ? QL_W8A8_OUTLIER_SLOTS * QL_W8A8_OUTLIER_BYTES(rows, tokens)                          \
                                : 0) +                                                                                 \
      1023) /                                                                                                          \
     1024 * 1024)

typedef struct ql_w8a8_wgmma_params {
    QL_ALIGNED(64)
    /* CUtensorMap of the weight, and of x_codes: 128 columns, swizzled by 128 bytes, by as many rows, or tokens, as a thread
     * block copies. */
    uint64_t w_map[16], x_map[16];
    ql_w8a8_params product;
    float *partials; /* scratch: [thread blocks][rows * tokens] */
    uint64_t *flags; /* scratch: [thread blocks][QL_W8A8_WARPS]; nonce: the warp's part of partials is there */
    uint64_t nonce;  /* of this launch */
    int32_t row_tiles, token_tiles, k_blocks, split_tiles;
    int32_t range, longer_ranges; /* blocks a range, and how many ranges have one more */
    int32_t stages;
    int32_t
        ahead; /* blocks that the second-level cache is asked for, after those of the first stages, before x is there */
    int32_t members; /* of a cluster, where they divide a tile's columns: 2 or more, no more than k_blocks */
} ql_w8a8_wgmma_params;

#endif

/* What the 8-bit product on wgmma takes beside kernels/w8a8.h, and how its shared memory is laid out: plain C for the host
 * and the device.
 *
 * A tile is the outputs of QL_W8A8_ROWS rows of the weight for each thread block of a cluster, and of some tokens. The
 * product has row_tiles x token_tiles tiles and every tile k_blocks blocks of 128 columns. The first split_tiles tiles are
 * one line of blocks, cut into as many equal ranges as there are clusters; the tiles after them are done whole, one a
 * cluster and wave. A range that starts inside a tile leaves its sums in scratch for the cluster that has the tile's first
 * columns, which adds them in the order of K. */
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
    QL_W8A8_OUTPUT_BYTES = 8192, /* 64 rows by 32 tokens of each of the two warpgroups */
    QL_W8A8_OUTLIERS = 16,       /* columns of an outlier slot */
    QL_W8A8_OUTLIER_SLOTS = 2
};

/* `subs` 64-row products for each of the two warpgroups that multiply. */
#define QL_W8A8_ROWS(subs) (128 * (subs))
#define QL_W8A8_STAGE_BYTES(subs, tokens) ((QL_W8A8_ROWS(subs) + (tokens)) * QL_W8A8_K)

/* Of a stage: x's scales, times the weight's where it has blocks, for each 128 rows. */
#define QL_W8A8_SCALE_BYTES(subs, tokens) ((subs) * (tokens) * 4)

/* 16-bit columns of x or its codes, and the weight's. */
#define QL_W8A8_OUTLIER_BYTES(subs, tokens) ((QL_W8A8_ROWS(subs) + (tokens)) * QL_W8A8_OUTLIERS * 2)

/* Before the stages: barriers, outputs, x's scales of two tiles, scales of stages or outlier slots. A multiple of 1024. */
#define QL_W8A8_HEAD_BYTES(code, grouped, subs, tokens)                                                                \
    ((QL_W8A8_BARRIER_BYTES + QL_W8A8_OUTPUT_BYTES + 2 * (tokens) * 4 +                                                \
      ((grouped)                ? QL_W8A8_MOST_STAGES * QL_W8A8_SCALE_BYTES(subs, tokens)                              \
       : (code) == QL_W8A8_INT8 ? QL_W8A8_OUTLIER_SLOTS * QL_W8A8_OUTLIER_BYTES(subs, tokens)                          \
                                : 0) +                                                                                 \
      1023) /                                                                                                          \
     1024 * 1024)

typedef struct ql_w8a8_wgmma_params {
    QL_ALIGNED(64)
    uint64_t
        w_map[16]; /* CUtensorMap of the weight: boxes of 128 columns by a thread block's rows, swizzled by 128 bytes */
    uint64_t x_map[16]; /* of x_codes: by what one thread block of a cluster copies of the tile's tokens */
    ql_w8a8_params product;
    float *partials; /* scratch: [thread blocks][rows * tokens] */
    uint64_t
        *flags; /* scratch: [thread blocks][QL_W8A8_WARPS]; one that equals nonce says that its warp's part is there */
    uint64_t nonce; /* of this launch */
    int32_t row_tiles, token_tiles, k_blocks, split_tiles;
    int32_t range, longer_ranges; /* blocks a range, and how many ranges have one more */
    int32_t stages;
} ql_w8a8_wgmma_params;

#endif

/* What the decode kernels (decode.cu) take beside the product: how the host (src/cuda/decode.c) cut it. Plain C for both. */
#ifndef QL_KERNELS_DECODE_H
#define QL_KERNELS_DECODE_H

#include "packed.h"

/* A warp takes columns in batches: what it has in flight at a time, in blocks of 64 columns. */
enum { QL_DECODE_BLOCK = 64, QL_DECODE_THREADS = 512 };
#define QL_DECODE_BATCH_TILES(code) ((code) == QL_CODE_INT3 ? 4 : 8)
#define QL_DECODE_BATCH_K(code) (QL_DECODE_BATCH_TILES(code) * QL_TILE_K(code))
#define QL_DECODE_BATCH_BYTES(code) (QL_DECODE_BATCH_TILES(code) * QL_TILE_BYTES(code))

/* How groups and batches meet, a constant of a kernel: the groups of a batch (1, 2, 4 or 8; with 1 a group may go on over
 * 2^group_shift batches), or one group for all of K. */
enum { QL_DECODE_CHANNEL = 0 };

/* A thread block is `teams` teams of `team_warps` warps. A team takes a strip and the block's part of K, its warps split
 * that in whole batches. The blocks of a cluster split K. Offsets and sizes are bytes of dynamic shared memory; where the
 * code is a table's, its pairs lie at 0. */
typedef struct ql_decode_params {
    ql_packed_params product;
    int64_t hop_bytes; /* of codes: from a team's strip to its next */
    uint32_t strip_bytes;
    int32_t strips, blocks, hop; /* blocks: of the grid, or its clusters; hop: blocks * teams */
    int32_t teams, team_warps, cluster;
    int32_t warp_team;                  /* a warp's team is its number * warp_team >> 16 */
    int32_t batches, block_batches;     /* of a strip, and of a block's part of it */
    int32_t share, rest;                /* block_batches / team_warps and % */
    int32_t last_tiles;                 /* in a strip's last batch */
    int32_t pairs;                      /* of groups, in a strip */
    int32_t group_shift;                /* log2 of the batches of a group, where it has one or more */
    int32_t nested_shift;               /* log2(nested_blocksize) */
    int32_t bare_zero;                  /* what every byte of zeros would be, where there are none */
    int32_t scale_size;                 /* bytes of one */
    int32_t x_at, x_pitch, x_aligned;   /* rows of x; whether 16-byte pieces of x can be copied */
    int32_t x_team_bytes;               /* of x where each team has its own, 0 where they share it */
    int32_t sums_at;                    /* of x over each part of a group that is in one batch: [parts][tokens] fp32 */
    int32_t entries_at;                 /* a warp's scales and zeros in fp32 */
    int32_t partials_at, partial_pitch; /* the warps' sums, two tokens a row */
    int32_t adders;                     /* warps that add a strip up */
    int32_t barriers_at;                /* of each team and buffer: full, free */
    int32_t nested_at;                  /* nested_table */
    int32_t exchange_at;                /* the parts of a cluster's blocks of the strips that a block owns */
} ql_decode_params;

#endif

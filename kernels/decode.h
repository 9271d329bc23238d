/* What the decode kernels (decode.cu) take beside the product: how the host (src/cuda/decode.c) cut it. Plain C for both. */
#ifndef QL_KERNELS_DECODE_H
#define QL_KERNELS_DECODE_H

#include "packed.h"

/* A warp takes columns in batches: what it has in flight of a strip at a time, in blocks of 64 columns. */
enum { QL_DECODE_BLOCK = 64, QL_DECODE_THREADS = 512 };

/* A band: the strips that a warp takes side by side. Two where a table is looked up for many tokens: x is read once for both, as look-ups
 * leave shared memory little time. */
#define QL_DECODE_ABREAST(code, tokens) ((code) == QL_CODE_TABLE4 && (tokens) == 8 ? 2 : 1)
#define QL_DECODE_BATCH_TILES(code, tokens)                                                                            \
    ((code) == QL_CODE_INT2 || (code) == QL_CODE_INT3 ? 4 : 8 / QL_DECODE_ABREAST(code, tokens))
#define QL_DECODE_BATCH_K(code, tokens) (QL_DECODE_BATCH_TILES(code, tokens) * QL_TILE_K(code))
#define QL_DECODE_BATCH_BYTES(code, tokens) (QL_DECODE_BATCH_TILES(code, tokens) * QL_TILE_BYTES(code)) /* of a strip */

/* How groups and batches meet, a constant of a kernel: the groups of a batch (1, 2, 4, 8 or 16; with 1 a group may go on
 * over 2^group_shift batches), or one group for all of K. */
enum { QL_DECODE_CHANNEL = 0 };

/* Whether a block is two groups, of 32 columns each. */
#define QL_DECODE_HALVES(code, tokens, groups) ((groups) * QL_DECODE_BLOCK > QL_DECODE_BATCH_K(code, tokens))

/* Bytes of a table's pairs: entries 256 bytes apart (pairs.cuh). */
enum { QL_DECODE_PAIRS_BYTES = 65536 };

/* Groups whose sums the columns of one mma hold side by side: up to 4 tokens leave room for two. */
#define QL_DECODE_SLOTS(tokens, groups) ((tokens) == 4 && (groups) >= 2 ? 2 : 1)

/* Whether a group's columns of x are zeros, read from a row of them, while the other's are multiplied. Of tables they are made
 * zeros (few_tokens.cuh). */
#define QL_DECODE_ZEROS(code, tokens, groups) (QL_DECODE_SLOTS(tokens, groups) == 2 && (code) != QL_CODE_TABLE4)

/* Whether a kernel knows columns in another order: weights with a table have none, and more tokens, or many groups of 2 or 3
 * bit, want the registers that it takes. */
#define QL_DECODE_ORDERED(code, tokens, groups)                                                                        \
    ((code) != QL_CODE_TABLE4 && (tokens) == 4 &&                                                                      \
     ((code) == QL_CODE_INT3 ? (groups) < 8 : (code) != QL_CODE_INT2 || (groups) < 16))

/* 2 to 8 rows of x with its columns in another order lie in shared memory column by column: bytes of one (cells.cuh). A thread
 * brings so many pieces of 8 columns at most. */
enum { QL_DECODE_CELL = 16, QL_CELLS_PIECES = 2 };

/* The groups of a batch whose absmax may be in two blocks of the second level; 1 where all are in one, as there are registers
 * for no more, or few groups. */
#define QL_DECODE_DIVIDED(tokens, groups) ((tokens) == 16 || (groups) < 4 ? 1 : (groups))

/* Rows of x begin with a line of shared memory, as copies to anywhere else take up to three times as long. What makes their
 * pieces of 16 bytes lie in different banks is that those of a line change places, by the row: the bits to change in a place. */
#define QL_DECODE_TURN(row) ((uint32_t)((row) % 8 * 16))

/* A thread block is `teams` teams of `team_warps` warps. A team takes a band and the block's part of K, of whose batches each of
 * its warps takes every team_warps-th. The blocks of a cluster split K. Offsets and sizes are bytes of dynamic shared memory; where
 * the code is a table's, its tables (pairs.cuh) lie at 0. What is needed before the first loads comes first, in as few lines of the
 * cache of parameters as can be: each is waited for. */
typedef struct ql_decode_params {
    const uint8_t *codes;
    const void *scales;
    const uint8_t *zeros;
    const void *x;
    int32_t warp_team; /* a warp's team is its number * warp_team >> 16 */
    int32_t team_warps;
    int32_t blocks, batches; /* blocks: of the grid, or its clusters; batches: of a strip */
    uint32_t band_bytes;     /* of codes */
    int32_t bands;
    int32_t last_tiles;    /* in a strip's last batch */
    int32_t pairs;         /* of groups, in a strip */
    int32_t cluster_shift; /* log2 of the blocks of a cluster */
    int32_t block_batches; /* of a block's part of a strip */
    int32_t bare_zero;     /* what every byte of zeros would be, where there are none, or -1 */
    int32_t x_aligned;     /* whether pieces of 16 bytes of x can be copied */
    int32_t m, k;
    int32_t x_stride;
    int32_t x_at, x_pitch;             /* rows of x, and one of zeros where those are read */
    int32_t ahead;                     /* whether a warp's second batch is asked into the cache early; of 8 bit */
    int32_t scale_size;                /* bytes of one */
    int32_t group_shift;               /* log2 of the batches of a group, where it has one or more */
    int64_t hop_bytes;                 /* of codes: from a team's band to its next */
    int32_t walk_bytes;                /* of codes: from a warp's batch to its next */
    int32_t walk_entries, hop_entries; /* the same of entries, and from a team's band to its next */
    int32_t walk_x, walk_sums;         /* the same of x and of its sums, bytes */
    int32_t teams, hop;                /* hop: blocks * teams */
    int32_t rounds;                    /* bands of the team that has most */
    int32_t lone; /* the band that has one strip where others have two, or -1; read as if it had that one twice */
    int32_t flush_rounds;   /* of which the warps' sums are held at a time */
    int32_t partials_at;    /* the warps' sums: [rounds][teams][warps][m][16 * abreast] */
    int32_t partials_bytes; /* of one of the two buffers, or 0 where there is one */
    int32_t token_part;     /* 65536 / m, rounded up */
    int32_t sums_at;        /* sums of x over each group's part in a batch, [parts][tokens of the kernel] fp32 */
    int32_t nested_shift;   /* log2(nested_blocksize) */
    int32_t exchange_at;    /* the parts of a cluster's blocks of the bands that a block owns */
    int32_t stage_at;       /* for columns in another order (order.cuh), where partials lie later: places, then x */
    int32_t stage_columns;  /* of it, or 0 */
    int32_t undivided;      /* whether absmax is nested and no batch has groups of two of those blocks */
    ql_packed_params product;
} ql_decode_params;

#endif

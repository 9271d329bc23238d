/* What the stream-K product on wgmma takes, and how its shared memory is laid out: plain C for the host and the device.
 *
 * The product has row_tiles x token_tiles tiles and every tile k_blocks blocks of a stage's columns. The first
 * split_tiles tiles are one line of blocks, cut into as many equal ranges as there are thread blocks; the tiles after
 * them are done whole, one a thread block and wave. A range that starts inside a tile leaves its sums in scratch for
 * the thread block that has the tile's first columns, which adds them in the order of K. */
#ifndef QL_KERNELS_STREAMK_H
#define QL_KERNELS_STREAMK_H

#include "packed.h"

#ifdef __cplusplus
#define QL_ALIGNED(bytes) alignas(bytes)
#else
#define QL_ALIGNED(bytes) _Alignas(bytes)
#endif

enum {
    QL_STREAMK_BOX_K = 64,
    QL_STREAMK_TOKEN_GROUP = 2048, /* tokens whose tiles are done beside each other */
    QL_STREAMK_WARPS = 8,          /* that multiply, of a set */
    QL_STREAMK_BARRIER_BYTES = 1024,
    QL_STREAMK_MOST_STAGES = 24,
    QL_STREAMK_TABLE_BYTES = 65536,                                 /* pairs of a table's values */
    QL_STREAMK_NESTED_SLOTS = 8,                                    /* of a ring of bytes of nested absmax */
    QL_STREAMK_NESTED_BYTES = 1024 + QL_STREAMK_NESTED_SLOTS * 256, /* the table of these, and that ring */
    QL_STREAMK_ABSMAX_SLOTS = 4,                                    /* of a ring of what absmax is made of */
    /* The table of bytes of nested absmax, and that ring: 16 bytes a row and slot. */
    QL_STREAMK_PLANES_BYTES = 1024 + QL_STREAMK_ABSMAX_SLOTS * 128 * 16
};

typedef struct ql_streamk_params {
    QL_ALIGNED(64)
    uint64_t x_map[16];     /* CUtensorMap of x: boxes of 64 columns by the tile's tokens, swizzled by 128 bytes */
    uint64_t codes_map[16]; /* of the codes: a row a strip; boxes of a stage's columns by the tile's strips */
    uint64_t out_map[16];   /* of out, where its rows are whole pieces: boxes of a buffer of outputs, swizzled as x */
    ql_packed_params product;
    float *partials; /* scratch: [grid][rows * tokens] */
    uint64_t *flags; /* scratch: [grid][QL_STREAMK_WARPS]; nonce: the warp's part of partials is there */
    uint64_t nonce;  /* of this launch */
    int32_t row_tiles, token_tiles, k_blocks, split_tiles;
    int32_t range, longer_ranges; /* blocks a range, and how many ranges have one more */
    int32_t stages;
    int32_t group_blocks;                            /* blocks a group, at least 1 */
    uint32_t k_blocks_inverse, group_blocks_inverse; /* 2^32 / each, rounded down; 2^32 - 1 for 1 */
    uint32_t width_inverse;                          /* of the last group of token tiles, how many they are */
    int32_t nested_shift;                            /* log2 of nested_blocksize */
    int32_t x_bytes; /* of x in a stage: less than there is room for where M is less than a tile */
} ql_streamk_params;

/* Tiles of 256 tokens are done by thread blocks in clusters of two, which have tiles below each other: each brings half of x
 * for both. */
#define QL_STREAMK_PAIRED(tokens) ((tokens) == 256)

/* Sums of 256 tokens leave no registers for a group's own beside them: there codes of a table become its products with
 * absmax, from planes of bytes (planes.cuh) that a stage has 32 bytes a row and group of. */
#define QL_STREAMK_HAS_PLANES(code, tokens) ((code) == QL_CODE_TABLE4 && (tokens) == 256)

/* What other ranges have left of a tile comes by the ring of stages where a thread has many sums: mostly it is there by then,
 * as tiles of 256 tokens are for products with more of them than thread blocks. */
#define QL_STREAMK_HAS_PARTS(code, tokens) ((tokens) == 256 && (code) != QL_CODE_TABLE4)

/* Up to 16 tokens of integers have two sets of warps that multiply, which take turns at stages and add their sums up in shared
 * memory (sixteen_tokens.cuh). So a ring has an even number of stages, each of which is one set's. */
#define QL_STREAMK_SETS(code, tokens) ((tokens) == 16 && (code) != QL_CODE_TABLE4 ? 2 : 1)
#define QL_STREAMK_THREADS(code, tokens) ((QL_STREAMK_SETS(code, tokens) * QL_STREAMK_WARPS + 4) * 32)

/* Bytes of a stage: x in boxes, the codes of the tile's strips, then what groups have (entries): of a strip and a pair
 * of groups up to 160, of a table 128, those of all strips of the first pair before those of the second; or planes. Where a
 * stage is half of a tile of codes, it has the whole tile: the halves of a lane's bytes do not lie together, and twice the
 * codes of 2 or 3 bit are still little beside x. */
#define QL_STREAMK_HAS_HALVES(code, stage_k) ((stage_k) < QL_TILE_K(code))
#define QL_STREAMK_STRIP_BYTES(code, stage_k)                                                                          \
    ((QL_STREAMK_HAS_HALVES(code, stage_k) ? 1 : (stage_k) / QL_TILE_K(code)) * QL_TILE_BYTES(code))
#define QL_STREAMK_CODES_AT(tokens, stage_k) ((tokens) * (stage_k) * 2)
#define QL_STREAMK_ENTRIES_AT(code, rows, tokens, stage_k)                                                             \
    (QL_STREAMK_CODES_AT(tokens, stage_k) + (rows) / 16 * QL_STREAMK_STRIP_BYTES(code, stage_k))
#define QL_STREAMK_PAIRS(groups) (((groups) + 1) / 2)
#define QL_STREAMK_PAIR_BYTES(code, rows) ((rows) / 16 * ((code) == QL_CODE_TABLE4 ? 128 : 160))
#define QL_STREAMK_ENTRIES_BYTES(code, rows, tokens, groups)                                                           \
    (QL_STREAMK_HAS_PLANES(code, tokens)                                                                               \
         ? (rows) * 32 * (groups)                                                                                      \
         : (QL_STREAMK_PAIRS(groups) * QL_STREAMK_PAIR_BYTES(code, rows) + 1023) / 1024 * 1024)
#define QL_STREAMK_STAGE_BYTES(code, rows, tokens, stage_k, groups)                                                    \
    (QL_STREAMK_ENTRIES_AT(code, rows, tokens, stage_k) +                                                              \
     ((groups) ? QL_STREAMK_ENTRIES_BYTES(code, rows, tokens, groups) : 0))

/* An element of codes_map, in bytes: a box has at most 256 of them along a row. */
#define QL_STREAMK_CODES_UNIT(code, stage_k) (QL_STREAMK_STRIP_BYTES(code, stage_k) > 1024 ? 8 : 4)

/* Tiles of 256 tokens leave their outputs to copies out of shared memory, of boxes that are all tokens, or half of them where
 * a fourth stage has no room else; the other tiles' threads store theirs, in pieces of two buffers that take turns. */
#define QL_STREAMK_HAS_BOXES(tokens) ((tokens) == 256)
#define QL_STREAMK_OUTPUT_TOKENS(code, tokens, groups)                                                                 \
    ((tokens) < 32                                                          ? (tokens)                                 \
     : !QL_STREAMK_HAS_BOXES(tokens)                                        ? 32                                       \
     : (code) == QL_CODE_TABLE4 || ((code) == QL_CODE_INT8 && (groups) > 0) ? 128                                      \
                                                                            : 256)
#define QL_STREAMK_OUTPUT_BYTES(code, tokens, groups) (64 * QL_STREAMK_OUTPUT_TOKENS(code, tokens, groups) * 2)
#define QL_STREAMK_OUTPUTS(tokens) (QL_STREAMK_WARPS / 4 * (QL_STREAMK_HAS_BOXES(tokens) ? 1 : 2))

/* Before the stages: barriers, buffers of outputs, 64 rows of W wide, for each warpgroup, tables or sums of the second set. */
#define QL_STREAMK_TABLE_AT(code, tokens, groups)                                                                      \
    (QL_STREAMK_BARRIER_BYTES + QL_STREAMK_OUTPUTS(tokens) * QL_STREAMK_OUTPUT_BYTES(code, tokens, groups))
#define QL_STREAMK_TABLES_BYTES(code, tokens)                                                                          \
    ((code) != QL_CODE_TABLE4              ? (QL_STREAMK_SETS(code, tokens) - 1) * 128 * (tokens) * 4                  \
     : QL_STREAMK_HAS_PLANES(code, tokens) ? QL_STREAMK_PLANES_BYTES                                                   \
                                           : QL_STREAMK_TABLE_BYTES + QL_STREAMK_NESTED_BYTES)
#define QL_STREAMK_HEAD_BYTES(code, tokens, groups)                                                                    \
    (QL_STREAMK_TABLE_AT(code, tokens, groups) + QL_STREAMK_TABLES_BYTES(code, tokens))

#endif

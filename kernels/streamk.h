/* What the stream-K product on wgmma takes, and how its shared memory is laid out: plain C for the host and the device.
 *
 * The product has row_tiles x token_tiles tiles and every tile k_blocks blocks of QL_STREAMK_K columns. The first
 * split_tiles tiles are one line of blocks, cut into as many equal ranges as there are thread blocks; the tiles after
 * them are done whole, one a thread block and wave. A range that starts inside a tile leaves its sums in scratch for the
 * thread block that has the tile's first columns, which adds them in the order of K. */
#ifndef QL_KERNELS_STREAMK_H
#define QL_KERNELS_STREAMK_H

#include "packed.h"

#ifdef __cplusplus
#define QL_ALIGNED(bytes) alignas(bytes)
#else
#define QL_ALIGNED(bytes) _Alignas(bytes)
#endif

enum {
    QL_STREAMK_K = 128,
    QL_STREAMK_BOX_K = 64,
    QL_STREAMK_TOKEN_GROUP = 16, /* tiles of tokens that are done beside each other */
    QL_STREAMK_PAIRS = 8,        /* pairs of groups in shared memory */
    QL_STREAMK_WARP_BYTES = 1024,
    QL_STREAMK_TABLE_AT = 65536, /* the pair table's address: a code is bits 8-15 of it */
    QL_STREAMK_TABLE_BYTES = 65536,
    QL_STREAMK_SHARED_START = 1024, /* the address of dynamic shared memory on sm_90 */
    QL_STREAMK_BARRIER_BYTES = 1024,
    QL_STREAMK_THREADS = 384,
    QL_STREAMK_WARPS = 8 /* that multiply */
};

/* What scales are applied to: a group's sums, the weights before they are rounded to 16 bit, or the outputs. */
enum { QL_SCALES_SUMS, QL_SCALES_WEIGHTS, QL_SCALES_OUTPUTS };

typedef struct ql_streamk_params {
    QL_ALIGNED(64)
    uint64_t x_map[16]; /* CUtensorMap of x: boxes of 64 columns by the tile's tokens, swizzled by 128 bytes */
    ql_packed_params product;
    float *partials; /* scratch: [grid][rows * tokens] */
    uint64_t *
        flags; /* scratch: [grid][QL_STREAMK_WARPS]; one that equals nonce says that the warp's part of partials is there */
    uint64_t nonce; /* of this launch */
    int32_t row_tiles, token_tiles, k_blocks, split_tiles;
    int32_t range, longer_ranges; /* blocks a range, and how many ranges have one more */
    int32_t stages, low_stages;   /* low_stages: those before the pair table */
    int32_t nested_shift;         /* log2 of nested_blocksize */
} ql_streamk_params;

/* Columns and bytes of a stage of x: one or two boxes; bytes of the codes of a strip in QL_STREAMK_K columns. */
#define QL_STREAMK_X_K(tokens) ((tokens) == 256 ? QL_STREAMK_BOX_K : QL_STREAMK_K)
#define QL_STREAMK_STAGE_BYTES(tokens) ((tokens) * QL_STREAMK_X_K(tokens) * 2)
#define QL_STREAMK_STRIP_BYTES(code) (QL_STREAMK_K / QL_TILE_K(code) * QL_TILE_BYTES(code))

/* Before the stages: barriers, scales and zeros of pairs of groups, a buffer for each warp's outputs, and the codes of
 * some stages: as many as keep 64 KB of them on their way, if there is room. */
#define QL_STREAMK_PAIR_BYTES(rows) ((rows) / 16 * 256)
#define QL_STREAMK_CODE_STAGES(code, rows, tokens)                                                                     \
    ((code) == QL_CODE_INT8                                         ? ((tokens) == 256   ? 3                           \
                                                                       : (tokens) == 128 ? 5                           \
                                                                                         : 6)                          \
     : (rows) == 256 || (tokens) == 256 || (code) == QL_CODE_TABLE4 ? 4                                                \
                                                                    : 8)
#define QL_STREAMK_HEAD_BYTES(code, rows, tokens)                                                                      \
    (QL_STREAMK_BARRIER_BYTES + QL_STREAMK_PAIRS * QL_STREAMK_PAIR_BYTES(rows) +                                       \
     QL_STREAMK_WARPS * QL_STREAMK_WARP_BYTES +                                                                        \
     QL_STREAMK_CODE_STAGES(code, rows, tokens) * (rows) / 16 * QL_STREAMK_STRIP_BYTES(code))

#endif

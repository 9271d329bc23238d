/* Products of 1 to 16 tokens with 8-bit weights and 8-bit activations: what the kernels take. Plain C for the host and the
 * device.
 *
 * A thread block is `teams` teams of `warps` warps. Team t of cluster c takes strips of 16 rows c + t * blocks, and every
 * blocks * teams-th after it; its warps take slots of QL_W8A8_GROUP columns in turn. Where the activations do not fit a
 * block's shared memory, the blocks of a cluster have `span` columns each. */
#ifndef QL_KERNELS_W8A8_DECODE_H
#define QL_KERNELS_W8A8_DECODE_H

#include "w8a8_quantize.h"

/* Rows of a strip; threads of a block, at most; bytes of a slot of a warp's ring, 16 rows by 128 columns, and the most
 * slots. */
enum {
    QL_W8A8_STRIP = 16,
    QL_W8A8_DECODE_THREADS = 512,
    QL_W8A8_SLOT = QL_W8A8_STRIP * QL_W8A8_GROUP,
    QL_W8A8_MOST_SLOTS = 8,
    QL_W8A8_MOST_TEAMS = 7,
    QL_W8A8_OWN_TOKENS = 8, /* kernels of so many quantize the activations themselves */
    QL_W8A8_OWN_HELD = 8,   /* pieces of 16 bytes of activations that a thread of them holds */
    QL_W8A8_HELD = 8        /* of codes, a thread of the others at once */
};

/* Sums of a warp: by token, 20 words apart so that lanes meet no bank twice, then by row. Two buffers where there is room. */
enum { QL_W8A8_SUMS_PITCH = 20 };
#define QL_W8A8_SUMS_BUFFERS(tokens) ((tokens) == 8 ? 2 : 1)

typedef struct ql_w8a8_decode_params {
    ql_w8a8_params product;
    ql_w8a8_quantize_params
        quantize; /* where blocks quantize x themselves: they do not read product.x_codes and x_scales */
    int32_t strips, blocks, cluster, teams, warps;
    int32_t cluster_shift; /* log2 of cluster */
    int32_t warp_team;     /* 65536 / warps, rounded up */
    int32_t batches;       /* slots of a warp in a strip */
    int32_t span;          /* columns of a block: batches * warps * QL_W8A8_GROUP */
    int32_t rounds;        /* strips of a team, at most */
    int32_t outputs;       /* rows of a block: rounds * teams * 16 */
    int32_t slots;         /* of a ring */
    int32_t early;         /* of them, filled before the activations are asked for */
    int32_t soon;          /* and before these are looked at, where blocks quantize them */
    int32_t kept;          /* chunks of 64 columns whose outliers are in shared memory */
    int32_t row_pieces;    /* of 16 bytes that a thread holds, in a row of x or of codes: a multiple of 32 */
    uint32_t per_row;      /* 2^32 / row_pieces, rounded up */
    int32_t turn;          /* pieces by which a row of int8 is turned against the one before, where blocks quantize x */
    int32_t x_row_bytes;   /* between rows of x, where blocks quantize it */
    /* Shared memory, offsets in bytes. */
    int32_t
        x_pitch; /* codes at 0: [m, x_pitch], 64 more than a multiple of 128; e4m3 that the block makes: fp16, 16 more */
    int32_t ring_at;        /* [warps of the block, slots] */
    int32_t ring_scales_at; /* fp32 [warps of the block, slots, 16], by groups only */
    int32_t outputs_at;     /* fp32 [2, rounds, teams, 16]: scales and bias */
    int32_t scales_at;      /* fp32 [tokens], or [span / 128, tokens] */
    int32_t mask_at;        /* [span / 8] */
    int32_t places_at;      /* [span / 64] */
    int32_t chunks_at;      /* 16 bit [kept] */
    int32_t kept_at;        /* 16 bit [kept, pieces of a value, m, 64] */
    int32_t marked_at;      /* how many chunks are marked */
    int32_t most_at;        /* magnitudes [QL_W8A8_OWN_HELD, warps of the block] */
    int32_t encoders_at;    /* 16 bytes [m] */
    int32_t sums_at;        /* [buffers, warps of the block, m, QL_W8A8_SUMS_PITCH] */
    int32_t exchange_at;    /* fp32 [rounds of this block, teams, cluster, m, 16] */
} ql_w8a8_decode_params;

#endif

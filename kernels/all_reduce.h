/* What a sum of tensors on several GPUs takes. Plain C for the host and the device. */
#ifndef QL_KERNELS_ALL_REDUCE_H
#define QL_KERNELS_ALL_REDUCE_H

#include <stdint.h>

/* The most GPUs; threads of a block; the most blocks, which every GPU runs at once so that none waits for one that has not
 * begun; bytes of a piece, which one thread sends and receives. */
enum { QL_ALL_REDUCE_PARTS = 8, QL_ALL_REDUCE_THREADS = 256, QL_ALL_REDUCE_BLOCKS = 128, QL_ALL_REDUCE_PIECE = 16 };

/* Stands in an inbox where nothing has come yet, and is never sent: a NaN, or two, in place of which another is. */
#define QL_ALL_REDUCE_NOTHING 0xffffffffu

/* x becomes the sum of the x of all GPUs, each of which launches this with one of the same count and type.
 * Grid: as many blocks as there are pieces for, QL_ALL_REDUCE_BLOCKS at most. */
typedef struct ql_all_reduce_params {
    void *x;
    char *boxes[QL_ALL_REDUCE_PARTS]; /* of each GPU as this one sees it: [2, parts, place] bytes, NOTHING at first */
    uint32_t *calls;      /* [QL_ALL_REDUCE_BLOCKS]: how often each block ran; at first the same on all GPUs */
    int64_t bytes, place; /* of x; place: a multiple of QL_ALL_REDUCE_PIECE, at least bytes */
    uint64_t patience;    /* nanoseconds that it waits for the others before it gives up */
    int32_t rank, parts, type;
    int32_t vector; /* x begins at a multiple of 16 bytes */
} ql_all_reduce_params;

#endif

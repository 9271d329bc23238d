/* How the mma.sync products of 8-bit weights and activations are launched. Plain C for the host and the device. */
#ifndef QL_KERNELS_W8A8_MMA_H
#define QL_KERNELS_W8A8_MMA_H

#include "w8a8.h"

/* Rows of the weight and tokens that a block makes outputs of, its threads, and the stages of its ring: rows and tokens by
 * 128 columns. Four stages are what fits GPUs whose multiprocessors have 100 KB. */
enum {
    QL_W8A8_MMA_ROWS = 128,
    QL_W8A8_MMA_TOKENS = 64,
    QL_W8A8_MMA_THREADS = 256,
    QL_W8A8_MMA_STAGES = 4,
    QL_W8A8_MMA_STAGE_BYTES = (QL_W8A8_MMA_ROWS + QL_W8A8_MMA_TOKENS) * QL_W8A8_GROUP,
    QL_W8A8_MMA_SHARED = QL_W8A8_MMA_STAGES * QL_W8A8_MMA_STAGE_BYTES
};

#endif

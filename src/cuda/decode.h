/* The engine of kernels/decode.cu: products of 1 to 16 rows with a packed weight, fp16 and bf16, for every GPU of compute
 * capability 8.0 and more where x fits a block's shared memory, or a cluster's on 9.0 and more. A choice's parameter is the
 * warps of a team + 32 * the blocks of a cluster. */
#ifndef QL_CUDA_DECODE_H
#define QL_CUDA_DECODE_H

#include "choose.h"

extern const ql_cuda_product_engine ql_cuda_decode;

#endif

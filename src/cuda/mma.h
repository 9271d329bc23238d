/* The engine of kernels/mma.cu: products with a packed weight on mma.sync, for every GPU of compute capability 8.0 and more,
 * fp16 and bf16, any number of rows. A choice's parameter is the number of blocks that K is split over. */
#ifndef QL_CUDA_MMA_H
#define QL_CUDA_MMA_H

#include "choose.h"

extern const ql_cuda_product_engine ql_cuda_mma;

#endif

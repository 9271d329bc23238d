/* The engine of kernels/wgmma.cu: products with a packed weight on GPUs of compute capability 9.0, fp16 and bf16, any number
 * of rows. A choice's parameter is the number of thread blocks. */
#ifndef QL_CUDA_WGMMA_H
#define QL_CUDA_WGMMA_H

#include "choose.h"

extern const ql_cuda_product_engine ql_cuda_wgmma;

#endif

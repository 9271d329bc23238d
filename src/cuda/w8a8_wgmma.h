/* The engine of kernels/w8a8_wgmma.cu: products of 8-bit activations with an 8-bit weight on GPUs of compute capability 9.0,
 * any number of rows, meant for more than 8. */
#ifndef QL_CUDA_W8A8_WGMMA_H
#define QL_CUDA_W8A8_WGMMA_H

#include "../../kernels/w8a8.h"
#include "choices.h"
#include "launch.h"

/* Whether it can run this product: on this GPU, with these strides and addresses. Both matrices of codes must begin at
 * multiples of 16 bytes, k and row_stride must be multiples of 16, x may not be fp32 where there are outliers, and the
 * weight's scales must be one, one a row, or one a block of 128 x 128. If so, *choice is the kernel and how the product is
 * cut for it: what the other two functions take. */
bool ql_cuda_w8a8_wgmma_takes(ql_cuda_choice *choice, const ql_cuda_device *device, const ql_w8a8_params *params);

/* Bytes of scratch for a product that it takes, which may hold anything. */
int64_t ql_cuda_w8a8_wgmma_scratch(const ql_w8a8_params *params, ql_cuda_choice choice);

/* Launches it on the stream, one kernel. 0, or -1 with a sentence in message. */
int ql_cuda_w8a8_wgmma_launch(const ql_cuda_guard *guard, void *stream, const ql_w8a8_params *params,
                              ql_cuda_choice choice, void *scratch, char message[QL_CUDA_MESSAGE]);

#endif

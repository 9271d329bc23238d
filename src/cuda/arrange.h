/* x laid out anew for kernels that do not take it as it is (kernels/arrange.cu): columns in the order of the packed weight,
 * rows at multiples of 16 bytes. */
#ifndef QL_CUDA_ARRANGE_H
#define QL_CUDA_ARRANGE_H

#include "../../kernels/packed.h"
#include "launch.h"

/* What a row takes, in elements. */
int64_t ql_cuda_arranged_stride(int64_t k);

/* What all rows take, a multiple of QL_ARRANGE_ALIGNMENT, or -1 where it does not fit int64. */
int64_t ql_cuda_arranged_bytes(int64_t m, int64_t k);

/* Launches it; out is aligned to QL_ARRANGE_ALIGNMENT. 0, or -1 with a sentence in message. */
int ql_cuda_arrange(const ql_cuda_guard *guard, void *stream, void *out, const ql_packed_params *params,
                    char message[QL_CUDA_MESSAGE]);

#endif

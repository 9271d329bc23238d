/* Which kernel multiplies with a packed weight: the one place that knows all of them. */
#ifndef QL_CUDA_CHOOSE_H
#define QL_CUDA_CHOOSE_H

#include "../../kernels/params.h"
#include "../formats/weight.h"
#include "launch.h"

/* What ql_cuda_packed_linear returns where the base kernels, which take every call, are to do it. */
enum { QL_CUDA_BASE = 1 };

/* Bytes of device memory that ql_cuda_packed_linear needs as scratch for m rows of x. -1 where it does not fit int64. */
int64_t ql_cuda_packed_scratch(int64_t m, const ql_weight *weight);

/* Launches the product on the place's stream, between enter and leave: 0, or -1 with a sentence in message; or launches
 * nothing and returns QL_CUDA_BASE. With QLINEAR_KERNELS=base in the environment it always does. */
int ql_cuda_packed_linear(const ql_cuda_guard *guard, void *stream, const ql_packed_params *params, void *scratch,
                          char message[QL_CUDA_MESSAGE]);

#endif

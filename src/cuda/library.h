/* The embedded kernels as the driver sees them. */
#ifndef QL_CUDA_LIBRARY_H
#define QL_CUDA_LIBRARY_H

#include "../../kernels/variants.h"
#include "driver.h"

/* The kernels, in the order of kernels/variants.h. */
#define QL_KERNEL_ID(name, ...) QL_KERNEL_##name,
typedef enum ql_cuda_kernel { QL_KERNELS(QL_KERNEL_ID) QL_KERNEL_COUNT } ql_cuda_kernel;
#undef QL_KERNEL_ID

/* The name of the kernel's entry point, which is its symbol in one of the images. */
const char *ql_cuda_kernel_name(ql_cuda_kernel kernel);

/* Fills kernels, by id, for GPUs of compute capability major.minor, from the images that were compiled for them, each of
 * which is loaded when the first such GPU asks; NULL for a kernel that is not compiled for them. The handles live as long
 * as the process. 0, or -1 with a sentence in message where there is not one. */
int ql_cuda_library(ql_cu_kernel kernels[QL_KERNEL_COUNT], const ql_cuda_driver *driver, int major, int minor,
                    char message[QL_CUDA_MESSAGE]);

#endif

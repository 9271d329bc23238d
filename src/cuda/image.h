/* The fatbin that the build embedded: kernels compiled for several GPU architectures. */
#ifndef QL_CUDA_IMAGE_H
#define QL_CUDA_IMAGE_H

#include <stdint.h>

/* Its first byte, or NULL where the package was built without CUDA. It lies in read-only memory for as long as the
 * module does. */
const void *ql_cuda_image(void);

/* Its size, 0 where there is none. */
int64_t ql_cuda_image_bytes(void);

/* What it was compiled for, separated by spaces; "compute_80" stands for PTX. "" where there is none. */
const char *ql_cuda_image_architectures(void);

/* The oldest CUDA version of a driver that can read it: 1000 * major + 10 * minor. */
int ql_cuda_image_driver(void);

#endif

/* The fatbins that the build embedded, one for each file of kernels: each holds its kernels for its architectures. */
#ifndef QL_CUDA_IMAGE_H
#define QL_CUDA_IMAGE_H

#include <stdint.h>

typedef struct ql_cuda_image {
    const char *name;          /* of the file kernels/<name>.cu */
    const char *architectures; /* what it was compiled for, separated by spaces; "compute_80" stands for PTX */
    const void *data;          /* read-only, for as long as the module is loaded */
    int64_t bytes;
} ql_cuda_image;

enum { QL_CUDA_MAX_IMAGES = 32 };

/* How many there are: 0 where the package was built without CUDA. */
int ql_cuda_image_count(void);

ql_cuda_image ql_cuda_image_at(int index);

/* What any of them was compiled for; "" where there is none. */
const char *ql_cuda_image_architectures(void);

/* The oldest CUDA version of a driver that can read them: 1000 * major + 10 * minor; 0 where there is none. */
int ql_cuda_image_driver(void);

#endif

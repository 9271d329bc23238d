/* The embedded kernels as the driver sees them, and a description of all that was found. */
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

/* Every kernel by its id, loaded from the embedded images at the first call; NULL for one that they lack. Returns NULL
 * with a sentence in message where there is no image, no driver, or an image that the driver cannot use. The handles
 * serve every GPU and live as long as the process. */
const ql_cu_kernel *ql_cuda_library(char message[QL_CUDA_MESSAGE]);

enum { QL_CUDA_MAX_DEVICES = 32 };

typedef struct ql_cuda_device {
    char name[128];
    int major, minor; /* compute capability */
    int64_t memory;   /* bytes */
} ql_cuda_device;

typedef struct ql_cuda_description {
    bool built;                /* kernels are embedded */
    const char *architectures; /* what they were compiled for, separated by spaces: "sm_80 ... compute_80", or "" */
    int64_t fatbin_bytes;      /* of all images */
    const char *driver;        /* the driver's file, or NULL */
    int driver_version;        /* as ql_cuda_driver's, 0 where there is none */
    int device_count;
    ql_cuda_device devices[QL_CUDA_MAX_DEVICES];
    bool kernels[QL_KERNEL_COUNT]; /* which the driver found in the images */
    char missing[QL_CUDA_MESSAGE]; /* why kernels cannot run here, or "" */
} ql_cuda_description;

/* Asks the driver (and so initializes it) and fills description; never fails. */
void ql_cuda_describe(ql_cuda_description *description);

#endif

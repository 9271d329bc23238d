/* What a user is told of the CUDA side: kernels, driver, GPUs, and what is missing. */
#ifndef QL_CUDA_DESCRIBE_H
#define QL_CUDA_DESCRIBE_H

#include "device.h"

typedef struct ql_cuda_description {
    bool built;                /* kernels are embedded */
    const char *architectures; /* what they were compiled for, separated by spaces: "sm_80 ... compute_80", or "" */
    int64_t fatbin_bytes;      /* of all images */
    const char *driver;        /* the driver's file, or NULL */
    int driver_version;        /* as ql_cuda_driver's, 0 where there is none */
    int device_count;
    ql_cuda_properties devices[QL_CUDA_MAX_DEVICES];
    bool kernels[QL_KERNEL_COUNT]; /* which run on one of the devices */
    char missing[QL_CUDA_MESSAGE]; /* why kernels cannot run on one of the devices, or "" */
} ql_cuda_description;

/* Asks the driver (and so initializes it) and fills description; never fails. Makes no context. */
void ql_cuda_describe(ql_cuda_description *description);

#endif

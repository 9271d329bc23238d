/* The GPUs: what is known of each, and what a call needs of it, found once and then read without a lock. */
#ifndef QL_CUDA_DEVICE_H
#define QL_CUDA_DEVICE_H

#include "library.h"

enum { QL_CUDA_MAX_DEVICES = 32 };

typedef struct ql_cuda_properties {
    char name[128];
    int major, minor; /* compute capability */
    int multiprocessors;
    int shared_bytes; /* shared memory, the most that one block can have */
    int64_t l2_bytes;
    int64_t memory; /* bytes of device memory */
} ql_cuda_properties;

/* A GPU that calls can run on. */
typedef struct ql_cuda_device {
    const ql_cuda_driver *driver;
    int ordinal;
    ql_cu_device handle;
    ql_cu_context context; /* the primary one, which the frameworks work in */
    ql_cuda_properties properties;
    ql_cu_kernel kernels[QL_KERNEL_COUNT]; /* NULL: not compiled for this GPU */
} ql_cuda_device;

/* The device of this number, made ready by its first caller: driver, kernels, context. NULL with a sentence in message;
 * the next call tries again. */
const ql_cuda_device *ql_cuda_device_get(int ordinal, char message[QL_CUDA_MESSAGE]);

/* Fills properties, and *handle, of a device that need not be ready. */
ql_cu_result ql_cuda_device_ask(ql_cuda_properties *properties, ql_cu_device *handle, const ql_cuda_driver *driver,
                                int ordinal);

#endif

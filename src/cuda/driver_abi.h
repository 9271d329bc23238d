/* The part of the CUDA driver's ABI that is used here: declared by hand, so that the package builds where there is no
 * CUDA at all. Names and values are those of the driver's API, of any driver from CUDA 12.0 on. */
#ifndef QL_CUDA_DRIVER_ABI_H
#define QL_CUDA_DRIVER_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int ql_cu_result;
typedef int ql_cu_device;
typedef struct ql_cu_library_handle *ql_cu_library;
typedef struct ql_cu_kernel_handle *ql_cu_kernel;
typedef struct ql_cu_context_handle *ql_cu_context;

/* CUipcMemHandle, which is given by value. */
typedef struct ql_cu_ipc_handle {
    unsigned char bytes[64];
} ql_cu_ipc_handle;

/* CUlaunchAttribute: what of the value is used here, in the place and the size of the driver's union. */
typedef struct ql_cu_launch_attribute {
    int id;
    union {
        struct {
            unsigned x, y, z;
        } cluster;
        int overlaps; /* programmatic stream serialization is allowed */
        uint64_t size[8];
    } value;
} ql_cu_launch_attribute;

/* CUlaunchConfig. */
typedef struct ql_cu_launch_config {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void *stream;
    ql_cu_launch_attribute *attributes;
    unsigned attribute_count;
} ql_cu_launch_config;

enum {
    QL_CU_SUCCESS = 0,
    QL_CU_NOT_INITIALIZED = 3,
    QL_CU_NO_DEVICE = 100,
    QL_CU_NO_BINARY_FOR_GPU = 209,
    QL_CU_UNSUPPORTED_PTX_VERSION = 222,
    QL_CU_SYSTEM_DRIVER_MISMATCH = 803
};

/* Of cuGetProcAddress_v2: stream 0 is the legacy stream, as in torch. */
enum { QL_CU_GET_PROC_ADDRESS_LEGACY_STREAM = 1 };

/* Of cuDeviceGetAttribute. */
enum {
    QL_CU_MULTIPROCESSOR_COUNT = 16,
    QL_CU_L2_CACHE_SIZE = 38,
    QL_CU_COMPUTE_CAPABILITY_MAJOR = 75,
    QL_CU_COMPUTE_CAPABILITY_MINOR = 76,
    QL_CU_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
};

/* Of cuKernelGetAttribute and cuKernelSetAttribute. */
enum { QL_CU_SHARED_SIZE_BYTES = 1, QL_CU_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };

/* Of cuLaunchKernelEx. */
enum { QL_CU_LAUNCH_CLUSTER_DIMENSION = 4, QL_CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

/* Of cuIpcOpenMemHandle and cuEventCreate. */
enum { QL_CU_IPC_LAZY_ENABLE_PEER_ACCESS = 1, QL_CU_EVENT_DISABLE_TIMING = 2 };

/* Of cuTensorMapEncodeTiled. */
enum {
    QL_CU_TENSOR_U8 = 0,
    QL_CU_TENSOR_INT32 = 3,
    QL_CU_TENSOR_INT64 = 5,
    QL_CU_TENSOR_F16 = 6,
    QL_CU_TENSOR_BF16 = 9,
    QL_CU_TENSOR_SWIZZLE_128B = 3,
    QL_CU_TENSOR_L2_128B = 2,
    QL_CU_TENSOR_L2_256B = 3
};

/* Of cuLibraryLoadData: the driver keeps no copy, the image stays where it is. */
enum { QL_CU_LIBRARY_BINARY_IS_PRESERVED = 1 };

typedef ql_cu_result (*ql_cu_get_proc_address)(const char *symbol, void **function, int version, uint64_t flags,
                                               int *status);

/* X(field, symbol, the CUDA version whose signature it is, parameters): every function that is looked up. */
#define QL_CU_FUNCTIONS(X)                                                                                             \
    X(init, "cuInit", 2000, (unsigned flags))                                                                          \
    X(driver_get_version, "cuDriverGetVersion", 2020, (int *version))                                                  \
    X(get_error_string, "cuGetErrorString", 6000, (ql_cu_result result, const char **text))                            \
    X(device_get_count, "cuDeviceGetCount", 2000, (int *count))                                                        \
    X(device_get, "cuDeviceGet", 2000, (ql_cu_device * device, int ordinal))                                           \
    X(device_get_name, "cuDeviceGetName", 2000, (char *name, int size, ql_cu_device device))                           \
    X(device_get_attribute, "cuDeviceGetAttribute", 2000, (int *value, int attribute, ql_cu_device device))            \
    X(device_total_mem, "cuDeviceTotalMem", 3020, (size_t *bytes, ql_cu_device device))                                \
    X(library_load_data, "cuLibraryLoadData", 12000,                                                                   \
      (ql_cu_library * library, const void *image, int *jit_options, void **jit_values, unsigned jit_count,            \
       int *options, void **values, unsigned count))                                                                   \
    X(library_get_kernel, "cuLibraryGetKernel", 12000,                                                                 \
      (ql_cu_kernel * kernel, ql_cu_library library, const char *name))                                                \
    X(device_primary_ctx_retain, "cuDevicePrimaryCtxRetain", 7000, (ql_cu_context * context, ql_cu_device device))     \
    X(ctx_get_current, "cuCtxGetCurrent", 4000, (ql_cu_context * context))                                             \
    X(ctx_push_current, "cuCtxPushCurrent", 4000, (ql_cu_context context))                                             \
    X(ctx_pop_current, "cuCtxPopCurrent", 4000, (ql_cu_context * context))                                             \
    X(kernel_get_attribute, "cuKernelGetAttribute", 12000,                                                             \
      (int *value, int attribute, ql_cu_kernel kernel, ql_cu_device device))                                           \
    X(kernel_set_attribute, "cuKernelSetAttribute", 12000,                                                             \
      (int attribute, int value, ql_cu_kernel kernel, ql_cu_device device))                                            \
    X(launch_kernel, "cuLaunchKernelEx", 11060,                                                                        \
      (const ql_cu_launch_config *config, ql_cu_kernel kernel, void **parameters, void **extra))                       \
    X(tensor_map_encode_tiled, "cuTensorMapEncodeTiled", 12000,                                                        \
      (void *map, int type, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *strides,              \
       const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill))              \
    X(memcpy_dtoh_async, "cuMemcpyDtoHAsync", 3020, (void *host, uint64_t device_data, size_t bytes, void *stream))    \
    X(stream_synchronize, "cuStreamSynchronize", 2000, (void *stream))                                                 \
    X(memset_d8_async, "cuMemsetD8Async", 3020,                                                                        \
      (uint64_t device_data, unsigned char value, size_t bytes, void *stream))                                         \
    X(stream_is_capturing, "cuStreamIsCapturing", 10000, (void *stream, int *status))                                  \
    X(stream_wait_event, "cuStreamWaitEvent", 3020, (void *stream, void *event, unsigned flags))                       \
    X(event_create, "cuEventCreate", 2000, (void **event, unsigned flags))                                             \
    X(event_record, "cuEventRecord", 2000, (void *event, void *stream))                                                \
    X(event_destroy, "cuEventDestroy", 4000, (void *event))                                                            \
    X(ipc_get_mem_handle, "cuIpcGetMemHandle", 4010, (ql_cu_ipc_handle * handle, uint64_t device_data))                \
    X(ipc_open_mem_handle, "cuIpcOpenMemHandle", 11000,                                                                \
      (uint64_t *device_data, ql_cu_ipc_handle handle, unsigned flags))                                                \
    X(ipc_close_mem_handle, "cuIpcCloseMemHandle", 4010, (uint64_t device_data))                                       \
    X(mem_alloc, "cuMemAlloc", 3020, (uint64_t *device_data, size_t bytes))                                            \
    X(mem_free, "cuMemFree", 3020, (uint64_t device_data))

#endif

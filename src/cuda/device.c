#include "device.h"

#include "image.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards devices while they are not ready */
static ql_cuda_device devices[QL_CUDA_MAX_DEVICES];
static atomic_bool ready[QL_CUDA_MAX_DEVICES];

ql_cu_result ql_cuda_device_ask(ql_cuda_properties *properties, ql_cu_device *handle, const ql_cuda_driver *driver,
                                int ordinal) {
    int l2_bytes = 0;
    size_t memory = 0;
    struct {
        int attribute, *value;
    } asked[] = {
        {QL_CU_COMPUTE_CAPABILITY_MAJOR, &properties->major},
        {QL_CU_COMPUTE_CAPABILITY_MINOR, &properties->minor},
        {QL_CU_MULTIPROCESSOR_COUNT, &properties->multiprocessors},
        {QL_CU_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &properties->shared_bytes},
        {QL_CU_L2_CACHE_SIZE, &l2_bytes},
    };
    ql_cu_result result = driver->device_get(handle, ordinal);
    if (result == QL_CU_SUCCESS)
        result = driver->device_get_name(properties->name, (int)sizeof properties->name, *handle);
    for (size_t i = 0; result == QL_CU_SUCCESS && i < sizeof asked / sizeof *asked; i++)
        result = driver->device_get_attribute(asked[i].value, asked[i].attribute, *handle);
    if (result == QL_CU_SUCCESS) result = driver->device_total_mem(&memory, *handle);
    properties->l2_bytes = l2_bytes;
    properties->memory = (int64_t)memory;
    return result;
}

static int make_ready(ql_cuda_device *device, const ql_cuda_driver *driver, int ordinal,
                      char message[QL_CUDA_MESSAGE]) {
    device->driver = driver;
    device->ordinal = ordinal;
    ql_cuda_properties *properties = &device->properties;
    ql_cu_result result = ql_cuda_device_ask(properties, &device->handle, driver, ordinal);
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE, "GPU %d could not be asked what it is: %s.", ordinal,
                 ql_cuda_error(driver, result));
        return -1;
    }
    if (ql_cuda_library(device->kernels, driver, properties->major, properties->minor, message) < 0) return -1;
    /* Never released: releasing at exit would pull it from under the frameworks that share it. */
    result = driver->device_primary_ctx_retain(&device->context, device->handle);
    if (result == QL_CU_SUCCESS) return 0;
    snprintf(message, QL_CUDA_MESSAGE, "the context of GPU %d could not be had: %s.", ordinal,
             ql_cuda_error(driver, result));
    return -1;
}

const ql_cuda_device *ql_cuda_device_get(int ordinal, char message[QL_CUDA_MESSAGE]) {
    if (ordinal < 0 || ordinal >= QL_CUDA_MAX_DEVICES) {
        snprintf(message, QL_CUDA_MESSAGE, "there is no GPU of number %d.", ordinal);
        return NULL;
    }
    if (atomic_load_explicit(&ready[ordinal], memory_order_acquire) && !ql_cuda_forked()) return &devices[ordinal];
    if (!ql_cuda_image_count()) {
        snprintf(message, QL_CUDA_MESSAGE, "this build has no CUDA kernels.");
        return NULL;
    }
    /* Nobody has the lock who has not opened the driver before: in a forked child, where a thread that is not there may
     * hold it for ever, opening fails. */
    const ql_cuda_driver *driver = ql_cuda_open(message);
    if (!driver) return NULL;
    pthread_mutex_lock(&lock);
    bool done = atomic_load_explicit(&ready[ordinal], memory_order_relaxed) ||
                make_ready(&devices[ordinal], driver, ordinal, message) == 0;
    if (done) atomic_store_explicit(&ready[ordinal], true, memory_order_release);
    pthread_mutex_unlock(&lock);
    return done ? &devices[ordinal] : NULL;
}

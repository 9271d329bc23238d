#include "launch.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards primary */
static ql_cu_context primary[QL_CUDA_MAX_DEVICES];

static int fail(const ql_cuda_driver *driver, ql_cu_result result, const char *what, char message[QL_CUDA_MESSAGE]) {
    snprintf(message, QL_CUDA_MESSAGE, "%s: %s.", what, ql_cuda_error(driver, result));
    return -1;
}

/* Retained once and never released: releasing at exit would pull it from under the frameworks that share it. */
static ql_cu_context primary_of(const ql_cuda_driver *driver, int device, char message[QL_CUDA_MESSAGE]) {
    if (device < 0 || device >= QL_CUDA_MAX_DEVICES) {
        snprintf(message, QL_CUDA_MESSAGE, "there is no GPU of number %d.", device);
        return NULL;
    }
    pthread_mutex_lock(&lock);
    ql_cu_context context = primary[device];
    if (!context) {
        ql_cu_device handle;
        ql_cu_result result = driver->device_get(&handle, device);
        if (result == QL_CU_SUCCESS) result = driver->device_primary_ctx_retain(&context, handle);
        if (result != QL_CU_SUCCESS) {
            context = NULL;
            fail(driver, result, "the GPU's context could not be had", message);
        }
        primary[device] = context;
    }
    pthread_mutex_unlock(&lock);
    return context;
}

int ql_cuda_enter(ql_cuda_guard *guard, int device, char message[QL_CUDA_MESSAGE]) {
    guard->kernels = ql_cuda_library(message);
    if (!guard->kernels) return -1;
    guard->driver = ql_cuda_open(message);
    if (!guard->driver) return -1;
    ql_cu_context wanted = primary_of(guard->driver, device, message), current = NULL;
    if (!wanted) return -1;
    ql_cu_result result = guard->driver->ctx_get_current(&current);
    guard->pushed = result == QL_CU_SUCCESS && current != wanted;
    if (guard->pushed) result = guard->driver->ctx_push_current(wanted);
    return result == QL_CU_SUCCESS ? 0 : fail(guard->driver, result, "the GPU's context could not be entered", message);
}

void ql_cuda_leave(ql_cuda_guard *guard) {
    ql_cu_context popped;
    if (guard->pushed) (void)guard->driver->ctx_pop_current(&popped);
}

int ql_cuda_launch(const ql_cuda_guard *guard, ql_cuda_kernel kernel, void *stream, int64_t grid_x, int64_t grid_y,
                   int threads, const void *params, char message[QL_CUDA_MESSAGE]) {
    if (!guard->kernels[kernel]) {
        snprintf(message, QL_CUDA_MESSAGE, "the kernels built in lack %s.", ql_cuda_kernel_name(kernel));
        return -1;
    }
    if (grid_x > INT_MAX || grid_y > 65535) {
        snprintf(message, QL_CUDA_MESSAGE, "%s: a grid of %lld by %lld blocks is more than a GPU takes.",
                 ql_cuda_kernel_name(kernel), (long long)grid_x, (long long)grid_y);
        return -1;
    }
    /* The driver reads the parameters and writes none; its signature has no const. */
    void *arguments[1];
    *(const void **)arguments = params;
    ql_cu_result result = guard->driver->launch_kernel(guard->kernels[kernel], (unsigned)grid_x, (unsigned)grid_y, 1,
                                                       (unsigned)threads, 1, 1, 0, stream, arguments, NULL);
    return result == QL_CU_SUCCESS ? 0 : fail(guard->driver, result, ql_cuda_kernel_name(kernel), message);
}

int ql_cuda_read(void *host, const void *device_data, size_t bytes, const ql_cuda_place *place,
                 char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    ql_cu_result result = guard.driver->memcpy_dtoh_async(host, (uint64_t)(uintptr_t)device_data, bytes, place->stream);
    if (result == QL_CU_SUCCESS) result = guard.driver->stream_synchronize(place->stream);
    ql_cuda_leave(&guard);
    return result == QL_CU_SUCCESS ? 0 : fail(guard.driver, result, "a tensor could not be read from the GPU", message);
}

void *ql_cuda_allocate(size_t bytes, int device, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, device, message) < 0) return NULL;
    uint64_t data = 0;
    ql_cu_result result = guard.driver->mem_alloc(&data, bytes ? bytes : 1);
    ql_cuda_leave(&guard);
    if (result != QL_CU_SUCCESS) fail(guard.driver, result, "memory on the GPU could not be had", message);
    return result == QL_CU_SUCCESS ? (void *)(uintptr_t)data : NULL;
}

void ql_cuda_free(void *device_data, int device) {
    ql_cuda_guard guard;
    char message[QL_CUDA_MESSAGE];
    /* At the end of the process the context may be gone, and the memory with it. */
    if (ql_cuda_enter(&guard, device, message) < 0) return;
    (void)guard.driver->mem_free((uint64_t)(uintptr_t)device_data);
    ql_cuda_leave(&guard);
}

int ql_cuda_synchronize(const ql_cuda_place *place, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    ql_cu_result result = guard.driver->stream_synchronize(place->stream);
    ql_cuda_leave(&guard);
    return result == QL_CU_SUCCESS ? 0 : fail(guard.driver, result, "a product on the GPU failed", message);
}

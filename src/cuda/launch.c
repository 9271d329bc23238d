#include "launch.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>

/* What a block may have without asking. */
enum { DEFAULT_SHARED_BYTES = 48 * 1024 };

/* Which kernels were told that their blocks may have all the shared memory of the GPU. */
static atomic_bool shared_raised[QL_CUDA_MAX_DEVICES][QL_KERNEL_COUNT];

static int fail(const ql_cuda_driver *driver, ql_cu_result result, const char *what, char message[QL_CUDA_MESSAGE]) {
    snprintf(message, QL_CUDA_MESSAGE, "%s: %s.", what, ql_cuda_error(driver, result));
    return -1;
}

int ql_cuda_enter(ql_cuda_guard *guard, int device, char message[QL_CUDA_MESSAGE]) {
    guard->device = ql_cuda_device_get(device, message);
    if (!guard->device) return -1;
    guard->driver = guard->device->driver;
    guard->properties = &guard->device->properties;
    ql_cu_context current = NULL;
    ql_cu_result result = guard->driver->ctx_get_current(&current);
    guard->pushed = result == QL_CU_SUCCESS && current != guard->device->context;
    if (guard->pushed) result = guard->driver->ctx_push_current(guard->device->context);
    return result == QL_CU_SUCCESS ? 0 : fail(guard->driver, result, "the GPU's context could not be entered", message);
}

void ql_cuda_leave(ql_cuda_guard *guard) {
    ql_cu_context popped;
    if (guard->pushed) (void)guard->driver->ctx_pop_current(&popped);
}

/* The driver takes a device-wide lock for it, so it is done once, to the most that any launch can ask for: the limit costs
 * nothing, a launch takes what it says. Two threads that meet here set the same value. */
static ql_cu_result raise_shared(const ql_cuda_guard *guard, ql_cuda_kernel kernel) {
    atomic_bool *raised = &shared_raised[guard->device->ordinal][kernel];
    if (atomic_load_explicit(raised, memory_order_relaxed)) return QL_CU_SUCCESS;
    const ql_cuda_device *device = guard->device;
    int fixed = 0;
    ql_cu_result result =
        guard->driver->kernel_get_attribute(&fixed, QL_CU_SHARED_SIZE_BYTES, device->kernels[kernel], device->handle);
    if (result == QL_CU_SUCCESS)
        result = guard->driver->kernel_set_attribute(QL_CU_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                     guard->properties->shared_bytes - fixed, device->kernels[kernel],
                                                     device->handle);
    if (result == QL_CU_SUCCESS) atomic_store_explicit(raised, true, memory_order_relaxed);
    return result;
}

static atomic_bool overlap_allowed = true;

bool ql_cuda_allow_overlap(bool allowed) {
    return atomic_exchange_explicit(&overlap_allowed, allowed, memory_order_relaxed);
}

bool ql_cuda_overlap_allowed(void) { return atomic_load_explicit(&overlap_allowed, memory_order_relaxed); }

int ql_cuda_launch(const ql_cuda_guard *guard, ql_cuda_kernel kernel, void *stream, const ql_cuda_grid *grid,
                   const void *params, char message[QL_CUDA_MESSAGE]) {
    if (!ql_cuda_has(guard, kernel)) {
        snprintf(message, QL_CUDA_MESSAGE, "%s was not compiled for a GPU of compute capability %d.%d.",
                 ql_cuda_kernel_name(kernel), guard->properties->major, guard->properties->minor);
        return -1;
    }
    if (grid->x < 1 || grid->x > INT_MAX || grid->y < 1 || grid->y > 65535) {
        snprintf(message, QL_CUDA_MESSAGE, "%s: a grid of %lld by %lld blocks is not one that a GPU takes.",
                 ql_cuda_kernel_name(kernel), (long long)grid->x, (long long)grid->y);
        return -1;
    }
    ql_cu_result result = QL_CU_SUCCESS;
    if (grid->shared_bytes > DEFAULT_SHARED_BYTES) result = raise_shared(guard, kernel);
    ql_cu_launch_attribute attributes[2];
    unsigned count = 0;
    if (grid->cluster > 1)
        attributes[count++] = (ql_cu_launch_attribute){.id = QL_CU_LAUNCH_CLUSTER_DIMENSION,
                                                       .value.cluster = {(unsigned)grid->cluster, 1, 1}};
    const bool allowed = grid->inner || ql_cuda_overlap_allowed();
    if (grid->overlaps && guard->properties->major >= 9 && allowed)
        attributes[count++] =
            (ql_cu_launch_attribute){.id = QL_CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION, .value.overlaps = 1};
    const ql_cu_launch_config config = {.grid_x = (unsigned)grid->x,
                                        .grid_y = (unsigned)grid->y,
                                        .grid_z = 1,
                                        .block_x = (unsigned)grid->threads,
                                        .block_y = 1,
                                        .block_z = 1,
                                        .shared_bytes = (unsigned)grid->shared_bytes,
                                        .stream = stream,
                                        .attributes = attributes,
                                        .attribute_count = count};
    /* The driver reads the parameters and writes none; its signature has no const. */
    void *arguments[1];
    *(const void **)arguments = params;
    if (result == QL_CU_SUCCESS)
        result = guard->driver->launch_kernel(&config, guard->device->kernels[kernel], arguments, NULL);
    return result == QL_CU_SUCCESS ? 0 : fail(guard->driver, result, ql_cuda_kernel_name(kernel), message);
}

int ql_cuda_launch_alone(const ql_cuda_place *place, ql_cuda_kernel kernel, const ql_cuda_grid *grid,
                         const void *params, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    const int result = ql_cuda_launch(&guard, kernel, place->stream, grid, params, message);
    ql_cuda_leave(&guard);
    return result;
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

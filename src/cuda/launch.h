/* Launching a kernel of the images, and what a launch needs: the GPU's context made current, which also makes it work from
 * a thread that never touched CUDA and whatever device is current there. */
#ifndef QL_CUDA_LAUNCH_H
#define QL_CUDA_LAUNCH_H

#include "device.h"

/* Where a call runs: a device ordinal and a stream of it (NULL: the legacy default stream). */
typedef struct ql_cuda_place {
    int device;
    void *stream;
} ql_cuda_place;

/* The device's primary context is current between enter and leave; leave restores what was before. */
typedef struct ql_cuda_guard {
    const ql_cuda_driver *driver;
    const ql_cuda_properties *properties;
    const ql_cuda_device *device;
    bool pushed;
} ql_cuda_guard;

/* 0, or -1 with a sentence in message; leave only after 0. Takes no lock once the device is ready. */
int ql_cuda_enter(ql_cuda_guard *guard, int device, char message[QL_CUDA_MESSAGE]);
void ql_cuda_leave(ql_cuda_guard *guard);

/* Whether the kernel was compiled for this GPU: what a choice between kernels asks first. */
static inline bool ql_cuda_has(const ql_cuda_guard *guard, ql_cuda_kernel kernel) {
    return guard->device->kernels[kernel] != NULL;
}

/* How many of `each` hold `count`, which is not negative. */
static inline int64_t ql_ceil_div(int64_t count, int64_t each) { return count / each + (count % each != 0); }

/* Of the first of so many tiles, those that `ranges` thread blocks or clusters share: what is left over whole waves together
 * with one wave, so that no range is short. */
static inline int64_t ql_split_tiles(int64_t tiles, int64_t ranges) {
    return tiles % ranges == 0 ? 0 : tiles < ranges ? tiles : tiles % ranges + ranges;
}

/* x by y blocks of `threads`. */
typedef struct ql_cuda_grid {
    int64_t x, y;
    int threads;
    int shared_bytes; /* dynamic shared memory, as much as the GPU lets a block have */
    int cluster;      /* blocks along x that form a cluster, x a multiple of it; 0 and 1: none */
    bool overlaps; /* may start while the kernel before it ends (PDL): it waits before it reads or writes. Counts from
                         compute capability 9.0 on. */
    bool inner;    /* that kernel is of the same call: so it is whatever was allowed */
} ql_cuda_grid;

/* Launches a kernel with one parameter struct on a stream of the device, between enter and leave. Does not wait. 0, or -1
 * with a sentence in message. */
int ql_cuda_launch(const ql_cuda_guard *guard, ql_cuda_kernel kernel, void *stream, const ql_cuda_grid *grid,
                   const void *params, char message[QL_CUDA_MESSAGE]);

/* A launch by itself on the place's stream: enters and leaves. */
int ql_cuda_launch_alone(const ql_cuda_place *place, ql_cuda_kernel kernel, const ql_cuda_grid *grid,
                         const void *params, char message[QL_CUDA_MESSAGE]);

/* Whether a launch may start while the kernel before it ends, where its grid says that it can: so it is until this says
 * otherwise for the whole process, as a measurement of single launches does. Returns what held before. */
bool ql_cuda_allow_overlap(bool allowed);

/* What holds now. */
bool ql_cuda_overlap_allowed(void);

/* Copies `bytes` from device memory to the host and waits for them, after all work of the stream: for the few values that
 * a layer must see when it is made. Fails while the stream is captured. */
int ql_cuda_read(void *host, const void *device_data, size_t bytes, const ql_cuda_place *place,
                 char message[QL_CUDA_MESSAGE]);

/* Device memory of our own, for frameworks that lend none: at least one byte, NULL with a sentence in message. Freeing
 * waits for the work that uses it. */
void *ql_cuda_allocate(size_t bytes, int device, char message[QL_CUDA_MESSAGE]);
void ql_cuda_free(void *device_data, int device);

/* Waits until the work on the place's stream is done. */
int ql_cuda_synchronize(const ql_cuda_place *place, char message[QL_CUDA_MESSAGE]);

#endif

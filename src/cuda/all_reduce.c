#include "all_reduce.h"

#include <stdio.h>
#include <string.h>

/* Of the two GPUs' places together. More GPUs have shorter ones: each sends the whole of its part to every other, which
 * with many of them pays for short sums alone. */
enum { PLACE_OF_TWO = 4 << 20 };

/* All blocks of a sum run at once: two fit a multiprocessor. */
enum { LEAST_MULTIPROCESSORS = QL_ALL_REDUCE_BLOCKS / 2 };

/* What has not come in this time does not come: torch's own patience with NCCL. */
static const uint64_t patience = UINT64_C(600) * 1000000000;

static int64_t inbox_bytes(const ql_cuda_reducer *reducer) { return 2 * reducer->parts * reducer->place; }

static uint32_t *calls_of(const ql_cuda_reducer *reducer) {
    return (uint32_t *)(uintptr_t)(reducer->boxes[reducer->rank] + (uint64_t)inbox_bytes(reducer));
}

/* Where `from` leaves its first piece in `to`'s inbox. */
static uint64_t first_place(const ql_cuda_reducer *reducer, int to, int from) {
    return reducer->boxes[to] + (uint64_t)(from * reducer->place);
}

static int tell(const ql_cuda_guard *guard, ql_cu_result result, const char *what, char message[QL_CUDA_MESSAGE]) {
    if (result == QL_CU_SUCCESS) return 0;
    snprintf(message, QL_CUDA_MESSAGE, "%s: %s.", what, ql_cuda_error(guard->driver, result));
    return -1;
}

static int make(ql_cuda_reducer *reducer, ql_cu_ipc_handle *handle, const ql_cuda_guard *guard,
                char message[QL_CUDA_MESSAGE]) {
    const ql_cuda_driver *driver = guard->driver;
    if (guard->properties->multiprocessors < LEAST_MULTIPROCESSORS) {
        snprintf(message, QL_CUDA_MESSAGE, "sums over GPUs take at least %d multiprocessors, GPU %d has %d.",
                 LEAST_MULTIPROCESSORS, reducer->device, guard->properties->multiprocessors);
        return -1;
    }
    const int64_t place = PLACE_OF_TWO * INT64_C(4) / (reducer->parts * reducer->parts);
    reducer->place = place - place % QL_ALL_REDUCE_PIECE;
    const size_t bytes = (size_t)inbox_bytes(reducer) + QL_ALL_REDUCE_BLOCKS * sizeof(uint32_t);
    uint64_t *own = &reducer->boxes[reducer->rank];
    if (tell(guard, driver->mem_alloc(own, bytes), "memory for sums over GPUs could not be had", message) < 0 ||
        tell(guard, driver->memset_d8_async(*own, 0xff, bytes, NULL), "memory for sums could not be set", message) <
            0 ||
        tell(guard, driver->stream_synchronize(NULL), "memory for sums could not be set", message) < 0)
        return -1;
    return tell(guard, driver->ipc_get_mem_handle(handle, *own), "memory for sums cannot be shared", message);
}

int ql_cuda_reducer_make(ql_cuda_reducer *reducer, ql_cu_ipc_handle *handle, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, reducer->device, message) < 0) return -1;
    const int result = make(reducer, handle, &guard, message);
    ql_cuda_leave(&guard);
    return result;
}

static int connect(ql_cuda_reducer *reducer, const ql_cu_ipc_handle *handles, const ql_cuda_guard *guard,
                   char message[QL_CUDA_MESSAGE]) {
    const ql_cuda_driver *driver = guard->driver;
    for (int to = 0; to < reducer->parts; to++) {
        if (to == reducer->rank) continue;
        const ql_cu_result result =
            driver->ipc_open_mem_handle(&reducer->boxes[to], handles[to], QL_CU_IPC_LAZY_ENABLE_PEER_ACCESS);
        const uint64_t greeting = result == QL_CU_SUCCESS ? first_place(reducer, to, reducer->rank) : 0;
        if (tell(guard, result, "another GPU's memory could not be opened", message) < 0 ||
            tell(guard, driver->memset_d8_async(greeting, (unsigned char)reducer->rank, QL_ALL_REDUCE_PIECE, NULL),
                 "another GPU's memory could not be written", message) < 0)
            return -1;
    }
    return tell(guard, driver->stream_synchronize(NULL), "another GPU's memory could not be written", message);
}

int ql_cuda_reducer_connect(ql_cuda_reducer *reducer, const ql_cu_ipc_handle *handles, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, reducer->device, message) < 0) return -1;
    const int result = connect(reducer, handles, &guard, message);
    ql_cuda_leave(&guard);
    return result;
}

int ql_cuda_reducer_check(const ql_cuda_reducer *reducer, char message[QL_CUDA_MESSAGE]) {
    const ql_cuda_place place = {reducer->device, NULL};
    unsigned char expected[QL_ALL_REDUCE_PIECE], found[QL_ALL_REDUCE_PIECE];
    for (int from = 0; from < reducer->parts; from++) {
        if (from == reducer->rank) continue;
        const void *at = (const void *)(uintptr_t)first_place(reducer, reducer->rank, from);
        if (ql_cuda_read(found, at, sizeof found, &place, message) < 0) return -1;
        memset(expected, from, sizeof expected);
        if (memcmp(found, expected, sizeof found) == 0) continue;
        snprintf(message, QL_CUDA_MESSAGE, "what GPU %d of %d wrote into the memory of GPU %d did not come there.",
                 from, reducer->parts, reducer->rank);
        return -1;
    }
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, reducer->device, message) < 0) return -1;
    const ql_cuda_driver *driver = guard.driver;
    ql_cu_result result =
        driver->memset_d8_async(reducer->boxes[reducer->rank], 0xff, (size_t)inbox_bytes(reducer), NULL);
    if (result == QL_CU_SUCCESS) result = driver->stream_synchronize(NULL);
    ql_cuda_leave(&guard);
    return tell(&guard, result, "memory for sums could not be set", message);
}

void ql_cuda_reducer_close(ql_cuda_reducer *reducer) {
    ql_cuda_guard guard;
    char message[QL_CUDA_MESSAGE];
    /* At the end of the process the context may be gone, and everything with it. */
    if (!reducer->boxes[reducer->rank] || ql_cuda_enter(&guard, reducer->device, message) < 0) return;
    const ql_cuda_driver *driver = guard.driver;
    for (int of = 0; of < reducer->parts; of++)
        if (of != reducer->rank && reducer->boxes[of]) (void)driver->ipc_close_mem_handle(reducer->boxes[of]);
    (void)driver->mem_free(reducer->boxes[reducer->rank]);
    if (reducer->done) (void)driver->event_destroy(reducer->done);
    memset(reducer->boxes, 0, sizeof reducer->boxes);
    reducer->done = NULL;
    ql_cuda_leave(&guard);
}

/* Whether a stream is captured; not one that only a captured stream keeps from being asked. */
static bool is_captured(const ql_cuda_driver *driver, void *stream) {
    int status = 0;
    return driver->stream_is_capturing(stream, &status) == QL_CU_SUCCESS && status != 0;
}

/* All GPUs see the sums in the order in which they were asked for, so that one on another stream waits for the one before it.
 * A graph's cannot wait for one outside of it, nor the other way round. */
static int follow(ql_cuda_reducer *reducer, const ql_cuda_guard *guard, void *stream, char message[QL_CUDA_MESSAGE]) {
    const ql_cuda_driver *driver = guard->driver;
    const bool first = !reducer->done;
    void *before = reducer->stream;
    if (!first && before == stream) return 0;
    if (first && tell(guard, driver->event_create(&reducer->done, QL_CU_EVENT_DISABLE_TIMING),
                      "an event could not be made", message) < 0)
        return -1;
    reducer->stream = stream;
    if (first || is_captured(driver, before) != is_captured(driver, stream)) return 0;
    ql_cu_result result = driver->event_record(reducer->done, before);
    if (result == QL_CU_SUCCESS) result = driver->stream_wait_event(stream, reducer->done, 0);
    return tell(guard, result, "a sum could not wait for the one before it", message);
}

int ql_cuda_all_reduce(ql_cuda_reducer *reducer, void *x, int64_t bytes, ql_dtype dtype, void *stream,
                       char message[QL_CUDA_MESSAGE]) {
    const int64_t blocks = ql_ceil_div(bytes, QL_ALL_REDUCE_THREADS * QL_ALL_REDUCE_PIECE);
    const ql_cuda_kernel kernel =
        blocks <= QL_ALL_REDUCE_BLOCKS ? QL_KERNEL_ql_all_reduce_1 : QL_KERNEL_ql_all_reduce_4;
    const ql_cuda_grid grid = {.x = blocks < QL_ALL_REDUCE_BLOCKS ? blocks : QL_ALL_REDUCE_BLOCKS,
                               .y = 1,
                               .threads = QL_ALL_REDUCE_THREADS,
                               .overlaps = true};
    ql_all_reduce_params p = {.x = x,
                              .calls = calls_of(reducer),
                              .bytes = bytes,
                              .place = reducer->place,
                              .patience = patience,
                              .rank = reducer->rank,
                              .parts = reducer->parts,
                              .type = (int32_t)dtype,
                              .vector = (uintptr_t)x % QL_ALL_REDUCE_PIECE == 0};
    for (int i = 0; i < reducer->parts; i++) p.boxes[i] = (char *)(uintptr_t)reducer->boxes[i];
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, reducer->device, message) < 0) return -1;
    int result = follow(reducer, &guard, stream, message);
    if (result == 0) result = ql_cuda_launch(&guard, kernel, stream, &grid, &p, message);
    ql_cuda_leave(&guard);
    return result;
}

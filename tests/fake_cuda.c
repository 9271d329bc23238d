/* A driver without a GPU: a libcuda.so.1 whose device memory is the host's, which runs no kernel, writes down every call
 * and fails where it is told to. It is as strict as the real one where that shows mistakes: nothing works before cuInit
 * or in a forked child, launches and copies want a current context, a launch no more shared memory than was allowed.
 *
 * Tests load it before the extension opens "libcuda.so.1", which then finds it by its soname, and steer it by fake_*. */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500
};
enum { MOST_CALLS = 1 << 16, MOST_RULES = 64, MOST_DEPTH = 16, MOST_DEVICES = 8, MOST_KERNELS = 1024 };

/* What a test reads of a call; fields that a call lacks are 0. */
typedef struct fake_call {
    char function[40];
    char kernel[64];
    void *stream;
    uint32_t grid[3], block[3], shared_bytes;
    int32_t cluster, overlaps; /* the attributes of a launch */
    int32_t device;            /* of the context that was current, -1 without one */
    int32_t result;
} fake_call;

typedef struct {
    char function[40];
    int result, first, last; /* the calls that fail, counted from 0 */
    int seen;
} rule;

typedef struct {
    char name[64];
    int dynamic_limit[MOST_DEVICES];
} kernel;

static fake_call calls[MOST_CALLS];
static int call_count;
static rule rules[MOST_RULES];
static int rule_count;
static kernel kernels[MOST_KERNELS];
static int kernel_count;
static char hidden[40];
static int version = 13000, device_count = 1, major = 9, minor = 0, static_shared, init_takes, version_takes;
static pid_t owner;
static int64_t allocated, retained, opened; /* memory and events; contexts; others' memory */
static void *captured;
static bool records = true;

static _Thread_local int stack[MOST_DEPTH]; /* contexts: device + 1 */
static _Thread_local int depth;

/* ---- steering ---- */

EXPORT void fake_fail(const char *function, int result, int first, int last) {
    rule *made = &rules[rule_count++];
    *made = (rule){.result = result, .first = first, .last = last};
    snprintf(made->function, sizeof made->function, "%s", function);
}
EXPORT void fake_work(void) { rule_count = 0; }
EXPORT void fake_slow_init(int milliseconds) { init_takes = milliseconds; }
EXPORT void fake_slow_version(int milliseconds) { version_takes = milliseconds; }
EXPORT void fake_hide(const char *function) { snprintf(hidden, sizeof hidden, "%s", function); }
EXPORT void fake_driver_version(int number) { version = number; }
EXPORT void fake_devices(int count, int cc_major, int cc_minor) {
    device_count = count;
    major = cc_major;
    minor = cc_minor;
}
EXPORT void fake_static_shared(int bytes) { static_shared = bytes; }
EXPORT void fake_record(bool on) { records = on; }
EXPORT int fake_call_count(void) { return call_count; }
EXPORT const fake_call *fake_calls(void) { return calls; }
EXPORT void fake_forget(void) { call_count = 0; }
EXPORT int fake_depth(void) { return depth; }
EXPORT int fake_current(void) { return depth ? stack[depth - 1] - 1 : -1; }
EXPORT void fake_push(int device) { stack[depth++] = device + 1; }
EXPORT int64_t fake_allocated(void) { return allocated; }
EXPORT int64_t fake_retained(void) { return retained; }
EXPORT int64_t fake_opened(void) { return opened; }
EXPORT void fake_capture(void *stream) { captured = stream; }

/* ---- the calls ---- */

static int answer(fake_call *call, const char *function, int result) {
    /* Without a record and rules the driver takes next to no time, so that the time of a call is that of its caller. */
    if (!records && !rule_count) return result;
    for (int i = 0; i < rule_count && result == SUCCESS; i++) {
        if (strcmp(rules[i].function, function) != 0) continue;
        int seen = rules[i].seen++;
        if (seen >= rules[i].first && seen <= rules[i].last) result = rules[i].result;
    }
    if (result == SUCCESS && strcmp(function, "cuInit") != 0 && strcmp(function, "cuDriverGetVersion") != 0 &&
        owner != getpid())
        result = NOT_INITIALIZED;
    if (!records || call_count == MOST_CALLS) return result;
    fake_call made = {.device = fake_current(), .result = result};
    if (call) made = *call;
    made.device = fake_current();
    made.result = result;
    snprintf(made.function, sizeof made.function, "%s", function);
    calls[call_count++] = made;
    return result;
}

/* The result of a call that has nothing else to say; a `check` that fails comes first. */
#define ANSWER(function, check)                                                                                        \
    do {                                                                                                               \
        int result_ = answer(NULL, function, check);                                                                   \
        if (result_ != SUCCESS) return result_;                                                                        \
    } while (0)

static int fake_init(unsigned flags) {
    ANSWER("cuInit", flags ? INVALID_VALUE : owner && owner != getpid() ? NOT_INITIALIZED : SUCCESS);
    usleep((useconds_t)init_takes * 1000);
    owner = getpid();
    return SUCCESS;
}

static int fake_driver_get_version(int *out) {
    ANSWER("cuDriverGetVersion", SUCCESS);
    usleep((useconds_t)version_takes * 1000);
    *out = version;
    return SUCCESS;
}

static int fake_get_error_string(int result, const char **text) {
    static char words[1000][32];
    if (result < 0 || result >= 1000) return INVALID_VALUE;
    for (int i = 0; i < rule_count; i++)
        if (strcmp(rules[i].function, "cuGetErrorString") == 0) return rules[i].result;
    snprintf(words[result], sizeof words[result], "the words for %d", result);
    *text = words[result];
    return SUCCESS;
}

static int fake_device_get_count(int *count) {
    ANSWER("cuDeviceGetCount", SUCCESS);
    *count = device_count;
    return SUCCESS;
}

static int fake_device_get(int *device, int ordinal) {
    ANSWER("cuDeviceGet", ordinal < 0 || ordinal >= device_count ? INVALID_DEVICE : SUCCESS);
    *device = ordinal;
    return SUCCESS;
}

static int fake_device_get_name(char *name, int size, int device) {
    ANSWER("cuDeviceGetName", SUCCESS);
    snprintf(name, (size_t)size, "Fake GPU %d", device);
    return SUCCESS;
}

static int fake_device_get_attribute(int *value, int attribute, int device) {
    (void)device;
    ANSWER("cuDeviceGetAttribute", SUCCESS);
    switch (attribute) {
    case 16: *value = 132; break;
    case 38: *value = 50 << 20; break;
    case 75: *value = major; break;
    case 76: *value = minor; break;
    case 97: *value = 227 << 10; break;
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}

static int fake_device_total_mem(size_t *bytes, int device) {
    (void)device;
    ANSWER("cuDeviceTotalMem", SUCCESS);
    *bytes = (size_t)80 << 30;
    return SUCCESS;
}

static int fake_library_load_data(void **library, const void *image, int *jit, void **jit_values, unsigned jit_count,
                                  int *options, void **values, unsigned count) {
    (void)jit, (void)jit_values, (void)options, (void)values;
    ANSWER("cuLibraryLoadData", !image || jit_count || count != 1 ? INVALID_VALUE : SUCCESS);
    *library = (void *)(uintptr_t)image;
    return SUCCESS;
}

static int fake_library_get_kernel(void **out, void *library, const char *name) {
    ANSWER("cuLibraryGetKernel", !library ? INVALID_VALUE : kernel_count == MOST_KERNELS ? NOT_FOUND : SUCCESS);
    kernel *made = &kernels[kernel_count++];
    snprintf(made->name, sizeof made->name, "%s", name);
    for (int i = 0; i < MOST_DEVICES; i++) made->dynamic_limit[i] = 48 << 10;
    *out = made;
    return SUCCESS;
}

static int fake_device_primary_ctx_retain(void **context, int device) {
    ANSWER("cuDevicePrimaryCtxRetain", SUCCESS);
    retained++;
    *context = (void *)(uintptr_t)(device + 1);
    return SUCCESS;
}

static int fake_ctx_get_current(void **context) {
    ANSWER("cuCtxGetCurrent", SUCCESS);
    *context = (void *)(uintptr_t)(depth ? stack[depth - 1] : 0);
    return SUCCESS;
}

static int fake_ctx_push_current(void *context) {
    ANSWER("cuCtxPushCurrent", !context || depth == MOST_DEPTH ? INVALID_CONTEXT : SUCCESS);
    stack[depth++] = (int)(uintptr_t)context;
    return SUCCESS;
}

static int fake_ctx_pop_current(void **context) {
    ANSWER("cuCtxPopCurrent", depth ? SUCCESS : INVALID_CONTEXT);
    *context = (void *)(uintptr_t)stack[--depth];
    return SUCCESS;
}

static int fake_kernel_get_attribute(int *value, int attribute, kernel *of, int device) {
    (void)of, (void)device;
    ANSWER("cuKernelGetAttribute", attribute == 1 ? SUCCESS : INVALID_VALUE);
    *value = static_shared;
    return SUCCESS;
}

static int fake_kernel_set_attribute(int attribute, int value, kernel *of, int device) {
    bool fits = attribute == 8 && value >= 0 && value + static_shared <= 227 << 10;
    ANSWER("cuKernelSetAttribute", fits ? SUCCESS : INVALID_VALUE);
    of->dynamic_limit[device] = value;
    return SUCCESS;
}

typedef struct {
    int id, unused;
    union {
        unsigned cluster[3];
        int overlaps;
        char size[64];
    } value;
} attribute;

typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    attribute *attributes;
    unsigned attribute_count;
} launch_config;

static int fake_launch_kernel(const launch_config *config, kernel *of, void **parameters, void **extra) {
    fake_call call = {.stream = config->stream, .shared_bytes = config->shared_bytes};
    int result = SUCCESS, device = fake_current();
    if (device < 0) result = INVALID_CONTEXT;
    if (of < kernels || of >= kernels + kernel_count || !parameters || !parameters[0] || extra) result = INVALID_VALUE;
    for (int i = 0; i < 3; i++) {
        call.grid[i] = config->grid[i];
        call.block[i] = config->block[i];
        if (!config->grid[i] || !config->block[i]) result = INVALID_VALUE;
    }
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const attribute *given = &config->attributes[i];
        if (given->id == 4)
            call.cluster = (int)given->value.cluster[0];
        else if (given->id == 6)
            call.overlaps = given->value.overlaps;
        else
            result = INVALID_VALUE;
    }
    if (call.block[0] * call.block[1] * call.block[2] > 1024) result = INVALID_VALUE;
    if (result == SUCCESS && config->shared_bytes > (unsigned)of->dynamic_limit[device]) result = INVALID_VALUE;
    if (result == SUCCESS) strcpy(call.kernel, of->name);
    return answer(&call, "cuLaunchKernelEx", result);
}

static int fake_memcpy_dtoh_async(void *host, uint64_t from, size_t bytes, void *stream) {
    fake_call call = {.stream = stream};
    int result = answer(&call, "cuMemcpyDtoHAsync", depth ? SUCCESS : INVALID_CONTEXT);
    if (result == SUCCESS) memcpy(host, (void *)(uintptr_t)from, bytes);
    return result;
}

static int fake_stream_synchronize(void *stream) {
    fake_call call = {.stream = stream};
    return answer(&call, "cuStreamSynchronize", depth ? SUCCESS : INVALID_CONTEXT);
}

typedef struct {
    char bytes[64];
} ipc_handle;

/* An inbox that is opened is the one of this process. */
static int fake_ipc_get_mem_handle(ipc_handle *out, uint64_t data) {
    ANSWER("cuIpcGetMemHandle", depth ? SUCCESS : INVALID_CONTEXT);
    memset(out, 0, sizeof *out);
    memcpy(out, &data, sizeof data);
    return SUCCESS;
}

static int fake_ipc_open_mem_handle(uint64_t *out, ipc_handle handle, unsigned flags) {
    ANSWER("cuIpcOpenMemHandle", !depth ? INVALID_CONTEXT : flags != 1 ? INVALID_VALUE : SUCCESS);
    memcpy(out, &handle, sizeof *out);
    opened++;
    return SUCCESS;
}

static int fake_ipc_close_mem_handle(uint64_t data) {
    ANSWER("cuIpcCloseMemHandle", depth && data ? SUCCESS : INVALID_CONTEXT);
    opened--;
    return SUCCESS;
}

static int fake_memset_d8_async(uint64_t data, unsigned char value, size_t bytes, void *stream) {
    fake_call call = {.stream = stream};
    int result = answer(&call, "cuMemsetD8Async", depth ? SUCCESS : INVALID_CONTEXT);
    if (result == SUCCESS) memset((void *)(uintptr_t)data, value, bytes);
    return result;
}

static int fake_stream_is_capturing(void *stream, int *status) {
    fake_call call = {.stream = stream};
    int result = answer(&call, "cuStreamIsCapturing", SUCCESS);
    *status = stream && stream == captured;
    return result;
}

static int fake_stream_wait_event(void *stream, void *event, unsigned flags) {
    fake_call call = {.stream = stream};
    return answer(&call, "cuStreamWaitEvent", event && !flags ? SUCCESS : INVALID_VALUE);
}

static int fake_event_create(void **event, unsigned flags) {
    ANSWER("cuEventCreate", !depth ? INVALID_CONTEXT : flags != 2 ? INVALID_VALUE : SUCCESS);
    *event = malloc(1);
    allocated++;
    return SUCCESS;
}

static int fake_event_record(void *event, void *stream) {
    fake_call call = {.stream = stream};
    return answer(&call, "cuEventRecord", event ? SUCCESS : INVALID_VALUE);
}

static int fake_event_destroy(void *event) {
    ANSWER("cuEventDestroy", event ? SUCCESS : INVALID_VALUE);
    free(event);
    allocated--;
    return SUCCESS;
}

static int fake_mem_alloc(uint64_t *out, size_t bytes) {
    ANSWER("cuMemAlloc", !depth ? INVALID_CONTEXT : bytes ? SUCCESS : INVALID_VALUE);
    *out = (uint64_t)(uintptr_t)malloc(bytes);
    allocated++;
    return SUCCESS;
}

static int fake_mem_free(uint64_t data) {
    ANSWER("cuMemFree", depth ? SUCCESS : INVALID_CONTEXT);
    free((void *)(uintptr_t)data);
    allocated--;
    return SUCCESS;
}

/* x as 16-bit rows a multiple of 16 bytes apart, in boxes of 128 bytes a row. */
static int fake_tensor_map_encode_tiled(void *map, int type, uint32_t rank, void *address, const uint64_t *shape,
                                        const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                                        int interleave, int swizzle, int promotion, int fill) {
    (void)promotion, (void)fill;
    /* The bytes of the types that are known here; with a swizzle of 128 bytes a row of the box is as long. */
    static const uint32_t sizes[10] = {[0] = 1, [3] = 4, [5] = 8, [6] = 2, [9] = 2};
    const uint32_t size = type >= 0 && type < 10 ? sizes[type] : 0;
    ANSWER("cuTensorMapEncodeTiled", (uintptr_t)map % 64 || !size || rank != 2 || (uintptr_t)address % 16 ||
                                             !shape[0] || !shape[1] || strides[0] % 16 || box[0] > 256 ||
                                             box[1] > 256 || box[0] * size % 16 || (swizzle && box[0] * size != 128) ||
                                             steps[0] != 1 || steps[1] != 1 || interleave || (swizzle && swizzle != 3)
                                         ? INVALID_VALUE
                                         : SUCCESS);
    memset(map, 0, 128);
    return SUCCESS;
}

/* Each with the version of CUDA in which its signature came. */
#define FUNCTIONS(X)                                                                                                   \
    X("cuInit", 2000, fake_init)                                                                                       \
    X("cuDriverGetVersion", 2020, fake_driver_get_version)                                                             \
    X("cuGetErrorString", 6000, fake_get_error_string)                                                                 \
    X("cuDeviceGetCount", 2000, fake_device_get_count)                                                                 \
    X("cuDeviceGet", 2000, fake_device_get)                                                                            \
    X("cuDeviceGetName", 2000, fake_device_get_name)                                                                   \
    X("cuDeviceGetAttribute", 2000, fake_device_get_attribute)                                                         \
    X("cuDeviceTotalMem", 3020, fake_device_total_mem)                                                                 \
    X("cuLibraryLoadData", 12000, fake_library_load_data)                                                              \
    X("cuLibraryGetKernel", 12000, fake_library_get_kernel)                                                            \
    X("cuDevicePrimaryCtxRetain", 7000, fake_device_primary_ctx_retain)                                                \
    X("cuCtxGetCurrent", 4000, fake_ctx_get_current)                                                                   \
    X("cuCtxPushCurrent", 4000, fake_ctx_push_current)                                                                 \
    X("cuCtxPopCurrent", 4000, fake_ctx_pop_current)                                                                   \
    X("cuKernelGetAttribute", 12000, fake_kernel_get_attribute)                                                        \
    X("cuKernelSetAttribute", 12000, fake_kernel_set_attribute)                                                        \
    X("cuLaunchKernelEx", 11060, fake_launch_kernel)                                                                   \
    X("cuTensorMapEncodeTiled", 12000, fake_tensor_map_encode_tiled)                                                   \
    X("cuMemcpyDtoHAsync", 3020, fake_memcpy_dtoh_async)                                                               \
    X("cuStreamSynchronize", 2000, fake_stream_synchronize)                                                            \
    X("cuMemsetD8Async", 3020, fake_memset_d8_async)                                                                   \
    X("cuStreamIsCapturing", 10000, fake_stream_is_capturing)                                                          \
    X("cuStreamWaitEvent", 3020, fake_stream_wait_event)                                                               \
    X("cuEventCreate", 2000, fake_event_create)                                                                        \
    X("cuEventRecord", 2000, fake_event_record)                                                                        \
    X("cuEventDestroy", 4000, fake_event_destroy)                                                                      \
    X("cuIpcGetMemHandle", 4010, fake_ipc_get_mem_handle)                                                              \
    X("cuIpcOpenMemHandle", 11000, fake_ipc_open_mem_handle)                                                           \
    X("cuIpcCloseMemHandle", 4010, fake_ipc_close_mem_handle)                                                          \
    X("cuMemAlloc", 3020, fake_mem_alloc)                                                                              \
    X("cuMemFree", 3020, fake_mem_free)

#ifndef FAKE_BEFORE_12
EXPORT int cuGetProcAddress_v2(const char *name, void **out, int minimum, uint64_t flags, int *status) {
    (void)status;
    if (flags != 1 || minimum > version) return INVALID_VALUE;
    if (strcmp(name, hidden) == 0) return NOT_FOUND;
#define FIND(symbol, since, function)                                                                                  \
    if (strcmp(name, symbol) == 0 && minimum == since) {                                                               \
        void (*found)(void) = (void (*)(void))function;                                                                \
        memcpy(out, &found, sizeof found);                                                                             \
        return SUCCESS;                                                                                                \
    }
    FUNCTIONS(FIND)
    return NOT_FOUND;
}
#endif

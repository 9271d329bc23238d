/* Opening the driver. Symbols go through cuGetProcAddress_v2 with the version of CUDA whose signatures are declared, so
 * that a newer driver gives the function that was meant; that entry point itself exists from CUDA 12.0 on. */
#define _GNU_SOURCE /* dladdr */

#include "driver.h"

#include "image.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Guards what follows it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ql_cuda_driver driver;
static void *handle;
static bool initialized;

static atomic_bool init_called, forked;
static pthread_once_t forks_watched = PTHREAD_ONCE_INIT;
static int not_watched;

bool ql_cuda_initialized(void) { return atomic_load_explicit(&init_called, memory_order_relaxed); }

bool ql_cuda_forked(void) { return atomic_load_explicit(&forked, memory_order_relaxed); }

/* A thread of the parent that held the lock is not here to give it back. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&lock, NULL);
    if (ql_cuda_initialized()) atomic_store_explicit(&forked, true, memory_order_relaxed);
}

static void watch_forks(void) { not_watched = pthread_atfork(NULL, NULL, after_fork_in_child); }

/* Loading takes milliseconds, in which another thread may fork, so forks are watched before anybody has the lock. */
static void take_lock(void) {
    pthread_once(&forks_watched, watch_forks);
    pthread_mutex_lock(&lock);
}

const char *ql_cuda_error(const ql_cuda_driver *from, ql_cu_result result) {
    const char *text = NULL;
    if (from->get_error_string(result, &text) != QL_CU_SUCCESS || !text) return "an error it has no words for";
    return text;
}

/* The release in which a CUDA version's driver came, for those who know their driver by it. */
static const char *release_of(int version) {
    switch (version / 1000) {
    case 12: return version >= 12040 ? "550" : "525";
    case 13: return "580";
    default: return "the newest";
    }
}

/* The library's real file, whose name ends in the driver's release. */
static void find_path(void *symbol) {
    Dl_info info;
    snprintf(driver.path, sizeof driver.path, "libcuda.so.1");
    if (!dladdr(symbol, &info) || !info.dli_fname) return;
    char *resolved = realpath(info.dli_fname, NULL);
    if (resolved && strlen(resolved) < sizeof driver.path) strcpy(driver.path, resolved);
    free(resolved);
}

/* ISO C has no cast from an object pointer to a function pointer; POSIX says that the bytes are the same. */
static void copy_pointer(void *function, void *symbol) { memcpy(function, &symbol, sizeof symbol); }

/* Fills driver from the open library; 0, or -1 with a sentence. */
static int resolve(void *library, char message[QL_CUDA_MESSAGE]) {
    void *symbol = dlsym(library, "cuGetProcAddress_v2");
    if (!symbol) {
        snprintf(message, QL_CUDA_MESSAGE,
                 "the NVIDIA driver is too old: it is from before CUDA 12.0 (release 525), which is the least needed.");
        return -1;
    }
    ql_cu_get_proc_address get_proc_address;
    copy_pointer(&get_proc_address, symbol);
    find_path(symbol);
#define QL_CU_RESOLVE(field, name, minimum, parameters)                                                                \
    symbol = NULL;                                                                                                     \
    if (get_proc_address(name, &symbol, minimum, QL_CU_GET_PROC_ADDRESS_LEGACY_STREAM, NULL) != QL_CU_SUCCESS ||       \
        !symbol) {                                                                                                     \
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver (%s) has no %s.", driver.path, name);                    \
        return -1;                                                                                                     \
    }                                                                                                                  \
    copy_pointer(&driver.field, symbol);
    QL_CU_FUNCTIONS(QL_CU_RESOLVE)
#undef QL_CU_RESOLVE
    ql_cu_result result = driver.driver_get_version(&driver.version);
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver (%s) does not tell its version: %s.", driver.path,
                 ql_cuda_error(&driver, result));
        return -1;
    }
    return 0;
}

static const ql_cuda_driver *load(char message[QL_CUDA_MESSAGE]) {
    if (handle) return &driver;
    if (not_watched) {
        snprintf(message, QL_CUDA_MESSAGE, "there is no memory to watch for forks.");
        return NULL;
    }
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *why = dlerror();
        snprintf(message, QL_CUDA_MESSAGE, "no NVIDIA driver was found (%s).", why ? why : "libcuda.so.1");
        return NULL;
    }
    if (resolve(library, message) < 0) {
        dlclose(library);
        return NULL;
    }
    handle = library;
    return &driver;
}

static const ql_cuda_driver *say_forked(char message[QL_CUDA_MESSAGE]) {
    snprintf(message, QL_CUDA_MESSAGE,
             "this process was forked after CUDA was initialized, and the driver does not work in it: start worker "
             "processes with 'spawn' or 'forkserver'.");
    return NULL;
}

static const ql_cuda_driver *initialize(char message[QL_CUDA_MESSAGE]) {
    if (!load(message)) return NULL;
    if (ql_cuda_forked()) return say_forked(message);
    if (initialized) return &driver;
    if (driver.version < ql_cuda_image_driver()) {
        int needed = ql_cuda_image_driver();
        snprintf(
            message, QL_CUDA_MESSAGE,
            "the NVIDIA driver is too old: it knows CUDA %d.%d, the kernels here need %d.%d (release %s or newer).",
            driver.version / 1000, driver.version % 1000 / 10, needed / 1000, needed % 1000 / 10, release_of(needed));
        return NULL;
    }
    atomic_store_explicit(&init_called, true, memory_order_relaxed);
    ql_cu_result result = driver.init(0);
    if (result == QL_CU_SUCCESS) {
        initialized = true;
        return &driver;
    }
    /* Somebody else called cuInit before the fork. */
    if (result == QL_CU_NOT_INITIALIZED) return say_forked(message);
    if (result == QL_CU_NO_DEVICE)
        snprintf(message, QL_CUDA_MESSAGE,
                 "the NVIDIA driver finds no GPU (none is built in, or CUDA_VISIBLE_DEVICES hides it).");
    else if (result == QL_CU_SYSTEM_DRIVER_MISMATCH)
        snprintf(message, QL_CUDA_MESSAGE,
                 "the NVIDIA driver's library and its kernel module are of different releases: restart the machine.");
    else
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver could not be initialized: %s.",
                 ql_cuda_error(&driver, result));
    return NULL;
}

const ql_cuda_driver *ql_cuda_load(char message[QL_CUDA_MESSAGE]) {
    take_lock();
    const ql_cuda_driver *found = load(message);
    pthread_mutex_unlock(&lock);
    return found;
}

const ql_cuda_driver *ql_cuda_open(char message[QL_CUDA_MESSAGE]) {
    take_lock();
    const ql_cuda_driver *found = initialize(message);
    pthread_mutex_unlock(&lock);
    return found;
}

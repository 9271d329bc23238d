/* An image is loaded only where a GPU fits it, so that one made for a single architecture does not keep the others from
 * working: what it fits is known by the list of the build, while the driver tells only when a kernel is first used.
 * Loading needs no context and serves every GPU. */
#include "library.h"

#include "image.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QL_KERNEL_NAME(name, ...) #name,
static const char *const names[QL_KERNEL_COUNT] = {QL_KERNELS(QL_KERNEL_NAME)};
#undef QL_KERNEL_NAME

#define QL_FIRST(source, ...) #source
#define QL_KERNEL_SOURCE(name, ...) QL_FIRST(__VA_ARGS__, unused),
static const char *const sources[QL_KERNEL_COUNT] = {QL_KERNELS(QL_KERNEL_SOURCE)};
#undef QL_KERNEL_SOURCE
#undef QL_FIRST

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what is below */
static ql_cu_library libraries[QL_CUDA_MAX_IMAGES];
static bool complete[QL_CUDA_MAX_IMAGES]; /* all its kernels have their handles */
static ql_cu_kernel handles[QL_KERNEL_COUNT];

const char *ql_cuda_kernel_name(ql_cuda_kernel kernel) { return names[kernel]; }

/* Whether an image has something that runs on compute capability major.minor: a binary "sm_XY" of the same major and no
 * higher minor ("sm_90a" of exactly this one), or PTX, "compute_XY", of no higher one. */
static bool runs_on(const char *architectures, int major, int minor) {
    for (const char *at = architectures; *at;) {
        bool ptx = strncmp(at, "compute_", 8) == 0;
        char *end;
        long number = strtol(at + (ptx ? 8 : 3), &end, 10);
        int has = (int)number, want = 10 * major + minor;
        bool specific = *end == 'a';
        if (specific ? has == want : ptx ? has <= want : has / 10 == major && has <= want) return true;
        at = strchr(end, ' ');
        if (!at) break;
        at++;
    }
    return false;
}

/* QLINEAR_KERNELS=mma in the environment leaves out what GPUs without wgmma do not have, to test the rest where it is. */
static bool is_wanted(const char *image) {
    const char *wish = getenv("QLINEAR_KERNELS");
    return !wish || strcmp(wish, "mma") != 0 || !strstr(image, "wgmma");
}

/* An image that the driver finds of no use is one that is not there; its sentence counts if none is left. */
static int load_image(int index, const ql_cuda_driver *driver, char message[QL_CUDA_MESSAGE]) {
    if (libraries[index]) return 0;
    ql_cuda_image image = ql_cuda_image_at(index);
    /* The value of an option that is a flag is the pointer itself, by the driver's convention. */
    int option = QL_CU_LIBRARY_BINARY_IS_PRESERVED;
    void *value = (void *)(uintptr_t)1;
    ql_cu_library library = NULL;
    ql_cu_result result = driver->library_load_data(&library, image.data, NULL, NULL, 0, &option, &value, 1);
    if (result == QL_CU_NO_BINARY_FOR_GPU) {
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver finds no kernels for a GPU here among those of %s (%s).",
                 image.name, image.architectures);
        return 0;
    }
    if (result == QL_CU_UNSUPPORTED_PTX_VERSION) {
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver is too old for the kernels: it knows CUDA %d.%d.",
                 driver->version / 1000, driver->version % 1000 / 10);
        return 0;
    }
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver could not load the kernels: %s.",
                 ql_cuda_error(driver, result));
        return -1;
    }
    libraries[index] = library;
    return 0;
}

static int find_kernels(int index, const ql_cuda_driver *driver, char message[QL_CUDA_MESSAGE]) {
    if (load_image(index, driver, message) < 0) return -1;
    const char *file = ql_cuda_image_at(index).name;
    for (int i = 0; libraries[index] && i < QL_KERNEL_COUNT; i++) {
        if (handles[i] || strcmp(sources[i], file) != 0) continue;
        ql_cu_kernel found = NULL;
        ql_cu_result result = driver->library_get_kernel(&found, libraries[index], names[i]);
        if (result != QL_CU_SUCCESS) {
            snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver could not load %s: %s.", names[i],
                     ql_cuda_error(driver, result));
            return -1;
        }
        handles[i] = found;
    }
    complete[index] = libraries[index] != NULL;
    return 0;
}

static int fill(ql_cu_kernel kernels[QL_KERNEL_COUNT], const ql_cuda_driver *driver, int major, int minor,
                char message[QL_CUDA_MESSAGE]) {
    bool any = false;
    memset(kernels, 0, QL_KERNEL_COUNT * sizeof *kernels);
    for (int index = 0; index < ql_cuda_image_count(); index++) {
        ql_cuda_image image = ql_cuda_image_at(index);
        if (!runs_on(image.architectures, major, minor) || !is_wanted(image.name)) continue;
        if (!complete[index] && find_kernels(index, driver, message) < 0) return -1;
        for (int i = 0; i < QL_KERNEL_COUNT; i++) {
            if (strcmp(sources[i], image.name) != 0) continue;
            kernels[i] = handles[i];
            any = any || handles[i];
        }
    }
    return any ? 0 : -1;
}

int ql_cuda_library(ql_cu_kernel kernels[QL_KERNEL_COUNT], const ql_cuda_driver *driver, int major, int minor,
                    char message[QL_CUDA_MESSAGE]) {
    snprintf(message, QL_CUDA_MESSAGE, "the GPU has compute capability %d.%d; the kernels were compiled for %s.", major,
             minor, ql_cuda_image_architectures());
    pthread_mutex_lock(&lock);
    int status = fill(kernels, driver, major, minor, message);
    pthread_mutex_unlock(&lock);
    return status;
}

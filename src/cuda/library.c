/* Loading the images needs no context and is done once for all GPUs. The driver takes from them what fits a GPU when a
 * kernel is first used there; that a GPU has no fitting binary is known only then, so the architectures are compared
 * with the list of the build here, where a plain sentence can still be given. */
#include "library.h"

#include "image.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QL_KERNEL_NAME(name, ...) #name,
static const char *const names[QL_KERNEL_COUNT] = {QL_KERNELS(QL_KERNEL_NAME)};
#undef QL_KERNEL_NAME

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the two below */
static bool loaded;
static ql_cu_kernel kernels[QL_KERNEL_COUNT];

const char *ql_cuda_kernel_name(ql_cuda_kernel kernel) { return names[kernel]; }

static int load_image(const ql_cuda_driver *driver, ql_cuda_image image, char message[QL_CUDA_MESSAGE]) {
    /* The value of an option that is a flag is the pointer itself, by the driver's convention. */
    int option = QL_CU_LIBRARY_BINARY_IS_PRESERVED;
    void *value = (void *)(uintptr_t)1;
    ql_cu_library library = NULL;
    ql_cu_result result = driver->library_load_data(&library, image.data, NULL, NULL, 0, &option, &value, 1);
    if (result == QL_CU_NO_BINARY_FOR_GPU) {
        snprintf(message, QL_CUDA_MESSAGE, "no GPU here is one that the kernels were compiled for (%s).",
                 ql_cuda_image_architectures());
        return -1;
    }
    if (result == QL_CU_UNSUPPORTED_PTX_VERSION) {
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver is too old for the kernels: it knows CUDA %d.%d.",
                 driver->version / 1000, driver->version % 1000 / 10);
        return -1;
    }
    if (result != QL_CU_SUCCESS) {
        snprintf(message, QL_CUDA_MESSAGE, "the NVIDIA driver could not load the kernels: %s.",
                 ql_cuda_error(driver, result));
        return -1;
    }
    for (int i = 0; i < QL_KERNEL_COUNT; i++) {
        ql_cu_kernel found;
        if (!kernels[i] && driver->library_get_kernel(&found, library, names[i]) == QL_CU_SUCCESS) kernels[i] = found;
    }
    return 0;
}

static int load(const ql_cuda_driver *driver, char message[QL_CUDA_MESSAGE]) {
    for (int i = 0; !loaded && i < ql_cuda_image_count(); i++)
        if (load_image(driver, ql_cuda_image_at(i), message) < 0) return -1;
    loaded = true;
    return 0;
}

const ql_cu_kernel *ql_cuda_library(char message[QL_CUDA_MESSAGE]) {
    if (!ql_cuda_image_count()) {
        snprintf(message, QL_CUDA_MESSAGE, "this build has no CUDA kernels.");
        return NULL;
    }
    const ql_cuda_driver *driver = ql_cuda_open(message);
    if (!driver) return NULL;
    pthread_mutex_lock(&lock);
    int status = load(driver, message);
    pthread_mutex_unlock(&lock);
    return status < 0 ? NULL : kernels;
}

/* Whether the images have something that runs on compute capability major.minor: a binary "sm_XY" of the same major and
 * no higher minor ("sm_90a" of exactly this one), or PTX, "compute_XY", of no higher one. */
static bool runs_on(int major, int minor) {
    for (const char *at = ql_cuda_image_architectures(); *at;) {
        bool ptx = strncmp(at, "compute_", 8) == 0;
        char *end;
        long number = strtol(at + (ptx ? 8 : 3), &end, 10);
        int has = (int)number, want = 10 * major + minor;
        bool specific = *end == 'a';
        if (ptx ? has <= want : specific ? has == want : has / 10 == major && has <= want) return true;
        at = strchr(end, ' ');
        if (!at) break;
        at++;
    }
    return false;
}

static void describe_devices(ql_cuda_description *description, const ql_cuda_driver *driver) {
    int count = 0;
    if (driver->device_get_count(&count) != QL_CU_SUCCESS) return;
    for (int i = 0; i < count && i < QL_CUDA_MAX_DEVICES; i++) {
        ql_cuda_device *found = &description->devices[description->device_count];
        ql_cu_device device;
        size_t memory = 0;
        if (driver->device_get(&device, i) != QL_CU_SUCCESS) continue;
        if (driver->device_get_name(found->name, (int)sizeof found->name, device) != QL_CU_SUCCESS) continue;
        if (driver->device_get_attribute(&found->major, QL_CU_COMPUTE_CAPABILITY_MAJOR, device) != QL_CU_SUCCESS ||
            driver->device_get_attribute(&found->minor, QL_CU_COMPUTE_CAPABILITY_MINOR, device) != QL_CU_SUCCESS)
            continue;
        if (driver->device_total_mem(&memory, device) != QL_CU_SUCCESS) continue;
        found->memory = (int64_t)memory;
        description->device_count++;
    }
}

void ql_cuda_describe(ql_cuda_description *description) {
    memset(description, 0, sizeof *description);
    description->built = ql_cuda_image_count() > 0;
    description->architectures = ql_cuda_image_architectures();
    for (int i = 0; i < ql_cuda_image_count(); i++) description->fatbin_bytes += ql_cuda_image_at(i).bytes;

    const ql_cuda_driver *driver = ql_cuda_load(description->missing);
    if (!driver) return;
    description->driver = driver->path;
    description->driver_version = driver->version;
    if (!ql_cuda_open(description->missing)) return;
    describe_devices(description, driver);

    const ql_cu_kernel *found = ql_cuda_library(description->missing);
    if (!found) return;
    for (int i = 0; i < QL_KERNEL_COUNT; i++) description->kernels[i] = found[i] != NULL;
    for (int i = 0; i < description->device_count; i++) {
        const ql_cuda_device *device = &description->devices[i];
        if (runs_on(device->major, device->minor)) continue;
        snprintf(description->missing, sizeof description->missing,
                 "%s has compute capability %d.%d; the kernels were compiled for %s.", device->name, device->major,
                 device->minor, description->architectures);
        return;
    }
}

#include "describe.h"

#include "image.h"

#include <stdio.h>
#include <string.h>

static void describe_devices(ql_cuda_description *description, const ql_cuda_driver *driver) {
    int count = 0;
    ql_cu_result result = driver->device_get_count(&count);
    for (int i = 0; i < count && i < QL_CUDA_MAX_DEVICES; i++) {
        ql_cu_device handle;
        ql_cuda_properties *found = &description->devices[description->device_count];
        ql_cu_result asked = ql_cuda_device_ask(found, &handle, driver, i);
        if (asked == QL_CU_SUCCESS)
            description->device_count++;
        else
            result = asked;
    }
    if (result != QL_CU_SUCCESS)
        snprintf(description->missing, sizeof description->missing, "the NVIDIA driver does not tell its GPUs: %s.",
                 ql_cuda_error(driver, result));
    else if (count == 0)
        snprintf(description->missing, sizeof description->missing, "the NVIDIA driver finds no GPU.");
}

static void describe_kernels(ql_cuda_description *description, const ql_cuda_driver *driver) {
    for (int i = 0; i < description->device_count; i++) {
        const ql_cuda_properties *device = &description->devices[i];
        ql_cu_kernel kernels[QL_KERNEL_COUNT];
        char message[QL_CUDA_MESSAGE];
        if (ql_cuda_library(kernels, driver, device->major, device->minor, message) < 0) {
            if (!*description->missing) strcpy(description->missing, message);
            continue;
        }
        for (int k = 0; k < QL_KERNEL_COUNT; k++) description->kernels[k] = description->kernels[k] || kernels[k];
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
    if (description->built)
        describe_kernels(description, driver);
    else
        snprintf(description->missing, sizeof description->missing, "this build has no CUDA kernels.");
}

/* Launches as the driver gets them: attributes, shared memory, what is refused. Linked with src/cuda/, with a driver that
 * needs no GPU (fake_cuda.c, as libcuda.so.1) and with images that hold nothing. */
#include "../../src/cuda/image.h"
#include "../../src/cuda/launch.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* fake_cuda.c */
typedef struct fake_call {
    char function[40], kernel[64];
    void *stream;
    uint32_t grid[3], block[3], shared_bytes;
    int32_t cluster, overlaps, device, result;
} fake_call;
int fake_call_count(void);
const fake_call *fake_calls(void);
void fake_forget(void);
void fake_devices(int count, int major, int minor);
void fake_static_shared(int bytes);
void fake_fail(const char *function, int result, int first, int last);
void fake_work(void);

/* An image for every GPU, one for sm_90a alone, and a binary that runs on its own major from its minor on. */
static const ql_cuda_image images[] = {
    {"linear", "sm_80 sm_90 compute_80", "image of linear", 16},
    {"activation", "sm_90a", "image of activation", 20},
    {"arrange", "sm_86", "image of arrange", 17},
};
int ql_cuda_image_count(void) { return 3; }
ql_cuda_image ql_cuda_image_at(int index) { return images[index]; }
const char *ql_cuda_image_architectures(void) { return "sm_80 sm_86 sm_90 sm_90a compute_80"; }
int ql_cuda_image_driver(void) { return 12040; }

static int failures;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("%s:%d: %s; the message is: %s\n", __FILE__, __LINE__, #condition, message);                        \
            failures++;                                                                                                \
        }                                                                                                              \
    } while (0)

static char message[QL_CUDA_MESSAGE];

static int count_of(const char *function) {
    int count = 0;
    for (int i = 0; i < fake_call_count(); i++) count += strcmp(fake_calls()[i].function, function) == 0;
    return count;
}

static const fake_call *last_call(void) { return &fake_calls()[fake_call_count() - 1]; }

static int launch(int device, ql_cuda_kernel kernel, ql_cuda_grid grid) {
    ql_cuda_guard guard;
    int parameters = 0;
    strcpy(message, "");
    if (ql_cuda_enter(&guard, device, message) < 0) return -2;
    int result = ql_cuda_launch(&guard, kernel, (void *)0x77, &grid, &parameters, message);
    ql_cuda_leave(&guard);
    return result;
}

static const ql_cuda_grid plain = {.x = 5, .y = 2, .threads = 128};

/* The call before the last is the launch, the last gives the context back. */
static const fake_call *launched(void) { return last_call() - 1; }

static void test_attributes(void) {
    ql_cuda_grid grid = plain;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0);
    CHECK(strcmp(launched()->kernel, "ql_copy") == 0 && launched()->stream == (void *)0x77);
    CHECK(launched()->grid[0] == 5 && launched()->grid[1] == 2 && launched()->grid[2] == 1);
    CHECK(launched()->block[0] == 128 && launched()->block[1] == 1 && launched()->block[2] == 1);
    CHECK(launched()->cluster == 0 && launched()->overlaps == 0 && launched()->shared_bytes == 0);
    grid.overlaps = true;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0 && launched()->overlaps == 1 && launched()->cluster == 0);
    grid.cluster = 4;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0 && launched()->overlaps == 1 && launched()->cluster == 4);
    grid.cluster = 1;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0 && launched()->cluster == 0);
    CHECK(ql_cuda_allow_overlap(false));
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0 && launched()->overlaps == 0);
    CHECK(!ql_cuda_allow_overlap(true));
}

static void test_shared_memory(void) {
    ql_cuda_grid grid = plain;
    fake_static_shared(1024);
    fake_forget();
    grid.shared_bytes = 48 * 1024;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0 && launched()->shared_bytes == 48 * 1024);
    CHECK(count_of("cuKernelSetAttribute") == 0);
    grid.shared_bytes = 49 * 1024;
    fake_fail("cuKernelSetAttribute", 2, 0, 0);
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == -1 && strcmp(message, "ql_copy: the words for 2.") == 0);
    CHECK(count_of("cuLaunchKernelEx") == 1);
    fake_work();
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0 && launched()->shared_bytes == 49 * 1024);
    /* Up to the most of all, without asking again. */
    grid.shared_bytes = 226 * 1024;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == 0);
    CHECK(count_of("cuKernelSetAttribute") == 2);
    /* Another kernel and another device are told on their own. */
    CHECK(launch(0, QL_KERNEL_ql_row_absmax, grid) == 0);
    CHECK(launch(1, QL_KERNEL_ql_copy, grid) == 0 && launched()->device == 1);
    CHECK(count_of("cuKernelSetAttribute") == 4);
    grid.shared_bytes = 227 * 1024;
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == -1 && strcmp(message, "ql_copy: the words for 1.") == 0);
}

static void test_refused(void) {
    static const int64_t wrong[][2] = {{0, 1}, {1, 0}, {-1, 1}, {(int64_t)1 << 31, 1}, {1, 65536}, {1, INT64_MAX}};
    fake_forget();
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ql_cuda_grid grid = {.x = wrong[i][0], .y = wrong[i][1], .threads = 128};
        CHECK(launch(0, QL_KERNEL_ql_copy, grid) == -1 && strstr(message, "is not one that a GPU takes."));
    }
    CHECK(count_of("cuLaunchKernelEx") == 0);
    CHECK(count_of("cuCtxPushCurrent") == count_of("cuCtxPopCurrent"));
}

static void test_properties(void) {
    ql_cuda_guard guard;
    CHECK(ql_cuda_enter(&guard, 0, message) == 0);
    CHECK(guard.properties->multiprocessors == 132 && guard.properties->l2_bytes == 50 << 20);
    CHECK(guard.properties->shared_bytes == 227 << 10 && guard.properties->major == 9);
    CHECK(strcmp(guard.properties->name, "Fake GPU 0") == 0 && guard.properties->memory == (int64_t)80 << 30);
    ql_cuda_leave(&guard);
}

/* A GPU that sm_90a's image does not fit; overlap is not for one before sm_90. */
static void test_other_gpu(int major, int minor) {
    const bool runs_sm_86 = major == 8 && minor >= 6;
    ql_cuda_guard guard;
    fake_devices(1, major, minor);
    CHECK(ql_cuda_enter(&guard, 0, message) == 0);
    CHECK(ql_cuda_has(&guard, QL_KERNEL_ql_dequantize) && !ql_cuda_has(&guard, QL_KERNEL_ql_copy));
    CHECK(ql_cuda_has(&guard, QL_KERNEL_ql_arrange) == runs_sm_86);
    ql_cuda_leave(&guard);
    CHECK(count_of("cuLibraryLoadData") == 1 + runs_sm_86);
    ql_cuda_grid grid = plain;
    grid.overlaps = true;
    CHECK(launch(0, QL_KERNEL_ql_dequantize, grid) == 0 && launched()->overlaps == (major >= 9));
    fake_forget();
    CHECK(launch(0, QL_KERNEL_ql_copy, grid) == -1);
    char expected[QL_CUDA_MESSAGE];
    snprintf(expected, sizeof expected, "ql_copy was not compiled for a GPU of compute capability %d.%d.", major,
             minor);
    CHECK(strcmp(message, expected) == 0 && count_of("cuLaunchKernelEx") == 0);
}

static void *enter_many_times(void *unused) {
    for (int i = 0; i < 2000; i++) {
        char told[QL_CUDA_MESSAGE];
        ql_cuda_guard guard;
        if (ql_cuda_enter(&guard, i % 2, told) < 0) return "failed";
        if (guard.device->ordinal != i % 2 || !ql_cuda_has(&guard, QL_KERNEL_ql_copy)) return "wrong device";
        ql_cuda_leave(&guard);
    }
    return unused;
}

static void test_threads(void) {
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, enter_many_times, NULL);
    for (int i = 0; i < 8; i++) {
        void *why = NULL;
        pthread_join(threads[i], &why);
        CHECK(why == NULL);
    }
    CHECK(count_of("cuInit") == 1 && count_of("cuDevicePrimaryCtxRetain") == 2);
}

int main(int argc, char **argv) {
    if (argc == 3) {
        test_other_gpu(atoi(argv[1]), atoi(argv[2]));
    } else {
        fake_devices(2, 9, 0);
        test_threads();
        test_properties();
        test_attributes();
        test_shared_memory();
        test_refused();
    }
    printf("%d failures\n", failures);
    return failures != 0;
}

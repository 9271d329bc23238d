/* Why through pointers: an own pool of threads collides with torch's spinning workers (15 to 230 us a region, and torch's
 * operations slow down as much), and linking libgomp would bring a second one beside a torch that carries its own under
 * a hashed name. */
#define _GNU_SOURCE
#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static struct {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*max_threads)(void);
    int (*in_parallel)(void);
    char name[256];
} runtime = {.name = "none"};

static pthread_once_t runtime_found = PTHREAD_ONCE_INIT;

/* libgomp's workers do not live on in a forked child, and its next region waits for them for ever. */
static atomic_bool region_ran;
static atomic_bool child_of_region;

static void after_fork_in_child(void) {
    if (atomic_load(&region_ran)) atomic_store(&child_of_region, true);
}

/* Old torch wheels carry libgomp-<hash>.so.1, which no soname finds. */
static int match_hashed(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size;
    const char *base = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
    if (!base || strncmp(base, "/libgomp", 8) != 0) return 0;
    snprintf(data, sizeof runtime.name, "%s", info->dlpi_name);
    return 1;
}

/* ISO C has no conversion from void * to a function pointer; POSIX gives both one representation. */
static bool find_symbol(void *function, void *library, const char *name) {
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static void find_runtime(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
    char path[sizeof runtime.name] = "libgomp.so.1";
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library && dl_iterate_phdr(match_hashed, path)) library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library) {
        memcpy(path, "libgomp.so.1", sizeof "libgomp.so.1");
        library = dlopen(path, RTLD_NOW);
    }
    if (!library) return;
    if (find_symbol(&runtime.max_threads, library, "omp_get_max_threads") &&
        find_symbol(&runtime.in_parallel, library, "omp_in_parallel") &&
        find_symbol(&runtime.parallel, library, "GOMP_parallel")) {
        const char *base = strrchr(path, '/');
        snprintf(runtime.name, sizeof runtime.name, "%s", base ? base + 1 : path);
    } else {
        runtime.parallel = NULL;
        dlclose(library);
    }
}

int ql_cpu_thread_count(void) {
    pthread_once(&runtime_found, find_runtime);
    if (!runtime.parallel || atomic_load(&child_of_region) || runtime.in_parallel()) return 1;
    int count = runtime.max_threads();
    return count > 1 ? count : 1;
}

const char *ql_cpu_thread_runtime(void) {
    pthread_once(&runtime_found, find_runtime);
    return runtime.name;
}

typedef struct loop {
    void (*body)(void *context, int64_t begin, int64_t end);
    void *context;
    int64_t count, grain;
    _Atomic int64_t next;
} loop;

static void run_ranges(void *data) {
    loop *work = data;
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&work->next, work->grain, memory_order_relaxed);
        if (begin >= work->count) return;
        int64_t end = work->count - begin < work->grain ? work->count : begin + work->grain;
        work->body(work->context, begin, end);
    }
}

void ql_cpu_parallel(int64_t count, int64_t grain, void (*body)(void *context, int64_t begin, int64_t end),
                     void *context) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    loop work = {.body = body, .context = context, .count = count, .grain = grain};
    int64_t ranges = (count - 1) / grain + 1;
    int64_t threads = ranges > 1 ? ql_cpu_thread_count() : 1;
    if (threads > ranges) threads = ranges;
    if (threads == 1) {
        run_ranges(&work);
        return;
    }
    atomic_store(&region_ran, true);
    runtime.parallel(run_ranges, &work, (unsigned)threads, 0);
}

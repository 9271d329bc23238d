#include "nonce.h"

#include <stdatomic.h>
#include <sys/random.h>
#include <time.h>

/* A random start, so that marks which another process left in the memory are none of ours. */
static uint64_t random_start(void) {
    uint64_t start;
    if (getrandom(&start, sizeof start, GRND_NONBLOCK) == (ssize_t)sizeof start) return start;
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return ((uint64_t)now.tv_nsec << 34) ^ (uint64_t)now.tv_sec ^ (uint64_t)(uintptr_t)&now;
}

uint64_t ql_cuda_nonce(void) {
    static _Atomic uint64_t last;
    uint64_t seen = atomic_load_explicit(&last, memory_order_relaxed), next;
    do {
        next = (seen ? seen : random_start()) + 1;
        next += next == 0;
    } while (!atomic_compare_exchange_weak_explicit(&last, &seen, next, memory_order_relaxed, memory_order_relaxed));
    return next;
}

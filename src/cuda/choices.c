/* A hash table that only grows: a problem takes a free place once, under the lock, and keeps it; what is chosen there is
 * one atomic word. So a reader needs no lock and never sees half a choice. */
#include "choices.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

enum { PLACES = 4096, MOST_BUCKET = 98304 };

typedef struct place {
    atomic_bool taken;   /* the two below do not change any more */
    ql_cuda_problem key; /* m is the bucket */
    int device;
    _Atomic uint64_t value; /* the kernel plus one, above the parameter's 32 bits; 0: none */
} place;

static place places[PLACES];
static atomic_bool any; /* spares every other process the search */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int64_t ql_cuda_choice_bucket(int64_t m) {
    if (m <= 1) return 1;
    int64_t bucket = 2;
    while (bucket < m && bucket < MOST_BUCKET) {
        int64_t between = bucket >= 16 ? bucket + bucket / 2 : 2 * bucket;
        bucket = m <= between ? between : 2 * bucket;
    }
    return bucket < MOST_BUCKET ? bucket : MOST_BUCKET;
}

static uint64_t hash(int device, const ql_cuda_problem *key) {
    const int64_t words[] = {key->n, key->k, key->group_size, key->m, key->code, key->x_type, device};
    uint64_t sum = 0;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        sum = ((sum ^ (uint64_t)words[i]) + (sum >> 29)) * UINT64_C(0x9e3779b97f4a7c15);
    return sum ^ sum >> 32;
}

static bool is_at(const place *at, int device, const ql_cuda_problem *key) {
    return at->device == device && at->key.n == key->n && at->key.k == key->k &&
           at->key.group_size == key->group_size && at->key.m == key->m && at->key.code == key->code &&
           at->key.x_type == key->x_type;
}

/* The problem's place, or the free one where it would go, or NULL where all are taken. */
static place *search(int device, const ql_cuda_problem *key) {
    uint64_t start = hash(device, key);
    for (uint64_t i = 0; i < PLACES; i++) {
        place *at = &places[(start + i) % PLACES];
        if (!atomic_load_explicit(&at->taken, memory_order_acquire) || is_at(at, device, key)) return at;
    }
    return NULL;
}

bool ql_cuda_choice_find(ql_cuda_choice *choice, int device, const ql_cuda_problem *problem) {
    if (!atomic_load_explicit(&any, memory_order_relaxed)) return false;
    ql_cuda_problem key = *problem;
    key.m = ql_cuda_choice_bucket(problem->m);
    place *at = search(device, &key);
    if (!at || !atomic_load_explicit(&at->taken, memory_order_acquire)) return false;
    uint64_t value = atomic_load_explicit(&at->value, memory_order_relaxed);
    if (!value) return false;
    *choice = (ql_cuda_choice){(ql_cuda_kernel)((value >> 32) - 1), (int32_t)(uint32_t)value};
    return true;
}

int ql_cuda_choice_set(int device, const ql_cuda_problem *problem, const ql_cuda_choice *choice,
                       char message[QL_CUDA_MESSAGE]) {
    ql_cuda_problem key = *problem;
    key.m = ql_cuda_choice_bucket(problem->m);
    int result = 0;
    pthread_mutex_lock(&lock);
    place *at = search(device, &key);
    if (!at) {
        snprintf(message, QL_CUDA_MESSAGE, "there is no room for more than %d choices.", PLACES);
        result = -1;
    } else {
        uint64_t value = choice ? (uint64_t)(choice->kernel + 1) << 32 | (uint32_t)choice->parameter : 0;
        atomic_store_explicit(&at->value, value, memory_order_relaxed);
        if (!atomic_load_explicit(&at->taken, memory_order_relaxed)) {
            at->key = key;
            at->device = device;
            atomic_store_explicit(&at->taken, true, memory_order_release);
        }
        atomic_store_explicit(&any, true, memory_order_relaxed);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

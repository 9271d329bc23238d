/* Places by hash, each under a sequence number that is odd while it is written: a reader that sees the same even number
 * before and after has seen one writer's words. */
#include "memo.h"

#include <stdatomic.h>
#include <string.h>

enum { PLACES = 256, KEY_WORDS = 5, WORDS = KEY_WORDS + 1 };

typedef struct place {
    atomic_uint sequence;
    _Atomic uint64_t words[WORDS]; /* the key, then the answer: 0 where nothing is kept */
} place;

static place places[PLACES];

static place *place_of(uint64_t key[KEY_WORDS], int engine, int device, const ql_cuda_problem *problem) {
    key[0] = (uint64_t)problem->n;
    key[1] = (uint64_t)problem->k;
    key[2] = (uint64_t)problem->group_size;
    key[3] = (uint64_t)problem->m;
    key[4] = (uint64_t)problem->code | (uint64_t)problem->x_type << 8 | (uint64_t)engine << 16 | (uint64_t)device << 24;
    uint64_t sum = 0;
    for (int i = 0; i < KEY_WORDS; i++) sum = (sum ^ key[i]) * UINT64_C(0x9e3779b97f4a7c15);
    return &places[sum >> 56];
}
_Static_assert(PLACES == 256, "a place is the hash's upper eight bits");

bool ql_cuda_memo_find(bool *found, ql_cuda_choice *choice, int engine, int device, const ql_cuda_problem *problem) {
    uint64_t key[KEY_WORDS], words[WORDS];
    place *at = place_of(key, engine, device, problem);
    unsigned before = atomic_load_explicit(&at->sequence, memory_order_acquire);
    for (int i = 0; i < WORDS; i++) words[i] = atomic_load_explicit(&at->words[i], memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    unsigned after = atomic_load_explicit(&at->sequence, memory_order_relaxed);
    const uint64_t answer = words[KEY_WORDS];
    if (before != after || before % 2 || !answer || memcmp(words, key, sizeof key) != 0) return false;
    *found = answer >> 32 > 1;
    if (*found) *choice = (ql_cuda_choice){(ql_cuda_kernel)((answer >> 32) - 2), (int32_t)(uint32_t)answer};
    return true;
}

/* The answer's upper half: 1 for none, else the kernel plus two. */
void ql_cuda_memo_keep(bool found, ql_cuda_choice choice, int engine, int device, const ql_cuda_problem *problem) {
    uint64_t words[WORDS];
    place *at = place_of(words, engine, device, problem);
    words[KEY_WORDS] = found ? (uint64_t)(choice.kernel + 2) << 32 | (uint32_t)choice.parameter : UINT64_C(1) << 32;
    unsigned before = atomic_load_explicit(&at->sequence, memory_order_relaxed);
    /* Another writer is at it: this answer is not kept. */
    if (before % 2 || !atomic_compare_exchange_strong_explicit(&at->sequence, &before, before + 1, memory_order_acquire,
                                                               memory_order_relaxed))
        return;
    atomic_thread_fence(memory_order_release);
    for (int i = 0; i < WORDS; i++) atomic_store_explicit(&at->words[i], words[i], memory_order_relaxed);
    atomic_store_explicit(&at->sequence, before + 2, memory_order_release);
}

/* The sum of tensors that lie on several GPUs. Each GPU writes its own into an inbox in the others' memory, waits for theirs
 * in its own inbox, and adds all in the order of ranks, so that all come to the same bits.
 *
 * A word that is not the mark has come: nothing is waited for but the words themselves, and nothing but they go over. A
 * reader leaves the mark again. Every second call of a block takes the same place: by then its words were read and the
 * mark was left, for the other's words of the call between them, which this GPU has had, were sent after that. */
#include "all_reduce.h"
#include "ptx.cuh"
#include "variants.h"

enum { THREADS = QL_ALL_REDUCE_THREADS, PIECE = QL_ALL_REDUCE_PIECE, HALVES = PIECE / 2 };

/* From a thread's piece to its next one. */
enum { STEP = QL_ALL_REDUCE_BLOCKS * THREADS * PIECE, MOST_PIECES = 4 };

typedef union piece {
    uint32_t word[PIECE / 4];
    uint16_t half[HALVES];
    float value[PIECE / 4];
} piece;

static __device__ __forceinline__ void put(char *to, piece v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

static __device__ __forceinline__ piece look(const char *at) {
    piece v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(at)
                 : "memory");
    return v;
}

static __device__ __forceinline__ uint64_t nanoseconds(void) {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

/* The piece at x[at], which begins before the end; zeros beyond that. */
static __device__ __forceinline__ piece load_piece(const ql_all_reduce_params *p, int64_t at) {
    const char *from = (const char *)p->x + at;
    piece v;
    if (__builtin_expect(p->vector && at + PIECE <= p->bytes, true))
        *(uint4 *)v.word = *(const uint4 *)from;
    else
#pragma unroll
        for (int i = 0; i < HALVES; i++) v.half[i] = at + 2 * i < p->bytes ? *(const uint16_t *)(from + 2 * i) : 0;
    return v;
}

static __device__ __forceinline__ void store_piece(const ql_all_reduce_params *p, int64_t at, piece v) {
    char *to = (char *)p->x + at;
    if (__builtin_expect(p->vector && at + PIECE <= p->bytes, true))
        *(uint4 *)to = *(const uint4 *)v.word;
    else
#pragma unroll
        for (int i = 0; i < HALVES; i++)
            if (at + 2 * i < p->bytes) *(uint16_t *)(to + 2 * i) = v.half[i];
}

/* Whether all words of a piece have come. */
static __device__ __forceinline__ bool is_there(piece v) {
    bool there = true;
#pragma unroll
    for (int i = 0; i < PIECE / 4; i++) there = there && v.word[i] != QL_ALL_REDUCE_NOTHING;
    return there;
}

/* A piece with no word that is the mark. */
static __device__ __forceinline__ piece sendable(piece v, int type) {
    const uint32_t nan = type == QL_VALUE_F32 ? 0x7fffffffu : 0x7fff7fffu;
#pragma unroll
    for (int i = 0; i < PIECE / 4; i++) v.word[i] = v.word[i] == QL_ALL_REDUCE_NOTHING ? nan : v.word[i];
    return v;
}

/* Looks until the piece of another GPU has come; v: what was seen at first. */
static __device__ __forceinline__ piece received(const char *from, piece v, uint64_t patience) {
    uint64_t began = 0;
    for (uint32_t looked = 1; !is_there(v); looked++) {
        v = look(from);
        if (looked % 1024) continue;
        const uint64_t now = nanoseconds();
        if (!began) began = now;
        if (now - began > patience) __trap();
    }
    return v;
}

static __device__ __forceinline__ void leave_mark(char *at) {
    piece nothing;
#pragma unroll
    for (int i = 0; i < PIECE / 4; i++) nothing.word[i] = QL_ALL_REDUCE_NOTHING;
    put(at, nothing);
}

/* The values of a piece: 8 of 16 bit, or 4. */
static __device__ __forceinline__ void widen(float values[HALVES], piece v, int type) {
    if (type == QL_VALUE_F32)
#pragma unroll
        for (int i = 0; i < PIECE / 4; i++) values[i] = v.value[i];
    else
#pragma unroll
        for (int i = 0; i < HALVES; i++)
            values[i] = type == QL_VALUE_F16 ? __half2float(__ushort_as_half(v.half[i]))
                                             : __bfloat162float(__ushort_as_bfloat16(v.half[i]));
}

static __device__ __forceinline__ piece narrow(const float values[HALVES], int type) {
    piece v;
    if (type == QL_VALUE_F32)
#pragma unroll
        for (int i = 0; i < PIECE / 4; i++) v.value[i] = values[i];
    else
#pragma unroll
        for (int i = 0; i < PIECE / 4; i++) v.word[i] = round16_pair(values[2 * i], values[2 * i + 1], type);
    return v;
}

/* Sums `count` pieces, a constant, that are STEP bytes apart, as far as there are any; place: of this call's in every inbox. */
static __device__ __forceinline__ void sum_pieces(const ql_all_reduce_params *p, int64_t at, int64_t place, int count) {
    piece own[MOST_PIECES], more[MOST_PIECES];
    float sums[MOST_PIECES][HALVES];
#pragma unroll
    for (int i = 0; i < count; i++)
        if (at + i * STEP < p->bytes) own[i] = load_piece(p, at + i * STEP);
#pragma unroll 1
    for (int next = 1; next < p->parts; next++) {
        const int to = p->rank + next < p->parts ? p->rank + next : p->rank + next - p->parts;
        char *box = p->boxes[to] + place + p->rank * p->place + at;
#pragma unroll
        for (int i = 0; i < count; i++)
            if (at + i * STEP < p->bytes) put(box + i * STEP, sendable(own[i], p->type));
    }
#pragma unroll 1
    for (int from = 0; from < p->parts; from++) {
        char *box = p->boxes[p->rank] + place + from * p->place + at;
        const bool is_own = from == p->rank;
#pragma unroll
        for (int i = 0; i < count; i++)
            if (at + i * STEP < p->bytes) more[i] = is_own ? own[i] : look(box + i * STEP);
#pragma unroll
        for (int i = 0; i < count; i++) {
            if (at + i * STEP >= p->bytes) break;
            if (!is_own) {
                more[i] = received(box + i * STEP, more[i], p->patience);
                leave_mark(box + i * STEP);
            }
            float values[HALVES];
            widen(values, more[i], p->type);
#pragma unroll
            for (int j = 0; j < HALVES; j++) sums[i][j] = from == 0 ? values[j] : sums[i][j] + values[j];
        }
    }
#pragma unroll
    for (int i = 0; i < count; i++)
        if (at + i * STEP < p->bytes) store_piece(p, at + i * STEP, narrow(sums[i], p->type));
}

static __device__ __forceinline__ void all_reduce(const ql_all_reduce_params *p, int count) {
    start_next_kernel();
    wait_for_previous_kernel();
    const uint32_t calls = *(volatile const uint32_t *)&p->calls[blockIdx.x];
    const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * PIECE,
                  place = calls % 2 * p->parts * p->place;
    for (int64_t at = first; at < p->bytes; at += (int64_t)count * STEP) sum_pieces(p, at, place, count);
    __syncthreads();
    if (threadIdx.x == 0) p->calls[blockIdx.x] = calls + 1;
}

#define DEFINE(name, source, count)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ ql_all_reduce_params p) {       \
        all_reduce(&p, count);                                                                                         \
    }
QL_ALL_REDUCE_VARIANTS(DEFINE)

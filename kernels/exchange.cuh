/* Partial sums of the stream-K product between thread blocks (streamk.h): left by a range that starts inside a tile,
 * added by the block that has the tile's first columns, in the order of K; here, or as they come by the ring (streamk.cuh).
 *
 * Each warp's sums have a flag, or all of them one that come by the ring, which a warp that has nothing else to do raises: no
 * warp that multiplies waits for a fence. A reader takes the flag away again, so that the launch may be repeated as it is, by
 * a graph. */
#ifndef QL_KERNELS_EXCHANGE_CUH
#define QL_KERNELS_EXCHANGE_CUH

#include "streamk.cuh"

enum { FLAGS_BARRIER = 2, NESTED_BARRIER = 5, MULTIPLIERS = WARPS * WARP };

/* This thread's first four sums; the next four are MULTIPLIERS further on. */
static __device__ __forceinline__ float4 *partials_of(const ql_streamk_params *q, int range, shape k) {
    return (float4 *)q->partials + place_of_partials(range, k) * (k.rows * k.tokens / 4) + threadIdx.x;
}

static __device__ __forceinline__ void leave_partials(const float *sums, const ql_streamk_params *q, shape k) {
    float4 *to = partials_of(q, own_range(k), k);
#pragma unroll
    for (int i = 0; i < k.rows * k.tokens / MULTIPLIERS; i += 4)
        __stcg(to + i / 4 * MULTIPLIERS, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
    named_arrive(FLAGS_BARRIER, MULTIPLIERS + WARP);
}

/* In this order: the compiler would else have them in two batches, of which one waits for the other. */
static __device__ __forceinline__ float4 load_partials(const float4 *from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from));
    return v;
}

/* By one warp, for all that multiply. */
static __device__ __forceinline__ void raise_flags(const ql_streamk_params *q, shape k) {
    wait_for_previous_kernel();
    named_barrier(FLAGS_BARRIER, MULTIPLIERS + WARP);
    if (threadIdx.x % WARP < (HAS_PARTS(k) ? 1 : WARPS))
        store_release(q->flags + place_of_partials(own_range(k), k) * WARPS + threadIdx.x % WARP, q->nonce);
}

/* By one that feeds as well: as late as that holds nothing up, once the ring is full of the tile after the one that was left.
 * in: stages until then, below 0: none. */
static __device__ __forceinline__ void count_down_flags(int *in, const ql_streamk_params *q, shape k) {
    if (*in == 0) raise_flags(q, k);
    (*in)--;
}

/* A lane waits for a range. */
static __device__ __forceinline__ void await_flags(const ql_streamk_params *q, int first, int ranges, shape k) {
#pragma unroll 1
    for (int i = (int)threadIdx.x % WARP; i < ranges; i += WARP) {
        uint64_t *flag = q->flags + place_of_partials(first + i, k) * WARPS + threadIdx.x / WARP;
        while (load_acquire(flag) != q->nonce) {
        }
        *flag = 0;
    }
    __syncwarp();
}

/* How many ranges have a part of the tile, once all of it is there. */
static __device__ __forceinline__ int await_partials(const ql_streamk_params *q, const walk *w, shape k) {
    const int ranges = ranges_after(q, w, k);
    await_flags(q, own_range(k) + 1, ranges, k);
    return ranges;
}

/* In the order of K, as many loads ahead as there are registers for: of several ranges where a thread has few sums of each. */
static __device__ __forceinline__ void add_partials(float *sums, const ql_streamk_params *q, int ranges, shape k) {
    const int count = k.rows * k.tokens / MULTIPLIERS, together = count <= 16 ? 4 : count <= 32 ? 2 : 1;
    const int pieces = together * count / 4, next = k.rows * k.tokens / 4 * (PAIRED(k) + 1);
    const int ahead = PAIRED(k) ? 10 : k.code == QL_CODE_TABLE4 ? 8 : pieces;
    const float4 *from = partials_of(q, own_range(k) + 1, k);
#pragma unroll 1
    for (; ranges > 0; ranges -= together, from += together * next) {
        float4 v[MOST_SUMS / 4];
#pragma unroll
        for (int i = 0; i < pieces + ahead; i++) {
            const int range = i / (count / 4), at = i - ahead;
            if (at >= 0 && at / (count / 4) < ranges) {
                const float4 u = v[at % ahead];
                float *s = sums + at % (count / 4) * 4;
                s[0] += u.x;
                s[1] += u.y;
                s[2] += u.z;
                s[3] += u.w;
            }
            if (i < pieces && range < ranges)
                v[i % ahead] = load_partials(from + range * next + i % (count / 4) * MULTIPLIERS);
        }
    }
}

#endif

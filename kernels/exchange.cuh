/* Partial sums of the stream-K product between thread blocks (streamk.h): left by a range that starts inside a tile,
 * added by the block that has the tile's first columns, in the order of K.
 *
 * Each warp's sums have a flag, which a warp that has nothing else to do raises: no warp that multiplies waits for a
 * fence. A reader takes the flag away again, so that the launch may be repeated as it is, by a graph. */
#ifndef QL_KERNELS_EXCHANGE_CUH
#define QL_KERNELS_EXCHANGE_CUH

#include "streamk.cuh"

enum { FLAGS_BARRIER = 2, MULTIPLIERS = WARPS * WARP };

/* Thread blocks of a pair leave their sums beside each other. */
static __device__ __forceinline__ int64_t place_of_partials(int range, shape k) {
    return PAIRED(k) ? (int64_t)range * 2 + cluster_rank() : range;
}

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

/* By one warp, for all that multiply. */
static __device__ __forceinline__ void raise_flags(const ql_streamk_params *q, shape k) {
    wait_for_previous_kernel();
    named_barrier(FLAGS_BARRIER, MULTIPLIERS + WARP);
    if (threadIdx.x % WARP < WARPS)
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

/* end: of the blocks that this thread block summed itself. As many ranges at once as there are registers for. */
static __device__ __forceinline__ void add_partials(float *sums, const ql_streamk_params *q, int end, shape k) {
    const int count = k.rows * k.tokens / MULTIPLIERS, together = count <= 16 ? 4 : count <= 32 ? 2 : 1;
    const int first = own_range(k) + 1, next = k.rows * k.tokens / 4 * (PAIRED(k) + 1);
    int ranges = 0;
#pragma unroll 1
    for (; end < q->k_blocks; ranges++) end += range_blocks(q, first + ranges);
    await_flags(q, first, ranges, k);
    const float4 *from = partials_of(q, first, k);
#pragma unroll 1
    for (; ranges > 0; ranges -= together, from += together * next) {
        float4 v[MOST_SUMS / 4];
#pragma unroll
        for (int t = 0; t < together; t++)
#pragma unroll
            for (int i = 0; i < count / 4; i++)
                if (t < ranges) v[t * (count / 4) + i] = __ldcg(from + t * next + i * MULTIPLIERS);
#pragma unroll
        for (int t = 0; t < together; t++)
#pragma unroll
            for (int i = 0; i < count / 4; i++)
                if (t < ranges) {
                    const float4 u = v[t * (count / 4) + i];
                    sums[4 * i] += u.x;
                    sums[4 * i + 1] += u.y;
                    sums[4 * i + 2] += u.z;
                    sums[4 * i + 3] += u.w;
                }
    }
}

#endif

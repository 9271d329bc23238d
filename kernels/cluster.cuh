/* Thread blocks of a cluster: how they meet, and what one does to another's shared memory. */
#ifndef QL_KERNELS_CLUSTER_CUH
#define QL_KERNELS_CLUSTER_CUH

#include "ptx.cuh"

/* ---- for kernels of every GPU: nothing where there are no clusters, as the host then starts none ---- */

static __device__ __forceinline__ int cluster_rank(void) {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

/* That this block has started, nothing else. */
static __device__ __forceinline__ void arrive_cluster_started(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void arrive_cluster(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void wait_cluster(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* All threads of all blocks: what any of them stored before is seen by all after. */
static __device__ __forceinline__ void meet_cluster(void) {
    arrive_cluster();
    wait_cluster();
}

/* To the same place in the shared memory of block `rank`. */
static __device__ __forceinline__ void store_remote(uint32_t address, int rank, float value) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .u32 to;\n\tmapa.shared::cluster.u32 to, %0, %1;\n\tst.shared::cluster.f32 [to], %2;\n\t}" ::"r"(
            address),
        "r"(rank), "f"(value)
        : "memory");
#endif
}

/* ---- for kernels of sm_90a ---- */

/* Where this address is in the shared memory of block `rank`, as store_remote_16 and barrier_arrive_remote take it. */
static __device__ __forceinline__ uint32_t address_at(uint32_t address, int rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

static __device__ __forceinline__ void store_remote_16(uint32_t remote, uint4 v) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

/* Arrives once what was stored before can be seen there, by whoever waits with barrier_wait_remote. */
static __device__ __forceinline__ void barrier_arrive_remote(uint32_t remote) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

static __device__ __forceinline__ void barrier_wait_remote(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "wait:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra wait;\n\t"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Arrives at the barrier at this address in the shared memory of block `rank`. */
static __device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile("{ .reg .b32 remote;\n\t"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

/* As copy_box, into the same place of all blocks of `mask`, whose barriers at that place count the bytes. */
static __device__ __forceinline__ void copy_box_to_all(uint32_t to, const void *map, int col, int row, uint32_t barrier,
                                                       uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(barrier), "h"(mask)
                 : "memory");
}

/* As copy_box_to_all, of bytes that are read once (copy_box_once). */
static __device__ __forceinline__ void copy_box_to_all_once(uint32_t to, const void *map, int col, int row,
                                                            uint32_t barrier, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::"
                 "cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(barrier), "h"(mask), "l"(EVICT_FIRST)
                 : "memory");
}

#endif

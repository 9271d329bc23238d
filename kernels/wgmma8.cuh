/* Products of a warpgroup with both operands in shared memory: 8-bit codes, and the 16-bit columns of outliers; and what
 * two thread blocks of a cluster do to each other's shared memory. */
#ifndef QL_KERNELS_WGMMA8_CUH
#define QL_KERNELS_WGMMA8_CUH

#include "hopper.cuh"
#include "w8a8.h"

/* Sums are bits of fp32 or int32, in registers that take either. */
#define BITS_8(d, at)                                                                                                  \
    "+r"(d[at]), "+r"(d[at + 1]), "+r"(d[at + 2]), "+r"(d[at + 3]), "+r"(d[at + 4]), "+r"(d[at + 5]), "+r"(d[at + 6]), \
        "+r"(d[at + 7])
#define BITS_16(d, at) BITS_8(d, at), BITS_8(d, at + 8)
#define BITS_32(d, at) BITS_16(d, at), BITS_16(d, at + 16)
#define BITS_64(d, at) BITS_32(d, at), BITS_32(d, at + 32)
#define BITS_128(d, at) BITS_64(d, at), BITS_64(d, at + 64)

/* D[64][n] (+)= A[64][k] B[n][k]; `sums`: n / 2; a_at, b_at, add_at: the numbers of the operands after them; `end`: the
 * constant operands that the instruction ends with. */
#define MULTIPLY(name, n, form, end, sums, a_at, b_at, add_at)                                                         \
    static __device__ __forceinline__ void name##_##n(uint32_t *d, uint64_t a, uint64_t b, int add) {                  \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #add_at ", 0;\n\t"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #n form " {" PLACES_##sums "}, %" #a_at ", %" #b_at           \
                                                                                    ", add" end "; }"                  \
                     : BITS_##sums(d, 0)                                                                               \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }
#define MULTIPLY_FORMS(n, sums, a_at, b_at, add_at)                                                                    \
    MULTIPLY(multiply_e4m3, n, "k32.f32.e4m3.e4m3", ", 1, 1", sums, a_at, b_at, add_at)                                \
    MULTIPLY(multiply_int8, n, "k32.s32.s8.s8", "", sums, a_at, b_at, add_at)                                          \
    MULTIPLY(multiply_shared_f16, n, "k16.f32.f16.f16", ", 1, 1, 0, 0", sums, a_at, b_at, add_at)                      \
    MULTIPLY(multiply_shared_bf16, n, "k16.f32.bf16.bf16", ", 1, 1, 0, 0", sums, a_at, b_at, add_at)
MULTIPLY_FORMS(32, 16, 16, 17, 18)
MULTIPLY_FORMS(64, 32, 32, 33, 34)
MULTIPLY_FORMS(128, 64, 64, 65, 66)
MULTIPLY_FORMS(256, 128, 128, 129, 130)
#undef MULTIPLY_FORMS
#undef MULTIPLY

/* 32 columns of codes. n: 32, 64, 128 or 256; D is 0 before where `add` is 0. */
static __device__ __forceinline__ void multiply_codes(uint32_t *d, uint64_t a, uint64_t b, int add, int n, int code) {
    if (code == QL_W8A8_E4M3) {
        if (n == 32) multiply_e4m3_32(d, a, b, add);
        if (n == 64) multiply_e4m3_64(d, a, b, add);
        if (n == 128) multiply_e4m3_128(d, a, b, add);
        if (n == 256) multiply_e4m3_256(d, a, b, add);
    } else {
        if (n == 32) multiply_int8_32(d, a, b, add);
        if (n == 64) multiply_int8_64(d, a, b, add);
        if (n == 128) multiply_int8_128(d, a, b, add);
        if (n == 256) multiply_int8_256(d, a, b, add);
    }
}

/* 16 columns of 16 bit, added to fp32. type: QL_VALUE_F16 or QL_VALUE_BF16, one branch for all threads. */
static __device__ __forceinline__ void multiply_columns(uint32_t *d, uint64_t a, uint64_t b, int n, int type) {
    if (type == QL_VALUE_F16) {
        if (n == 32) multiply_shared_f16_32(d, a, b, 1);
        if (n == 64) multiply_shared_f16_64(d, a, b, 1);
        if (n == 128) multiply_shared_f16_128(d, a, b, 1);
        if (n == 256) multiply_shared_f16_256(d, a, b, 1);
    } else {
        if (n == 32) multiply_shared_bf16_32(d, a, b, 1);
        if (n == 64) multiply_shared_bf16_64(d, a, b, 1);
        if (n == 128) multiply_shared_bf16_128(d, a, b, 1);
        if (n == 256) multiply_shared_bf16_256(d, a, b, 1);
    }
}

/* Rows of 16 columns of 16 bit as 8 x 8 matrices of 128 bytes, the two of a row group side by side. */
static __device__ __forceinline__ uint64_t columns_descriptor(uint32_t address) {
    /* In a cluster addresses have the thread block's rank above their 18 bits, where a distance between matrices goes. */
    return (uint64_t)(256u >> 4) << 32 | (128u >> 4) << 16 | (address & 0x3ffff) >> 4;
}

/* Four 8 x 8 matrices of 16-bit values, each lane giving the address of a row. */
static __device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t m[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
                 "r"(m[2]), "r"(m[3])
                 : "memory");
}

/* Sums may be read from here on: keeps the compiler from reading them before the wait. */
static __device__ __forceinline__ void settle_bits(uint32_t *sums, int count) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(sums[i])::"memory");
}

/* ---- clusters ---- */

static __device__ __forceinline__ uint32_t cluster_rank(void) {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of all thread blocks of the cluster. */
static __device__ __forceinline__ void cluster_barrier(void) {
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

/* Arrives at the barrier at this address in the shared memory of thread block `rank`. */
static __device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{ .reg .b32 remote;\n\t"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

/* Where this address is in the shared memory of thread block `rank`, as the two functions below take it. */
static __device__ __forceinline__ uint32_t address_at(uint32_t address, uint32_t rank) {
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

/* As copy_box, into the same place of all thread blocks of `mask`, whose barriers at that place count the bytes. */
static __device__ __forceinline__ void copy_box_to_all(uint32_t to, const void *map, int col, int row, uint32_t barrier,
                                                       uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(barrier), "h"(mask)
                 : "memory");
}

/* As copy_box, of bytes that are read once: they leave the second-level cache before others do. */
static __device__ __forceinline__ void copy_box_once(uint32_t to, const void *map, int col, int row, uint32_t barrier) {
    const uint64_t evict_first = 0x12f0000000000000ull;
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(barrier), "l"(evict_first)
                 : "memory");
}

/* What threads stored in shared memory is there for products to read. */
static __device__ __forceinline__ void fence_for_products(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* What threads of other thread blocks stored, and this one has seen the marks of, is there for bulk copies to read. */
static __device__ __forceinline__ void fence_for_copies(void) {
    asm volatile("fence.acq_rel.gpu;\n\tfence.proxy.async.global;" ::: "memory");
}

#endif

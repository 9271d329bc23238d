/* Instructions of sm_90a that CUDA C has no name for: barriers in shared memory, copies that complete on them, products of
 * a warpgroup. */
#ifndef QL_KERNELS_HOPPER_CUH
#define QL_KERNELS_HOPPER_CUH

#include "ptx.cuh"

/* ---- barriers in shared memory: `parity` is that of the phase waited for, 0 at first ---- */

static __device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* Makes initialized barriers visible to the copies that complete on them. */
static __device__ __forceinline__ void barrier_init_done(void) {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and lets the phase wait for `bytes` of copies as well. */
static __device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "wait:\n\t"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
                 "@!done bra wait;\n\t"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Whether that phase is over, at once. */
static __device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred done;\n\t"
                 "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, done; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

/* An arrival of this thread once its copies so far (cp_async) are there; one that the phase counts. */
static __device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Of `threads` threads of the block that share `id`. */
static __device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* The same without waiting for the others. */
static __device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* True for one lane of the warp, which the compiler knows to be one. */
static __device__ __forceinline__ bool is_elected(void) {
    uint32_t is;
    asm volatile("{ .reg .pred is;\n\telect.sync _|is, 0xffffffff;\n\tselp.u32 %0, 1, 0, is; }" : "=r"(is));
    return is != 0;
}

/* ---- copies into shared memory ---- */

/* `bytes` contiguous bytes, a multiple of 16. */
static __device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* The box of a two-dimensional tensor map whose first element is (row, col); what lies outside becomes zeros. */
static __device__ __forceinline__ void copy_box(uint32_t to, const void *map, int col, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(col), "r"(row), "r"(barrier)
        : "memory");
}

static __device__ __forceinline__ void prefetch_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* ---- registers of a warpgroup: a multiple of 8 ---- */

#define WARPGROUP_GIVES_REGISTERS(count) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count))
#define WARPGROUP_TAKES_REGISTERS(count) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count))

/* ---- products of a warpgroup: D[64][n] += A[64][16] B[n][16], A from registers, B in rows of 128 swizzled bytes ---- */

static __device__ __forceinline__ void warpgroup_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void warpgroup_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until all but the last `pending` groups are done. */
#define WARPGROUP_WAIT(pending) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory")

/* Sums may be read from here on: keeps the compiler from reading them before the wait. */
static __device__ __forceinline__ void settle(float *sums, int count) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

/* Keeps values that are ready from being computed later than here. */
static __device__ __forceinline__ void keep(uint32_t *values, int count) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(values[i])::"memory");
}

/* B's descriptor for 8-row groups 1024 bytes apart, swizzled by 128 bytes, without its constant half; a step of 16
 * columns is 32 bytes on. */
static __device__ __forceinline__ uint32_t rows_descriptor(uint32_t address) { return 1u << 16 | address >> 4; }

static __device__ __forceinline__ uint64_t descriptor_at(uint32_t descriptor, int bytes) {
    return (uint64_t)(1u << 30 | 1024u >> 4) << 32 | (descriptor + (uint32_t)bytes / 16);
}

/* Sums are operands 0 to n / 2 - 1 of the instruction: their places in its text, and the list of them. */
#define PLACES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PLACES_16 PLACES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PLACES_32 PLACES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PLACES_64                                                                                                      \
    PLACES_32                                                                                                          \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "                \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PLACES_128                                                                                                     \
    PLACES_64                                                                                                          \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "                \
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "                      \
    "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "                 \
    "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_8(d, at)                                                                                                  \
    "+f"(d[at]), "+f"(d[at + 1]), "+f"(d[at + 2]), "+f"(d[at + 3]), "+f"(d[at + 4]), "+f"(d[at + 5]), "+f"(d[at + 6]), \
        "+f"(d[at + 7])
#define SUMS_16(d, at) SUMS_8(d, at), SUMS_8(d, at + 8)
#define SUMS_32(d, at) SUMS_16(d, at), SUMS_16(d, at + 16)
#define SUMS_64(d, at) SUMS_32(d, at), SUMS_32(d, at + 32)
#define SUMS_128(d, at) SUMS_64(d, at), SUMS_64(d, at + 64)

/* sums: n / 2; a0 to a3, b_at and add_at: the numbers of the operands after them. */
#define MULTIPLY(name, type, n, sums, a0, a1, a2, a3, b_at, add_at)                                                    \
    static __device__ __forceinline__ void name(float *d, const uint32_t *a, uint64_t b, int add) {                    \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #add_at ", 0;\n\t"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" PLACES_##sums              \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_at ", add, 1, 1, 0; }"                        \
                     : SUMS_##sums(d, 0)                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                  \
    }
#define MULTIPLY_TYPES(n, sums, a0, a1, a2, a3, b_at, add_at)                                                          \
    MULTIPLY(multiply_half_##n, f16, n, sums, a0, a1, a2, a3, b_at, add_at)                                            \
    MULTIPLY(multiply_bf16_##n, bf16, n, sums, a0, a1, a2, a3, b_at, add_at)
MULTIPLY_TYPES(16, 8, 8, 9, 10, 11, 12, 13)
MULTIPLY_TYPES(32, 16, 16, 17, 18, 19, 20, 21)
MULTIPLY_TYPES(64, 32, 32, 33, 34, 35, 36, 37)
MULTIPLY_TYPES(128, 64, 64, 65, 66, 67, 68, 69)
MULTIPLY_TYPES(256, 128, 128, 129, 130, 131, 132, 133)
#undef MULTIPLY_TYPES
#undef MULTIPLY

/* n: 16, 32, 64, 128 or 256; D is 0 before where `add` is 0. */
static __device__ __forceinline__ void multiply_warpgroup(float *d, const uint32_t *a, uint64_t b, int add, int n,
                                                          int type) {
    if (type == QL_VALUE_F16) {
        if (n == 16) multiply_half_16(d, a, b, add);
        if (n == 32) multiply_half_32(d, a, b, add);
        if (n == 64) multiply_half_64(d, a, b, add);
        if (n == 128) multiply_half_128(d, a, b, add);
        if (n == 256) multiply_half_256(d, a, b, add);
    } else {
        if (n == 16) multiply_bf16_16(d, a, b, add);
        if (n == 32) multiply_bf16_32(d, a, b, add);
        if (n == 64) multiply_bf16_64(d, a, b, add);
        if (n == 128) multiply_bf16_128(d, a, b, add);
        if (n == 256) multiply_bf16_256(d, a, b, add);
    }
}

/* Four 8 x 8 matrices of 16-bit values, transposed, each lane giving the address of a row. */
static __device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t m[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]),
                 "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

/* ---- shared memory by address ---- */

static __device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

static __device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

static __device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

static __device__ __forceinline__ uint16_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

static __device__ __forceinline__ uint32_t load_shared_1(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

static __device__ __forceinline__ void store_shared_16(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

static __device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

#endif

/* Products of a warpgroup, wgmma of sm_90a: D[64][n] += A[64][k] B[n][k], sums in registers, B in shared memory. A comes
 * from registers, 16 bits wide, in the fragments that packed.h names; or from shared memory, as 8-bit codes, or as the
 * 16-bit columns of outliers. All arguments but sums, fragments, descriptors and `add` are constants. */
#ifndef QL_KERNELS_WARPGROUP_CUH
#define QL_KERNELS_WARPGROUP_CUH

#include "hopper.cuh"
#include "w8a8.h"

/* ---- order ---- */

static __device__ __forceinline__ void warpgroup_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void warpgroup_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until all but the last `pending` groups are done. */
#define WARPGROUP_WAIT(pending) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory")

/* Registers that nothing is moved across here: sums are read after the wait, and what is ready is not computed later. */
static __device__ __forceinline__ void settle(float *sums, int count) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

static __device__ __forceinline__ void settle_bits(uint32_t *bits, int count) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(bits[i])::"memory");
}

/* ---- where an operand lies ---- */

/* A descriptor counts in 16 bytes: bits 0 to 13 are the address, 16 to 29 the distance of 8 x 8 matrices along the columns, 32
 * to 45 that along the rows; bits 62 and 63 are the swizzle, 1: of 128 bytes. */

/* Rows of 128 bytes, swizzled, in groups of eight that are 1024 bytes apart: the lower half of the descriptor, whose upper
 * half is constant. Along the columns the swizzle leaves nothing to tell: 1. */
static __device__ __forceinline__ uint32_t rows_descriptor(uint32_t address) { return 1u << 16 | address >> 4; }

/* `bytes` further on along the columns. */
static __device__ __forceinline__ uint64_t descriptor_at(uint32_t descriptor, int bytes) {
    return (uint64_t)(1u << 30 | 1024u >> 4) << 32 | (descriptor + (uint32_t)bytes / 16);
}

/* Rows of 16 columns of 16 bit as 8 x 8 matrices of 128 bytes, the two of a row group side by side. */
static __device__ __forceinline__ uint64_t columns_descriptor(uint32_t address) {
    /* In a cluster addresses have the thread block's rank above their 18 bits, where a distance between matrices goes. */
    return (uint64_t)(256u >> 4) << 32 | (128u >> 4) << 16 | (address & 0x3ffff) >> 4;
}

/* ---- the instruction ---- */

/* Sums are operands 0 to n / 2 - 1 of the instruction: their places in its text, and the list of them, each `as` "+f" or,
 * where registers hold bits of fp32 or int32, "+r". */
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
#define SUMS_8(as, d, at)                                                                                              \
    as(d[at]), as(d[at + 1]), as(d[at + 2]), as(d[at + 3]), as(d[at + 4]), as(d[at + 5]), as(d[at + 6]), as(d[at + 7])
#define SUMS_16(as, d, at) SUMS_8(as, d, at), SUMS_8(as, d, at + 8)
#define SUMS_32(as, d, at) SUMS_16(as, d, at), SUMS_16(as, d, at + 16)
#define SUMS_64(as, d, at) SUMS_32(as, d, at), SUMS_32(as, d, at + 32)
#define SUMS_128(as, d, at) SUMS_64(as, d, at), SUMS_64(as, d, at + 64)

/* A from registers. sums: n / 2; a0 to a3, b_at and add_at: the numbers of the operands after them. */
#define MULTIPLY(name, type, n, sums, a0, a1, a2, a3, b_at, add_at)                                                    \
    static __device__ __forceinline__ void name(float *d, const uint32_t *a, uint64_t b, int add) {                    \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #add_at ", 0;\n\t"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" PLACES_##sums              \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_at ", add, 1, 1, 0; }"                        \
                     : SUMS_##sums("+f", d, 0)                                                                         \
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

/* 16 columns. n: 16, 32, 64, 128 or 256; D is 0 before where `add` is 0. */
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

/* A from shared memory, sums as bits of fp32 or int32. a_at, b_at, add_at: likewise; `end`: the constant operands that the
 * instruction ends with. */
#define MULTIPLY(name, n, form, end, sums, a_at, b_at, add_at)                                                         \
    static __device__ __forceinline__ void name##_##n(uint32_t *d, uint64_t a, uint64_t b, int add) {                  \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #add_at ", 0;\n\t"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #n form " {" PLACES_##sums "}, %" #a_at ", %" #b_at           \
                                                                                    ", add" end "; }"                  \
                     : SUMS_##sums("+r", d, 0)                                                                         \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }
#define MULTIPLY_FORMS(n, sums, a_at, b_at, add_at)                                                                    \
    MULTIPLY(multiply_e4m3, n, "k32.f32.e4m3.e4m3", ", 1, 1", sums, a_at, b_at, add_at)                                \
    MULTIPLY(multiply_int8, n, "k32.s32.s8.s8", "", sums, a_at, b_at, add_at)                                          \
    MULTIPLY(multiply_columns, n, "k16.f32.bf16.bf16", ", 1, 1, 0, 0", sums, a_at, b_at, add_at)
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

/* 16 columns of bf16, added to fp32. */
static __device__ __forceinline__ void multiply_columns(uint32_t *d, uint64_t a, uint64_t b, int n) {
    if (n == 32) multiply_columns_32(d, a, b, 1);
    if (n == 64) multiply_columns_64(d, a, b, 1);
    if (n == 128) multiply_columns_128(d, a, b, 1);
    if (n == 256) multiply_columns_256(d, a, b, 1);
}

#endif

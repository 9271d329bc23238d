/* Instructions that CUDA C has no name for, one function each. `type` is QL_VALUE_F16 or QL_VALUE_BF16, a constant of the
 * kernel. */
#ifndef QL_KERNELS_PTX_CUH
#define QL_KERNELS_PTX_CUH

#include "params.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* Of a warp's functions, all its lanes. */
#define ALL_LANES 0xffffffffu

/* ---- launches that overlap: nothing before the wait may read what an earlier kernel writes, or write at all ---- */

static __device__ __forceinline__ void wait_for_previous_kernel(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void start_next_kernel(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* ---- memory ---- */

static __device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* Bytes that are read once: past the first-level cache. */
static __device__ __forceinline__ uint4 load_stream_16(const void *from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

/* Loads that keep their turn: what may be cached as constant the compiler puts where it likes. */
static __device__ __forceinline__ uint4 load_in_turn_16(const void *from) {
    uint4 value;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

static __device__ __forceinline__ uint2 load_in_turn_8(const void *from) {
    uint2 value;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
    return value;
}

static __device__ __forceinline__ uint32_t load_in_turn_4(const void *from) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

static __device__ __forceinline__ uint16_t load_in_turn_2(const void *from) {
    uint16_t value;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(value) : "l"(from));
    return value;
}

static __device__ __forceinline__ uint2 load_stream_8(const void *from) {
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
    return value;
}

/* Bytes that another kernel may have written since this one started: not out of the first-level cache. */
static __device__ __forceinline__ uint4 load_late_16(const void *from) {
    uint4 value;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from)
                 : "memory");
    return value;
}

/* Into the second-level cache. */
static __device__ __forceinline__ void prefetch_line(const void *line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

/* In one instruction: the compiler makes four of an assignment here. */
static __device__ __forceinline__ void store_global_16(void *to, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

/* 16 bytes of shared memory from `bytes` (0 to 16) of global memory, the rest zeros. */
static __device__ __forceinline__ void cp_async_16(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* The same for 4 bytes (0 or 4 of them from global memory). */
static __device__ __forceinline__ void cp_async_4(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Until all but the last `pending` groups have arrived: a constant, up to 7. The instruction takes a literal. */
static __device__ __forceinline__ void cp_async_wait(int pending) {
    switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
    }
}

static __device__ __forceinline__ void store_release(uint64_t *to, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

static __device__ __forceinline__ uint64_t load_acquire(const uint64_t *from) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}

static __device__ __forceinline__ uint64_t load_relaxed(const uint64_t *from) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}

/* threadIdx.x, read anew: what is made of it after a loop would else be held in registers all through that, where they are
 * few, or be made in it again. */
static __device__ __forceinline__ int thread_anew(void) {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
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

/* A byte with its sign. */
static __device__ __forceinline__ int load_shared_int8(uint32_t address) {
    int v;
    asm volatile("ld.shared.s8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

static __device__ __forceinline__ void store_shared_16(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

static __device__ __forceinline__ void store_shared_8(uint32_t address, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

static __device__ __forceinline__ void store_shared_2(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"((uint16_t)v) : "memory");
}

static __device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

/* ---- barriers of a part of the block ---- */

/* Of `threads` threads of the block that share `id`. */
static __device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* The same without waiting for the others. */
static __device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- matrices ---- */

/* Four 8 x 8 matrices of 16-bit values, each lane giving the address of a row: lanes 0-7 those of low[0], and so on. */
static __device__ __forceinline__ void load_matrices(uint32_t low[2], uint32_t high[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(low[0]), "=r"(low[1]), "=r"(high[0]), "=r"(high[1])
                 : "r"(row)
                 : "memory");
}

/* The same, turned over: rows become columns. */
static __device__ __forceinline__ void load_matrices_transposed(uint32_t low[2], uint32_t high[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(low[0]), "=r"(low[1]), "=r"(high[0]), "=r"(high[1])
                 : "r"(row)
                 : "memory");
}

/* sum += a b: 16 x 16 by 16 x 8, in fp32. */
static __device__ __forceinline__ void multiply_16816(float sum[4], const uint32_t a[4], const uint32_t b[2],
                                                      int type) {
    if (type == QL_VALUE_F16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* sum += a b: 16 x 32 by 32 x 8, of int8 in int32. */
static __device__ __forceinline__ void multiply_16832_int8(int32_t sum[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if __CUDA_ARCH__ >= 890
/* The same of e4m3 in fp32. */
static __device__ __forceinline__ void multiply_16832_e4m3(float sum[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

/* ---- words of codes ---- */

/* index: a constant. */
static __device__ __forceinline__ uint32_t word_of(uint4 words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

/* The low or the high halves of two words. */
static __device__ __forceinline__ uint32_t halves_of(uint32_t first, uint32_t second, int high) {
    return __byte_perm(first, second, high ? 0x7632 : 0x5410);
}

/* bits >> by, or << -by. */
static __device__ __forceinline__ uint32_t shifted(uint32_t bits, int by) { return by >= 0 ? bits >> by : bits << -by; }

/* A function of a word's, a mask's and another word's bits in one instruction, by its truth table: the compiler makes two of
 * it where mask and rest are constants. */
#define MASKED(name, table)                                                                                            \
    static __device__ __forceinline__ uint32_t name(uint32_t word, uint32_t mask, uint32_t rest) {                     \
        uint32_t result;                                                                                               \
        asm("lop3.b32 %0, %1, %2, %3, " #table ";" : "=r"(result) : "r"(word), "r"(mask), "r"(rest));                  \
        return result;                                                                                                 \
    }
MASKED(masked_or, 0xea)     /* (word & mask) | rest */
MASKED(masked_else, 0xe2)   /* (word & mask) | (rest & ~mask) */
MASKED(masked_not_or, 0xae) /* (~word & mask) | rest */
#undef MASKED

/* ---- pairs of 16-bit numbers in a register, the first in the low half ---- */

static __device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

static __device__ __forceinline__ uint32_t add_half2(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

static __device__ __forceinline__ uint32_t mul_half2(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

static __device__ __forceinline__ uint32_t fma_bf162(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

/* max(a b + c, 0) */
static __device__ __forceinline__ uint32_t fma_relu_bf162(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

/* sm_80 has the fused form alone. */
static __device__ __forceinline__ uint32_t mul_bf162(uint32_t a, uint32_t b) { return fma_bf162(a, b, 0x80008000u); }
static __device__ __forceinline__ uint32_t add_bf162(uint32_t a, uint32_t b) { return fma_bf162(a, 0x3f803f80u, b); }
static __device__ __forceinline__ uint32_t sub_bf162(uint32_t a, uint32_t b) { return fma_bf162(b, 0xbf80bf80u, a); }

static __device__ __forceinline__ float2 half2_values(uint32_t pair) {
    __half2_raw raw;
    raw.x = (uint16_t)pair;
    raw.y = (uint16_t)(pair >> 16);
    return __half22float2(__half2(raw));
}

/* The value of the low 16 bits. */
static __device__ __forceinline__ float value_of16(uint32_t bits, int type) {
    return type == QL_VALUE_F16 ? __half2float(__ushort_as_half((uint16_t)bits)) : __uint_as_float(bits << 16);
}

/* To nearest even. */
static __device__ __forceinline__ uint32_t round16_pair(float first, float second, int type) {
    uint32_t result;
    if (type == QL_VALUE_F16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

static __device__ __forceinline__ uint16_t round16(float value, int type) {
    return type == QL_VALUE_F16 ? __half_as_ushort(__float2half_rn(value))
                                : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

/* ---- the second-level cache ---- */

/* What leaves it first: as createpolicy.fractional.L2::evict_first makes it of 1.0. */
#define EVICT_FIRST 0x12f0000000000000ull

#endif

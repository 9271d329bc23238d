/* Quotients of sizes, which are 64 bits wide and rarely need it. */
#ifndef QL_KERNELS_DIVIDE_CUH
#define QL_KERNELS_DIVIDE_CUH

#include <stdint.h>

/* 64-bit division is a long sequence, and sizes rarely need it. Neither is negative. */
static __device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
    return (a | b) >> 32 ? a / b : (int64_t)((uint32_t)a / (uint32_t)b);
}

#endif

/* e4m3 to fp16, which holds every value of it. */
#ifndef QL_KERNELS_E4M3_CUH
#define QL_KERNELS_E4M3_CUH

#include <stdint.h>

/* The two codes in the low half of a word as two fp16. */
static __device__ __forceinline__ uint32_t half2_of_e4m3(uint32_t two) {
#if __CUDA_ARCH__ >= 890
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((uint16_t)two));
    return pair;
#else
    /* The exponent's bias is 8 less than fp16's, for denormals as well. The one pattern that is NaN has to be told. */
    const uint32_t bytes = __byte_perm(two, 0, 0x1404), magnitude = bytes & 0x7f007f00u;
    uint32_t scaled;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(scaled) : "r"(magnitude >> 1), "r"(0x5c005c00u));
    return scaled | (bytes & 0x80008000u) | (__vcmpeq2(magnitude, 0x7f007f00u) & 0x7fff7fffu);
#endif
}

/* The four codes of a word, the first two in pair[0]: without the shift that two words of two would take. */
static __device__ __forceinline__ void halves_of_e4m3(uint32_t pair[2], uint32_t four) {
#if __CUDA_ARCH__ >= 890
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}"
        : "=r"(pair[0]), "=r"(pair[1])
        : "r"(four));
#else
    pair[0] = half2_of_e4m3(four & 0xffffu);
    pair[1] = half2_of_e4m3(four >> 16);
#endif
}

#endif

/* The kernels for AVX2 with FMA and F16C: every x86-64 server of the last ten years. */
#include "kernels.h"

#include <stddef.h>

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define QL_AVX2 1
#include "int8.h"

const ql_kernels *ql_kernels_avx2(void) {
    static const ql_kernels kernels = {linear, int8_linear, grad, dequantize, to_f32, NULL, NULL};
    return &kernels;
}
#else
const ql_kernels *ql_kernels_avx2(void) { return NULL; }
#endif

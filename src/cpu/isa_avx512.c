/* The kernels for AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and what came after them. */
#include "kernels.h"

#include <stddef.h>

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c")
#define QL_AVX512 1
#include "int8.h"

#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "dense_bf16.h"
#pragma GCC pop_options

const ql_kernels *ql_kernels_avx512(void) {
    static const ql_kernels kernels = {linear, int8_linear, grad, dequantize, to_f32, bf16_suits, bf16_linear};
    return &kernels;
}
#else
const ql_kernels *ql_kernels_avx512(void) { return NULL; }
#endif

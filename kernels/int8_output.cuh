/* An output of LLM.int8() from its sum of codes, in the one order of factors and roundings that all kernels and the CPU engine
 * have: ((sum / 127) * the token's absmax + outliers) * (the row's absmax / 127) + bias. No factor is denormal before it has
 * met the sum, however small a token is, and rows scale outliers as well. */
#ifndef QL_KERNELS_INT8_OUTPUT_CUH
#define QL_KERNELS_INT8_OUTPUT_CUH

static __device__ __forceinline__ float int8_by_token(float sum, float absmax) {
    return __fmul_rn(__fmul_rn(sum, 1.0f / 127.0f), absmax);
}

/* by_row: the row's absmax / 127. */
static __device__ __forceinline__ float int8_by_row(float value, float by_row, float bias) {
    return __fadd_rn(__fmul_rn(value, by_row), bias);
}

#endif

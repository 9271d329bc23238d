/* The CPU engine: products with a quantized weight, straight from the checkpoint's bytes. No function here allocates
 * more than a few panels of scratch; each returns 0, or -1 when that scratch could not be had. Work is split over
 * ql_cpu_parallel's threads; the result does not depend on their number. */
#ifndef QL_CPU_ENGINE_H
#define QL_CPU_ENGINE_H

#include "../formats/weight.h"

/* out[m][n] = sum_k x[m][k] * W[n][k] + bias[n].
 * out: [m, n] contiguous, dtype; x: [m, k], rows x_stride elements apart, each contiguous, dtype (fp32, fp16 or bf16);
 * bias: [n] in fp32, or NULL. Sums run in fp32 (int8 products in int32), the output is rounded once. For bf16 x the
 * dequantized weight may be rounded once to bf16. INT8 and FP8 weights quantize x as their structs say. */
int ql_cpu_linear(void *out, const void *x, int64_t x_stride, ql_dtype dtype, int64_t m, const ql_weight *weight,
                  const float *bias);

/* out[m][k] = sum_n g[m][n] * W[n][k]: the gradient to the input. g: [m, n], rows g_stride apart; out: [m, k]. */
int ql_cpu_linear_grad(void *out, const void *g, int64_t g_stride, ql_dtype dtype, int64_t m, const ql_weight *weight);

/* out[n][k] = W in dtype (fp32, fp16 or bf16), contiguous. */
int ql_cpu_dequantize(void *out, ql_dtype dtype, const ql_weight *weight);

/* The instruction set in use: "avx512", "avx2" or "plain"; QLINEAR_CPU_ISA in the environment forces one that the
 * processor has. With it "+vnni" and "+bf16" where they are used. */
const char *ql_cpu_isa(void);

#endif

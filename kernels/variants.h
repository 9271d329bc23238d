/* Every kernel variant by name: read by the kernels, by the host's table and by the tests.
 *
 * X(name, bits, type): one entry point `name`, for codes of `bits` bits, writing `type`. */
#ifndef QL_KERNELS_VARIANTS_H
#define QL_KERNELS_VARIANTS_H

#define QL_DEQUANTIZE_GPTQ_VARIANTS(X)                                                                                 \
    X(ql_dequantize_gptq2_f32, 2, QL_VALUE_F32)                                                                        \
    X(ql_dequantize_gptq2_f16, 2, QL_VALUE_F16)                                                                        \
    X(ql_dequantize_gptq2_bf16, 2, QL_VALUE_BF16)                                                                      \
    X(ql_dequantize_gptq3_f32, 3, QL_VALUE_F32)                                                                        \
    X(ql_dequantize_gptq3_f16, 3, QL_VALUE_F16)                                                                        \
    X(ql_dequantize_gptq3_bf16, 3, QL_VALUE_BF16)                                                                      \
    X(ql_dequantize_gptq4_f32, 4, QL_VALUE_F32)                                                                        \
    X(ql_dequantize_gptq4_f16, 4, QL_VALUE_F16)                                                                        \
    X(ql_dequantize_gptq4_bf16, 4, QL_VALUE_BF16)                                                                      \
    X(ql_dequantize_gptq8_f32, 8, QL_VALUE_F32)                                                                        \
    X(ql_dequantize_gptq8_f16, 8, QL_VALUE_F16)                                                                        \
    X(ql_dequantize_gptq8_bf16, 8, QL_VALUE_BF16)

/* X(name, at, along_n, transposed, tokens a thread): the base products; `along_n` where the checkpoint packs along N,
 * transposed for the gradient to the input. Each format has few tokens, many, and the gradient, in this order. */
#define QL_LINEAR_FORMAT(X, format, along_n)                                                                           \
    X(ql_linear_##format##_few, format##_at, along_n, false, 2)                                                        \
    X(ql_linear_##format##_many, format##_at, along_n, false, 16)                                                      \
    X(ql_linear_##format##_grad, format##_at, along_n, true, 16)
#define QL_LINEAR_VARIANTS(X)                                                                                          \
    QL_LINEAR_FORMAT(X, gptq, true)                                                                                    \
    QL_LINEAR_FORMAT(X, awq, true)                                                                                     \
    QL_LINEAR_FORMAT(X, eetq, false)                                                                                   \
    QL_LINEAR_FORMAT(X, int8, false)                                                                                   \
    QL_LINEAR_FORMAT(X, fourbit, false)                                                                                \
    QL_LINEAR_FORMAT(X, fp8, false)

/* X(name, at): the whole weight written out. */
#define QL_DEQUANTIZE_VARIANTS(X)                                                                                      \
    X(ql_dequantize_gptq, gptq_at)                                                                                     \
    X(ql_dequantize_awq, awq_at)                                                                                       \
    X(ql_dequantize_eetq, eetq_at)                                                                                     \
    X(ql_dequantize_int8, int8_at)                                                                                     \
    X(ql_dequantize_fourbit, fourbit_at)                                                                               \
    X(ql_dequantize_fp8, fp8_at)

/* X(name, what): what is done to activations, and the product of int8 ones. */
#define QL_ACTIVATION_KERNELS(X)                                                                                       \
    X(ql_find_outliers, activation)                                                                                    \
    X(ql_row_absmax, activation)                                                                                       \
    X(ql_fp8_activation, activation)                                                                                   \
    X(ql_copy, activation)                                                                                             \
    X(ql_linear_int8, product)

/* X(name, ...): all of them, in the order of the host's table. */
#define QL_KERNELS(X)                                                                                                  \
    QL_DEQUANTIZE_GPTQ_VARIANTS(X)                                                                                     \
    QL_LINEAR_VARIANTS(X)                                                                                              \
    QL_DEQUANTIZE_VARIANTS(X)                                                                                          \
    QL_ACTIVATION_KERNELS(X)

#endif

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

#endif

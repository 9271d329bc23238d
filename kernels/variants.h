/* Every kernel by name: read by the kernels, by the host's table and by the tests. */
#ifndef QL_KERNELS_VARIANTS_H
#define QL_KERNELS_VARIANTS_H

/* Every list begins X(name, source, ...): source is the kernels/<source>.cu that has the kernel. */

/* X(name, source, transposed, tokens a thread): the base products: few tokens, many, gradient to the input. */
#define QL_LINEAR_VARIANTS(X)                                                                                          \
    X(ql_linear_few, linear, false, 2)                                                                                 \
    X(ql_linear_many, linear, false, 16)                                                                               \
    X(ql_linear_grad, linear, true, 16)

/* X(name, source): the kernels that have one form. */
#define QL_SINGLE_KERNELS(X)                                                                                           \
    X(ql_dequantize, linear)                                                                                           \
    X(ql_linear_int8, linear)                                                                                          \
    X(ql_find_outliers, activation)                                                                                    \
    X(ql_row_absmax, activation)                                                                                       \
    X(ql_fp8_activation, activation)                                                                                   \
    X(ql_copy, activation)

/* X(name, source, ...): all of them, in the order of the host's table. */
#define QL_KERNELS(X)                                                                                                  \
    QL_LINEAR_VARIANTS(X)                                                                                              \
    QL_SINGLE_KERNELS(X)

#endif

/* The kernels in plain C: any processor, vectors as the compiler makes them. */
#include "int8.h"

const ql_kernels *ql_kernels_plain(void) {
    static const ql_kernels kernels = {linear, int8_linear, grad, dequantize, to_f32};
    return &kernels;
}

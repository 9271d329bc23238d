/* The kernels in plain C: any processor, vectors as the compiler makes them. */
#include "int8.h"

#include <stddef.h>

const ql_kernels *ql_kernels_plain(void) {
    static const ql_kernels kernels = {linear, int8_linear, grad, dequantize, to_f32, NULL, NULL};
    return &kernels;
}

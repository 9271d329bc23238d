/* The element types that tensors of a checkpoint or of a call can have. */
#ifndef QL_FORMATS_DTYPE_H
#define QL_FORMATS_DTYPE_H

#include <stdbool.h>
#include <stddef.h>

typedef enum ql_dtype {
    QL_F32,
    QL_F16,
    QL_BF16,
    QL_F64,
    QL_I8,
    QL_U8,
    QL_I16,
    QL_I32,
    QL_I64,
    QL_BOOL,
    QL_E4M3, /* float8_e4m3fn: bias 7, largest 448, NaN 0x7f and 0xff, no infinity */
    QL_E5M2,
    QL_E8M0, /* float8_e8m0fnu: 2^(byte - 127), NaN 0xff */
    QL_DTYPE_COUNT
} ql_dtype;

/* Bytes of one element. */
static inline size_t ql_dtype_size(ql_dtype dtype) {
    static const unsigned char size[QL_DTYPE_COUNT] = {
        [QL_F32] = 4, [QL_F16] = 2, [QL_BF16] = 2, [QL_F64] = 8,  [QL_I8] = 1,   [QL_U8] = 1,   [QL_I16] = 2,
        [QL_I32] = 4, [QL_I64] = 8, [QL_BOOL] = 1, [QL_E4M3] = 1, [QL_E5M2] = 1, [QL_E8M0] = 1,
    };
    return size[dtype];
}

/* The name that torch and NumPy give it, for messages and keyword arguments. */
static inline const char *ql_dtype_name(ql_dtype dtype) {
    static const char *const name[QL_DTYPE_COUNT] = {
        [QL_F32] = "float32",
        [QL_F16] = "float16",
        [QL_BF16] = "bfloat16",
        [QL_F64] = "float64",
        [QL_I8] = "int8",
        [QL_U8] = "uint8",
        [QL_I16] = "int16",
        [QL_I32] = "int32",
        [QL_I64] = "int64",
        [QL_BOOL] = "bool",
        [QL_E4M3] = "float8_e4m3fn",
        [QL_E5M2] = "float8_e5m2",
        [QL_E8M0] = "float8_e8m0fnu",
    };
    return name[dtype];
}

#endif

/* What kernels take, as the host fills it and the device reads it: plain C for both, fixed-width types, 64-bit sizes. */
#ifndef QL_KERNELS_PARAMS_H
#define QL_KERNELS_PARAMS_H

#include <stdint.h>

/* The floating types of values in memory; the numbers are ql_dtype's. */
enum { QL_VALUE_F32 = 0, QL_VALUE_F16 = 1, QL_VALUE_BF16 = 2 };

/* The part of a weight that one warp writes, and the warps of a block. */
enum { QL_DEQUANTIZE_TILE_N = 32, QL_DEQUANTIZE_TILE_K = 32, QL_DEQUANTIZE_WARPS = 8 };

/* W[row][col] = (q - z) * s with g = g_idx ? g_idx[col] : col / group_size, exactly as ql_gptq in formats/weight.h says.
 * The grid has one warp a tile, ceil(n / 32) * ceil(k / 32) of them, the tiles of one column strip side by side. */
typedef struct ql_dequantize_gptq_params {
    void *out;              /* [n, k], the variant's type */
    const int32_t *qweight; /* [ceil(k * bits / 32), n] */
    const int32_t *qzeros;  /* [groups, ceil(n * bits / 32)] */
    const void *scales;     /* [groups, n], scales_type */
    const int32_t *g_idx;   /* [k], all in [0, groups), or NULL */
    int64_t n, k;
    int64_t group_size;
    int32_t scales_type;
    int32_t zero_offset; /* 1: zeros are stored less one, 0: as they are */
} ql_dequantize_gptq_params;

#endif

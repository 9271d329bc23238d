/* W[row][col] of every format, one element at a time: the device's twin of formats/weight.c, with the same formulas. The
 * base kernels are built on it; whatever is faster is tested against them. */
#ifndef QL_KERNELS_WEIGHT_CUH
#define QL_KERNELS_WEIGHT_CUH

#include "params.h"
#include "value.cuh"

/* (q - z) * s. */
static __device__ __forceinline__ float gptq_at(const ql_linear_params *p, int64_t row, int64_t col) {
    /* The index was checked when the layer was made; whatever it was changed to since, nothing outside is read. */
    int64_t group = p->index ? max((int64_t)0, min((int64_t)p->index[col], p->groups - 1)) : col / p->group_size;
    uint32_t mask = (1u << p->bits) - 1u;
    uint32_t code = load_code((const int32_t *)p->codes + row, p->n, p->bits, col);
    const int32_t *zeros = (const int32_t *)p->zeros + group * ((p->n * p->bits + 31) / 32);
    uint32_t zero = (load_code(zeros, 1, p->bits, row) + (uint32_t)p->zero_offset) & mask;
    return ((float)code - (float)zero) * load_value(p->scales, p->scales_type, group * p->n + row);
}

/* The nibble of AWQ's word that holds column `row` of the checkpoint. */
static __device__ __forceinline__ uint32_t awq_nibble(const int32_t *words, int64_t row) {
    int place = (int)(row & 7);
    int nibble = (place >> 1) + ((place & 1) << 2); /* 0 4 1 5 2 6 3 7 */
    return (uint32_t)words[row >> 3] >> (4 * nibble) & 15u;
}

/* (q - z) * s, or q * s + z where the zeros are products. */
static __device__ __forceinline__ float awq_at(const ql_linear_params *p, int64_t row, int64_t col) {
    int64_t group = col / p->group_size, words = (p->n + 7) / 8;
    float code = (float)awq_nibble((const int32_t *)p->codes + col * words, row);
    float scale = load_value(p->scales, p->scales_type, group * p->n + row);
    if (p->zero_products) return fmaf(code, scale, load_value(p->zero_products, p->scales_type, group * p->n + row));
    return (code - (float)awq_nibble((const int32_t *)p->zeros + group * words, row)) * scale;
}

/* q * s. */
static __device__ __forceinline__ float eetq_at(const ql_linear_params *p, int64_t row, int64_t col) {
    int64_t offset =
        (row >> 1) * 2 * p->k + (col >> 6) * 128 + (row & 1) * 64 + (col & 48) + (((col & 7) << 1) | ((col >> 3) & 1));
    int code = (int)((const uint8_t *)p->codes)[offset] - 128;
    return (float)code * load_value(p->scales, p->scales_type, row);
}

/* q * absmax / 127. */
static __device__ __forceinline__ float int8_at(const ql_linear_params *p, int64_t row, int64_t col) {
    float code = (float)((const int8_t *)p->codes)[row * p->k + col];
    return code * ((const float *)p->scales)[row] * (1.0f / 127.0f);
}

/* code[q] * absmax. */
static __device__ __forceinline__ float fourbit_at(const ql_linear_params *p, int64_t row, int64_t col) {
    int64_t index = row * p->k + col, block = index / p->group_size;
    uint32_t byte = ((const uint8_t *)p->codes)[index >> 1];
    float value = p->table[index & 1 ? byte & 15u : byte >> 4];
    float absmax =
        p->nested
            ? __fadd_rn(p->nested_table[p->nested[block]] * ((const float *)p->scales)[block / p->nested_blocksize],
                        p->offset)
            : ((const float *)p->scales)[block];
    return value * absmax;
}

/* e4m3 * s. */
static __device__ __forceinline__ float fp8_at(const ql_linear_params *p, int64_t row, int64_t col) {
    uint8_t code = ((const uint8_t *)p->codes)[row * p->row_stride + col * p->col_stride];
    return value_from_e4m3(code) * ((const float *)p->scales)[row / p->block_n * p->scale_stride + col / p->block_k];
}

/* The format is the same for a whole launch, so the branch costs a base kernel little, and one kernel serves all. */
static __device__ __forceinline__ float weight_at(const ql_linear_params *p, int64_t row, int64_t col) {
    switch (p->format) {
    case QL_WEIGHT_GPTQ: return gptq_at(p, row, col);
    case QL_WEIGHT_AWQ: return awq_at(p, row, col);
    case QL_WEIGHT_EETQ: return eetq_at(p, row, col);
    case QL_WEIGHT_INT8: return int8_at(p, row, col);
    case QL_WEIGHT_FOURBIT: return fourbit_at(p, row, col);
    default: return fp8_at(p, row, col);
    }
}

/* Whether the checkpoint packs along N: neighbouring rows of W are close in memory. */
static __device__ __forceinline__ bool packs_along_n(const ql_linear_params *p) {
    return p->format == QL_WEIGHT_GPTQ || p->format == QL_WEIGHT_AWQ;
}

#endif

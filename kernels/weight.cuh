/* W[row][col] of every format, one element at a time: the device's twin of formats/weight.c, with the same formulas. The
 * base kernels are built on it; whatever is faster is tested against them. */
#ifndef QL_KERNELS_WEIGHT_CUH
#define QL_KERNELS_WEIGHT_CUH

#include "divide.cuh"
#include "params.h"
#include "value.cuh"

/* (q - z) * s. */
static __device__ __forceinline__ float gptq_at(const ql_linear_params *p, int64_t row, int64_t col) {
    /* The index was checked when the layer was made; whatever it was changed to since, nothing outside is read. */
    int64_t group = p->index ? max((int64_t)0, min((int64_t)p->index[col], p->groups - 1)) : divide(col, p->group_size);
    uint32_t mask = (1u << p->bits) - 1u;
    uint32_t code = load_code((const int32_t *)p->codes + row, p->n, p->bits, col);
    const int32_t *zeros = (const int32_t *)p->zeros + group * ((p->n * p->bits + 31) / 32);
    uint32_t zero = (load_code(zeros, 1, p->bits, row) + (uint32_t)p->zero_offset) & mask;
    return ((float)code - (float)zero) * load_value(p->scales, p->scales_type, group * p->n + row);
}

/* The nibble of AWQ's word that has its column number `place`: 0 4 1 5 2 6 3 7. */
static __device__ __forceinline__ int awq_place(int place) { return (place >> 1) + ((place & 1) << 2); }

/* Code `row` of a line of AWQ's words. */
static __device__ __forceinline__ uint32_t awq_nibble(const int32_t *words, int64_t row) {
    return (uint32_t)words[row >> 3] >> (4 * awq_place((int)(row & 7))) & 15u;
}

/* (q - z) * s, or q * s + z where the zeros are products. */
static __device__ __forceinline__ float awq_at(const ql_linear_params *p, int64_t row, int64_t col) {
    int64_t group = divide(col, p->group_size), words = (p->n + 7) / 8;
    float code = (float)awq_nibble((const int32_t *)p->codes + col * words, row);
    float scale = load_value(p->scales, p->scales_type, group * p->n + row);
    if (p->zero_products) return fmaf(code, scale, load_value(p->zero_products, p->scales_type, group * p->n + row));
    return (code - (float)awq_nibble((const int32_t *)p->zeros + group * words, row)) * scale;
}

/* Where EETQ's weight has the byte of (row, col). */
static __device__ __forceinline__ int64_t eetq_offset(int64_t k, int64_t row, int64_t col) {
    return (row >> 1) * 2 * k + (col >> 6) * 128 + (row & 1) * 64 + (col & 48) + (((col & 7) << 1) | ((col >> 3) & 1));
}

/* q * s. */
static __device__ __forceinline__ float eetq_at(const ql_linear_params *p, int64_t row, int64_t col) {
    int code = (int)((const uint8_t *)p->codes)[eetq_offset(p->k, row, col)] - 128;
    return (float)code * load_value(p->scales, p->scales_type, row);
}

/* q * absmax / 127. */
static __device__ __forceinline__ float int8_at(const ql_linear_params *p, int64_t row, int64_t col) {
    float code = (float)((const int8_t *)p->codes)[row * p->k + col];
    return code * ((const float *)p->scales)[row] * (1.0f / 127.0f);
}

/* code[q] * absmax. */
static __device__ __forceinline__ float fourbit_at(const ql_linear_params *p, int64_t row, int64_t col) {
    int64_t index = row * p->k + col, block = divide(index, p->group_size);
    uint32_t byte = ((const uint8_t *)p->codes)[index >> 1];
    float value = p->table[index & 1 ? byte & 15u : byte >> 4];
    float absmax = p->nested ? __fadd_rn(p->nested_table[p->nested[block]] *
                                             ((const float *)p->scales)[divide(block, p->nested_blocksize)],
                                         p->offset)
                             : ((const float *)p->scales)[block];
    return value * absmax;
}

/* e4m3 * s. */
static __device__ __forceinline__ float fp8_at(const ql_linear_params *p, int64_t row, int64_t col) {
    uint8_t code = ((const uint8_t *)p->codes)[row * p->row_stride + col * p->col_stride];
    return value_from_e4m3(code) *
           ((const float *)p->scales)[divide(row, p->block_n) * p->scale_stride + divide(col, p->block_k)];
}

/* The tile of a packed weight that has code (row, col). */
static __device__ __forceinline__ const uint8_t *packed_tile(const void *codes, int code, int64_t k, int64_t row,
                                                             int64_t col) {
    uint64_t tiles = (uint64_t)(k + QL_TILE_K(code) - 1) / QL_TILE_K(code);
    uint64_t tile = (uint64_t)row / QL_STRIP * tiles + (uint64_t)col / QL_TILE_K(code);
    return (const uint8_t *)codes + tile * QL_TILE_BYTES(code);
}

/* Codes (row, col) and (row, col + 1), the second 16 bits up, for an even col; columns beyond the weight's are 0. */
static __device__ __forceinline__ uint32_t packed_pair(const void *codes, int code, int64_t k, int64_t row,
                                                       int64_t col) {
    const uint8_t *tile = packed_tile(codes, code, k, row, col);
    uint32_t r = (uint32_t)row, c = (uint32_t)col; /* only their last bits count */
    int lane = QL_PACKED_LANE(r, c);
    uint32_t low = ((const uint32_t *)(tile + 16 * lane))[QL_PACKED_WORD(code, c)] >> QL_PACKED_BIT(code, r, c);
    if (code == QL_CODE_TABLE4) return (low & 15u) | (low & 0xf0u) << 12;
    if (code != QL_CODE_INT3) return low & ((1u << QL_CODE_BITS(code)) - 1u) * 0x10001u;
    uint32_t high = ((const uint32_t *)(tile + 512 + 8 * lane))[QL_PACKED_HIGH_WORD(c)] >> QL_PACKED_HIGH_BIT(r, c);
    return (low & 0x30003u) | (high & 0x10001u) << 2;
}

static __device__ __forceinline__ uint32_t packed_code(const void *codes, int code, int64_t k, int64_t row,
                                                       int64_t col) {
    return packed_pair(codes, code, k, row, col & ~(int64_t)1) >> (col & 1) * 16 & 0xffffu;
}

/* Zero number `place`; 2^(bits - 1) where there are none. */
static __device__ __forceinline__ uint32_t packed_zero(const void *zeros, int code, int64_t place) {
    if (!zeros) return 1u << (QL_CODE_BITS(code) - 1);
    if (code == QL_CODE_INT8) return ((const uint8_t *)zeros)[place];
    return (uint32_t)((const uint8_t *)zeros)[place / 2] >> place % 2 * 4 & 15u;
}

/* The absmax of (row, group), whose place is `place`. */
static __device__ __forceinline__ float packed_absmax(const ql_linear_params *p, int64_t row, int64_t group,
                                                      int64_t place) {
    const float *absmax = (const float *)p->scales;
    if (!p->nested) return absmax[place];
    const int64_t block = divide(row * p->groups + group, p->nested_blocksize);
    return __fadd_rn(p->nested_table[p->nested[place]] * absmax[block], p->offset);
}

/* (q - z) * s, or table[q] * absmax. */
static __device__ __forceinline__ float packed_at(const ql_linear_params *p, int64_t row, int64_t col) {
    if (p->index) col = max((int64_t)0, min((int64_t)p->index[col], p->k - 1));
    int64_t group = divide(col, p->group_size), place = QL_GROUP_PLACE(row, group, p->groups);
    uint32_t code = packed_code(p->codes, p->code, p->k, row, col);
    if (p->code != QL_CODE_TABLE4)
        return ((float)code - (float)packed_zero(p->zeros, p->code, place)) *
               load_value(p->scales, p->scales_type, place);
    return p->table[code] * packed_absmax(p, row, group, place);
}

/* The format is the same for a whole launch, so the branch costs a base kernel little, and one kernel serves all. */
static __device__ __forceinline__ float weight_at(const ql_linear_params *p, int64_t row, int64_t col) {
    switch (p->format) {
    case QL_WEIGHT_GPTQ: return gptq_at(p, row, col);
    case QL_WEIGHT_AWQ: return awq_at(p, row, col);
    case QL_WEIGHT_EETQ: return eetq_at(p, row, col);
    case QL_WEIGHT_INT8: return int8_at(p, row, col);
    case QL_WEIGHT_FOURBIT: return fourbit_at(p, row, col);
    case QL_WEIGHT_PACKED: return packed_at(p, row, col);
    default: return fp8_at(p, row, col);
    }
}

/* Whether the checkpoint packs along N: neighbouring rows of W are close in memory. */
static __device__ __forceinline__ bool packs_along_n(const ql_linear_params *p) {
    return p->format == QL_WEIGHT_GPTQ || p->format == QL_WEIGHT_AWQ;
}

#endif

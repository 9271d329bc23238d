/* Fragments of a packed weight in 16 bit, for the kernels that scale before they multiply: W = (q - zero) * scale, rounded
 * once. q - zero is exact in 16 bit. Where the scale fits x's type the product is one rounding; where it does not, the
 * scale is the sum of two 16-bit parts and a fused multiply-add rounds once. A code that has no cheap form is computed in
 * fp32 and rounded at the end. */
#ifndef QL_KERNELS_WEIGHT16_CUH
#define QL_KERNELS_WEIGHT16_CUH

#include "code_bits.cuh"
#include "value.cuh"

/* A lane's codes of one tile. */
typedef struct ql_lane_codes {
    uint4 low;
    uint2 high; /* 3 bit */
} ql_lane_codes;

/* What a lane's two rows (g and g + 8) have in a group. */
typedef struct ql_group16 {
    uint32_t minus[2];          /* pairs, subtracted from the raw code */
    uint32_t scale[2], rest[2]; /* rest: of bf16 */
    float zero[2], scale32[2];
} ql_group16;

static __device__ __forceinline__ uint32_t half_pair(float value) {
    uint32_t bits = __half_as_ushort(__float2half_rn(value));
    return bits | bits << 16;
}

static __device__ __forceinline__ uint32_t bf16_pair(float value) {
    uint32_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    return bits | bits << 16;
}

static __device__ __forceinline__ float value_of_bf16(uint32_t pair) {
    return __bfloat162float(__ushort_as_bfloat16((uint16_t)pair));
}

/* Codes that go through fp32: 8 bits do not fit bf16's mantissa beside the offset, a table's values are no integers. */
static __device__ __forceinline__ bool through_fp32(int code, int type) {
    return code == QL_CODE_TABLE4 || code == QL_CODE_E4M3 || (code == QL_CODE_INT8 && type == QL_VALUE_BF16);
}

/* What load_group leaves in registers until it has arrived: bits of scales and zeros, second-level absmax. */
typedef struct ql_group_bits {
    uint32_t scale[2], zero[2];
    float absmax[2];
} ql_group_bits;

/* Of a lane in a strip: its first row, and the place of that row's first group. */
typedef struct ql_lane_rows {
    int64_t row, place;
} ql_lane_rows;

static __device__ __forceinline__ bool has_zeros(const ql_packed_params *p, int code) {
    return code != QL_CODE_TABLE4 && code != QL_CODE_E4M3 && p->zeros;
}

/* Asks for a group's values, of the lane's row and the row 8 below it, and waits for none of them. */
static __device__ __forceinline__ void load_group(ql_group_bits *to, const ql_packed_params *p, int code,
                                                  ql_lane_rows at, int group) {
    const bool one = p->groups == 1;
    const int64_t place = at.place + (one ? 0 : group / 2 * 32 + group % 2 * 2);
    const int next = one ? 8 : 1;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int64_t here = place + h * next;
        if (code == QL_CODE_TABLE4 && p->nested_table) {
            const int64_t row = at.row + h * 8;
            to->scale[h] = ((const uint8_t *)p->scales)[here];
            /* Rows beyond n have no absmax of the second level. */
            to->absmax[h] = row < p->n ? p->nested_absmax[(row * p->groups + group) / p->nested_blocksize] : 0.0f;
        } else if (code == QL_CODE_TABLE4 || p->scales_type == QL_VALUE_F32) {
            to->scale[h] = ((const uint32_t *)p->scales)[here];
        } else {
            to->scale[h] = ((const uint16_t *)p->scales)[here];
        }
        if (has_zeros(p, code)) to->zero[h] = code == QL_CODE_INT8 ? p->zeros[here] : p->zeros[here / 2];
    }
}

static __device__ __forceinline__ void use_group(ql_group16 *to, const ql_group_bits *bits, const ql_packed_params *p,
                                                 int code, int type) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float scale;
        if (code == QL_CODE_TABLE4 && p->nested_table)
            scale = __fadd_rn(__fmul_rn(p->nested_table[bits->scale[h]], bits->absmax[h]), p->nested_offset);
        else if (code == QL_CODE_TABLE4 || p->scales_type == QL_VALUE_F32)
            scale = __uint_as_float(bits->scale[h]);
        else if (p->scales_type == QL_VALUE_F16)
            scale = __half2float(__ushort_as_half((uint16_t)bits->scale[h]));
        else
            scale = __uint_as_float(bits->scale[h] << 16);
        float zero = (float)(1u << (QL_CODE_BITS(code) - 1));
        /* A nibble's place is even in the lane's first row and odd in the second; of one group for all, that of its row. */
        if (has_zeros(p, code)) {
            const int odd = p->groups == 1 ? (int)(threadIdx.x / 4 % 2) : h;
            zero = (float)(code == QL_CODE_INT8 ? bits->zero[h] : bits->zero[h] >> (odd * 4) & 15u);
        }
        to->scale32[h] = scale;
        to->zero[h] = zero;
        if (type == QL_VALUE_F16) {
            /* The second row's codes stand higher in their 16 bits: 1024 is less once that shift is divided out. */
            const int shift = code == QL_CODE_INT8 ? 0 : code == QL_CODE_INT4 ? 4 : 2;
            to->minus[h] = half_pair(-(h ? 1024.0f / (float)(1 << shift) : 1024.0f) - zero);
            to->scale[h] = half_pair(scale);
        } else {
            to->minus[h] = bf16_pair(-128.0f - zero);
            to->scale[h] = bf16_pair(scale);
            to->rest[h] = bf16_pair(scale - value_of_bf16(to->scale[h]));
        }
    }
}

/* Codes of 2, 3 or 4 bits of a step of a tile; at: where their lowest bits are to stand in `rest`. */
static __device__ __forceinline__ uint32_t small_codes(const ql_lane_codes *c, int code, int step, int h, int p, int at,
                                                       uint32_t rest) {
    const uint32_t word = word_of(c->low, code == QL_CODE_INT4 ? step : step / 2);
    return codes_at(word, step / 4 ? c->high.y : c->high.x, code, step, p, h, at, rest);
}

/* Codes as fp16 1024 + q, or for row g + 8 as 1024 + q * 2^bits: what the mask leaves in place. */
static __device__ __forceinline__ uint32_t raw_half(const ql_lane_codes *c, int code, int step, int h, int p) {
    if (code == QL_CODE_INT8) return half_bytes(word_of(c->low, step * 2 + p), h);
    return small_codes(c, code, step, h, p, (code == QL_CODE_INT4 ? 4 : 2) * h, 0x64006400u);
}

/* Codes of up to 4 bits as bf16 128 + q. */
static __device__ __forceinline__ uint32_t raw_bf16(const ql_lane_codes *c, int code, int step, int h, int p) {
    return small_codes(c, code, step, h, p, 0, 0x43004300u);
}

/* Two neighbouring weights in fp32, before they are scaled. */
static __device__ __forceinline__ float2 plain_pair(const ql_lane_codes *c, int code, int step, int h, int p,
                                                    const uint8_t *table, float zero) {
    if (code == QL_CODE_TABLE4) {
        uint32_t byte = word_of(c->low, step) >> (16 * p + 8 * h) & 0xffu;
        const float *values = (const float *)table;
        return make_float2(values[byte & 15u], values[byte >> 4]);
    }
    uint32_t word = word_of(c->low, step * 2 + p);
    uint32_t first = word >> (8 * h) & 0xffu, second = word >> (16 + 8 * h) & 0xffu;
    if (code == QL_CODE_E4M3) return make_float2(value_from_e4m3((uint8_t)first), value_from_e4m3((uint8_t)second));
    return make_float2((float)first - zero, (float)second - zero);
}

/* The code's 16 values in shared memory, each in its bank. */
static __device__ __forceinline__ void fill_table(uint8_t *table, const ql_packed_params *p, int code) {
    if (code == QL_CODE_TABLE4 && threadIdx.x < 16) ((float *)table)[threadIdx.x] = p->table[threadIdx.x];
}

/* A[4] of mma.m16n8k16 for one step of a tile: rows g and g + 8, columns 2t.. and 2t + 8... wide: scales are not fp16;
 * beside fp16 x they go through fp32, as fp16's small range would lose bits of them. */
static __device__ __forceinline__ void weights16(uint32_t a[4], const ql_lane_codes *c, int step,
                                                 const ql_group16 *group, const uint8_t *table, int code, int type,
                                                 bool wide) {
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t *to = &a[p * 2 + h];
            if (through_fp32(code, type)) {
                float2 pair = plain_pair(c, code, step, h, p, table, group->zero[h]);
                *to = round16_pair(__fmul_rn(pair.x, group->scale32[h]), __fmul_rn(pair.y, group->scale32[h]), type);
            } else if (type == QL_VALUE_F16) {
                uint32_t raw = raw_half(c, code, step, h, p), divide = 0x3c003c00u;
                if (h && code == QL_CODE_INT4) divide = 0x2c002c00u;                           /* 1 / 16 */
                if (h && (code == QL_CODE_INT2 || code == QL_CODE_INT3)) divide = 0x34003400u; /* 1 / 4 */
                uint32_t exact = fma_half2(raw, divide, group->minus[h]);
                if (wide) {
                    float2 pair = half2_values(exact);
                    *to = round16_pair(pair.x * group->scale32[h], pair.y * group->scale32[h], type);
                } else {
                    *to = mul_half2(exact, group->scale[h]);
                }
            } else {
                uint32_t exact = add_bf162(raw_bf16(c, code, step, h, p), group->minus[h]);
                *to = fma_bf162(exact, group->scale[h], mul_bf162(exact, group->rest[h]));
            }
        }
}

#endif

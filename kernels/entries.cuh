/* Scales and zeros for the decode kernels, as a lane of an mma fragment needs them: of rows g and g + 8 (packed.h). They are
 * loaded a batch ahead, a load for each pair of groups, and become fp32 where a group's sums are made up:
 * W x = scale * (sum raw x - zero * sum x), in the units of code_raw.cuh. */
#ifndef QL_KERNELS_ENTRIES_CUH
#define QL_KERNELS_ENTRIES_CUH

#include "code_raw.cuh"

/* The most pairs of groups of which a lane holds entries. */
enum { QL_MOST_HELD = 4 };

/* What a lane holds of a batch: entries of rows g and g + 8 of one group of each pair or, `both`, of both groups. nested:
 * absmax of the second level of rows g and g + 8, of the batch's first groups, `before` of them, and of the rest: blocks of the
 * second level go on from row to row. */
typedef struct ql_raw_entries {
    uint32_t scale[QL_MOST_HELD][4], zero[QL_MOST_HELD], nested[2][2];
    int before[2];
} ql_raw_entries;

typedef struct ql_entry {
    float scale[2], zero[2]; /* rows g and g + 8 */
} ql_entry;

/* What a table's absmax are: fp32, quantized, quantized in such a way that no batch has groups of two blocks of the second level, or
 * either, which is then found at each use. Known when this is compiled, as branches in the loop end what the compiler can overlap;
 * 16 tokens have no registers for that. */
enum { QL_ABSMAX_PLAIN, QL_ABSMAX_NESTED, QL_ABSMAX_UNDIVIDED, QL_ABSMAX_EITHER };

static __device__ __forceinline__ bool is_nested(const ql_decode_params *p, int absmax) {
    return absmax == QL_ABSMAX_EITHER ? p->scale_size == 1 : absmax != QL_ABSMAX_PLAIN;
}

static __device__ __forceinline__ bool is_plain(const ql_decode_params *p, int absmax) {
    return absmax == QL_ABSMAX_EITHER ? p->scale_size == 4 : absmax == QL_ABSMAX_PLAIN;
}

/* The place of the lane's entry where a group has whole batches: of rows g and g + 8, in the group of a batch. */
static __device__ __forceinline__ int group_entry(const ql_decode_params *p, int strip, int batch, int g) {
    return (strip * p->pairs + (batch >> p->group_shift >> 1)) * 32 + g * 4 + (batch >> p->group_shift & 1) * 2;
}

/* From an entry of a band's first strip to that of its second. */
static __device__ __forceinline__ int entry_beside(const ql_decode_params *p, int band) {
    return band == p->lone ? 0 : p->pairs * 32;
}

/* What a pair of no groups has: x is 0 there, so what counts is that no entry is infinite. */
static __device__ __forceinline__ void clear_scales(ql_raw_entries *raw, int pair) {
#pragma unroll
    for (int i = 0; i < 4; i++) raw->scale[pair][i] = 0;
}

static __device__ __forceinline__ void clear_pair(ql_raw_entries *raw, const ql_decode_params *p, int pair) {
    raw->zero[pair] = (uint32_t)p->bare_zero * 0x01010101u;
    clear_scales(raw, pair);
}

/* The pair whose entries for this lane start at place `at`. Scales have two bytes; a table's four, or one where nested. */
static __device__ __forceinline__ void load_pair(const ql_decode_params *p, int code, int absmax, bool both,
                                                 ql_raw_entries *raw, int pair, int at) {
    const uint8_t *scales = (const uint8_t *)p->scales;
    uint32_t *scale = raw->scale[pair];
    if (code == QL_CODE_TABLE4) {
        if (is_nested(p, absmax)) {
            scale[0] = both ? __ldg((const uint32_t *)(scales + at)) : __ldg((const uint16_t *)(scales + at));
        } else if (both) {
            uint4 v = __ldg((const uint4 *)(scales + (int64_t)at * 4));
            scale[0] = v.x, scale[1] = v.y, scale[2] = v.z, scale[3] = v.w;
        } else {
            uint2 v = __ldg((const uint2 *)(scales + (int64_t)at * 4));
            scale[0] = v.x, scale[1] = v.y;
        }
        return;
    }
    if (both) {
        uint2 v = __ldg((const uint2 *)(scales + (int64_t)at * 2));
        scale[0] = v.x, scale[1] = v.y;
    } else {
        scale[0] = __ldg((const uint32_t *)(scales + (int64_t)at * 2));
    }
    if (p->bare_zero >= 0) return;
    if (code == QL_CODE_INT8)
        raw->zero[pair] = both ? __ldg((const uint32_t *)(p->zeros + at)) : __ldg((const uint16_t *)(p->zeros + at));
    else
        raw->zero[pair] = both ? __ldg((const uint16_t *)(p->zeros + (at >> 1))) : __ldg(p->zeros + (at >> 1));
}

/* Absmax of the second level of a batch of `count` groups that begins with `group`, for rows `row` and row + 8. `before` is
 * counted from the lane's own first group, `own`. */
static __device__ __forceinline__ void load_nested(const ql_decode_params *p, ql_raw_entries *raw, int row, int group,
                                                   int count, int own) {
    const int n = (int)p->product.n, groups = (int)p->product.groups;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int first = min(row + 8 * h, n - 1) * groups + group, block = first >> p->nested_shift;
        raw->nested[h][0] = __float_as_uint(__ldg(p->product.nested_absmax + block));
        if (count == 1) continue;
        const int last = min(first + count, n * groups) - 1 >> p->nested_shift;
        raw->nested[h][1] = __float_as_uint(__ldg(p->product.nested_absmax + last));
        raw->before[h] = (block + 1 << p->nested_shift) - first - own;
    }
}

static __device__ __forceinline__ float half_value(uint32_t bits) {
    return __half2float(__ushort_as_half((uint16_t)bits));
}

/* A zero, given as a byte, in the unit of row g. */
static __device__ __forceinline__ float zero_of_byte(uint32_t byte, int code, int type, bool parted) {
    return type == QL_VALUE_F16 ? half_value(byte)
                                : __uint_as_float(byte | 0x4b000000u) - (0x1p23f - QL_RAW_OFFSET(code, type, parted));
}

/* The entry of the nested table for a byte of `word`. */
static __device__ __forceinline__ float nested_entry(const uint8_t *pairs, uint32_t word, int byte, uint32_t low) {
    return __uint_as_float(table_pair(pairs + 128, word, byte, low));
}

/* Absmax of all of a lane's groups of a batch, undivided; of them `loads`. pairs, low: as of raw_fragment. */
static __device__ __forceinline__ void make_sets(float absmax[QL_MOST_HELD][2], const ql_raw_entries *raw,
                                                 const ql_decode_params *p, int kind, int loads, const uint8_t *pairs,
                                                 uint32_t low) {
#pragma unroll
    for (int i = 0; i < loads; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            absmax[i][h] = kind == QL_ABSMAX_PLAIN ? __uint_as_float(raw->scale[i][h])
                                                   : __fadd_rn(__fmul_rn(nested_entry(pairs, raw->scale[i][0], h, low),
                                                                         __uint_as_float(raw->nested[h][0])),
                                                               p->product.nested_offset);
}

/* What the next batch's are made of. at: the place of the lane's entry of the first load; left: pairs from there on, of the
 * strip; spread: pairs a load; row, group: the lane's first row, the batch's first group. */
static __device__ __forceinline__ void load_sets(ql_raw_entries *raw, const ql_decode_params *p, int kind, int loads,
                                                 int spread, int at, int left, int row, int group) {
    const int size = kind == QL_ABSMAX_PLAIN ? 4 : 1;
    const uint8_t *from = (const uint8_t *)p->scales + (int64_t)at * size;
    const int n = (int)p->product.n, groups = (int)p->product.groups;
#pragma unroll
    for (int i = 0; i < loads; i++) {
        uint2 v = make_uint2(0, 0);
        if (i * spread < left) {
            if (kind == QL_ABSMAX_PLAIN)
                v = load_in_turn_8(from + i * spread * 128);
            else
                v.x = load_in_turn_2(from + i * spread * 32);
        }
        raw->scale[i][0] = v.x, raw->scale[i][1] = v.y;
    }
    if (kind == QL_ABSMAX_PLAIN) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int entry = min(row + 8 * h, n - 1) * groups + group;
        raw->nested[h][0] = load_in_turn_4(p->product.nested_absmax + (entry >> p->nested_shift));
    }
}

/* Entries of the `index`-th group of those that the lane has (of `both`, two a pair). group: in the batch, from the lane's own
 * first on; divided: the batch's groups that may be in two blocks of the second level. pairs, low: as of raw_fragment. */
static __device__ __forceinline__ ql_entry entry_of(const ql_decode_params *p, int code, int type, bool parted,
                                                    int absmax, bool both, const ql_raw_entries *raw, int index,
                                                    int group, int divided, const uint8_t *pairs, uint32_t low) {
    const int pair = both ? index / 2 : index, which = both ? index % 2 : 0;
    const uint32_t *scale = raw->scale[pair];
    ql_entry e = {{0}, {0}};
    if (code == QL_CODE_TABLE4) {
#pragma unroll
        for (int h = 0; h < 2; h++)
            e.scale[h] =
                is_plain(p, absmax)
                    ? __uint_as_float(scale[which * 2 + h])
                    : __fadd_rn(__fmul_rn(nested_entry(pairs, scale[0], which * 2 + h, low),
                                          __uint_as_float(divided == 1 || group < raw->before[h] ? raw->nested[h][0]
                                                                                                 : raw->nested[h][1])),
                                p->product.nested_offset);
        return e;
    }
    const bool half = p->product.scales_type == QL_VALUE_F16;
    e.scale[0] = half ? half_value(scale[which]) : __uint_as_float(scale[which] << 16);
    e.scale[1] = half ? half_value(scale[which] >> 16) : __uint_as_float(scale[which] & 0xffff0000u);
    uint32_t zero = raw->zero[pair];
    if (code == QL_CODE_INT8) {
        e.zero[0] = zero_of_byte(zero >> (16 * which) & 255, code, type, parted);
        e.zero[1] = zero_of_byte(zero >> (16 * which + 8) & 255, code, type, parted);
    } else if (type == QL_VALUE_F16) {
        /* As denormals they have the units of the codes. */
        zero >>= 8 * which;
        e.zero[0] = half_value(zero & 15);
        e.zero[1] = half_value(code == QL_CODE_INT4   ? zero & 0xf0
                               : code == QL_CODE_INT2 ? zero >> 2 & 0x3c
                                                      : zero >> 4 & 15);
    } else {
        zero >>= 8 * which;
        e.zero[0] = __uint_as_float((zero & 15) << 16 | 0x43000000u);
        e.zero[1] = __uint_as_float((zero & 0xf0) << 12 | 0x43000000u);
    }
    return e;
}

#endif

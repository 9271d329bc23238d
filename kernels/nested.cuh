/* Absmax of double quantization for warps that take two strips side by side (decode.h): of the four lanes that have the same rows
 * each makes what a quarter of a batch's groups needs and gives it to the others, as a look-up of its own for every row and group
 * would take a sixth of a batch's instructions. They are loaded a batch ahead. */
#ifndef QL_KERNELS_NESTED_CUH
#define QL_KERNELS_NESTED_CUH

#include "code_raw.cuh"

/* Rounds in which four lanes take the groups of a batch, and the lanes that take part. */
#define QL_NESTED_TURNS(groups) ((groups) > 4 ? (groups) / 4 : 1)
#define QL_NESTED_LANES(groups) ((groups) > 4 ? 4 : (groups))

/* Of one strip: the codes of absmax of rows g and g + 8 of the lane's groups, and what they are multiplied by. */
typedef struct ql_nested_entries {
    uint32_t codes[2];
    float by[2][2];
} ql_nested_entries;

/* A strip of a band of two. */
static __device__ __forceinline__ int strip_of(const ql_decode_params *p, int band, int second) {
    return band * 2 + (band == p->lone ? 0 : second);
}

/* Of a batch whose first group is `group`. */
static __device__ __forceinline__ void load_nested_entries(ql_nested_entries *to, const ql_decode_params *p, int groups,
                                                           int strip, int group, int lane) {
    const int n = (int)p->product.n, all = (int)p->product.groups, row = strip * 16 + lane / 4;
    group += lane % QL_NESTED_LANES(groups);
#pragma unroll
    for (int i = 0; i < QL_NESTED_TURNS(groups); i++, group += 4) {
        const int at = (strip * p->pairs + group / 2) * 32 + lane / 4 * 4 + group % 2 * 2;
        to->codes[i] = 0;
        if (group < all) to->codes[i] = __ldg((const uint16_t *)((const uint8_t *)p->scales + at));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int entry = min(row + 8 * h, n - 1) * all + min(group, all - 1);
            to->by[i][h] = __ldg(p->product.nested_absmax + (entry >> p->nested_shift));
        }
    }
}

/* absmax[turn][h] of the lane's own groups. pairs, low: as of table_pair. */
static __device__ __forceinline__ void make_absmax(float absmax[2][2], const ql_nested_entries *from,
                                                   const ql_decode_params *p, int groups, const uint8_t *pairs,
                                                   uint32_t low) {
#pragma unroll
    for (int i = 0; i < QL_NESTED_TURNS(groups); i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            absmax[i][h] =
                __fadd_rn(__fmul_rn(__uint_as_float(table_pair(pairs + 128, from->codes[i], h, low)), from->by[i][h]),
                          p->product.nested_offset);
}

/* That of group `set` of the batch, from the lane that made it. */
static __device__ __forceinline__ float absmax_of_set(const float absmax[2][2], int set, int h, int groups) {
    return groups == 1 ? absmax[0][h] : __shfl_sync(ALL_LANES, absmax[set / 4][h], set % 4, QL_NESTED_LANES(groups));
}

#endif
